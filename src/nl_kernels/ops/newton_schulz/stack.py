"""Any call as a stack of wide matrices, their normalisation, and the way back."""

from __future__ import annotations

import torch


def wide_stack(x: torch.Tensor) -> torch.Tensor:
    """x [..., m, n] as [N, rows ≤ columns, columns], transposed when tall; a view where one will do."""
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    return wide.reshape(-1, *wide.shape[-2:])


def normalised(stack: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """``X_0 = X / max(‖X‖_F, eps)`` of each matrix of [N, rows, columns]: new, contiguous, in ``dtype``.

    Each matrix is first divided by its largest magnitude, so that no square under- or overflows.
    """
    stack = stack.to(torch.promote_types(torch.promote_types(stack.dtype, dtype), torch.float32))
    # Two vectorised passes; the norm of order ∞ takes twenty times as long on a CPU.
    largest = torch.maximum(stack.amax((-2, -1), keepdim=True), -stack.amin((-2, -1), keepdim=True))
    largest = torch.where(largest == 0, 1.0, largest)
    scaled = (stack / largest).contiguous()
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    # eps may overflow when divided by a tiny number: 1/∞ = 0 is then right.
    return scaled.div_(torch.maximum(norm, eps / largest)).to(dtype)


def restored(stack: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`wide_stack`: shape and dtype of ``like``, contiguous."""
    tall = like.shape[-2] > like.shape[-1]
    return (stack.mT if tall else stack).reshape(like.shape).to(like.dtype).contiguous()
