"""Level by level, chunk by chunk: the loop around every implementation of a chunk's products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from nl_kernels.dispatch import autocasting, compiler_at_work, needs_gradient, without_autocast
from nl_kernels.memory.segments import KEPT_MEGABYTES, Footprint, spans
from nl_kernels.ops.continuum import eager, registration
from nl_kernels.ops.continuum.chunk_walk import (
    Chunk,
    LevelCall,
    Step,
    contiguous,
    in_chunks,
    take,
    walk,
)
from nl_kernels.ops.continuum.first_order import walk_recorded
from nl_kernels.ops.continuum.grid import Counts, Grid, pending_tokens, place_on_grid
from nl_kernels.ops.continuum.schedule import Resets, chosen, clock_after
from nl_kernels.ops.continuum.state import (
    NO_MOMENTA,
    RULES_WITH_MOMENTUM,
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    Weights,
    entry_type,
    fast_part,
    initial_weights,
    level_state,
    state_dtype,
)


class Options(NamedTuple):
    """What all levels of a call share."""

    variant: str
    norm_eps: float
    through: bool  # gradients flow through the steps
    products: Any  # of a chunk: the module eager, compiled or triton_chunk, or what has their functions
    checkpoint_every: int | None = None
    keep_state: bool = True

    def following(self) -> torch.autograd.grad_mode.set_grad_enabled:
        """Whether what a step is made of is recorded for the backward pass."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.through)


class _Level(NamedTuple):
    """A level of a call, before it runs."""

    level: ContinuumLevel
    inner: torch.Tensor  # [B, T, D]: n(x)
    weights: Weights
    momenta: Weights
    grid: Grid | None  # None: never steps
    call: LevelCall | None  # None: no step between the tokens


