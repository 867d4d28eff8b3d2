"""Chunked ``self_modifying_memory`` in PyTorch: a bank of five memories that makes its own tokens."""

from __future__ import annotations

import torch

from nl_kernels.memory.bank import Bank, Layout
from nl_kernels.memory.chunk import BankRule
from nl_kernels.memory.loop import Loop, run
from nl_kernels.memory.segments import footprint, plan_segments
from nl_kernels.memory_rule import MemoryRule, l2_normalize
from nl_kernels.ops.self_modifying.generate import GeneratedTokens
from nl_kernels.ops.self_modifying.rows import collect_output, place_tokens
from nl_kernels.ops.self_modifying.state import MemoryStack, SelfModifyingState


@torch.compiler.disable(
    reason="self_modifying_memory's eager path is a loop over chunks, which a trace would unroll; "
    "without fullgraph=True it runs as it is"
)
def self_modifying_memory_eager(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: MemoryStack,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: torch.Tensor,
    rate_bias: torch.Tensor,
    retention_bias: torch.Tensor,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    truncate_every: int | None,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
    operands: torch.dtype,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """As :func:`self_modifying_memory_reference`, by chunks of the faster clock.

    Args:
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
        checkpoint_every: chunks between the states kept for the backward pass.
        operands: the dtype of the caller's tokens.
    """
    batch, _, heads, width = query.shape
    period, chunk = max(chunk_size, generator_chunk_size), min(chunk_size, generator_chunk_size)
    placed = place_tokens(
        l2_normalize(query),
        key_input,
        value_input,
        gate_input,
        momentum,
        mask,
        state.position,
        period=period,
        at_boundary=at_boundary,
    )
    applied = None
    if placed.applied is not None:
        applied = placed.applied[:, :, None, None].expand(*placed.applied.shape, heads, 1).to(query.dtype)
    momentum = None if momentum is None else placed.momentum[..., None]
    sequences = (placed.key_input, placed.value_input, placed.query, placed.gate_input, momentum, applied)
    sequences = tuple(None if x is None else x.transpose(1, 2).flatten(0, 1) for x in sequences)

    running = to_bank(state.running)
    layout = Layout(batch * heads, width, True, len(running) == 1)
    absent = (None,) * layout.layers
    velocity = absent if state.momentum is None else to_bank(state.momentum)
    snapshot = absent if at_boundary else to_bank(state.snapshot)
    biases = torch.stack([rate_bias, retention_bias], -1).repeat(batch, 1)[:, None]
    gates = (rate_max.repeat(batch)[:, None, None], biases)
    constants = (*(to_bank(anchor) if rule.anchored else absent), *gates)
    loop = Loop(
        BankRule(rule, read, layout),
        GeneratedTokens(rule, layout, generator_chunk_size // chunk),
        (chunk_size, generator_chunk_size),
        None if truncate_every is None else chunk * truncate_every,
        placed.grid.for_heads(heads),
        operands,
    )
    size = footprint(layout, running, chunk, width)
    tokens, block = sequences[0].shape[1], generator_chunk_size // chunk
    segments = plan_segments(tokens, chunk, placed.grid.offset, checkpoint_every, size, block)
    o, after = run(loop, segments, (*running, *velocity, *snapshot), constants, sequences)

    o = collect_output(o.unflatten(0, (batch, heads)).transpose(1, 2), placed)
    count = layout.layers
    running, velocity, snapshot = (from_bank(after[i * count : (i + 1) * count], batch) for i in range(3))
    return o, SelfModifyingState(snapshot or running, running, placed.grid.position, velocity)


def to_bank(stack: MemoryStack) -> Bank:
    """A state's [B, H, m, out, in], memory first and the memory that is read before the others."""
    last = _memory_first(stack.last[:, :, _READ_FIRST[:3]])
    if stack.first is None:
        last = last.unflatten(0, (3, -1)).transpose(0, 1).flatten(1, 2)
        return (torch.cat([last, stack.gate.flatten(0, 1)], 1),)
    return _memory_first(stack.first[:, :, _READ_FIRST]), last, _memory_first(stack.gate[:, :, :, None])


def from_bank(bank: Bank, batch: int) -> MemoryStack | None:
    """The inverse of :func:`to_bank`; ``None`` for an absent bank."""
    if bank[0] is None:
        return None
    if len(bank) == 1:
        width = bank[0].shape[2]
        last, gate = bank[0].unflatten(0, (batch, -1)).split([3 * width, 2], 2)
        return MemoryStack(None, last.unflatten(2, (3, width))[:, :, _READ_THIRD[:3]], gate)
    first, last, gate = (
        x.unflatten(0, (count, batch, -1)).permute(1, 2, 0, 3, 4) for x, count in zip(bank, (5, 3, 2))
    )
    return MemoryStack(first[:, :, _READ_THIRD], last[:, :, _READ_THIRD[:3]], gate[..., 0, :])


_READ_FIRST = [2, 0, 1, 3, 4]  # of a stack's key, value, memory, rate, retention
_READ_THIRD = [1, 2, 0, 3, 4]


def _memory_first(x: torch.Tensor) -> torch.Tensor:
    """[B, H, m, out, in] as [m · B · H, out, in]."""
    return x.permute(2, 0, 1, 3, 4).flatten(0, 2)
