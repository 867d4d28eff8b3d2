"""Hope-Attention: causal softmax attention with rotary positions in the place of the memory (§5)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from nl_kernels.checks import check_choice
from nl_kernels.renamed import RenamedAttribute, renamed_arguments
from nl_models.layers.gated_output import GatedOutput
from nl_models.layers.state import AttentionState

ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Names of transformers' attention interface."""


class Attention(nn.Module):
    """Causal softmax attention with rotary embeddings and a key-value cache that grows with the context.

    Args:
        hidden_size: width ``d``.
        num_heads: heads; divides ``d`` into heads of an even width.
        rope_theta: base of the rotary frequencies.
        gated: whether norm and gate precede the output projection.
        impl: one of :data:`ATTENTION_IMPLEMENTATIONS`; all but ``"sdpa"`` are an error where transformers
            cannot serve a call by it; ``None`` is ``"sdpa"``, PyTorch's own choice of a kernel.
        eps: of the output norm.
    """

    implementation = RenamedAttribute("impl")

    @renamed_arguments(implementation="impl")
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rope_theta: float = 10_000.0,
        gated: bool = True,
        impl: str | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size={hidden_size} with heads of an even width, "
                f"got {num_heads}"
            )
        check_choice("impl", impl, (*ATTENTION_IMPLEMENTATIONS, None))
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.rope_theta = rope_theta
        self.impl = impl
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = GatedOutput(hidden_size, self.head_dim, gated=gated, eps=eps)

    def forward(
        self,
        x: torch.Tensor,
        state: AttentionState | None = None,
        mask: torch.Tensor | None = None,
        output_state: bool = False,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, AttentionState | None]:
        """Attend from a piece of each sequence to it and to all before it.

        Args:
            x: ``[B, T, d]``.
            state: of the tokens before; ``None`` at the start.
            mask: ``[B, T]`` bool, True at real tokens. Padding is attended by no token and does not count as
                a position; the output there is zero.
            output_state: whether to return the state after this piece.
            positions: ``[B, T]`` (or ``[1, T]``) rotary positions; by default real tokens are counted.

        Returns:
            ``y`` like ``x``, and the new state or ``None``.
        """
        B, T, _ = x.shape
        start = state.position if state is not None else torch.zeros(B, dtype=torch.int64, device=x.device)
        if positions is None:
            steps = torch.arange(1, T + 1, device=x.device)[None] if mask is None else mask.cumsum(1)
            positions = start[:, None] + (steps - 1).clamp_min(0)
        q, k, v = self.queries_keys_values(x, positions)
        key_mask = mask
        if state is not None:
            key_mask = _join_masks(state, mask, B, T, x.device)
            k = torch.cat([state.keys.to(k.dtype), k], dim=2)
            v = torch.cat([state.values.to(v.dtype), v], dim=2)
        o = self.attend(q, k, v, key_mask)
        if mask is not None:
            o = o * mask[:, None, :, None]
        y = self.output(o.transpose(1, 2), x)
        if not output_state:
            return y, None
        real = positions if mask is None else positions.expand(B, T).masked_fill(~mask, -1)
        position = torch.maximum(start, real.max(1).values.expand(B) + 1)
        return y, AttentionState(k, v, key_mask, position)

    def queries_keys_values(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each ``[B, H, T, D]`` for ``x [B, T, d]``, rotated to ``positions [B, T]`` (or ``[1, T]``)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotary_embedding(positions, self.head_dim, self.rope_theta)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``q [B, H, T, D]`` are the last T of the S tokens of ``k, v [B, H, S, D]``."""
        T, S, impl = q.shape[2], k.shape[2], self.impl or "sdpa"
        if impl == "sdpa" and key_mask is None and T in (1, S):
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        # Late: it takes a second, which a layer without padding does not need.
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import causal_mask_function

        mask = AttentionMaskInterface()[impl](
            batch_size=q.shape[0],
            q_length=T,
            kv_length=S,
            q_offset=S - T,
            mask_function=causal_mask_function,
            attention_mask=key_mask,
            allow_is_causal_skip=False,  # it would ask the device whether there is any padding
            device=q.device,
        )
        try:
            return AttentionInterface()[impl](self, q, k, v, mask)[0].transpose(1, 2)
        except ImportError as error:
            raise ImportError(f"impl={impl!r} cannot serve this call: {error}; use 'sdpa'") from error

    is_causal = True

    @property
    def config(self) -> SimpleNamespace:
        """What transformers' attention functions ask a module."""
        return SimpleNamespace(_attn_implementation=self.impl or "sdpa")


def rotary_embedding(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[B, 1, T, D/2]`` in fp32 of ``positions [B, T]``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of ``x [B, H, T, D]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _join_masks(
    state: AttentionState, mask: torch.Tensor | None, B: int, T: int, device: torch.device
) -> torch.Tensor | None:
    if state.mask is None and mask is None:
        return None
    before = state.mask
    if before is None:
        before = torch.ones(B, state.keys.shape[2], dtype=torch.bool, device=device)
    if mask is None:
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
    return torch.cat([before, mask], dim=1)
