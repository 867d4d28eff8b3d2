"""A study: which models learn which tasks, with which settings and seeds; its rows, one a run.

Every model is searched with as many settings on the first seed; the best of them for a task, by validation,
is repeated with the other seeds. Runs whose rows exist are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar

import torch

from evaluations.models import MODELS, at_equal_parameters, parameters
from evaluations.task import Task
from evaluations.training import train

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


class DataNotInstalledError(RuntimeError):
    """A package that has a task's data is not installed."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        name: of its file of rows.
        tasks: how each task is made, by its name.
        shape: of the models: ``width``, ``layers``, ``heads``, and ``widening`` of MLPs if it is not 2.
        training: arguments of :func:`~evaluations.training.train` that are the same for all.
        settings: by model the settings it is searched with, each with a ``learning_rate`` and, if any,
            ``options`` of HopeConfig; as many for each.
        seeds: the first is that of the search.
        unit: of scores: "%" of what is right, or "nats", of which fewer are better.
        steps: of a task for which they are not those of ``training``.
    """

    known: ClassVar[Mapping[str, object]] = MODELS  # what may be compared

    name: str
    tasks: dict[str, Callable[[str], Task]]
    shape: dict[str, int]
    training: dict[str, object]
    settings: dict[str, list[dict[str, object]]]
    seeds: tuple[int, ...] = (0, 1, 2)
    unit: str = "%"
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def training_of(self, task: str) -> dict[str, object]:
        """``training``, with a task's own steps."""
        return {**self.training, "steps": self.steps.get(task, self.training["steps"])}

    def goodness(self, scores: Iterable[float]) -> float:
        """Higher is better."""
        return sum(scores) if self.unit == "%" else -sum(scores)

    def __post_init__(self) -> None:
        unknown = self.settings.keys() - self.known.keys()
        if unknown:
            raise ValueError(f"settings: expected models of {', '.join(self.known)}, got {sorted(unknown)}")
        if unknown := self.steps.keys() - self.tasks.keys():
            raise ValueError(f"steps: expected tasks of {', '.join(self.tasks)}, got {sorted(unknown)}")
        counts = {model: len(self.settings[model]) for model in self.searched}
        if len(set(counts.values())) > 1:
            raise ValueError(f"settings: every model is searched with as many, got {counts}")

    @property
    def searched(self) -> list[str]:
        """The models with a rate: what has none, as it learns nothing by steps, has nothing to search."""
        rates = {"learning_rate", "rate", "rates"}
        return [model for model, settings in self.settings.items() if any(map(rates.intersection, settings))]

    def require(self, task: str) -> None:
        """Raise ``DataNotInstalledError`` where a task's data are not there."""

    def perform(self, run: Run, progress: Callable[..., None]) -> dict[str, object]:
        """Train and score: ``parameters``, and what :func:`evaluations.training.train` returns."""
        task = self.tasks[run.task](run.task)
        torch.manual_seed(run.seed)
        options = run.setting.get("options")
        sizes = (task.vocabulary, task.outputs)
        model = at_equal_parameters(run.model, *sizes, options=options, head=task.head, **self.shape)
        rate = run.setting["learning_rate"]
        training = self.training_of(run.task)
        outcome = train(model, task, learning_rate=rate, seed=run.seed, progress=progress, **training)
        return {"parameters": parameters(model), **outcome}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a task, a model, a setting and a seed."""

    task: str
    model: str
    setting: dict[str, object]
    seed: int

    def key(self, study: Study) -> dict[str, object]:
        """What a row must say for this run to be done."""
        same = {"study": study.name, "shape": study.shape, "training": study.training_of(self.task)}
        return json.loads(json.dumps({**same, **dataclasses.asdict(self)}))


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file.

    Raises:
        ValueError: a line that is not a row, with its number.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); take the line out") from error
    return rows


def find(rows: list[dict], study: Study, run: Run) -> dict | None:
    """The newest row of a run."""
    key = run.key(study)
    return next((row for row in reversed(rows) if all(row.get(name) == key[name] for name in key)), None)


def tried(rows: list[dict], study: Study, task: str, model: str) -> list[tuple[dict, dict[str, object]]]:
    """The row of the first seed of each setting that has one, and the setting."""
    found = [(find(rows, study, Run(task, model, s, study.seeds[0])), s) for s in study.settings[model]]
    return [pair for pair in found if pair[0] is not None]


def best_setting(rows: list[dict], study: Study, task: str, model: str) -> dict[str, object] | None:
    """Of those tried the setting with the best last validation scores; of equal ones the faster."""
    found = tried(rows, study, task, model)
    if not found:
        return None
    return max(found, key=lambda pair: (study.goodness(pair[0]["curve"][-1][2].values()), -pair[0]["steps"]))[
        1
    ]


def remaining(rows: list[dict], study: Study, tasks: list[str], models: list[str]) -> Iterator[Run]:
    """Runs to do: the search first, then the other seeds. ``rows`` may grow meanwhile."""
    for task in tasks:
        for model in models:
            for setting in study.settings[model]:
                run = Run(task, model, setting, study.seeds[0])
                if find(rows, study, run) is None:
                    yield run
    for seed in study.seeds[1:]:
        for task in tasks:
            for model in models:
                run = Run(task, model, best_setting(rows, study, task, model), seed)
                if find(rows, study, run) is None:
                    yield run


def total(study: Study, tasks: list[str], models: list[str]) -> int:
    """Runs of the whole study."""
    return sum(len(tasks) * (len(study.settings[model]) + len(study.seeds) - 1) for model in models)


def perform(study: Study, run: Run, progress: Callable[..., None] = lambda *_: None) -> dict:
    """Train and score; the row."""
    return {
        **run.key(study),
        **study.perform(run, progress),
        "command": " ".join(["python -m evaluations", *sys.argv[1:]]),
        "commit": commit(),
        "torch": torch.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Of the working tree; with a plus where code has changed since; "unknown" outside of a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "evaluations/*.py", "evaluations/tasks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def append(path: Path, row: dict) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class TimeLeft:
    """Whether there is time for another run, and how long all that remain may take."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._end = None if minutes is None else self._began + 60 * minutes
        self.done = 0

    @property
    def over(self) -> bool:
        return self._end is not None and self._clock() >= self._end

    def minutes(self, remaining: int) -> float | None:
        """At the speed so far; ``None`` before the first run is done."""
        return (self._clock() - self._began) / self.done * remaining / 60 if self.done else None
