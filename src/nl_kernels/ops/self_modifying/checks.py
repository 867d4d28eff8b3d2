"""Checks of the arguments of ``self_modifying_memory`` and of its step."""

from __future__ import annotations

import math

import torch

from nl_kernels.checks import (
    check_positive_int,
    check_range,
    check_tensor,
    check_tokens,
)
from nl_kernels.memory.state import check_state as check_memory_state
from nl_kernels.memory_checks import check_memory
from nl_kernels.ops.self_modifying.state import MemoryStack, SelfModifyingState, SelfModifyingWeights


def check_clocks(chunk_size: object, generator_chunk_size: object) -> None:
    check_positive_int("chunk_size", chunk_size)
    check_positive_int("generator_chunk_size", generator_chunk_size)
    if max(chunk_size, generator_chunk_size) % min(chunk_size, generator_chunk_size):
        raise ValueError(
            f"generator_chunk_size: one of it and chunk_size must be a multiple of the other, "
            f"got {generator_chunk_size} and {chunk_size}"
        )


def check_inputs(inputs: tuple, one: bool) -> None:
    """Check the tensors over time, or of ``one`` token."""
    query, *others, write_scale, momentum = inputs
    check_tokens("query", query, "[B, H, D]" if one else "[B, T, H, D]")
    for name, x in zip(("key_input", "value_input", "gate_input"), others):
        check_tensor(name, x, query.shape, like=query)
    for name, x, most in (("write_scale", write_scale, math.inf), ("momentum", momentum, 1.0)):
        if x is not None:
            check_tensor(name, x, query.shape[:-1], like=query)
            if not one:
                check_range(name, x, 0.0, most, closed_high=False)


def check_weights(weights: object, batch: int, heads: int, width: int, like: torch.Tensor) -> None:
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


def check_state(name, state, weights, batch, sizes, has_momentum, period, like) -> None:
    heads, width = sizes
    hidden = weights.key.inner.shape[-2]
    shapes = MemoryStack((5, hidden, width), (3, width, hidden), (2, hidden))
    if weights.key.outer is None:
        shapes = MemoryStack(None, (3, width, width), (2, width))
    shapes = MemoryStack(*(None if shape is None else (batch, heads, *shape) for shape in shapes))
    check_memory_state(name, state, SelfModifyingState, shapes, has_momentum, period, like)


def check_head_parameter(name: str, value: object, heads: int, like: torch.Tensor) -> None:
    """Check that ``value`` is a float or a tensor [H]."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a float or a tensor [H], got {type(value).__name__}")
    check_tensor(name, value, (heads,), like=like)