def run_memory(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    options: Options,
    *,
    level_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    initial_state: ContinuumState | None,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """See :func:`nl_kernels.continuum_memory`.

    Steps in place are taken together: of levels side by side those that are due at one position; of levels
    one after the other, which wait for the outputs before theirs, those after the last token.
    """
    counts = Counts.of(len(levels), initial_state, mask)
    mask = None if counts.tokens is None else mask
    initial_state = initial_state or [None] * len(levels)
    indices = list(range(len(levels)))
    state, total, last_steps = [], x, []
    together = options.variant == "independent" and options.products.IN_PLACE
    for group in [indices] if together else [[index] for index in indices]:
        results, steps = _walked(
            [_placed(x, levels, index, initial_state, mask, counts, options) for index in group], options
        )
        last_steps += steps
        for index, (y, after) in zip(group, results):
            total = total + (y if level_weights is None else level_weights[index].to(y.dtype) * y)
            if after is None and entry_type(levels, index, options.variant) is ContinuumClock:
                after = clock_after(levels[index], initial_state[index], x, mask)
            state.append(after)
        if options.variant != "independent":
            x = total
    if last_steps:
        with torch.no_grad():
            take(last_steps, options.products)
    if mask is not None:
        total = total.masked_fill(~mask[..., None], 0.0)
    return total, tuple(state) if options.keep_state else None


def run_flush(state: ContinuumState, levels: Sequence[ContinuumLevel], options: Options) -> ContinuumState:
    """See :func:`nl_kernels.continuum_flush`."""
    steps, walks = [], {}
    with options.following():
        for index, (level, before) in enumerate(zip(levels, state)):
            pending = before.pending_rates.shape[1] if isinstance(before, ContinuumLevelState) else 0
            if pending:
                taken = torch.arange(pending, device=before.position.device) < before.position[:, None]
                inputs = before.pending_inputs * taken[..., None]
                keys, rates = eager.keys_of(level, inputs, options.norm_eps), before.pending_rates * taken
                if level.predict_next:
                    inputs, rates = _ahead(inputs, pending), _ahead(rates, pending)
                targets = inputs if options.products.IN_PLACE else _targets(level, inputs)
                call = LevelCall(level, None, before.position, 0, inputs.dtype, options.products)
                walks[index] = call.walk(*fast_part(before, not options.through), False)
                chunk = Chunk(keys, targets, rates, 0, 1)
                steps.append(walks[index].advance(chunk, None))
        take([step for step in steps if step is not None], options.products)
    flushed = []
    for index, (level, before) in enumerate(zip(levels, state)):
        if not isinstance(before, ContinuumLevelState):
            flushed.append(before and ContinuumClock(before.position * 0))
            continue
        weights, momenta = fast_part(before, not options.through)
        if index in walks:
            new, momenta = walks[index].weights, walks[index].momenta
            weights = new if options.through else Weights(*map(_constant_step, weights, new))
        if options.variant == "nested" and index + 1 < len(levels) and state[index + 1] is not None:
            slower_steps = state[index + 1].position > 0
            weights = chosen(slower_steps, initial_weights(level), weights)
            momenta = chosen(slower_steps, NO_MOMENTA, momenta)
        nothing = before.pending_inputs[:, :0], before.pending_rates[:, :0], before.position * 0
        flushed.append(level_state(level, weights, momenta, *nothing))
    return tuple(flushed)


def _placed(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    index: int,
    state: Sequence[ContinuumLevelState | ContinuumClock | None],
    mask: torch.Tensor | None,
    counts: Counts,
    options: Options,
) -> _Level:
    """A level with its tokens in their chunks."""
    level, before = levels[index], state[index]
    inner = F.rms_norm(x, x.shape[-1:], level.norm.to(x.dtype), options.norm_eps)
    weights, momenta = initial_weights(level), NO_MOMENTA
    if not level.steps:
        return _Level(level, inner, weights, momenta, None, None)
    if before is not None:
        weights, momenta = fast_part(before, not options.through)
    rates = torch.as_tensor(level.rate, dtype=state_dtype(x.dtype), device=x.device).expand(x.shape[:2])
    grid = place_on_grid(inner, rates, before, mask, counts.positions[index], counts)
    size, length = level.chunk_size, grid.inputs.shape[1]
    # the step after the last token changes only the state
    steps = (length - (not options.keep_state)) // size
    if not steps:
        return _Level(level, inner, weights, momenta, grid, None)
    dtype, exact = _read_dtype(inner), not options.products.IN_PLACE
    head = size if grid.first else 0  # the first chunk, where it is read in part
    with options.following(), without_autocast(inner.device.type):
        if exact:  # as the weights are; other products round to what is read
            inputs = grid.inputs[:, : steps * size]
        else:
            inputs = (grid.inputs if head else grid.reads)[:, : steps * size].to(dtype)
        as_read = level.key is None and inputs.dtype == dtype
        keys = eager.keys_of(level, inputs[:, :head] if as_read else inputs, options.norm_eps)
        rates = grid.rates[:, : steps * size]
        if level.predict_next:
            inputs, rates = _ahead(inputs, size), _ahead(rates, size)
        elif not exact:
            inputs = inputs[:, :head]  # the others are what is read
        targets = _targets(level, inputs) if exact else inputs
        parts = [in_chunks(t, 0, size) for t in (keys, targets, rates)]
    stops = [*range(size, length, size), length]
    chunks = [Chunk(*each) for each in itertools.zip_longest(*parts, range(len(stops)), stops)]
    resets = Resets.of(levels, index, options.variant, state, counts.positions)
    call = LevelCall(level, resets, grid.lengths, grid.first, dtype, options.products, chunks)
    return _Level(level, inner, weights, momenta, grid, call)


def _walked(
    group: Sequence[_Level], options: Options
) -> tuple[list[tuple[torch.Tensor, ContinuumLevelState | None]], list[Step]]:
    """Of each level the outputs [B, T, D] and the state after them; and the steps yet to be taken."""
    results = [None if of.call else (_plain(of, options), of.weights, of.momenta) for of in group]
    stepping, last_steps = [i for i, of in enumerate(group) if of.call], []
    if stepping:
        calls, states, reads, leaves = [], [], [], []
        with without_autocast(group[0].inner.device.type):
            for of in (group[i] for i in stepping):
                calls.append(of.call)
                states.append((of.weights, of.momenta))
                reads.append(of.grid.reads.to(of.call.dtype))
                leaves += (*of.weights, *initial_weights(of.level))
            records = not options.through and needs_gradient(*reads, *leaves)
            spans = [_spans(call, part, options) for call, part in zip(calls, reads)]
            if (options.through or records) and any(len(each) > 1 or not each[0][2] for each in spans):
                each = zip(calls, reads, states, spans)
                walked = [_in_segments(*part, records, options) for part in each]
            else:
                walked, last_steps = _untraced()(calls, reads, states, records, options)
        for i, (y, *last) in zip(stepping, walked):
            results[i] = (group[i].grid.restored(y, *group[i].inner.shape[:2]), *last)
    after = []
    for of, (y, *last) in zip(group, results):
        state = None
        if options.keep_state and of.grid is not None:
            # steps that are yet to be taken write these very weights
            state = level_state(of.level, *last, *pending_tokens(of.grid, of.level.chunk_size))
        after.append((y, state))
    return after, last_steps


def walk_levels(
    calls: Sequence[LevelCall],
    reads: Sequence[torch.Tensor],
    states: Sequence[tuple[Weights, Weights]],
    records: bool,
    options: Options,
) -> tuple[list[tuple[torch.Tensor, Weights, Weights]], list[Step]]:
    """Outputs, weights and momenta of each level, and the steps yet to be taken."""
    if records:
        return walk_recorded(calls, reads, states, options.keep_state), []
    with options.following():
        walks = [call.walk(*before, False) for call, before in zip(calls, states)]
        steps = walk(walks, reads)
        return [(torch.cat(each.outputs, dim=1), each.weights, each.momenta) for each in walks], steps


def _spans(call: LevelCall, reads: torch.Tensor, options: Options) -> list[tuple[int, int, bool]]:
    """Of a level's chunks those that go together in the backward, and whether their activations are kept."""
    level, (batch, _, width) = call.level, reads.shape
    hidden, gated = level.up.shape[-2], level.gate is not None
    numbers, tokens = (2 + gated) * batch * hidden * width, batch * level.chunk_size
    fast, read = (torch.finfo(dtype).bits // 8 for dtype in (state_dtype(call.dtype), call.dtype))
    if options.through:  # counted, of autograd's
        weights = 1 + level.restore_norms + 2 * (level.rule == "muon")
        chunk = fast * (weights * numbers + tokens * ((20 if gated else 11) * hidden + 13 * width))
    else:
        chunk = read * (numbers + tokens * ((2 + gated) * hidden + 3 * width))
    state = fast * numbers * (1 + (level.rule in RULES_WITH_MOMENTUM))
    size = Footprint(state, chunk, KEPT_MEGABYTES["continuum"] << 20)
    return spans(len(call.chunks), options.checkpoint_every, size)


def _in_segments(
    call: LevelCall,
    reads: torch.Tensor,
    state: tuple[Weights, Weights],
    parts: Sequence[tuple[int, int, bool]],
    records: bool,
    options: Options,
) -> tuple[torch.Tensor, Weights, Weights]:
    """One level, which keeps for the backward the weights between parts, and all of those that say so."""
    first, outputs = call.first, []
    bounds = [first, *(call.chunks[stop - 1].stop for _, stop, _ in parts)]
    options = options._replace(keep_state=True)
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    for (begin, stop, kept), x in zip(parts, reads.split(lengths, dim=1)):
        some, first = call._replace(chunks=call.chunks[begin:stop], first=first), 0
        # tensors one by one: an outer checkpoint drops no others
        leaves, layout = tree_flatten(([some], [x], [state], records, options))
        if kept:
            ((y, *state),), _ = _laid_out(layout, *leaves)
        else:
            ((y, *state),), _ = checkpoint(
                _laid_out, layout, *leaves, use_reentrant=False, preserve_rng_state=False
            )
        outputs.append(y)
    return torch.cat(outputs, dim=1), *state


def _laid_out(layout: TreeSpec, *leaves: Any) -> tuple[list[tuple[torch.Tensor, Weights, Weights]], list]:
    return _untraced()(*tree_unflatten(leaves, layout))


def _untraced() -> Callable:
    if compiler_at_work():
        from nl_kernels.untraced import walk_levels as found

        return found
    return walk_levels


def _plain(of: _Level, options: Options) -> torch.Tensor:
    """Tokens without a step between them, where they lie: with weights of all sequences as a plain block."""
    if not options.products.IN_PLACE or of.weights.up.ndim == 2:
        return eager.mlp(of.inner, *of.weights)
    with without_autocast(of.inner.device.type):
        x = of.inner.to(_read_dtype(of.inner)).contiguous()
        return registration.mlp(x, *contiguous(of.weights), options.products.IMPL)


def _read_dtype(inner: torch.Tensor) -> torch.dtype:
    """What tokens are read in; autocast leaves fp64 as it is."""
    device = inner.device.type
    rounds = autocasting(device) and inner.dtype != torch.float64
    return torch.get_autocast_dtype(device) if rounds else inner.dtype


def _ahead(x: torch.Tensor, size: int) -> torch.Tensor:
    """Of each token of x [B, n · size, ..] the next one of its chunk; zeros behind the last."""
    chunks = x.unflatten(1, (-1, size))
    return torch.cat((chunks[:, :, 1:], torch.zeros_like(chunks[:, :, :1])), 2).flatten(1, 2)


def _targets(level: ContinuumLevel, inputs: torch.Tensor) -> torch.Tensor:
    return F.linear(inputs, level.value.to(inputs.dtype))


def _constant_step(weight: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """The new weight, with the gradient of the one before the step."""
    return new if weight is None or not needs_gradient(weight) else new + (weight - weight.detach())
