"""What a task is to the rest: batches, a loss, and scores of a model."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch

Batch = tuple[torch.Tensor, torch.Tensor]
# Beyond those of training batches; of a seed PyTorch's generators take the low 32 bits alone.
TEST_SEED, VALIDATION_SEED = 2**31, 2**31 + 1
IGNORED = -100  # as a target: nothing is asked here


class Task(abc.ABC):
    """One task.

    Attributes:
        name: in rows and tables.
        vocabulary, outputs: ids that come, and numbers that are asked for at each position.
        scores: names of the scores of :meth:`evaluate`: shares of what is right, or nats per token. Pictures
            show the last.
        head: what answers, see :func:`evaluations.models.make`.
        goal: training ends once every score has reached it twice in a row on validation data; ``None`` for
            none.
    """

    name: str
    vocabulary: int
    outputs: int
    scores: tuple[str, ...]
    goal: float | None
    head: str = "linear"

    @abc.abstractmethod
    def batch(self, size: int, seed: int) -> Batch:
        """Ids [size, T] and targets; the same arguments give the same batch."""

    @abc.abstractmethod
    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The training loss of logits [B, T, outputs]."""

    @abc.abstractmethod
    def evaluate(self, model: Callable[[torch.Tensor], torch.Tensor], final: bool) -> dict[str, float]:
        """Scores of ids [B, T] → logits [B, T, outputs] on validation data, or on test data (``final``)."""


def accuracy(
    model: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, targets: torch.Tensor
) -> float:
    """Share of the targets [B, T] that are not ignored and are what the logits choose."""
    chosen = torch.cat([model(part).argmax(-1) for part in ids.split(125)])
    return (chosen == targets)[targets != IGNORED].float().mean().item()
