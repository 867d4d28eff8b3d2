"""What a task is to the rest: batches, a loss, and scores of a model."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


class Task(abc.ABC):
    """One task.

    Attributes:
        name: in rows and tables.
        vocabulary, outputs: ids that come, and numbers that are asked for at each position.
        scores: names of the scores of :meth:`evaluate`, higher is better, at most 1.
        goal: training ends once every score has reached it twice in a row on validation data.
    """

    name: str
    vocabulary: int
    outputs: int
    scores: tuple[str, ...]
    goal: float

    @abc.abstractmethod
    def batch(self, size: int, seed: int) -> Batch:
        """Ids [size, T] and targets; the same arguments give the same batch."""

    @abc.abstractmethod
    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The training loss of logits [B, T, outputs]."""

    @abc.abstractmethod
    def evaluate(self, model: Callable[[torch.Tensor], torch.Tensor], final: bool) -> dict[str, float]:
        """Scores of ids [B, T] → logits [B, T, outputs] on validation data, or on test data (``final``)."""
