"""Loss of a model on documents, and by position of a trained run: ``python -m nl_models.position``."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import nl_models
from nl_kernels.checks import check_positive_int
from nl_models.console import OtherModel, explained_errors, token_count, without_progress_bars
from nl_models.conversation import Conversation, begin_conversation
from nl_models.data.corpus import read_documents, read_folder
from nl_models.data.prepare import data_folder, pack, prepare_data
from nl_models.data.tokenizer import Tokenizer, open_tokenizer
from nl_models.evaluation.documents import document_losses, documents_table
from nl_models.evaluation.generation import check_sampling, conversation_by_turn, generation_by_position
from nl_models.evaluation.harness import run_tasks, tasks_table
from nl_models.evaluation.position import loss_by_position
from nl_models.evaluation.report import (
    conversation_table,
    generation_table,
    plot_generation,
    plot_position,
    position_table,
    save_position,
)
from nl_models.files import make_folder
from nl_models.hope import HopeForCausalLM
from nl_models.open_model import open_model
from nl_models.profiling.report import describe_machine
from nl_models.training.config import TrainConfig, load_config
from nl_models.training.distributed import choose_device
from nl_models.training.loop import autocast

_WINDOWS = 64  # of the text, unless told otherwise
_TURN_TOKENS = 32
_REPLY_TOKENS = 64
_STUDIES = {"rich_help_panel": "A study of small models trained anew instead, in a checkout"}
_CHECKOUT = Path(nl_models.__file__).parents[2]
_TASKS = {"rich_help_panel": "Tasks of lm-eval instead"}


@dataclasses.dataclass(frozen=True)
class _Run:
    """A finished training run."""

    folder: Path
    config: TrainConfig
    model: HopeForCausalLM
    tokenizer: Tokenizer


def main(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Folder of a finished training run; with documents also a checkpoint, or a saved or "
            "converted model.",
        ),
    ] = None,
    documents: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files or folders: the loss of each, instead of the loss by position."),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(help="File of what the model remembers: the documents with it and without.")
    ] = None,
    allow_other_model: OtherModel = False,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task, group or tag of lm-eval, which is to be installed; repeatable.", **_TASKS),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of YAML files with tasks of one's own.", **_TASKS)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests of each task.", **_TASKS)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.", **_TASKS)] = 8,
    study: Annotated[str | None, typer.Option(help="Its name, 'all', or 'report'.", **_STUDIES)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: minutes, and less is true.", **_STUDIES)
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Folder of UTF-8 text files that the model was not trained on. Without it: the run's own "
            "held-out files."
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Tokens to read; K and M are 1024 and 1024². Without it: 64 windows, or what the text has."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens between fresh states. Without it: the run's sequence length.")
    ] = None,
    streams: Annotated[int, typer.Option(help="Rotations of the text.")] = 8,
    generate: Annotated[
        int, typer.Option(help="Also let it write this many tokens, judged by itself with a fresh state.")
    ] = 0,
    turns: Annotated[
        int, typer.Option(help="Also hold a conversation of this many turns, pieces of the text.")
    ] = 0,
    samples: Annotated[int, typer.Option(help="Texts and conversations, side by side.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of what it writes.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what it writes.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Without it: 'position' in the run's folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier results there.")] = False,
    device: Annotated[
        str, typer.Option(help="'auto' (CUDA when there), 'cpu', 'cuda' or 'cuda:N'.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")
    ] = None,
) -> None:
    """Measure a model's loss on documents, or by the distance from the start of a text.

    With documents: nats per token, bits per byte and perplexity of each, or
    the loss with --memory and without; nothing is learned from them. With
    --task: scores of tasks of lm-eval, with --memory and without. With
    --study: python -m evaluations, of which docs/evidence.md tells.

    Without: three losses, by position: one state carried from the first
    token on; a fresh state every window; the same without writes. Reading on
    should not make the first worse than the second. Writes position.json and
    plots.
    """
    console = Console()
    if study is not None:
        with explained_errors():
            raise typer.Exit(_study(study, quick, given=run is not None))
    if run is None:
        raise typer.BadParameter("give a model, or a --study", param_hint="MODEL")
    if documents or memory is not None or task:
        with explained_errors(NotImplementedError):
            if not documents and not task:
                raise ValueError("documents: give some, or a --task, to measure the memory with")
            if documents and task:
                raise ValueError("task: give documents or tasks, not both")
            torch.set_num_threads(1 if threads is None else threads)
            opened = _opened(run, memory, device, allow_other_model)
            if task:
                about = {"folder": task_folder, "limit": limit, "batch_size": batch}
                console.print(tasks_table(*(run_tasks(each, task, **about) for each in opened)))
            else:
                console.print(_of_documents(documents, *opened))
        return
    output = run / "position" if output is None else output
    target = output / "position.json"
    with explained_errors():
        if threads is not None:
            torch.set_num_threads(threads)
        for name, value in (("generate", generate), ("turns", turns)):
            if value < 0:
                raise ValueError(f"{name}: expected at least 0 (none), got {value}")
        check_sampling(samples, temperature)
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; choose another --output or add --overwrite")
        chosen = choose_device(device)
        opened = _open_run(run, chosen)
        trained = opened.config.sequence_length
        window = trained if window is None else window
        check_positive_int("window", window)
        tokens, source = _read_text(
            opened, text, window, None if length is None else token_count("length", length)
        )
        spoken = _turns(tokens, turns, window)
        make_folder(output)
        console.print(
            f"{opened.config.model} of {run}, trained on windows of {trained:,}; {len(tokens):,} tokens of "
            f"{source}",
            highlight=False,
            soft_wrap=True,
        )
        reading = {"window": window, "console": console}
        writing = {**reading, "samples": samples, "temperature": temperature, "seed": seed}
        files = [target]
        measured = {}
        name = opened.config.model
        with autocast(opened.config.precision, chosen):
            position = loss_by_position(opened.model, tokens, streams=streams, **reading)
            measured["position"] = position
            console.print(position_table(position))
            files.append(
                plot_position(position, output / "position.png", title=f"{name}, by position in {source}")
            )
            if generate:
                generation = generation_by_position(opened.model, tokens[:_TURN_TOKENS], generate, **writing)
                measured["generation"] = generation
                console.print(generation_table(generation))
                title = f"What {name} writes, judged by itself with a fresh state"
                files.append(plot_generation(generation, output / "generation.png", title=title))
            if turns:
                measured["conversation"] = conversation_by_turn(
                    opened.model, spoken, reply_tokens=min(_REPLY_TOKENS, window), **writing
                )
                console.print(conversation_table(measured["conversation"]))
        about = {"run": str(run), "text": source, "machine": describe_machine(str(chosen))}
        if generate or turns:
            about |= {"temperature": temperature, "seed": seed}
        save_position(target, about=about, **measured)
    console.print("\n".join(map(str, files)), highlight=False, soft_wrap=True)


def _study(name: str, quick: bool, *, given: bool) -> int:
    """Hand over to the studies of a checkout; returns their exit status."""
    if given:
        raise ValueError("study: trains small models of its own; leave MODEL out, or --study")
    if not (_CHECKOUT / "evaluations" / "__main__.py").is_file():
        raise ValueError(
            "study: the studies are in a checkout of the project, not in its wheel; clone it, install it "
            "with pip install -e, and run this again"
        )
    command = [sys.executable, "-m", "evaluations", name, *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=_CHECKOUT).returncode


def _opened(model: Path, memory: Path | None, device: str, allow_other_model: bool) -> list[Conversation]:
    """The model, and with a memory the same once more with it."""
    if memory is not None and not memory.exists():
        raise ValueError(f"memory: no such file: {memory}")
    opened = open_model(model, choose_device(device))
    conversations = [begin_conversation(opened, None)]
    if memory is not None:
        conversations += [begin_conversation(opened, memory, allow_other_model=allow_other_model)]
    return conversations


def _of_documents(paths: list[Path], plain: Conversation, remembering: Conversation | None = None) -> Table:
    """The table of their losses."""
    documents = {document.name: document.text for path in paths for document in read_documents(path)}
    return documents_table(document_losses(documents, plain, remembering))


def _open_run(folder: Path, device: torch.device) -> _Run:
    if not (folder / "config.json").is_file():
        raise ValueError(f"run: {folder} is not a training run (it has no config.json)")
    if "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8")):  # transformers'
        raise ValueError(f"run: {folder} is a model and no training run; give documents to measure it with")
    config = load_config(folder / "config.json")
    if not (folder / "model").is_dir():
        raise ValueError(
            f"run: {folder} has no model yet; finish it with "
            f"python -m nl_models.train --output {folder} --resume"
        )
    with without_progress_bars():
        model = HopeForCausalLM.from_pretrained(folder / "model").to(device)
    return _Run(folder, config, model, open_tokenizer(folder / "model"))


def _read_text(run: _Run, folder: Path | None, window: int, length: int | None) -> tuple[np.ndarray, str]:
    """The tokens to read, and what they are."""
    wanted = _WINDOWS * window if length is None else length
    if folder is None:
        tokens, source = _held_out(run), "held-out text"
    else:
        tokens, source = pack(read_folder(folder), run.tokenizer, enough=wanted), str(folder)
    if length is not None and len(tokens) < length:
        raise ValueError(
            f"length: {source} has {len(tokens):,} tokens, {length:,} are asked for; choose a smaller "
            "--length or a folder with more --text"
        )
    return tokens[:wanted], source


def _held_out(run: _Run) -> np.ndarray:
    folder = data_folder(run.folder)
    if folder is None:
        raise ValueError(f"text: {run.folder} has no data folder; give a folder of text files with --text")
    return prepare_data(run.config, folder).validation


def _turns(tokens: np.ndarray, turns: int, window: int) -> list[np.ndarray]:
    size = min(_TURN_TOKENS, window)
    if turns * size > len(tokens):
        raise ValueError(f"turns: the text has {len(tokens) // size:,} turns of {size} tokens, not {turns:,}")
    return [tokens[i * size : (i + 1) * size] for i in range(turns)]


if __name__ == "__main__":
    typer.run(main)
