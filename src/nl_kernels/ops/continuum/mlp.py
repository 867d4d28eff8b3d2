"""The MLP of a level by itself, with weights of each sequence."""

from __future__ import annotations

import torch

from nl_kernels.checks import check_tensor, check_tokens
from nl_kernels.dispatch import choose_implementation, without_autocast
from nl_kernels.ops.continuum import registration
from nl_kernels.ops.continuum.reference import mlp


def continuum_mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """``down GELU(up x)``, or with a gate ``down (SiLU(gate x) ∘ up x)``, each sequence with its weights.

    Keeps its arguments alone for the backward pass, which computes the hidden layer again. Differentiable
    once.

    Args:
        x: [B, T, D], fp16, bf16, fp32 or fp64.
        up, gate: [B, H, D], or [H, D] for all sequences; products round them to what they round x to.
        down: [B, D, H] or [D, H].
        impl: ``"triton"`` (not fp64), ``"eager"``, ``"reference"`` or None: by device and dtype.

    Returns:
        [B, T, D] in x's dtype.

    Raises:
        TypeError, ValueError: a bad argument, named.
        NotImplementedError: ``impl="triton"`` in fp64.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_tokens("x", x, "[B, T, D]")
    _check_weights(x, up, down, gate)
    fp64 = "the Triton kernels take bfloat16, float16 and float32, got float64"
    refused = fp64 if x.dtype == torch.float64 else None
    chosen = choose_implementation("continuum_mlp", impl, x.device, unsupported=lambda: refused)
    batch, _, width = x.shape
    shared = up.ndim == 2
    if shared:
        x = x.reshape(1, -1, width)
        up, down, gate = (None if w is None else w[None] for w in (up, down, gate))
    x, up, down, gate = (None if t is None else t.contiguous() for t in (x, up, down, gate))
    with without_autocast(x.device.type):
        y = mlp(x, up, down, gate) if chosen == "reference" else registration.mlp(x, up, down, gate, chosen)
    return y.view(batch, -1, width) if shared else y


def _check_weights(x: torch.Tensor, up: object, down: object, gate: object) -> None:
    if not isinstance(up, torch.Tensor) or up.ndim not in (2, 3) or min(up.shape) < 1:
        got = tuple(up.shape) if isinstance(up, torch.Tensor) else type(up).__name__
        raise ValueError(f"up: expected a tensor of shape [B, H, D] or [H, D], got {got}")
    leading, hidden, width = (x.shape[0],) * (up.ndim == 3), up.shape[-2], x.shape[2]
    check_tensor("up", up, (*leading, hidden, width), like=x)
    check_tensor("down", down, (*leading, width, hidden), like=x)
    if gate is not None:
        check_tensor("gate", gate, (*leading, hidden, width), like=x)
    for name, weight in (("up", up), ("down", down), ("gate", gate)):
        if weight is not None and (weight.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(f"{name}: expected fp64 exactly where the inputs are, got {weight.dtype}")
