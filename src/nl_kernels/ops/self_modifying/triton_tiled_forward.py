"""Chunks too large for one program: the forward pass, chunk after chunk of :mod:`.triton_tiled_chunk`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.chunk_kernels import tiled_call
from nl_kernels.chunk_kernels.tiled_launch import Operand, Schedule, part_of, slot_of, whole
from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.rows import ABSENT, TiledInputs, tiled_inputs, tokens_of_rows, unstack_rows
from nl_kernels.ops.self_modifying.state import MemoryStack
from nl_kernels.ops.self_modifying.triton_tiled_chunk import TiledChunks
from nl_kernels.triton_support.kernel_call import run_calls
from nl_kernels.triton_support.targets import architecture_of


class TiledResults(NamedTuple):
    """What the forward pass fills: reads [N, S, D], states after the call by layer, those kept by slot.

    Velocities follow the running states among those kept.
    """

    o: torch.Tensor
    running: list[torch.Tensor]
    velocity: list[torch.Tensor]
    snapshot: list[torch.Tensor]
    kept: list[torch.Tensor]


class Snapshots:
    """The snapshots after the call, from which chunks within a slower clock's period serve on the way.

    Args:
        known: those before the call; the running states where those are the snapshots.
    """

    def __init__(self, chunks: TiledChunks, known: list[torch.Tensor]) -> None:
        self.chunks, self.inputs, options = chunks, chunks.inputs, chunks.options
        self.results = [torch.empty_like(x) for x in known]
        self.ragged = self.inputs.begin is not None
        self.end = options.offset + chunks.grid.tokens
        self.at_boundary = not self.ragged and self.end % options.chunk == 0
        if self.ragged or chunks.ratio > 1 or (chunks.grid.chunks == 1 and not self.at_boundary):
            self._take([whole(x) for x in known], "always", slow=None)

    @property
    def slow(self) -> list[Operand] | None:
        """Of the slower clock, where there are two."""
        return [whole(x) for x in self.results] if self.chunks.ratio > 1 else None

    def before_chunk(self, chunk: int, running: list[Operand]) -> None:
        """The faster clock's, ahead of the last chunk of a row."""
        if chunk and self.ragged:
            self._take(running, "last", index=chunk)
        elif chunk and chunk == self.chunks.grid.chunks - 1 and not self.at_boundary:
            self._take(running, "always")

    def after_chunk(self, chunk: int, running: list[Operand]) -> None:
        """The slower clock's where it strikes, and the faster one's at the end of the call."""
        chunks, options = self.chunks, self.chunks.options
        period = chunks.ratio * options.chunk
        end = (options.offset // options.chunk + chunk + 1) * options.chunk
        if self.inputs.origin is not None:
            self._take(running, "met", slow=True, clock=period)
        elif end % period == 0 and (self.ragged or end <= self.end):
            self._take(running, "at" if self.ragged else "always", slow=True, index=end)
        if chunk == chunks.grid.chunks - 1 and (self.ragged or self.at_boundary):
            self._take(running, "met" if self.ragged else "always")

    def _take(self, running: list[Operand], when: str, *, slow: bool | None = False, **options: int) -> None:
        """Copy the rows of one clock; ``None``: of both."""
        for i, (source, to) in enumerate(zip(running, self.results)):
            parts = [(0, to.shape[1])] if slow is None else self.chunks.clock_rows(i, slow=slow)
            for first, stop in parts:
                source_part, to_part = part_of(source, first), part_of(whole(to), first)
                shape = stop - first, to.shape[2]
                tiled_call.move(self.chunks.schedule, source_part, to_part, shape, when=when, **options)


def plan_forward(
    inputs: TiledInputs, options: launch.Options, *, architecture: str
) -> tuple[Schedule, TiledResults]:
    """The kernels' calls, and what they fill."""
    chunks = TiledChunks(inputs, options, architecture, keeps=False)
    s, given = chunks.schedule, inputs.carried()
    step, ahead = options.checkpoint_every, options.offset // options.chunk
    o = torch.empty_like(inputs.query) if inputs.begin is None else torch.zeros_like(inputs.query)
    final = [torch.empty_like(x) for x in given]
    slots = -(-options.chunks // step) if step else 0
    kept = [x.new_empty((len(x), slots, *x.shape[1:])) for x in given] if step else []
    known = [x if y is None else y for x, y in zip(given, inputs.states("snapshot"))]
    snapshots = Snapshots(chunks, known)
    before = [whole(x) for x in given]
    last = chunks.grid.chunks - 1
    for chunk in range(last + 1):
        place = ahead + chunk  # among the chunks of the slower clock's period
        if step and (chunk == 0 or (step > 1 and place % step == 0)):
            for x, to in zip(before, kept):
                tiled_call.move(s, x, slot_of(to, place // step), to.shape[2:])
        snapshots.before_chunk(chunk, before)
        chunks.take_weights(before, chunk, snapshots.slow)
        chunks.generate(o)
        chunks.serve_and_write()
        chunks.read_queries(o)
        in_slot = step == 1 and chunk < last
        after = [slot_of(x, place + 1) for x in kept] if in_slot else [whole(x) for x in final]
        chunks.carry(before, after)
        snapshots.after_chunk(chunk, after)
        before = after
    count = len(chunks.layers)
    return s, TiledResults(o, final[:count], final[count:], snapshots.results, kept)


def self_modifying_forward(*tensors: torch.Tensor | None, options: launch.Options):
    """As :func:`.triton_forward.self_modifying_forward`; kept states are those of :class:`TiledResults`."""
    inputs = tiled_inputs(*tensors)
    device, batch = inputs.query.device, len(tensors[0])
    schedule, results = plan_forward(inputs, options, architecture=architecture_of(device))
    run_calls(schedule.calls, device)
    linear = inputs.running_first is None

    def stacked(parts: list[torch.Tensor]) -> MemoryStack:
        return ABSENT if not parts else MemoryStack(None, *parts, None) if linear else MemoryStack(*parts)

    running, velocity, snapshot = (
        unstack_rows(stacked(x), batch) for x in (results.running, results.velocity, results.snapshot)
    )
    count = len(results.running)
    kept = (stacked(x) for x in (results.kept[:count], results.kept[count:]))
    o = tokens_of_rows(results.o, batch)
    return (o, *running, *velocity, *snapshot, *(part for stack in kept for part in stack))
