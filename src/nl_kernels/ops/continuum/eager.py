"""Level by level, chunk by chunk, batched over sequences; exact gradients by autograd through the steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nl_kernels.dispatch import autocasting, needs_gradient, without_autocast
from nl_kernels.ops.continuum.chunk_step import NO_MOMENTA, Weights, keys_of, learn, mlp, row_norms, serve
from nl_kernels.ops.continuum.eager_backward import serve_detached
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


class Chunk(NamedTuple):
    """The slots of one chunk; what is learned from them is None where no step follows."""

    read: int  # how many of its slots are read: the last ones
    keys: torch.Tensor | None  # [B, C, D]; None also where the keys are what is read
    targets: torch.Tensor | None  # [B, C, D]
    rates: torch.Tensor | None  # [B, C]
    number: int  # since the first slot
    stop: int  # the slot after its last


def continuum_memory_eager(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str,
    level_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    initial_state: ContinuumState | None,
    output_final_state: bool,
    detach_updates: bool,
    norm_eps: float,
    checkpoint_every: int | None,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """See :func:`nl_kernels.continuum_memory`."""
    counts = Counts.of(len(levels), initial_state, mask)
    mask = None if counts.tokens is None else mask
    state, total = [], x
    for index, level in enumerate(levels):
        inner = F.rms_norm(x, x.shape[-1:], level.norm.to(x.dtype), norm_eps)
        initial = Weights(level.up, level.down, level.gate)
        before = None if initial_state is None else initial_state[index]
        if not level.steps:
            y, after = mlp(inner, *initial), None
            if entry_type(levels, index, variant) is ContinuumClock:
                after = clock_after(level, before, x, mask)
        else:
            resets = Resets.of(levels, index, variant, initial_state, counts.positions)
            run = SteppingLevel(level, resets, norm_eps, checkpoint_every, output_final_state, detach_updates)
            y, after = run(inner, initial, before, mask, counts.positions[index], counts.tokens)
        state.append(after)
        if level_weights is not None:
            y = level_weights[index].to(y.dtype) * y
        total = total + y
        if variant != "independent":
            x = total
    if mask is not None:
        total = total.masked_fill(~mask[..., None], 0.0)
    return total, tuple(state) if output_final_state else None


def continuum_flush_eager(
    state: ContinuumState,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str,
    detach_updates: bool,
    norm_eps: float,
) -> ContinuumState:
    """See :func:`nl_kernels.continuum_flush`."""
    flushed = []
    for index, (level, before) in enumerate(zip(levels, state)):
        if not isinstance(before, ContinuumLevelState):
            flushed.append(before and ContinuumClock(before.position * 0))
            continue
        run = SteppingLevel(level, None, norm_eps, None, True, detach_updates)
        weights, momenta = run.flushed(before)
        if variant == "nested" and index + 1 < len(levels) and state[index + 1] is not None:
            slower_steps = (state[index + 1].position > 0)[:, None, None]
            weights = chosen(slower_steps, Weights(level.up, level.down, level.gate), weights)
            momenta = chosen(slower_steps, NO_MOMENTA, momenta)
        nothing = before.pending_inputs[:, :0], before.pending_rates[:, :0], before.position * 0
        flushed.append(level_state(level, weights, momenta, *nothing))
    return tuple(flushed)


class SteppingLevel(NamedTuple):
    """A level that learns, in one call."""

    level: ContinuumLevel
    resets: Resets | None
    norm_eps: float
    checkpoint_every: int | None
    keep_state: bool
    detach_updates: bool

    def __call__(
        self,
        inner: torch.Tensor,
        weights: Weights,
        before: ContinuumLevelState | None,
        mask: torch.Tensor | None,
        position: Sequence[int] | None,
        tokens: Sequence[int] | None,
    ) -> tuple[torch.Tensor, ContinuumLevelState | None]:
        """The MLP's outputs [B, T, D] (at padding: anything) and the state after them."""
        rates = torch.as_tensor(self.level.rate, dtype=state_dtype(inner.dtype), device=inner.device)
        rates = rates.expand(inner.shape[:2])
        momenta = NO_MOMENTA
        if before is not None:
            weights, momenta = fast_part(before, self.detach_updates)
        grid = place_on_grid(inner, rates, before, mask, position, tokens)
        length, size = grid.inputs.shape[1], self.level.chunk_size
        # the step after the last token changes only the state
        steps = (length if self.keep_state else length - 1) // size
        if not steps:
            # no step between the tokens: they are read where they lie
            y = mlp(inner, *weights)
        else:
            y, weights, momenta = self.walk(weights, momenta, grid, self.split(grid, steps))
            y = grid.restored(y, *inner.shape[:2])
        if not self.keep_state:
            return y, None
        return y, level_state(self.level, weights, momenta, *pending_tokens(grid, size))

    def split(self, grid: Grid, steps: int) -> list[Chunk]:
        """The chunks of the grid, with keys and targets for the first ``steps``."""
        length, size = grid.inputs.shape[1], self.level.chunk_size
        stops = [*range(size, length, size), length]
        reads = [stops[0] - grid.first, *(b - a for a, b in itertools.pairwise(stops))]
        inputs = grid.inputs[:, : steps * size]
        with without_autocast(inputs.device.type), self.recording():
            # split, not slices: the gradient of a slice is as long as the sequence
            keys = keys_of(self.level, inputs, self.norm_eps).split(size, dim=1)
            targets = F.linear(inputs, self.level.value.to(inputs.dtype)).split(size, dim=1)
            rates = grid.rates[:, : steps * size].split(size, dim=1)
        if (
            self.level.key is None
            and grid.reads.dtype == inputs.dtype
            and not autocasting(inputs.device.type)
        ):
            keys = [key if read < size else None for key, read in zip(keys, reads)]
        return [
            Chunk(read, *parts, number, stop)
            for number, (read, *parts, stop) in enumerate(
                itertools.zip_longest(reads, keys, targets, rates, stops)
            )
        ]

    def recording(self) -> torch.autograd.grad_mode.set_grad_enabled:
        """Whether what a step is made of is recorded for the backward pass."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_updates)

    @torch.compiler.disable(
        reason="continuum_memory's steps are a loop over chunks, which a trace would unroll; "
        "without fullgraph=True it runs as it is"
    )
    def walk(
        self, weights: Weights, momenta: Weights, grid: Grid, chunks: Sequence[Chunk]
    ) -> tuple[torch.Tensor, Weights, Weights]:
        """Outputs for all slots that are read, and the last weights and momenta."""
        every = self.checkpoint_every
        if every is None or not torch.is_grad_enabled():
            return self.serve(chunks, grid.lengths, grid.reads, weights, momenta)
        groups = [chunks[begin : begin + every] for begin in range(0, len(chunks), every)]
        outputs = []
        for group, reads in zip(groups, grid.reads.split([sum(c.read for c in g) for g in groups], dim=1)):
            y, weights, momenta = checkpoint(
                self.serve,
                group,
                grid.lengths,
                reads,
                weights,
                momenta,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            outputs.append(y)
        return torch.cat(outputs, dim=1), weights, momenta

    def serve(
        self,
        chunks: Sequence[Chunk],
        lengths: torch.Tensor | None,
        reads: torch.Tensor,
        weights: Weights,
        momenta: Weights,
    ) -> tuple[torch.Tensor, Weights, Weights]:
        """Reads each chunk, then steps."""
        level = self.level
        if self.detach_updates and needs_gradient(reads, *weights, level.up, level.down, level.gate):
            return serve_detached(self, chunks, lengths, reads, weights, momenta)
        norms, outputs = row_norms(self.level), []
        for chunk, inner in zip(chunks, reads.split([c.read for c in chunks], dim=1)):
            shared = None
            if chunk.targets is not None and chunk.keys is None:
                shared = serve(inner, weights)
                outputs.append(shared.outputs.down)
            elif chunk.read:
                outputs.append(mlp(inner, *weights))
            if chunk.targets is not None:
                weights, momenta = self.stepped(weights, momenta, norms, chunk, inner, shared, lengths)
        return torch.cat(outputs, dim=1) if outputs else reads, weights, momenta

    def stepped(
        self,
        weights: Weights,
        momenta: Weights,
        norms: Weights | None,
        chunk: Chunk,
        inner: torch.Tensor,
        served: object,
        lengths: torch.Tensor | None,
    ) -> tuple[Weights, Weights]:
        """Weights and momenta after a chunk: of those sequences that fill it; the others keep theirs."""
        reset = self.resets is not None and self.resets.after(chunk.number)
        start = Weights(self.level.up, self.level.down, self.level.gate)
        if reset is True and lengths is None:
            return start, NO_MOMENTA
        weights = Weights(*(None if w is None else w.to(chunk.targets.dtype) for w in weights))
        # reduced precision is for the reads: steps accumulate
        with without_autocast(chunk.targets.device.type):
            keys = inner if chunk.keys is None else chunk.keys
            served = serve(keys, weights) if served is None else served
            new, after = learn(self.level, weights, momenta, norms, served, keys, chunk.targets, chunk.rates)
        if reset is not False:
            reset = torch.as_tensor(reset, device=inner.device).view(-1, 1, 1)
            new, after = chosen(reset, start, new), chosen(reset, NO_MOMENTA, after)
        if lengths is None:
            return new, after
        full = (lengths >= chunk.stop)[:, None, None]
        return chosen(full, new, weights), chosen(full, after, momenta)

    def flushed(self, before: ContinuumLevelState) -> tuple[Weights, Weights]:
        """Weights and momenta after a step on the pending tokens, of those sequences that have any."""
        weights, momenta = fast_part(before, self.detach_updates)
        pending = before.pending_rates.shape[1]
        if not pending:
            return weights, momenta
        taken = torch.arange(pending, device=before.position.device) < before.position[:, None]
        inputs, rates = before.pending_inputs * taken[..., None], before.pending_rates * taken
        keys = keys_of(self.level, inputs, self.norm_eps)
        chunk = Chunk(0, keys, F.linear(inputs, self.level.value.to(inputs.dtype)), rates, 0, 1)
        _, weights, momenta = self.serve([chunk], before.position, inputs[:, :0], weights, momenta)
        return weights, momenta
