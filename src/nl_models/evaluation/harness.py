"""Tasks of lm-eval, where it is installed, for a model with what it remembers and without."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from nl_models.conversation import Conversation
from nl_models.data.tokenizer import for_transformers

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval says of one metric of a task; ``error`` is its standard error, where it gives one."""

    task: str
    metric: str
    value: float
    error: float | None


def run_tasks(
    conversation: Conversation,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[TaskScore]:
    """Put a model to tasks of lm-eval. Every request begins with the memory as it is, and leaves it so.

    Args:
        conversation: the model, and what it remembers. It is at its end then: what was learned lies in the
            model's weights.
        tasks: names of tasks, groups or tags.
        folder: of tasks of one's own, YAML files.
        limit: of requests of each task; ``None``: all.

    Raises:
        ValueError: lm-eval is not installed, or has no such task.
        OSError: the data of a task is not there.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"task: needs lm-eval ({error}); install it with: pip install 'nl-kernels[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"task_folder: no folder {folder}")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"task: lm-eval knows no {', '.join(unknown)}; 'lm_eval ls tasks' lists what it knows, and "
            "--task-folder takes the YAML files of others"
        )
    model = _language_model(conversation, batch_size)
    found = lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit)
    return [score for name, values in found["results"].items() for score in _scores(name, values)]


def _language_model(conversation: Conversation, batch_size: int) -> LM:
    """As lm-eval wants it: one of transformers that begins every request with a state."""
    from lm_eval.models.huggingface import HFLM

    model, start = conversation.end()
    tokenizer = for_transformers(conversation.tokenizer)

    class Remembering(HFLM):
        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            with torch.no_grad():
                return self.model(inps, cache=start.select([0] * len(inps))).logits

        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
        ) -> torch.Tensor:
            options |= {"cache": start.select([0] * len(context)), "new_tokens_only": True}
            return super()._model_generate(context, max_length, stop, **options)

    kind = HFLM if start is None else Remembering
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _scores(task: str, values: dict[str, Any]) -> list[TaskScore]:
    """The numbers among what lm-eval says of a task: ``"acc,none"`` and ``"acc_stderr,none"``."""
    found = []
    for key, value in values.items():
        metric, comma, variant = key.partition(",")
        if comma and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric} ({variant})"
            found.append(TaskScore(task, name, float(value), error if isinstance(error, float) else None))
    return found


def tasks_table(plain: list[TaskScore], remembering: list[TaskScore] | None = None) -> Table:
    """A row for each metric of each task."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    headings = ("score", "with memory", "difference") if remembering is not None else ("score",)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, score in enumerate(plain):
        figures = [_shown(score)]
        if remembering is not None:
            other = remembering[index]
            figures += [_shown(other), f"{other.value - score.value:+.3f}"]
        table.add_row(score.task, score.metric, *figures)
    return table


def _shown(score: TaskScore) -> str:
    return f"{score.value:.3f}" + ("" if score.error is None else f" ± {score.error:.3f}")
