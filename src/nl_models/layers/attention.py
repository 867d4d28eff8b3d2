"""Hope-Attention: causal softmax attention with rotary positions in the place of the memory (§5)."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from nl_kernels.checks import check_choice
from nl_kernels.renamed import RenamedAttribute, renamed_arguments
from nl_models.layers.gated_output import GatedOutput
from nl_models.layers.state import AttentionState

ATTENTION_IMPLEMENTATIONS = ("sdpa", "flash")


class Attention(nn.Module):
    """Causal softmax attention with rotary embeddings and a key-value cache that grows with the context.

    Args:
        hidden_size: width ``d``.
        num_heads: heads; divides ``d`` into heads of an even width.
        rope_theta: base of the rotary frequencies.
        gated: whether norm and gate precede the output projection.
        impl: ``"sdpa"``, ``"flash"`` (flash-attn; an error where it cannot serve a call), or ``None``:
            flash-attn where it is installed and can serve the call, else SDPA.
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
        obstacle = None
        if self.impl != "sdpa":
            obstacle = flash_obstacle(q, key_mask)
            if obstacle is None:
                from flash_attn import flash_attn_func

                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
        if self.impl == "flash":
            raise ValueError(f"impl='flash' cannot serve this call: {obstacle}; use 'sdpa'")
        T, S = q.shape[2], k.shape[2]
        if key_mask is None and (T == S or T == 1):
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        # Query i is token S - T + i. It always sees itself, so that the softmax is never empty.
        query = torch.arange(S - T, S, device=q.device)[:, None]
        key = torch.arange(S, device=q.device)
        allowed = key <= query
        if key_mask is not None:
            allowed = (allowed & key_mask[:, None, None, :]) | (key == query)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


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


def flash_obstacle(q: torch.Tensor, key_mask: torch.Tensor | None) -> str | None:
    """Why flash-attn cannot serve a call with queries ``q``, or ``None`` if it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type!r}, not on a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {q.dtype}, not float16 or bfloat16"
    if key_mask is not None:
        return "the batch is padded"
    if q.shape[-1] > 256:
        return f"the heads are {q.shape[-1]} wide, more than 256"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None


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
