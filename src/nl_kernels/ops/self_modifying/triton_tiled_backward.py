"""Chunks too large for one program: the backward pass as tiled products, a fixed number of kernels a chunk.

A chunk is computed again from the state that was kept at its start, and then differentiated.
"""

from __future__ import annotations

import torch

from nl_kernels.chunk_kernels import tiled_call
from nl_kernels.chunk_kernels.tiled_launch import Operand, Schedule, part_of, slot_of, whole
from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.rows import (
    ABSENT,
    TiledInputs,
    rows_of_tokens,
    stack_rows,
    tiled_inputs,
    tokens_of_rows,
    unstack_rows,
)
from nl_kernels.ops.self_modifying.state import MemoryStack
from nl_kernels.ops.self_modifying.triton_tiled_adjoint_buffers import TiledGradients
from nl_kernels.ops.self_modifying.triton_tiled_chunk import TiledChunks
from nl_kernels.ops.self_modifying.triton_tiled_chunk_adjoint import TiledAdjoint
from nl_kernels.triton_support.kernel_call import run_calls
from nl_kernels.triton_support.targets import architecture_of


def plan_backward(
    grad_o: torch.Tensor,
    final: list[torch.Tensor | None],
    velocity: list[torch.Tensor | None],
    snapshot: list[torch.Tensor | None],
    inputs: TiledInputs,
    kept: list[torch.Tensor],
    options: launch.Options,
    *,
    architecture: str,
) -> tuple[Schedule, TiledGradients]:
    """The kernels' calls, and what they fill.

    Args:
        grad_o, final, velocity, snapshot: cotangents of the reads [N, S, D] and, by layer, of the states
            after the call; ``None`` is zero.
        kept: the states that the forward pass kept, with momentum and velocities.
    """
    given, resumed = inputs.states("running"), inputs.snapshot_last is not None
    tokens = (inputs.query, inputs.key_input, inputs.value_input, inputs.gate_input, inputs.momentum)
    like = torch.empty_like if inputs.begin is None else torch.zeros_like
    gradients = TiledGradients(
        *(None if x is None else like(x) for x in tokens),
        inputs.query.new_zeros(len(inputs.query), 3),
        *(
            [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(like_parts, parts)]
            for like_parts, parts in (
                (given, final),
                (inputs.carried()[len(given) :], velocity),
                (given, snapshot),
            )
        ),
        [None if x is None else torch.zeros_like(x) for x in inputs.states("anchor")],
    )
    chunks = TiledChunks(inputs, options, architecture, keeps=True)
    s, adjoint = chunks.schedule, TiledAdjoint(chunks, grad_o, gradients)
    boundaries = Boundaries(chunks, gradients, pending=any(x is not None for x in snapshot))
    rerun = Rerun(chunks, kept)
    last = chunks.grid.chunks - 1
    boundaries.meet(last + 1)
    for chunk in range(last, -1, -1):
        before = rerun.states_before(chunk)
        chunks.take_weights(before, chunk, rerun.slow_of(chunk))
        chunks.generate(None)
        chunks.serve_and_write()
        chunks.read_queries(None)
        adjoint.chunk_adjoint(before)
        if chunk:
            boundaries.meet(chunk)
    if not resumed:
        boundaries.join()
    return s, gradients


class Boundaries:
    """What happens to adjoints where a clock strikes: a snapshot's joins that of the running weights.

    Args:
        pending: whether snapshots after the call have cotangents, which wait for their rows' last boundary.
    """

    def __init__(self, chunks: TiledChunks, gradients: TiledGradients, *, pending: bool) -> None:
        self.chunks, self.gradients, self.pending = chunks, gradients, pending
        self.ahead = chunks.options.offset // chunks.options.chunk

    def meet(self, chunk: int) -> None:
        """The instant before ``chunk``; rows that are within a call there meet a boundary."""
        chunks, options = self.chunks, self.chunks.options
        end, period = (self.ahead + chunk) * options.chunk, chunks.ratio * options.chunk
        if chunks.inputs.origin is not None:
            if options.truncate:
                self._forget("met", clock=options.truncate)
            self._join("met", slow=False, clock=options.chunk)
            self._join("met", slow=True, clock=period)
            return
        ragged = chunks.inputs.begin is not None
        if not ragged and end > options.offset + chunks.grid.tokens:
            return
        when = "at" if ragged else "always"
        if options.truncate and end % options.truncate == 0:
            self._forget(when, index=end)
        if self.pending or chunks.ratio > 1:
            self._join(when, slow=False, index=end)
            self.pending = ragged
            if end % period == 0:
                self._join(when, slow=True, index=end)

    def join(self) -> None:
        """At the start of the call, where the snapshots were the running weights."""
        if self.pending or self.chunks.ratio > 1:
            for slow in (False, True):
                self._join("always", slow=slow)

    def _join(self, when: str, *, slow: bool, **options: int) -> None:
        for i, (source, to) in enumerate(zip(self.gradients.snapshot, self.gradients.running)):
            for first, stop in self.chunks.clock_rows(i, slow=slow):
                parts = [part_of(whole(x), first) for x in (source, to)]
                shape = stop - first, to.shape[2]
                tiled_call.move(
                    self.chunks.schedule, *parts, shape, when=when, adds=True, clears=True, **options
                )

    def _forget(self, when: str, **options: int) -> None:
        """Cut the gradient off."""
        gradients = self.gradients
        for x in (*gradients.snapshot, *gradients.running, *gradients.velocity):
            tiled_call.move(
                self.chunks.schedule, whole(x), None, x.shape[1:], when=when, clears=True, **options
            )


