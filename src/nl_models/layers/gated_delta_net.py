"""Gated DeltaNet (arXiv 2412.06464): a linear memory with a learned decay, on the ``delta_memory`` op."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nl_kernels import delta_memory, delta_memory_step
from nl_kernels.dispatch import check_implementation
from nl_kernels.memory_rule import l2_normalize
from nl_kernels.renamed import RenamedAttribute, renamed_arguments
from nl_models.layers.gated_output import GatedOutput
from nl_models.layers.memory_layer import is_decoding


class GatedDeltaNet(nn.Module):
    """``S_t = α_t S_{t-1}(I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ``, read as ``S_t q_t``, per head.

    Keys and queries have unit length; ``β = rate_max σ(W_b x)`` and ``α = exp(−A softplus(W_a x + b))``.

    Args:
        hidden_size: width ``d``.
        num_heads: heads; divides ``d``.
        eps: of the output norm.
        impl: of the op, "triton", "eager" or "reference"; ``None`` picks by device.
        rate_max: largest β, in [0, 2]; above 1 the eigenvalues of ``I − β k kᵀ`` may be negative.
    """

    implementation = RenamedAttribute("impl")

    @renamed_arguments(implementation="impl")
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        eps: float = 1e-6,
        impl: str | None = None,
        rate_max: float = 1.0,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size={hidden_size}, got {num_heads}")
        check_implementation(impl)
        self.num_heads = num_heads
        self.impl = impl
        self.rate_max = rate_max
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.decay_bias = nn.Parameter(torch.empty(num_heads))
        self.output = GatedOutput(hidden_size, self.head_dim, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A spread over heads of half-lives from a few to some thousand tokens, as in Mamba-2."""
        nn.init.uniform_(self.log_rate, math.log(1), math.log(16))
        # softplus(bias) between 0.001 and 0.1
        nn.init.uniform_(self.decay_bias, math.log(math.expm1(0.001)), math.log(math.expm1(0.1)))

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        output_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read and write the memory along a piece of each sequence.

        Args:
            x: ``[B, T, d]``.
            state: ``[B, H, D, D]`` fp32, the memory before this piece; ``None`` is zeros.
            mask: ``[B, T]`` bool, True at real tokens. Padding neither decays nor writes; its output is zero.
            output_state: whether to return the memory after this piece.

        Returns:
            ``y`` like ``x``, and the new state or ``None``.
        """
        decoding = is_decoding(x, state)
        if decoding:
            x, mask = x[:, 0], None if mask is None else mask[:, 0]
        tokens = self.memory_inputs(x, mask)
        new: Any  # a tensor, for there is no momentum
        if decoding and state is not None:
            o, new = delta_memory_step(*tokens, state=state, impl=self.impl)
        else:
            o, new = delta_memory(
                *tokens, initial_state=state, output_final_state=output_state, impl=self.impl
            )
        if mask is not None:
            o = o * mask[..., None, None]
        y = self.output(o, x)
        return (y[:, None], new if output_state else None) if decoding else (y, new)

    def memory_inputs(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """q, k, v, log_decay, erase of :func:`nl_kernels.delta_memory` for ``x [.., d]``, ``mask [..]``."""
        q, k, v = (
            F.silu(projection(x)).unflatten(-1, (self.num_heads, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Norms and rates in fp32 (or better): a decay near 1 has too few digits in bf16.
        exact = torch.promote_types(x.dtype, torch.float32)
        q, k = (l2_normalize(t.to(exact)).to(v.dtype) for t in (q, k))
        log_decay = -self.log_rate.to(exact).exp() * F.softplus(self.a_proj(x).to(exact) + self.decay_bias)
        rate = self.rate_max * self.b_proj(x).to(exact).sigmoid()
        if mask is not None:
            log_decay, rate = log_decay * mask[..., None], rate * mask[..., None]
        return q, k, rate[..., None].to(v.dtype) * v, log_decay, rate * log_decay.exp()
