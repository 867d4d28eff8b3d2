"""``deep_memory`` by the kernels: a bank of one memory with given targets."""

from __future__ import annotations

import torch

from nl_kernels.memory.kernels.arguments import Bank
from nl_kernels.memory.kernels.call import Call, one_token, overwritten, run
from nl_kernels.memory_checks import per_sequence
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory.state import DeepMemoryState


def deep_memory_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    anchor: DeepMemoryWeights,
    state: DeepMemoryState,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """As :func:`~nl_kernels.ops.deep_memory.eager.deep_memory_eager` without momentum, by the kernels.

    Args:
        dtype: of the caller's tokens, which decides the precision of products.
    """
    anchors = _bank(anchor) if rule.anchored else Bank(None, None)
    banks = _bank(state.running), _bank(state.snapshot), anchors
    o, running, snapshot, position = run(
        Call(q, k, v, None, rate, log_decay, (None,) * 3, *banks, state.position),
        rule=rule,
        read=read,
        chunk_size=chunk_size,
        generator_chunk_size=chunk_size,
        truncate_every=None,
        mask=mask,
        at_boundary=at_boundary,
        checkpoint_every=checkpoint_every,
        dtype=dtype,
    )
    batch = len(state.position)
    return o, DeepMemoryState(_weights(snapshot, batch), _weights(running, batch), position, None)


def deep_memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    weights: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    inplace: bool,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """As :func:`nl_kernels.ops.deep_memory.eager_step.deep_memory_step` without momentum: a chunk of one
    token."""
    tokens = one_token((q, k, v, rate, log_decay), mask)
    batch, dtype = len(state.position), state.running.inner.dtype
    o, after = deep_memory_triton(
        *tokens,
        anchor=DeepMemoryWeights(*(None if w is None else per_sequence(w, batch, dtype) for w in weights)),
        state=state,
        rule=rule,
        read=read,
        chunk_size=chunk_size,
        mask=None if mask is None else mask[:, None],
        at_boundary=False,
        checkpoint_every=None,
        dtype=q.dtype,
    )
    return o[:, 0], overwritten(state, after) if inplace else after


def _bank(weights: DeepMemoryWeights) -> Bank:
    """Weights [B, H, ..] as layers [N, ..]; the one layer of a linear memory is its last."""
    inner, outer = (None if w is None else w.flatten(0, 1) for w in weights)
    return Bank(None, inner) if outer is None else Bank(inner, outer)


def _weights(bank: Bank, batch: int) -> DeepMemoryWeights:
    first, last = (None if x is None else x.unflatten(0, (batch, -1)) for x in bank)
    return DeepMemoryWeights(last, None) if first is None else DeepMemoryWeights(first, last)
