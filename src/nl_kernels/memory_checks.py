"""Argument checks and preparation shared by the chunked memories."""

from __future__ import annotations

import torch

from nl_kernels.checks import check_choice, check_tensor
from nl_kernels.chunk_alignment import ChunkAlignment, align_packed
from nl_kernels.memory.state import named_tensors
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule

READS = ("snapshot", "running")


def check_memory(
    name: str, weights: object, batch: int, heads: int, width: int, out: int, like: torch.Tensor
) -> None:
    """Check the weights of a memory from ``width`` to ``out``, shared ([H, ..]) or by sequence ([B, H, ..]).

    Raises:
        TypeError, ValueError: naming the field, what came and what is accepted.
    """
    if not isinstance(weights, DeepMemoryWeights):
        raise TypeError(f"{name}: expected DeepMemoryWeights, got {type(weights).__name__}")
    inner, outer = weights
    if not isinstance(inner, torch.Tensor):
        raise TypeError(f"{name}.inner: expected a tensor, got {type(inner).__name__}")
    if inner.ndim not in (3, 4):
        raise ValueError(f"{name}.inner: expected [H, h, D] or [B, H, h, D], got shape {tuple(inner.shape)}")
    lead = (batch, heads)[4 - inner.ndim :]
    hidden = out if outer is None else inner.shape[-2]
    check_tensor(f"{name}.inner", inner, (*lead, hidden, width), like=like)
    if outer is not None:
        check_tensor(f"{name}.outer", outer, (*lead, out, hidden), like=like)


def check_rule(rule: object, read: object, weights: DeepMemoryWeights) -> None:
    """Check that ``rule`` is a :class:`MemoryRule` for such weights, and when a memory is read."""
    if not isinstance(rule, MemoryRule):
        raise TypeError(f"rule: expected a MemoryRule, got {type(rule).__name__}")
    if rule.error_at == "anchor" and weights.outer is not None:
        raise ValueError("rule.error_at: memories of two layers have errors at the 'snapshot', got 'anchor'")
    check_choice("read", read, READS)


def check_step_dtype(held: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Check that a state's tensors are fp32, or fp64 where any of the others is, as the ops return it."""
    dtypes = {x.dtype for x in held}
    wide = torch.float64 in dtypes or torch.float64 in {x.dtype for x in others}
    expected = torch.float64 if wide else torch.float32
    for dtype in dtypes - {expected, torch.int64}:  # that of positions
        raise TypeError(f"state: expected {expected} for these inputs, got {dtype}; a state is fp32 or fp64")


def check_own_memory(state: tuple, held: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Check that a step may write into the tensors of a state: contiguous, and no memory of another or of
    weights, with which the state of a rule that is not anchored begins."""
    seen = {x.data_ptr() for x in weights}
    for i, x in enumerate(held):
        if not x.is_contiguous() or x.data_ptr() in seen:
            name = list(named_tensors("state", state))[i]
            raise ValueError(
                f"{name}: inplace needs contiguous tensors that share no memory, nor that of weights; "
                "start from state.clone()"
            )
        seen.add(x.data_ptr())


def head_parameter(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A float or a tensor [H] as a tensor [H], of the heads of ``like`` [.., H, D]."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((like.shape[-2],), float(value), device=like.device, dtype=torch.float64)


def per_sequence(weights: torch.Tensor, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Weights [H, ..] or [B, H, ..] as [B, H, ..] in ``dtype`` (a view where they are shared)."""
    weights = weights.to(dtype)
    return weights.expand(batch, *weights.shape) if weights.ndim == 3 else weights


def zero_padding(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Tokens [B, T, …], or [B, …], with zeros where ``mask`` is False, whatever padding holds."""
    return x.masked_fill(~mask.view(mask.shape + (1,) * (x.ndim - mask.ndim)), 0)


def by_sequence(
    inputs: list[torch.Tensor | None], mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[list[torch.Tensor | None], torch.Tensor | None, ChunkAlignment | None]:
    """Packed inputs unpacked, or padding made zero; the mask of what there is, and how to pack again."""
    if cu_seqlens is not None:
        alignment = align_packed(cu_seqlens)
        return [None if x is None else alignment.gather(x) for x in inputs], alignment.valid, alignment
    if mask is not None:
        inputs = [None if x is None else zero_padding(x, mask) for x in inputs]
    return inputs, mask, None
