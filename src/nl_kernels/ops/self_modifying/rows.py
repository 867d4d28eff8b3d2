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
