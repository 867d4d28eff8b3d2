"""What follows every token mixer: per-head norm, gate, output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GatedOutput(nn.Module):
    """``y = W_o (n(o) ∘ silu(W_g x))`` with an RMS norm per head; without the gate, ``y = W_o o``.

    Args:
        hidden_size: width ``d`` of the input ``x`` and of the result.
        head_dim: width of a head of ``o``; divides ``d``.
        gated: whether norm and gate are present.
        eps: of the norm.
    """

    def __init__(self, hidden_size: int, head_dim: int, gated: bool = True, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.RMSNorm(head_dim, eps=eps) if gated else None
        self.g_proj = nn.Linear(hidden_size, hidden_size, bias=False) if gated else None
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``o [.., H, D]`` of the mixer and its input ``x [.., d]`` to ``[.., d]`` in x's dtype."""
        if self.norm is None or self.g_proj is None:
            return self.o_proj(o.flatten(-2).to(x.dtype))
        return self.o_proj(self.norm(o.to(x.dtype)).flatten(-2) * F.silu(self.g_proj(x)))
