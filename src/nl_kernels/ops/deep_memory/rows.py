"""A call of ``deep_memory`` as rows on a grid of chunks: what every chunked implementation works on.

A row is one head of one sequence. Padding, packed input and sequences at different positions are brought onto
one grid (:mod:`nl_kernels.chunk_alignment`) and back here, so that implementations cannot differ in them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nl_kernels.chunk_alignment import ChunkGrid, place_on_grid
from nl_kernels.memory.loop import State
from nl_kernels.memory_rule import DeepMemoryWeights
from nl_kernels.ops.deep_memory.state import DeepMemoryState

Compute = Callable[[State, State, State, ChunkGrid], tuple[torch.Tensor, State]]


def run_on_rows(
    compute: Compute,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    anchored: bool,
    chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """Reads [B, T, H, Dv] and the state after the call, from what ``compute`` makes of N = B · H rows.

    Args:
        compute: ``(carried, anchor, sequences, grid) -> (reads [N, S, Dv], carried)``.
            ``carried``: running weights, velocities and snapshot, each inner [N, h, D] and outer [N, Dv, h];
            no snapshot means that it equals the running weights, in and out.
            ``anchor``: inner and outer, or ``None`` for a rule that is not anchored.
            ``sequences``: q, k, v [N, S, ·], rate, log decay, momentum [N, S, 1], and ``applied`` [N, S, 1],
            0 in slots that hold no token; ``None`` where all do.
            ``grid``: where the slots lie, for the N rows.
        q, k, v, rate, log_decay, momentum, anchor, state, chunk_size, mask: as in the op, in the
            state's dtype and with weights by sequence.
        anchored: whether the rule uses ``anchor``.
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
    """
    batch, length, heads, _ = q.shape
    grid = place_on_grid(state.position, mask, length, chunk_size, at_boundary)
    sequences = [q, k, v, rate[..., None], log_decay[..., None]]
    sequences.append(None if momentum is None else momentum[..., None])
    if grid.alignment is not None:
        sequences = [None if x is None else grid.alignment.gather(x) for x in sequences]
    applied = mask if grid.alignment is None else grid.alignment.valid
    if applied is not None:
        applied = applied[:, :, None, None].expand(*applied.shape, heads, 1).to(q.dtype)
    sequences.append(applied)
    sequences = [None if x is None else x.transpose(1, 2).flatten(0, 1) for x in sequences]

    snapshot = (None, None) if at_boundary else state.snapshot
    carried = [*state.running, *(state.momentum or (None, None)), *snapshot]
    carried = [None if x is None else x.flatten(0, 1) for x in carried]
    constants = [None if x is None or not anchored else x.flatten(0, 1) for x in anchor]
    o, carried = compute(tuple(carried), tuple(constants), tuple(sequences), grid.for_heads(heads))

    o = o.unflatten(0, (batch, heads)).transpose(1, 2)
    if grid.alignment is not None:
        o = grid.alignment.scatter(o, batch, length)
    elif mask is not None:
        o = o.masked_fill(~mask[:, :, None, None], 0)
    running, velocity, snapshot = (
        DeepMemoryWeights(*(None if x is None else x.unflatten(0, (batch, heads)) for x in part))
        for part in (carried[0:2], carried[2:4], carried[4:6])
    )
    return o, DeepMemoryState(
        running if snapshot.inner is None else snapshot,
        running,
        grid.position,
        None if momentum is None else velocity,
    )
