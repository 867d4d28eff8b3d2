"""Checks of the arguments of ``self_modifying_memory`` and of its step."""

from __future__ import annotations

import math

import torch

from nl_kernels.checks import (
    check_positive_int,
    check_range,
    check_sequences,
    check_tensor,
    check_tokens,
)
from nl_kernels.memory.state import check_state
from nl_kernels.memory_checks import check_memory, check_rule
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying.state import MemoryStack, SelfModifyingState, SelfModifyingWeights


def check_call(
    tokens: tuple,
    weights: SelfModifyingWeights,
    rule: MemoryRule,
    read: str,
    clocks: tuple[int, int],
    parameters: dict[str, torch.Tensor | float],
    state: tuple,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Check a call on tokens [B, T, ..], or on one token [B, ..]; ``state`` comes with its name."""
    for name, clock in zip(("chunk_size", "generator_chunk_size"), clocks):
        check_positive_int(name, clock)
    if max(clocks) % min(clocks):
        raise ValueError(
            f"generator_chunk_size: one of it and chunk_size must be a multiple of the other, "
            f"got {clocks[1]} and {clocks[0]}"
        )
    query, *others, write_scale, momentum = tokens
    one = state[0] == "state"
    check_tokens("query", query, "[B, H, D]" if one else "[B, T, H, D]")
    for name, x in zip(("key_input", "value_input", "gate_input"), others):
        check_tensor(name, x, query.shape, like=query)
    for name, x, most in (("write_scale", write_scale, math.inf), ("momentum", momentum, 1.0)):
        if x is not None:
            check_tensor(name, x, query.shape[:-1], like=query)
            if not one:
                check_range(name, x, 0.0, most, closed_high=False)
    batch = check_sequences(mask, cu_seqlens, query, one=one)
    heads, width = query.shape[-2:]
    _check_weights(weights, batch, heads, width, query)
    check_rule(rule, read, weights.key)
    linear, hidden = weights.key.outer is None, weights.key.inner.shape[-2]
    if write_scale is not None and not linear:
        raise ValueError("write_scale: of linear memories alone, got memories of two layers")
    if one or state[1] is not None:
        shapes = ((3, width, width), (2, width)) if linear else ((3, width, hidden), (2, hidden))
        shapes = (None if linear else (5, hidden, width), *shapes)
        shapes = MemoryStack(*(None if shape is None else (batch, heads, *shape) for shape in shapes))
        check_state(*state, SelfModifyingState, shapes, momentum is not None, max(clocks), query)
    for name, value in parameters.items():
        if isinstance(value, torch.Tensor):
            check_tensor(name, value, (heads,), like=query)
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a float or a tensor [H], got {type(value).__name__}")


def _check_weights(weights: object, batch: int, heads: int, width: int, like: torch.Tensor) -> None:
    if not isinstance(weights, SelfModifyingWeights):
        raise TypeError(f"weights: expected SelfModifyingWeights, got {type(weights).__name__}")
    for name, memory in zip(SelfModifyingWeights._fields, weights):
        out = 1 if name in ("rate", "retention") else width
        check_memory(f"weights.{name}", memory, batch, heads, width, out, like)
    linear = weights.key.outer is None
    for name, memory in zip(SelfModifyingWeights._fields, weights):
        if (memory.outer is None) != linear:
            raise ValueError(f"weights.{name}: the memories must be all two-layer or all linear")
        if not linear and memory.inner.shape[-2] != weights.key.inner.shape[-2]:
            raise ValueError(
                f"weights.{name}: expected hidden width {weights.key.inner.shape[-2]} as weights.key has, "
                f"got {memory.inner.shape[-2]}"
            )
