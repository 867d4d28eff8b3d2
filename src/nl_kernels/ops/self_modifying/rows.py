"""What every chunked implementation does around its loop over chunks: tokens onto the grid, states to rows.

A row is one head of one sequence, N = B · H in all. The implementations differ in how they lay rows out, so
tokens stay [B, T, H, ..] here and each flattens them as its products want them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.chunk_alignment import ChunkGrid, place_on_grid
from nl_kernels.ops.self_modifying.state import MemoryStack, SelfModifyingState, map_stack

ABSENT = MemoryStack(None, None, None)
GATE_ROWS = 16
"""Rows below those of linear memories: the two gates, and zeros, so that rows of tokens are aligned."""


class Placed(NamedTuple):
    """The tokens of a call on a grid of chunks of which ``grid.offset`` is the first token's slot.

    Attributes:
        query, key_input, value_input, gate_input: [B, T, H, D].
        momentum: [B, T, H], or ``None``.
        applied: [B, T] bool, False in empty slots; ``None`` when there are none.
        grid: where the tokens went.
        mask: the caller's mask, for :func:`collect_output`.
        length: tokens a sequence before they were placed.
    """

    query: torch.Tensor
    key_input: torch.Tensor
    value_input: torch.Tensor
    gate_input: torch.Tensor
    momentum: torch.Tensor | None
    applied: torch.Tensor | None
    grid: ChunkGrid
    mask: torch.Tensor | None
    length: int


def place_tokens(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    momentum: torch.Tensor | None,
    mask: torch.Tensor | None,
    position: torch.Tensor,
    *,
    period: int,
    at_boundary: bool,
) -> Placed:
    """Bring a call's tokens onto a grid with a boundary every ``period`` tokens.

    Args:
        position: [B], tokens since each sequence's last boundary.
        at_boundary: every position is known to be 0 (spares reading them).
    """
    length = query.shape[1]
    grid = place_on_grid(position, mask, length, period, at_boundary)
    sequences = [query, key_input, value_input, gate_input, momentum]
    applied = mask
    if grid.alignment is not None:
        sequences = [None if x is None else grid.alignment.gather(x) for x in sequences]
        applied = grid.alignment.valid
    return Placed(*sequences, applied, grid, mask, length)


def collect_output(o: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Outputs on the grid [B, .., H, D] back at their tokens [B, T, H, D]; padding is zero."""
    alignment = placed.grid.alignment
    if alignment is not None:
        return alignment.scatter(o, len(o), placed.length)
    if placed.mask is not None:
        return o.masked_fill(~placed.mask[:, :, None, None], 0)
    return o


def collect_state(
    running: MemoryStack, velocity: MemoryStack, snapshot: MemoryStack, placed: Placed
) -> SelfModifyingState:
    """The state after the call from its stacks; an absent snapshot equals ``running``."""
    return SelfModifyingState(
        running if snapshot.last is None else snapshot,
        running,
        placed.grid.position,
        None if placed.momentum is None else velocity,
    )


def memory_first(stack: MemoryStack) -> MemoryStack:
    """[B, H, m, out, in] as [m · B · H, out, in]; a gate's rows become matrices of one row."""
    stack = stack._replace(gate=stack.gate[..., None, :])
    return map_stack(lambda x: x.permute(2, 0, 1, 3, 4).flatten(0, 2), stack)


def sequence_first(stack: MemoryStack, batch: int, heads: int) -> MemoryStack:
    """The inverse of :func:`memory_first`; an absent stack stays absent."""
    if stack.last is None:
        return stack
    stack = map_stack(lambda x: x.unflatten(0, (-1, batch, heads)).permute(1, 2, 0, 3, 4), stack)
    return stack._replace(gate=stack.gate[..., 0, :])


