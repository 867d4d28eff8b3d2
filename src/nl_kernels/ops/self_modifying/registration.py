"""``self_modifying_memory`` by the kernels: a bank of five memories that makes its own targets."""

from __future__ import annotations

import torch

from nl_kernels.memory.kernels.arguments import Bank
from nl_kernels.memory.kernels.call import Call, one_token, overwritten, run
from nl_kernels.memory_checks import per_sequence
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.self_modifying.state import (
    MemoryStack,
    SelfModifyingState,
    SelfModifyingWeights,
    stack_memories,
)


def self_modifying_memory_triton(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
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
    dtype: torch.dtype,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """As the reference without momentum and with constant targets, by the kernels.

    Args:
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
        checkpoint_every: chunks between the states kept for the backward pass.
        dtype: of the caller's tokens, which decides the precision of products.
    """
    gates = rate_max, rate_bias, retention_bias
    anchors = _bank(anchor) if rule.anchored else Bank(None, None)
    banks = _bank(state.running), _bank(state.snapshot), anchors
    o, running, snapshot, position = run(
        Call(query, key_input, value_input, gate_input, None, None, gates, *banks, state.position),
        rule=rule,
        read=read,
        chunk_size=chunk_size,
        generator_chunk_size=generator_chunk_size,
        truncate_every=truncate_every,
        mask=mask,
        at_boundary=at_boundary,
        checkpoint_every=checkpoint_every,
        dtype=dtype,
    )
    batch, width = len(state.position), query.shape[-1]
    return o, SelfModifyingState(
        _stack(snapshot, batch, width), _stack(running, batch, width), position, None
    )


def self_modifying_memory_step(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    weights: SelfModifyingWeights,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: torch.Tensor | float,
    rate_bias: torch.Tensor | float,
    retention_bias: torch.Tensor | float,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    mask: torch.Tensor | None,
    inplace: bool,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """As :func:`nl_kernels.ops.self_modifying.eager_step.self_modifying_memory_step` without momentum and
    with constant targets: a chunk of one token."""
    tokens = one_token((query, key_input, value_input, gate_input), mask)
    batch, heads = query.shape[:2]
    rate_max, rate_bias, retention_bias = (
        x if isinstance(x, torch.Tensor) else torch.full((heads,), float(x), device=query.device)
        for x in (rate_max, rate_bias, retention_bias)
    )
    dtype = state.running.last.dtype
    memories = (
        DeepMemoryWeights(*(None if w is None else per_sequence(w, batch, dtype) for w in memory))
        for memory in weights
    )
    o, after = self_modifying_memory_triton(
        *tokens,
        stack_memories(SelfModifyingWeights(*memories)),
        state,
        rule=rule,
        rate_max=rate_max,
        rate_bias=rate_bias,
        retention_bias=retention_bias,
        read=read,
        chunk_size=chunk_size,
        generator_chunk_size=generator_chunk_size,
        truncate_every=None,
        mask=None if mask is None else mask[:, None],
        at_boundary=False,
        checkpoint_every=None,
        dtype=query.dtype,
    )
    return o[:, 0], overwritten(state, after) if inplace else after


def _bank(stack: MemoryStack) -> Bank:
    """[B, H, m, out, in] as layers [N, ..], one memory below the other and the gates last."""
    first = None if stack.first is None else stack.first.flatten(2, 3).flatten(0, 1)
    return Bank(first, torch.cat([stack.last.flatten(2, 3), stack.gate], 2).flatten(0, 1))


def _stack(bank: Bank, batch: int, width: int) -> MemoryStack:
    """The inverse of :func:`_bank`, in memory of its own."""
    first = None if bank.first is None else bank.first.unflatten(0, (batch, -1)).unflatten(2, (5, -1))
    last, gate = bank.last.unflatten(0, (batch, -1)).split([3 * width, 2], 2)
    return MemoryStack(first, last.contiguous().unflatten(2, (3, width)), gate.contiguous())
