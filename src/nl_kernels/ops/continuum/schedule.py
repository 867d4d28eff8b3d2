"""When a level of the nested variant goes back to its start, and whose weights it then has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from nl_kernels.ops.continuum.state import (
    ContinuumClock,
    ContinuumLevel,
    ContinuumState,
    Weights,
    all_equal_to,
    equal_positions,
)

Owner: TypeAlias = bool | torch.Tensor
"""Whether weights came from their start by a reset, not from those that the call began with: all, or [B]."""


class Resets(NamedTuple):
    """When a level of the nested variant goes back to its start: after chunks number, number + period, …

    ``first`` is how many chunks it has had since the last time: of all sequences, or of each, [B].
    """

    period: int
    first: int | torch.Tensor

    @classmethod
    def of(
        cls,
        levels: Sequence[ContinuumLevel],
        index: int,
        variant: str,
        state: ContinuumState | Sequence[None],
        positions: Sequence[Sequence[int] | None],
    ) -> Resets | None:
        """Those of a level, whenever the next slower one steps, be it by nothing; None: never."""
        if variant != "nested" or not levels[index].steps or index + 1 == len(levels):
            return None
        if levels[index + 1].chunk_size is None:
            return None
        size = levels[index].chunk_size
        first = 0
        if state[index] is not None:
            known = {(slow - fast) // size for slow, fast in zip(positions[index + 1], positions[index])}
            first = known.pop()
            if known:
                first = (state[index + 1].position - state[index].position) // size
        return cls(levels[index + 1].chunk_size // size, first)

    def after(self, number: int) -> Owner:
        """Whether the level is reset after the chunk of this number: one answer, or that of each, [B]."""
        return (self.first + number + 1) % self.period == 0


def clock_after(
    level: ContinuumLevel, before: ContinuumClock | None, x: torch.Tensor, mask: torch.Tensor | None
) -> ContinuumClock:
    """The place of a level of rate 0 in its chunk after the tokens of ``x`` [B, T, D]."""
    known = 0 if before is None else all_equal_to(before.position)
    if mask is None and known is not None:
        return ContinuumClock(equal_positions(len(x), (known + x.shape[1]) % level.chunk_size, x.device))
    tokens = x.shape[1] if mask is None else mask.sum(1)
    return ContinuumClock((tokens if before is None else before.position + tokens) % level.chunk_size)


def either(a: Owner, b: Owner) -> Owner:
    """Whether one of both."""
    return b if a is False else a if b is False or a is True else a | b


def chosen(condition: torch.Tensor, new: Weights, old: Weights) -> Weights:
    """``new`` for the sequences of the condition [B], else ``old``; an absent momentum is zero."""
    return Weights(*(_where(condition[:, None, None], n, o) for n, o in zip(new, old)))


def _where(
    condition: torch.Tensor, new: torch.Tensor | None, old: torch.Tensor | None
) -> torch.Tensor | None:
    if new is None and old is None:
        return None
    like = new if old is None else old
    new, old = (torch.zeros((), dtype=like.dtype, device=like.device) if w is None else w for w in (new, old))
    return torch.where(condition, new.to(like.dtype), old)