class TiledInputs(NamedTuple):
    """A call by rows, as the tiled kernels take it.

    Attributes:
        query, key_input, value_input, gate_input: [N, S, D]; momentum: [N, S] or ``None``.
        rate_max, rate_bias, retention_bias: [N].
        anchor, running, velocity and snapshot: first layers [N, 5h, D], last ones [N, 3D, h] and gates
            [N, 2, h], one memory below the other. Linear memories have all in one, ``…_last`` [N, 3D +
            GATE_ROWS, D]. ``None``: without an anchor, without momentum, or where every row starts at a
            boundary.
        begin, stop: [N] int64, each row's slots are begin … stop − 1; ``None`` when all rows have the same.
        origin: [N] int64, the slot of the row's one token where the call has one; ``None``: 0, or the offset
            of all rows.
    """

    query: torch.Tensor
    key_input: torch.Tensor
    value_input: torch.Tensor
    gate_input: torch.Tensor
    momentum: torch.Tensor | None
    rate_max: torch.Tensor
    rate_bias: torch.Tensor
    retention_bias: torch.Tensor
    anchor_first: torch.Tensor | None
    anchor_last: torch.Tensor | None
    anchor_gate: torch.Tensor | None
    running_first: torch.Tensor | None
    running_last: torch.Tensor
    running_gate: torch.Tensor | None
    velocity_first: torch.Tensor | None
    velocity_last: torch.Tensor | None
    velocity_gate: torch.Tensor | None
    snapshot_first: torch.Tensor | None
    snapshot_last: torch.Tensor | None
    snapshot_gate: torch.Tensor | None
    begin: torch.Tensor | None
    stop: torch.Tensor | None
    origin: torch.Tensor | None

    def states(self, name: str) -> list[torch.Tensor | None]:
        """The parts of a stack that there are in this kind of memory."""
        parts = [getattr(self, f"{name}_{part}") for part in MemoryStack._fields]
        return parts[1:2] if self.running_first is None else parts

    def carried(self) -> list[torch.Tensor]:
        """The running states and, with momentum, the velocities."""
        return self.states("running") + (self.states("velocity") if self.momentum is not None else [])


def tiled_inputs(*tensors: torch.Tensor | None) -> TiledInputs:
    """The operator's tensors by row: four inputs and momentum, spans [B, 3], gate parameters, four stacks."""
    *tokens, spans, rate_max, rate_bias, retention_bias = tensors[:9]
    batch, length, heads, _ = tokens[0].shape
    slots = [None] * 3
    if spans is not None:
        origin, begin, stop = (x.repeat_interleave(heads) for x in spans.unbind(1))
        slots = [begin, stop, origin if length == 1 else None]
    stacks = [stack_rows(MemoryStack(*tensors[i : i + 3])) for i in range(9, 21, 3)]
    return TiledInputs(
        *(None if x is None else rows_of_tokens(x) for x in tokens),
        *(x.repeat(batch) for x in (rate_max, rate_bias, retention_bias)),
        *(part for stack in stacks for part in stack),
        *slots,
    )


def stack_rows(stack: MemoryStack) -> MemoryStack:
    """[B, H, m, out, in] as :class:`TiledInputs` has it; an absent stack stays absent."""
    if stack.last is None:
        return ABSENT
    last, gate = stack.last.flatten(2, 3).flatten(0, 1), stack.gate.flatten(0, 1)
    if stack.first is None:
        padding = last.new_zeros(len(last), GATE_ROWS - gate.shape[1], last.shape[2])
        return MemoryStack(None, torch.cat([last, gate, padding], 1), None)
    first = stack.first.flatten(2, 3).flatten(0, 1)
    return MemoryStack(*(x.contiguous() for x in (first, last, gate)))


def unstack_rows(stack: MemoryStack, batch: int) -> MemoryStack:
    """The inverse of :func:`stack_rows`, in memory of its own."""
    if stack.last is None:
        return ABSENT
    if stack.first is None:
        width = stack.last.shape[2]
        last, gate, _ = stack.last.split([3 * width, 2, GATE_ROWS - 2], 1)
        stack = MemoryStack(None, last, gate)
    parts = [None if x is None else x.unflatten(0, (batch, -1)) for x in stack]
    first, last, gate = parts
    first = None if first is None else first.unflatten(2, (5, -1))
    stack = MemoryStack(first, last.unflatten(2, (3, -1)), gate)
    return map_stack(lambda x: x.clone(memory_format=torch.contiguous_format), stack)


def rows_of_tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, S, H, ..] as [N, S, ..]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def tokens_of_rows(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[N, S, ..] as [B, S, H, ..]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
