"""The MLP of a level by itself, with weights of each sequence: its outputs, and the gradients of a step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nl_kernels.checks import check_range, check_tensor
from nl_kernels.dispatch import without_autocast
from nl_kernels.ops.continuum import registration
from nl_kernels.ops.continuum.checks import check_bound, check_stream, choose_checked
from nl_kernels.ops.continuum.state import state_dtype


class ContinuumGradients(NamedTuple):
    """Σ_t η_t δ_t x_tᵀ of each linear layer: what :func:`nl_kernels.continuum_update` takes."""

    up: torch.Tensor  # [B, H, D], fp32 (fp64 for fp64), as the others
    down: torch.Tensor  # [B, D, H]
    gate: torch.Tensor | None  # [B, H, D]


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
    check_stream("x", x)
    _check_weights(x, up, down, gate)
    chosen = choose_checked("continuum_mlp", impl, x.device, _refused(x))
    batch, _, width = x.shape
    shared = up.ndim == 2
    if shared:
        x = x.reshape(1, -1, width)
        up, down, gate = (None if w is None else w[None] for w in (up, down, gate))
    x, up, down, gate = (None if t is None else t.contiguous() for t in (x, up, down, gate))
    with without_autocast(x.device.type):
        y = registration.mlp(x, up, down, gate, chosen)
    return y.view(batch, -1, width) if shared else y


def continuum_gradients(
    inputs: torch.Tensor,
    error: torch.Tensor,
    rates: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    error_bound: float | None = None,
    impl: str | None = None,
) -> ContinuumGradients:
    """The sums of a chunk's step, Σ_t η_t δ_t x_tᵀ of each linear layer of the MLP (Eq. 71).

    The hidden layer is computed from ``inputs``. No derivative.

    Args:
        inputs: [B, C, D], what the MLP read, fp16, bf16, fp32 or fp64.
        error: [B, C, D], the loss's gradient at the MLP's outputs, in the same dtype.
        rates: η [B, C], at least 0; 0 where there is no token.
        up, gate: [B, H, D]. down: [B, D, H].
        error_bound: largest root mean square of the gradients at the outputs of up and gate, which longer
            ones are scaled down to; ``error`` is taken as it is. None: no bound.
        impl: ``"triton"`` (not fp64), ``"eager"``, ``"reference"`` or None: by device and dtype.

    Raises:
        TypeError, ValueError: a bad argument, named; or one that requires a gradient while they are recorded.
        NotImplementedError: ``impl="triton"`` in fp64.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_stream("inputs", inputs)
    check_tensor("error", error, inputs.shape, like=inputs)
    if error.dtype != inputs.dtype:
        raise TypeError(f"error: expected {inputs.dtype}, that of inputs, got {error.dtype}")
    check_tensor("rates", rates, inputs.shape[:2], like=inputs)
    if rates.device.type == "cpu":  # reading them on an accelerator would wait for the device
        check_range("rates", rates, 0.0, math.inf, closed_high=False)
    if isinstance(up, torch.Tensor) and up.ndim == 2:
        raise ValueError(f"up: expected shape [B, H, D], weights of each sequence, got {tuple(up.shape)}")
    _check_weights(inputs, up, down, gate)
    check_bound("error_bound", error_bound)
    tensors = {"inputs": inputs, "error": error, "rates": rates, "up": up, "down": down, "gate": gate}
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name}: the gradients have no derivative; detach it or use torch.no_grad()"
                )
    chosen = choose_checked("continuum_gradients", impl, inputs.device, _refused(inputs))
    rates = rates.to(state_dtype(inputs.dtype))
    contiguous = [None if t is None else t.contiguous() for t in (error, inputs, up, down, gate, rates)]
    with without_autocast(inputs.device.type):
        sums = torch.ops.nl_kernels.continuum_mlp_backward(*contiguous, error_bound, False, chosen)
    return ContinuumGradients(sums[0], sums[1], sums[2] if gate is not None else None)


def _refused(x: torch.Tensor) -> str | None:
    fp64 = x.dtype == torch.float64
    return "the Triton kernels take bfloat16, float16 and float32, got float64" if fp64 else None


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
