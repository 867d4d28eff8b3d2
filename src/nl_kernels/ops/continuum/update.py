"""One step of a fast weight by a rule, from what a chunk's backward pass yields."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nl_kernels.checks import check_choice, check_tensor
from nl_kernels.ops.continuum.checks import check_decay, check_retention
from nl_kernels.ops.continuum.orthogonal import orthogonalised
from nl_kernels.ops.continuum.state import RULES, RULES_WITH_MOMENTUM


def continuum_update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    *,
    rule: str,
    gram: torch.Tensor | None = None,
    momentum: torch.Tensor | None = None,
    momentum_decay: float = 0.9,
    initial: torch.Tensor | None = None,
    retention: float | torch.Tensor = 1.0,
    norms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight of a linear layer after one step on a chunk (Nested Learning, arXiv 2512.24695, Eq. 71).

    With the layer's inputs x_t, its output gradients δ_t, rates η_t, and G = Σ_t η_t δ_t x_tᵀ::

        sgd        W − G
        dgd        (W − G) (I + Σ_t η_t x_t x_tᵀ)⁻¹
        momentum   M ← decay·M + G,  W − M
        muon       M ← decay·M + G,  W − (‖M‖_F / ‖O‖_F) O  with O = newton_schulz(M)

    With ``retention`` α < 1, ``(1 − α) (W − W_0)`` is taken off as well: a part of how far the weight moved.
    Muon's step evens out M's singular values and keeps its Frobenius norm, so it has M's root mean square:
    it follows the rates as the other rules' steps do, and a rank-one M is stepped by as it is.
    Differentiable in every tensor; muon's step once.

    Args:
        weight: W [.., out, in], fp32 or fp64; leading dimensions (sequences) as the gradient's, or such that
            they broadcast to them.
        gradient: G [.., out, in], rates included.
        rule: ``"sgd"``, ``"dgd"``, ``"momentum"`` or ``"muon"``.
        gram: of dgd: Σ_t η_t x_t x_tᵀ [.., in, in].
        momentum: M [.., out, in] of ``momentum`` and ``muon`` from the step before; None: zero.
        momentum_decay: in [0, 1).
        initial: W_0 [.., out, in], of a dtype and shape that go with the weight's; needed below retention 1.
        retention: α in [0, 1], a number or a tensor of one.
        norms: [out] or [.., out], the Euclidean norm that each row gets back after the step (LaCT,
            arXiv 2505.23884); rows of zeros stay. None: rows are as the step leaves them.

    Returns:
        The new weight, and the new momentum or None for a rule without.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype than ``weight``.
        ValueError: another shape, device or value than said, or an argument that the rule does not take.
    """
    _check(weight, gradient, rule, gram, momentum, momentum_decay, initial, retention, norms)
    if rule in RULES_WITH_MOMENTUM:
        momentum = gradient if momentum is None else torch.add(gradient, momentum, alpha=momentum_decay)
    step = momentum if rule == "momentum" else evened_out(momentum) if rule == "muon" else gradient
    new = weight - step
    if rule == "dgd":
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        new = torch.linalg.solve(eye + gram, new, left=False)
    if isinstance(retention, torch.Tensor) or retention < 1:
        new = new - (1 - retention) * (weight - initial.to(weight.dtype))
    return new if norms is None else with_row_norms(new, norms), momentum


def evened_out(momentum: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """Muon's step: ``newton_schulz(M)`` with the Frobenius norm of each M [.., out, in]."""
    direction = orthogonalised(momentum, impl)
    norm, length = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (momentum, direction))
    return direction * (norm / torch.where(length > 0, length, 1.0))


def with_row_norms(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Every row of ``weight`` [.., out, in] scaled to its norm in [.., out]; rows of zeros as they are."""
    length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return weight * (norms[..., None] / torch.where(length > 0, length, 1.0))


def erasing(inputs: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """The R [.., N, in] along which dgd writes a layer with inputs X [.., N, in] and rates [.., N].

    With D = diag(rates): D X (I + Xᵀ D X)⁻¹ = (I + D X Xᵀ)⁻¹ D X, by the smaller of the two systems. No
    square root of the rates: its derivative at 0 is infinite.
    """
    rated = inputs * rates[..., None]
    tokens, width = inputs.shape[-2:]
    eye = torch.eye(min(tokens, width), dtype=inputs.dtype, device=inputs.device)
    if tokens < width:
        return torch.linalg.inv(eye + rated @ inputs.mT) @ rated
    return rated @ torch.linalg.inv(eye + inputs.mT @ rated)


def _check(weight, gradient, rule, gram, momentum, momentum_decay, initial, retention, norms) -> None:
    check_choice("rule", rule, RULES)
    _check_matrix("gradient", gradient)
    _check_matrix("weight", weight)
    *leading, out, width = gradient.shape
    if not _broadcasts(weight.shape, gradient.shape) or weight.shape[-2:] != gradient.shape[-2:]:
        raise ValueError(
            f"weight: expected shape {tuple(gradient.shape)}, the gradient's, or one that broadcasts to it, "
            f"got {tuple(weight.shape)}"
        )
    _check_like("gradient", gradient, gradient.shape, weight)
    if rule == "dgd":
        _check_like("gram", gram, (*leading, width, width), weight)
    elif gram is not None:
        raise ValueError(f"gram: of rule 'dgd' only, got it with {rule!r}")
    if momentum is not None:
        if rule not in RULES_WITH_MOMENTUM:
            raise ValueError(f"momentum: of rules {RULES_WITH_MOMENTUM} only, got it with {rule!r}")
        _check_like("momentum", momentum, gradient.shape, weight)
    check_decay("momentum_decay", momentum_decay)
    check_retention("retention", retention, weight)
    if initial is not None:
        shape = getattr(initial, "shape", weight.shape)
        if not _broadcasts(shape, gradient.shape) or shape[-2:] != weight.shape[-2:]:
            raise ValueError(
                f"initial: expected a shape that goes with {tuple(gradient.shape)}, got {tuple(shape)}"
            )
        check_tensor("initial", initial, shape, like=weight)
    elif isinstance(retention, torch.Tensor) or retention < 1:
        raise ValueError(
            "initial: a retention below 1 needs the weights that the step pulls back to, got None"
        )
    if norms is not None:
        _check_like("norms", norms, (out,) if getattr(norms, "ndim", 0) == 1 else (*leading, out), weight)


def _check_matrix(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, in which steps add up, got {value.dtype}")
    if value.ndim < 2:
        raise ValueError(f"{name}: expected shape [.., out, in], got {tuple(value.shape)}")


def _check_like(name: str, value: object, shape: Sequence[int], weight: torch.Tensor) -> None:
    check_tensor(name, value, shape, like=weight)
    if value.dtype != weight.dtype:
        raise TypeError(f"{name}: expected {weight.dtype}, the weight's, got {value.dtype}")


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to)))
