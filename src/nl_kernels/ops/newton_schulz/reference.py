"""The definition: the polynomials of all steps, applied to the singular values in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def newton_schulz(
    x: torch.Tensor, schedule: Sequence[tuple[float, float, float]], eps: float
) -> torch.Tensor:
    """``U p(S / max(‖S‖, eps)) Vᵀ`` with ``x = U S Vᵀ`` and p the composition of the schedule's quintics.

    x [..., m, n] in any floating dtype; the result has x's dtype, computed in fp64.
    """
    x64 = x.double()
    largest = x64.abs().amax(dim=(-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    u, s, v = torch.linalg.svd(x64 / largest, full_matrices=False)
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    s = s / torch.maximum(norm, eps / largest[..., 0])
    for a, b, c in schedule:
        s = a * s + b * s**3 + c * s**5
    return (u @ (s[..., None] * v)).to(x.dtype)
