"""What the layers of chunked memories have in common: projections, gates' biases, how a token is decoded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nl_kernels import MemoryRule
from nl_kernels.dispatch import check_implementation
from nl_kernels.renamed import RenamedAttribute


class MemoryLayer(nn.Module):
    """Heads, slow projections and gate biases of a layer whose memories are written in context.

    Args:
        hidden_size: width ``d``.
        num_heads: heads; divides ``d``.
        projections: output widths of further projections of the input, by name; queries, keys and values have
            theirs.
        chunk_size: tokens between the states at which gradients are taken. Part of the model.
        read: ``"snapshot"`` or ``"running"``.
        rule: how a memory is applied and written.
        rate_max: largest rate, in [0, 2], and at most 1 + α; 0 switches writing off.
        rate_bias, retention_bias: initial biases of the gates' logits.
        momentum: whether writes have momentum, in the form that ``rule.momentum`` says.
        impl: of the op, "triton", "eager" or "reference"; ``None`` picks by device.
    """

    implementation = RenamedAttribute("impl")
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        projections: Mapping[str, int],
        *,
        chunk_size: int,
        read: str,
        rule: MemoryRule | None,
        rate_max: float,
        rate_bias: float,
        retention_bias: float,
        momentum: bool,
        impl: str | None,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size={hidden_size}, got {num_heads}")
        check_implementation(impl)
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.chunk_size = chunk_size
        self.read = read
        self.rule = MemoryRule() if rule is None else rule
        self.rate_max = rate_max
        self.impl = impl
        self.initial_biases = (rate_bias, retention_bias)
        for name, width in {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), hidden_size),
            **projections,
        }.items():
            self.add_module(name, nn.Linear(hidden_size, width, bias=False))
        self.momentum_proj = nn.Linear(hidden_size, num_heads, bias=False) if momentum else None
        self.momentum_max = 1.0
        self.rate_bias = nn.Parameter(torch.empty(num_heads))
        self.retention_bias = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self) -> None:
        """The gates start at their initial biases."""
        nn.init.constant_(self.rate_bias, self.initial_biases[0])
        nn.init.constant_(self.retention_bias, self.initial_biases[1])

    def split_heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """``[.., d]`` projected, as ``[.., H, d / H]``."""
        return projection(x).unflatten(-1, (self.num_heads, self.head_dim))

    def momentum(self, x: torch.Tensor) -> torch.Tensor | None:
        """The decays of momentum ``[.., H]`` for ``x [.., d]``, at least fp32; ``None`` without momentum."""
        if self.momentum_proj is None:
            return None
        exact = torch.promote_types(x.dtype, torch.float32)
        return self.momentum_max * self.momentum_proj(x).to(exact).sigmoid()


def is_decoding(x: torch.Tensor, state: object | None) -> bool:
    """Whether ``x [B, T, d]`` is the next token of each sequence, and no gradient is wanted."""
    return x.shape[1] == 1 and state is not None and not torch.is_grad_enabled()
