"""Personalisation over time: one project's modules day by day, each scored before it is learned.

The stream is the source of a package that is installed with this project (NetworkX, BSD; Rich, MIT), its
modules in order of dependency: one that imports another comes after it. A day is 2,048 tokens of it, cut into
documents of at most 128. The base is a transformer of 0.5 million parameters that knows the standard library.

"as read": nats per token of a day, each token before anything is learned from it. "next day": nats of a day
with what was learned by the end of the day before, and nothing of its own. Days 2 to 4 choose the setting,
days 5 to 8 are the test. The same without memory is the method "frozen"; "starts over" forgets every
morning, when the day was scored; "other project" has learned another project's days instead, so that what it
gains is no memory of this one. With "small file" the memory between two days is a file of 16 bits and rank 4.
What a token costs is in the rows (``microseconds_per_token``), as is the file's size.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from evaluations.learners import Learner
from evaluations.streams import Course
from evaluations.tasks import language_modelling

PROJECTS = ("networkx", "rich")
DAYS, DAY = 8, 2048
VALIDATION_DAYS = 4
DOCUMENT = 128  # half of what the base takes, so that something fits in front of it
BASE_BATCH = 8


def in_order(folder: Path) -> list[Path]:
    """The modules of a package, none before those of it that it imports, but for circles; no tests."""
    paths = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        if "tests" not in parts:
            paths[".".join(parts).removesuffix(".__init__")] = path
    ordered: dict[str, None] = {}
    begun: set[str] = set()

    def visit(name: str) -> None:
        if name in begun:
            return
        begun.add(name)
        for imported in _imports(paths[name], name):
            if imported in paths:
                visit(imported)
        ordered[name] = None

    for name in paths:
        visit(name)
    return [paths[name] for name in ordered]


def _imports(path: Path, name: str) -> list[str]:
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return found


@functools.cache
def days(project: str) -> list[list[torch.Tensor]]:
    """Documents of each day."""
    folder = Path(importlib.util.find_spec(project).origin).parent
    tokenizer = language_modelling.load("standard library").tokenizer
    found, left = [], DAYS * DAY
    for path in in_order(folder):
        tokens = torch.tensor([*tokenizer.encode(path.read_text(encoding="utf-8")), tokenizer.separator_id])
        found += tokens[:left].split(DOCUMENT)
        left -= len(tokens[:left])
        if not left:
            break
    ends = np.cumsum([len(document) for document in found])
    return [[d for d, end in zip(found, ends) if day * DAY < end <= (day + 1) * DAY] for day in range(DAYS)]


class Personalisation(Course):
    """One of :data:`PROJECTS`."""

    parts = tuple(f"day {day + 1}" for day in range(DAYS))
    scores = ("as read", "next day")
    vocabulary = language_modelling.VOCABULARY
    width = 128
    base_steps = 400

    def __init__(self, name: str) -> None:
        if name not in PROJECTS:
            raise ValueError(f"name: expected one of {', '.join(PROJECTS)}, got {name!r}")
        self.name = "personalisation"  # all projects have the same base
        self.project = name

    def base_batch(self, rng: torch.Generator) -> torch.Tensor:
        tokens = language_modelling.load("standard library").train
        starts = torch.randint(len(tokens) - self.context, (BASE_BATCH,), generator=rng).tolist()
        return torch.stack([torch.from_numpy(tokens[s : s + self.context].astype(np.int64)) for s in starts])

    def documents(self, part: int, seed: int) -> list[torch.Tensor]:
        return days(self.project)[part]

    def score(self, learner: Learner, part: int, final: bool) -> float:
        return -learner.loss(self.documents(part, 0))

    def outcome(self, learner: Learner, seed: int, joint: bool, progress: Callable[..., None]) -> dict:
        other = PROJECTS[1 - PROJECTS.index(self.project)]
        read, ahead, curve = [], [], []
        for day, documents in enumerate(days(self.project)):
            ahead.append(learner.loss(documents))
            if learner.elsewhere:
                read.append(ahead[-1])
                learner.read(days(other)[day])
            else:
                read.append(learner.read(documents))
            curve.append((day + 1, read[-1], {"next day": statistics.mean(ahead[: day + 1])}))
            progress(day + 1, read[-1], DAY)
        chosen = {"next day": statistics.mean(ahead[1:VALIDATION_DAYS])}
        curve[-1] = (*curve[-1][:2], chosen)
        test = slice(VALIDATION_DAYS, None)
        scores = {"as read": statistics.mean(read[test]), "next day": statistics.mean(ahead[test])}
        days_read = {"as read": read, "next day": ahead}
        return {"scores": scores, "curve": curve, "days": days_read, "steps": DAYS}


TASKS = dict.fromkeys(PROJECTS, Personalisation)
