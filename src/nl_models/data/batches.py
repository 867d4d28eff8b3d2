"""Windows of a packed token array; which ones make a batch is a function of the step alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
            self.__dict__["_cached_epoch"] = cached
        return cached[1]


class StreamBatch(NamedTuple):
    """The next window of each of B streams.

    Attributes:
        tokens: ``[B, T]`` int64; what follows the end of a document is padding.
        lengths: ``[B]`` int64, how many of them are real, at least 2.
        begins: ``[B]`` bool, whether the window continues nothing.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    begins: torch.Tensor

    @classmethod
    def whole(cls, tokens: torch.Tensor) -> StreamBatch:
        """Windows ``[B, T]`` without padding, each of which begins anew."""
        rows, length = tokens.shape
        return cls(tokens, torch.full((rows,), length), torch.ones(rows, dtype=torch.bool))


@dataclass(frozen=True)
class DocumentStreams:
    """Streams that read documents from their beginnings, a window at a time, for training with carried state.

    An epoch puts the documents in an order drawn from ``(seed, epoch)`` and cuts each into windows; the last
    one of a document is shorter. Every stream reads an equal part of the windows, in order. It begins anew at
    each document, and at the start of its part, which may lie within one. Fewer windows than there are
    streams are left over at the end of an epoch.

    Args:
        tokens: ``[N]`` integer array (may be memory mapped): documents, each ended by a separator.
        separator_id: what ends a document.
        sequence_length: T, tokens in a window.
        batch_size: B, streams in a batch.
        batches: of a step; a step reads one window of every stream.
        seed: of the order.

    Raises:
        CorpusError: fewer windows than streams.
    """

    tokens: np.ndarray
    separator_id: int
    sequence_length: int
    batch_size: int
    batches: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows == 0:
            raise CorpusError(
                f"corpus: its training documents have {self._counts.sum():,} windows of up to "
                f"{self.sequence_length:,} tokens, fewer than the {self.batches * self.batch_size:,} streams "
                "(batch_size × gradient_accumulation); use fewer, or a larger corpus"
            )

    @property
    def windows(self) -> int:
        """Windows that a stream reads in an epoch."""
        return int(self._counts.sum()) // (self.batches * self.batch_size)

    def batch(self, index: int) -> StreamBatch:
        """Batch number ``index`` (counted from 0), of step ``index // batches``."""
        step, part = divmod(index, self.batches)
        epoch, place = divmod(step, self.windows)
        starts, lengths, first = self._epoch(epoch)
        streams = np.arange(part * self.batch_size, (part + 1) * self.batch_size)
        chosen = streams * self.windows + place
        rows = np.full((len(chosen), self.sequence_length), self.separator_id, dtype=np.int64)
        for row, start, length in zip(rows, starts[chosen], lengths[chosen]):
            row[:length] = self.tokens[start : start + length]
        arrays = (rows, lengths[chosen], first[chosen] | (place == 0))
        return StreamBatch(*map(torch.from_numpy, arrays))

    @cached_property
    def _documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends."""
        ends = np.flatnonzero(np.asarray(self.tokens) == self.separator_id) + 1
        if not len(ends) or ends[-1] < len(self.tokens):
            ends = np.append(ends, len(self.tokens))
        return np.concatenate([[0], ends[:-1]]), ends

    @cached_property
    def _counts(self) -> np.ndarray:
        """Windows of each document; a single token at its end, which predicts nothing, makes none."""
        starts, ends = self._documents
        return (ends - starts + self.sequence_length - 2) // self.sequence_length

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each window in order: start, length, whether it is the first of its document."""
        cached = self.__dict__.get("_cached_epoch")
        if cached is None or cached[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._counts))
            counts, (begin, end) = self._counts[order], (x[order] for x in self._documents)
            number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            starts = np.repeat(begin, counts) + number * self.sequence_length
            lengths = np.minimum(np.repeat(end, counts) - starts, self.sequence_length)
            cached = (epoch, (starts, lengths, number == 0))
            self.__dict__["_cached_epoch"] = cached
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
