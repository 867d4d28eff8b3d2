"""Launch parameters of the one-token kernels: a program holds whole matrices of a memory, one at a time.

The numbers come from ahead-of-time compilation (registers and spills), not from timings.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.tiles import power_of_two

MAX_WIDTH = 128
"""Widest head that the one-token kernels take."""

MAX_TILE = 16384
"""Most numbers of a matrix, padded, that they take."""

_ADVANCED = 128  # sequences whose position one program advances


def warps_of(*widths: int | None) -> int:
    """Warps of a program whose matrices have these widths on their sides: 16 to 32 numbers a thread."""
    sides = sorted(power_of_two(width or 1) for width in widths)
    return max(1, min(16, sides[-1] * sides[-2] // 512))


def why_not(name: str, width: int, hidden: int | None, dtype: torch.dtype) -> str | None:
    """Why the kernels do not serve a step of tokens ``name`` of this width; ``None`` if they do."""
    if dtype == torch.float64:
        return f"{name}: the Triton kernels take bfloat16, float16 and float32, got float64"
    if width > MAX_WIDTH:
        return f"{name}: the Triton kernels take heads up to {MAX_WIDTH} wide, got {width}"
    widest = MAX_TILE // power_of_two(width)
    if hidden is not None and power_of_two(hidden) > widest:
        limit = f"at heads of {width} the Triton step takes hidden layers up to {widest} wide"
        return f"weights: {limit}, got {hidden}"
    return None


def why_not_momentum(rule: MemoryRule, momentum: torch.Tensor | None) -> str | None:
    """Why the kernels, which sum writes, do not serve a step with this momentum; ``None`` if they do."""
    if momentum is None or rule.momentum == "sum":
        return None
    return f"momentum: the Triton step takes rule.momentum='sum' alone, got {rule.momentum!r}"


def together(weights: Iterable[torch.Tensor | None], lead: tuple[int, int]) -> list[torch.Tensor | None]:
    """Anchors that are all shared [H, ..], or all by sequence [B, H, ..] (``lead``), and contiguous."""
    weights = list(weights)
    if len({w.ndim for w in weights if w is not None}) > 1:
        weights = [None if w is None else w.expand(*lead, *w.shape[-2:]) for w in weights]
    return [None if w is None else w.contiguous() for w in weights]


def plan_advance(position: torch.Tensor, mask: torch.Tensor | None, period: int) -> KernelCall:
    """The call that moves the positions [B] on by one token, after all heads have read them."""
    from nl_kernels.chunk_kernels.one_token import advance_kernel

    sequences = len(position)
    arguments = {"position": position, "mask": mask, "B": sequences}
    constants = {"PERIOD": period, "BLOCK": _ADVANCED}
    return KernelCall(advance_kernel, (-(-sequences // _ADVANCED),), arguments, constants, 1, 1)