class Rerun:
    """The states before each chunk, last chunk first, from those that the forward pass kept."""

    def __init__(self, chunks: TiledChunks, kept: list[torch.Tensor]) -> None:
        self.chunks, self.kept, self.step = chunks, kept, chunks.options.checkpoint_every
        self.ahead = chunks.options.offset // chunks.options.chunk
        self.stack = kept
        if self.step > 1:
            self.stack = [x.new_empty((len(x), self.step, *x.shape[2:])) for x in kept]

    def states_before(self, chunk: int) -> list[Operand]:
        """Those of a segment are made when its last chunk is asked for."""
        place = self.ahead + chunk
        ends = chunk == self.chunks.grid.chunks - 1 or place % self.step == self.step - 1
        if self.step > 1 and ends:
            first = max(0, chunk - place % self.step)
            for source, target in zip(self.kept, self.stack):
                to = slot_of(target, (self.ahead + first) % self.step)
                place_kept = slot_of(source, place // self.step)
                tiled_call.move(self.chunks.schedule, place_kept, to, source.shape[2:])
            for below in range(first, chunk):
                before = self._slots(below)
                self.chunks.take_weights(before, below, self.slow_of(below))
                self.chunks.generate(None)
                self.chunks.serve_and_write()
                self.chunks.carry(before, self._slots(below + 1))
        return self._slots(chunk)

    def slow_of(self, chunk: int) -> list[Operand] | None:
        """The snapshots of the slower clock that serve a chunk, where there are two."""
        chunks = self.chunks
        if chunks.ratio == 1:
            return None
        first = chunk - (self.ahead + chunk) % chunks.ratio
        given = chunks.inputs.states("snapshot")
        if first > 0 or (first == 0 and given[0] is None):
            return self._slots(first)
        return [whole(x) for x in given]

    def _slots(self, chunk: int) -> list[Operand]:
        place = self.ahead + chunk
        return [slot_of(x, place % self.step if self.step > 1 else place) for x in self.stack]


def self_modifying_backward(
    grad_o: torch.Tensor,
    grad_stacks: tuple[torch.Tensor | None, ...],
    *tensors: torch.Tensor | None,
    options: launch.Options,
) -> tuple[torch.Tensor | None, ...]:
    """As :func:`.triton_backward.self_modifying_backward`; kept states are those of the tiled kernels."""
    inputs = tiled_inputs(*tensors[:21])
    batch, heads, device = len(grad_o), grad_o.shape[2], grad_o.device
    linear, running = inputs.running_first is None, tensors[12:15]
    final, velocity, snapshot = (_cotangents(grad_stacks[i : i + 3], running) for i in (0, 3, 6))
    schedule, found = plan_backward(
        rows_of_tokens(grad_o),
        final,
        velocity,
        snapshot,
        inputs,
        [x for x in tensors[21:] if x is not None],
        options,
        architecture=architecture_of(device),
    )
    run_calls(schedule.calls, device)

    def stacked(parts: list[torch.Tensor | None]) -> MemoryStack:
        if not parts or parts[0] is None:
            return ABSENT
        return unstack_rows(MemoryStack(None, *parts, None) if linear else MemoryStack(*parts), batch)

    snapshots = MemoryStack(*(None if x is None else torch.zeros_like(x) for x in running))
    if inputs.snapshot_last is not None:
        snapshots = stacked(found.snapshot)
    tokens = (found.query, found.key_input, found.value_input, found.gate_input, found.momentum)
    by_head = found.parameters.view(batch, heads, 3).sum(0)
    return (
        *(None if x is None else tokens_of_rows(x, batch) for x in tokens),
        *(x.clone() for x in by_head.unbind(1)),  # outputs of an operator may not share memory
        *stacked(found.anchor),
        *stacked(found.running),
        *stacked(found.velocity),
        *snapshots,
    )


def _cotangents(
    stack: tuple[torch.Tensor | None, ...], like: tuple[torch.Tensor | None, ...]
) -> list[torch.Tensor | None]:
    """Those of a stack's parts by row, zeros in place of absent ones; ``None`` where all are absent."""
    if all(x is None for x in stack):
        return [None] * (3 if like[0] is not None else 1)
    parts = [None if x is None else torch.zeros_like(x) if g is None else g for g, x in zip(stack, like)]
    return [x for x in stack_rows(MemoryStack(*parts)) if x is not None]
