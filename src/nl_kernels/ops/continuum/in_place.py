"""Level by level with steps in place, first-order or without gradients: the loop around the kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nl_kernels.dispatch import autocasting, needs_gradient, without_autocast
from nl_kernels.ops.continuum import registration
from nl_kernels.ops.continuum.chunk_step import NO_MOMENTA, Weights, mlp
from nl_kernels.ops.continuum.first_order import serve_recorded
from nl_kernels.ops.continuum.level_pass import (
    LevelCall,
    LevelPass,
    Span,
    Step,
    contiguous,
    in_chunks,
    take,
    walk,
)
from nl_kernels.ops.continuum.rows import Counts, Grid, pending_tokens, place_on_grid
from nl_kernels.ops.continuum.schedule import Resets, chosen, clock_after, fast_part, level_state
from nl_kernels.ops.continuum.state import (
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    entry_type,
    state_dtype,
)


class _Level(NamedTuple):
    """A level of a call, before it runs."""

    level: ContinuumLevel
    inner: torch.Tensor  # [B, T, D]: n(x)
    weights: Weights
    momenta: Weights
    grid: Grid | None  # None: never steps
    resets: Resets | None
    steps: int

    def call(self, dtype: torch.dtype, norm_eps: float, impl: str) -> LevelCall:
        """What its chunks share."""
        grid, size = self.grid, self.level.chunk_size
        pending = None
        if grid.first:
            pending = grid.inputs[:, :size].detach().to(dtype).contiguous()
        rates = in_chunks(grid.rates[:, : self.steps * size].detach(), 0, size)
        length = grid.inputs.shape[1]
        return LevelCall(
            self.level, self.resets, rates, grid.lengths, length, grid.first, pending, dtype, norm_eps, impl
        )


def continuum_memory_in_place(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str,
    level_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    initial_state: ContinuumState | None,
    output_final_state: bool,
    norm_eps: float,
    checkpoint_every: int | None,
    impl: str,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """See :func:`nl_kernels.continuum_memory`, with ``detach_updates`` or where nothing needs a gradient.

    Levels side by side are walked together, so that those that are due at one slot step in one launch; those
    one after the other wait for the outputs before theirs, and share the launch of the steps after the last
    token.
    """
    counts = Counts.of(len(levels), initial_state, mask)
    mask = None if counts.tokens is None else mask
    everything = list(range(len(levels)))
    state: list[ContinuumLevelState | ContinuumClock | None] = [None] * len(levels)
    total, held, waiting = x, [], []
    for indices in [everything] if variant == "independent" else [[index] for index in everything]:
        group = []
        for index in indices:
            resets = Resets.of(levels, index, variant, initial_state, counts.positions)
            before = None if initial_state is None else initial_state[index]
            inner = F.rms_norm(x, x.shape[-1:], levels[index].norm.to(x.dtype), norm_eps)
            place = (mask, counts.positions[index], counts.tokens)
            group.append(_placed(levels[index], inner, before, resets, place, output_final_state))
            if entry_type(levels, index, variant) is ContinuumClock:
                state[index] = clock_after(levels[index], before, x, mask)
        served, steps = _serve(group, norm_eps, checkpoint_every, output_final_state, impl)
        held += steps
        for index, level, (y, weights, momenta) in zip(indices, group, served):
            if level.grid is not None and output_final_state:
                left = pending_tokens(level.grid, level.level.chunk_size)
                waiting.append((index, level.level, weights, momenta, *left))
            total = total + (y if level_weights is None else level_weights[index].to(y.dtype) * y)
        x = total
    with torch.no_grad():
        take(held, impl)
    if mask is not None:
        total = total.masked_fill(~mask[..., None], 0.0)
    if not output_final_state:
        return total, None
    for index, *parts in waiting:
        state[index] = level_state(*parts)
    return total, tuple(state)


def continuum_flush_in_place(
    state: ContinuumState,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str,
    norm_eps: float,
    impl: str,
) -> ContinuumState:
    """See :func:`nl_kernels.continuum_flush`, with ``detach_updates`` or where nothing needs a gradient."""
    steps, passes = [], {}
    with torch.no_grad():
        for index, (level, before) in enumerate(zip(levels, state)):
            pending = before.pending_rates.shape[1] if isinstance(before, ContinuumLevelState) else 0
            if pending:
                passes[index], step = _flushed(level, before, pending, norm_eps, impl)
                steps.append(step)
        take(steps, impl)
    flushed = []
    for index, (level, before) in enumerate(zip(levels, state)):
        if not isinstance(before, ContinuumLevelState):
            flushed.append(before and ContinuumClock(before.position * 0))
            continue
        weights, momenta = fast_part(before, True)
        if index in passes:
            new, momenta = passes[index].last()
            weights = Weights(*(_constant_step(w, n) for w, n in zip(weights, new)))
        if variant == "nested" and index + 1 < len(levels) and state[index + 1] is not None:
            slower_steps = (state[index + 1].position > 0)[:, None, None]
            weights = chosen(slower_steps, Weights(level.up, level.down, level.gate), weights)
            momenta = chosen(slower_steps, NO_MOMENTA, momenta)
        nothing = before.pending_inputs[:, :0], before.pending_rates[:, :0], before.position * 0
        flushed.append(level_state(level, weights, momenta, *nothing))
    return tuple(flushed)


def _placed(
    level: ContinuumLevel,
    inner: torch.Tensor,
    before: ContinuumLevelState | None,
    resets: Resets | None,
    place: tuple[torch.Tensor | None, Sequence[int] | None, Sequence[int] | None],
    keep_state: bool,
) -> _Level:
    """A level with its tokens on their grid."""
    weights, momenta = Weights(level.up, level.down, level.gate), NO_MOMENTA
    if not level.steps:
        return _Level(level, inner, weights, momenta, None, None, 0)
    dtype = state_dtype(inner.dtype)
    if isinstance(level.rate, torch.Tensor):
        rates = level.rate.to(dtype)
    else:
        rates = inner.new_full((), level.rate, dtype=dtype)
    if before is not None:
        weights, momenta = fast_part(before, True)
    grid = place_on_grid(inner, rates.expand(inner.shape[:2]), before, *place)
    # the step after the last token changes only the state
    steps = (grid.inputs.shape[1] - (not keep_state)) // level.chunk_size
    return _Level(level, inner, weights, momenta, grid, resets, steps)


def _serve(
    group: Sequence[_Level], norm_eps: float, checkpoint_every: int | None, keep_state: bool, impl: str
) -> tuple[list[tuple[torch.Tensor, Weights, Weights]], list[Step]]:
    """Of each level the outputs [B, T, D], last weights and momenta; and the steps yet to be taken."""
    device = group[0].inner.device.type
    dtype = torch.get_autocast_dtype(device) if autocasting(device) else group[0].inner.dtype
    served = [(_read(level, dtype, impl), level.weights, level.momenta) for level in group if not level.steps]
    learning = [level for level in group if level.steps]
    held, found = [], []
    if learning:
        with without_autocast(device):
            spans = []
            for level in learning:
                call = level.call(dtype, norm_eps, impl)
                spans.append(Span(call, 0, -(-call.length // level.level.chunk_size)))
            reads = [level.grid.reads.to(dtype) for level in learning]
            records = needs_gradient(*reads, *(w for level in learning for w in _leaves(level)))
            if records and checkpoint_every is not None:
                found = [
                    _checkpointed(level, span, part, checkpoint_every)
                    for level, span, part in zip(learning, spans, reads)
                ]
            else:
                states = [(level.weights, level.momenta) for level in learning]
                found, held = _walked(spans, reads, states, records, keep_state)
        found = [
            (level.grid.restored(y, *level.inner.shape[:2]), *last)
            for level, (y, *last) in zip(learning, found)
        ]
    served, found = iter(served), iter(found)
    return [next(found if level.steps else served) for level in group], held


def _walked(
    spans: Sequence[Span],
    reads: Sequence[torch.Tensor],
    states: Sequence[tuple[Weights, Weights]],
    records: bool,
    keep_state: bool,
) -> tuple[list[tuple[torch.Tensor, Weights, Weights]], list[Step]]:
    """Outputs, weights and momenta of each span; without a record, their last steps are yet to be taken."""
    if records:
        return serve_recorded(spans, reads, states, keep_state), []
    with torch.no_grad():
        passes = [LevelPass(span.call, *before, False) for span, before in zip(spans, states)]
        chunks = [span.chunks(part) for span, part in zip(spans, reads)]
        held = walk(list(zip(passes, chunks)), hold=True)
    return [(torch.cat(p.outputs, dim=1), *p.last()) for p in passes], held


def _checkpointed(
    level: _Level, span: Span, reads: torch.Tensor, every: int
) -> tuple[torch.Tensor, Weights, Weights]:
    """One level, which keeps for the backward the weights of every so many chunks."""
    cuts = [*range(0, span.end, every), span.end]
    size, first = level.level.chunk_size, level.grid.first
    stops = [min(cut * size, span.call.length) - first for cut in cuts[1:]]
    outputs, state = [], (level.weights, level.momenta)
    parts = reads.split([b - a for a, b in itertools.pairwise([0, *stops])], dim=1)
    for (begin, end), part in zip(itertools.pairwise(cuts), parts):
        found = checkpoint(
            serve_recorded,
            [Span(span.call, begin, end)],
            [part],
            [state],
            True,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        y, *state = found[0]
        outputs.append(y)
    return torch.cat(outputs, dim=1), *state


def _read(level: _Level, dtype: torch.dtype, impl: str) -> torch.Tensor:
    """Tokens without a step between them, where they lie: of a level's own weights as a plain block."""
    if level.weights.up.ndim == 2:
        return mlp(level.inner, *level.weights)
    with without_autocast(level.inner.device.type):
        return registration.mlp(level.inner.to(dtype).contiguous(), *contiguous(level.weights), impl)


def _leaves(level: _Level) -> tuple[torch.Tensor | None, ...]:
    return *level.weights, level.level.up, level.level.down, level.level.gate


def _flushed(
    level: ContinuumLevel, before: ContinuumLevelState, pending: int, norm_eps: float, impl: str
) -> tuple[LevelPass, Step]:
    """The step on the pending tokens, of those sequences that have any."""
    taken = torch.arange(pending, device=before.position.device) < before.position[:, None]
    inputs = (before.pending_inputs * taken[..., None]).contiguous()
    rates = (before.pending_rates * taken).contiguous()
    call = LevelCall(level, None, [rates], before.position, pending, 0, inputs, inputs.dtype, norm_eps, impl)
    level_pass = LevelPass(call, *fast_part(before, True), False)
    return level_pass, level_pass.advance(Span(call, 0, 1).unread())


def _constant_step(weight: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """The new weight, with the gradient of the one before the step."""
    return new if weight is None or not needs_gradient(weight) else new + (weight - weight.detach())
