"""Fixed-length windows of a packed token array; which ones make a batch is a function of the step alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nl_models.data.corpus import CorpusError


@dataclass(frozen=True)
class TrainingBatches:
    """Shuffled windows for training, without state: any step's batch can be asked for at any time.

    An epoch cuts the array into windows of ``sequence_length`` from an offset of its own and visits them in
    an order of its own, both drawn from ``(seed, epoch)``. So a resumed run continues in the data exactly
    where it stopped, with nothing but its step number.

    Args:
        tokens: ``[N]`` integer array (may be memory mapped): documents, each ended by a separator.
        sequence_length: T, tokens in a window.
        batch_size: B, windows in a batch.
        seed: of the order.

    Raises:
        CorpusError: the array is shorter than two windows.
    """

    tokens: np.ndarray
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 * self.sequence_length:
            raise CorpusError(
                f"corpus: {len(self.tokens):,} training tokens are too few for windows of "
                f"{self.sequence_length:,}; at least two windows are needed"
            )

    @property
    def windows(self) -> int:
        """Windows in an epoch (one fewer than fit, so that the offset is free)."""
        return len(self.tokens) // self.sequence_length - 1

    def batch(self, index: int) -> torch.Tensor:
        """Batch number ``index`` (counted from 0): ``[B, T]`` int64."""
        first = index * self.batch_size
        rows = [self._window(position) for position in range(first, first + self.batch_size)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, position: int) -> np.ndarray:
        epoch, place = divmod(position, self.windows)
        offset, order = self._epoch(epoch)
        start = offset + int(order[place]) * self.sequence_length
        return self.tokens[start : start + self.sequence_length]

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        cached = self.__dict__.get("_cached_epoch")
        if cached is None or cached[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            offset = int(generator.integers(self.sequence_length))
            cached = (epoch, (offset, generator.permutation(self.windows)))
            object.__setattr__(self, "_cached_epoch", cached)
        return cached[1]


def validation_windows(tokens: np.ndarray, *, sequence_length: int, count: int) -> torch.Tensor:
    """``[min(count, available), T]`` int64: a fixed set of windows spread evenly over ``tokens``.

    Raises:
        CorpusError: ``tokens`` is shorter than one window.
    """
    available = len(tokens) // sequence_length
    if available == 0:
        raise CorpusError(
            f"corpus: {len(tokens):,} validation tokens are too few for one window of {sequence_length:,}; "
            "use shorter windows, a larger corpus or a larger validation fraction"
        )
    chosen = np.linspace(0, available - 1, min(count, available)).round().astype(np.int64)
    rows = [tokens[index * sequence_length : (index + 1) * sequence_length] for index in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
