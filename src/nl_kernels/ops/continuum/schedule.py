"""When a level goes back to its start, and how its fast weights come out of a state and into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from nl_kernels.ops.continuum.chunk_step import Weights
from nl_kernels.ops.continuum.state import (
    RULES_WITH_MOMENTUM,
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
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
        state: ContinuumState | None,
        positions: Sequence[Sequence[int] | None],
    ) -> Resets | None:
        """Those of a level, whenever the next slower one steps, be it by nothing; None: never."""
        if variant != "nested" or not levels[index].steps or index + 1 == len(levels):
            return None
        if levels[index + 1].chunk_size is None:
            return None
        size = levels[index].chunk_size
        first = 0
        if state is not None:
            known = {(slow - fast) // size for slow, fast in zip(positions[index + 1], positions[index])}
            first = known.pop()
            if known:
                first = (state[index + 1].position - state[index].position) // size
        return cls(levels[index + 1].chunk_size // size, first)

    def after(self, number: int) -> bool | torch.Tensor:
        """Whether the level is reset after the chunk of this number: one answer, or that of each, [B]."""
        return (self.first + number + 1) % self.period == 0


def reset_rows(resets: Resets | None, number: int, full: torch.Tensor | None) -> Owner:
    """Whether sequences go back to their start after a chunk: all, none, or [B].

    ``full`` [B]: those that fill the chunk; None: all.
    """
    reset = False if resets is None else resets.after(number)
    return reset if reset is False or full is None else full & reset


def clock_after(
    level: ContinuumLevel, before: ContinuumClock | None, x: torch.Tensor, mask: torch.Tensor | None
) -> ContinuumClock:
    """The place of a level of rate 0 in its chunk after the tokens of ``x`` [B, T, D]."""
    tokens = x.new_full(x.shape[:1], x.shape[1], dtype=torch.int64) if mask is None else mask.sum(1)
    return ContinuumClock((tokens if before is None else before.position + tokens) % level.chunk_size)


def either(a: Owner, b: Owner) -> Owner:
    """Whether one of both."""
    return b if a is False else a if b is False or a is True else a | b


def add_owned(
    grad: torch.Tensor,
    reset: Owner,
    total: torch.Tensor,
    start_total: torch.Tensor | None,
    first: torch.Tensor,
    start: torch.Tensor | None,
) -> None:
    """Add the gradient of last weights to that of the weights that they came from."""
    if isinstance(reset, bool):
        parts = [(grad, start_total, start)] if reset else [(grad, total, first)]
    else:
        reset = reset.view(-1, 1, 1)
        parts = [(grad * ~reset, total, first), (grad * reset, start_total, start)]
    for part, to, weight in parts:
        to += part.sum_to_size(weight.shape).to(to.dtype)


def chosen(condition: torch.Tensor, new: Weights, old: Weights) -> Weights:
    """``new`` where the condition [B, 1, 1] holds, else ``old``; an absent momentum is zero."""
    return Weights(*(_where(condition, n, o) for n, o in zip(new, old)))


def _where(
    condition: torch.Tensor, new: torch.Tensor | None, old: torch.Tensor | None
) -> torch.Tensor | None:
    if new is None and old is None:
        return None
    like = new if old is None else old
    new, old = (torch.zeros((), dtype=like.dtype, device=like.device) if w is None else w for w in (new, old))
    return torch.where(condition, new.to(like.dtype), old)


def fast_part(state: ContinuumLevelState, detach_updates: bool) -> tuple[Weights, Weights]:
    """Weights and momenta of a state."""
    momenta = Weights(state.up_momentum, state.down_momentum, state.gate_momentum)
    if detach_updates:
        momenta = Weights(*(None if m is None else m.detach() for m in momenta))
    return Weights(state.up, state.down, state.gate), momenta


def level_state(
    level: ContinuumLevel,
    weights: Weights,
    momenta: Weights,
    inputs: torch.Tensor,
    rates: torch.Tensor,
    position: torch.Tensor,
) -> ContinuumLevelState:
    """The state of these weights, of all sequences or of each, with the tokens that wait for a step."""
    batch = len(position)
    fast = [
        w if w is None or w.ndim == 3 else w.to(inputs.dtype).expand(batch, -1, -1).clone() for w in weights
    ]
    if level.rule in RULES_WITH_MOMENTUM:
        momenta = [
            None if w is None else torch.zeros_like(w) if m is None else m for w, m in zip(fast, momenta)
        ]
    return ContinuumLevelState(*fast, inputs, rates, position, *momenta)
