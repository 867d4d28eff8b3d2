"""Language modelling of source code: windows as in training, and on beyond them with the state carried.

The paper trains 760M and 1.3B parameters on 30 and 100 billion tokens of web text (its table 1). Here models
of half a million read 1.2 million tokens of code, in windows of 512: nats are not on one scale with the
paper's; the order of models can be compared.

Two corpora, split by file: the running interpreter's standard library with its language reference, and SymPy,
one project whose names come back. The first half of the held-out files chooses the setting, the second is the
test: every window of it with a fresh state, and four streams of it, whose state is carried from the first
token, from 8 windows on. Softmax attention keeps every token and knows no positions beyond its window, so it
has no second score.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluations.models import LanguageModel
from evaluations.task import Batch, Task
from nl_models.data.batches import TrainingBatches, validation_windows
from nl_models.data.prepare import DataOptions, PreparedData, prepare_data
from nl_models.evaluation.position import loss_by_position
from nl_models.evaluation.token_losses import token_losses

VOCABULARY = 1024  # of byte pairs
WINDOW = 512
BEYOND = 8 * WINDOW
STREAMS = 4
VALIDATION_WINDOWS = 64
TEST_TOKENS = 2**15  # at most
CORPORA = {"standard library": None, "sympy": "sympy"}  # a package that is installed with torch
DATA = Path(__file__).parents[2] / "runs/evidence_data"


@functools.cache
def load(name: str) -> PreparedData:
    """Tokens of a corpus, made on first use."""
    package = CORPORA[name]
    corpus = None if package is None else str(Path(importlib.util.find_spec(package).origin).parent)
    return prepare_data(DataOptions(corpus=corpus, vocab_size=VOCABULARY), DATA / name.replace(" ", "_"))


class LanguageModelling(Task):
    """One of :data:`CORPORA`."""

    goal = None
    head = "tied"
    scores = ("carried", "windows")
    vocabulary = outputs = VOCABULARY

    def __init__(self, name: str) -> None:
        if name not in CORPORA:
            raise ValueError(f"name: expected one of {', '.join(CORPORA)}, got {name!r}")
        self.name = name

    def batch(self, size: int, seed: int) -> Batch:
        run, step = divmod(seed, 1_000_003)  # as evaluations.training counts them
        windows = TrainingBatches(load(self.name).train, WINDOW, size, run).batch(step)
        return windows[:, :-1], windows[:, 1:]

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def evaluate(self, model: LanguageModel, final: bool) -> dict[str, float]:
        """Nats per token: of windows, and at last of the test text with the state carried, too."""
        tokens = load(self.name).validation
        half = len(tokens) // 2
        if not final:
            rows = validation_windows(tokens[:half], sequence_length=WINDOW, count=VALIDATION_WINDOWS)
            losses = [token_losses(model.hope, part).mean() for part in rows.split(8)]
            return {"windows": torch.stack(losses).mean().item()}
        losses = loss_by_position(model.hope, tokens[half:][:TEST_TOKENS], window=WINDOW, streams=STREAMS)
        beyond = losses.carried[:, BEYOND:]
        scores = {"carried": beyond.double().mean().item()} if beyond.numel() else {}
        return {**scores, "windows": losses.fresh.double().mean().item()}


TASKS = dict.fromkeys(CORPORA, LanguageModelling)
