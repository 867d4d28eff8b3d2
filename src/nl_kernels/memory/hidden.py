"""The hidden layer ``n(σ(z))`` of a memory, the error signal that flows back through it, and their adjoints.

None of these is differentiable by autograd: the adjoints are the derivatives written out. They take few
passes, and none keeps what another has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nl_kernels.memory_rule import MemoryRule, activate, inverse_norm


class Activated(NamedTuple):
    """A hidden layer [.., h] with what its adjoint needs.

    Attributes:
        value: n(σ(z)).
        slope: σ'(z), or ``None`` if not asked for.
        curvature: σ''(z), or ``None`` if not asked for; of the tokens that were asked for.
        scale: 1/‖σ(z)‖ [.., 1], or ``None`` when it is not normalised.
    """

    value: torch.Tensor
    slope: torch.Tensor | None
    curvature: torch.Tensor | None
    scale: torch.Tensor | None

    def rows(self, tokens: slice) -> Activated:
        """The same for some tokens of [P, c, h]."""
        return Activated(*(None if part is None else part[:, tokens] for part in self))


def activated(
    z: torch.Tensor, rule: MemoryRule, *, sloped: bool = True, curved: bool | slice = True
) -> Activated:
    """``n(σ(z))``, its slope and curvature if asked for; overwrites z; not differentiable by autograd.

    ``curved`` may say for which tokens.
    """
    slope = curvature = None
    tokens = curved if isinstance(curved, slice) else slice(None)
    if rule.activation == "silu":
        s = torch.sigmoid(z)
        value = z.mul_(s)
        if sloped:
            slope = torch.lerp(value, torch.ones((), dtype=z.dtype, device=z.device), s)  # s + value (1 − s)
        if curved:  # (2 slope − value) (1 − s)
            rest = torch.sub(slope[..., tokens, :], value[..., tokens, :], alpha=0.5)
            curvature = rest.addcmul_(rest, s[..., tokens, :], value=-1).mul_(2)
    else:
        value, slope = activate(z, rule.activation)
        if curved:
            square = z[..., tokens, :].square()
            density = torch.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))
            curvature = density.mul_(2 - square)
    scale = None
    if rule.normalize_hidden:
        scale = inverse_norm(value)
        value = value.mul_(scale)
    return Activated(value, slope, curvature, scale)


def hidden_adjoint(grad: torch.Tensor, hidden: Activated, radial: torch.Tensor | None = None) -> torch.Tensor:
    """The adjoint of z from that of ``n(σ(z))``; overwrites ``grad``.

    ``radial`` [.., 1] is ‖σ(z)‖⁻¹'s own adjoint times itself, of the first tokens (:func:`signal_adjoint`).
    """
    value, slope, _, scale = hidden
    if scale is not None:
        along = row_dot(value, grad)
        if radial is not None:
            along[:, : radial.shape[1]] += radial
        grad = grad.addcmul_(value, along, value=-1).mul_(scale)
    return grad.mul_(slope)


class Signal(NamedTuple):
    """What :func:`error_signal` made of ``back`` [.., h], and keeps for its adjoint."""

    value: torch.Tensor
    back: torch.Tensor
    tangent: torch.Tensor
    along: torch.Tensor | None
    factor: torch.Tensor | None


def error_signal(back: torch.Tensor, hidden: Activated, rule: MemoryRule) -> Signal:
    """The error signal at z, bounded, from ``back``, the one at ``n(σ(z))``."""
    value, slope, _, scale = hidden
    along, tangent = None, back
    if scale is not None:
        along = row_dot(value, back)
        tangent = torch.addcmul(back, value, along, value=-1).mul_(scale)
    signal = tangent * slope
    factor = length_factor(signal, rule.error_bound)
    return Signal(signal if factor is None else signal.mul_(factor), back, tangent, along, factor)


def signal_adjoint(grad: torch.Tensor, signal: Signal, hidden: Activated, rule: MemoryRule):
    """Adjoints [P, c, h] from that of the error signal, for all memories along the batch.

    Of ``back``, of n(σ(z)), of z (through σ'), and ``radial`` [P, c, 1] for :func:`hidden_adjoint`. The
    second and the last are ``None`` for layers that are not normalised.
    """
    value, slope, curvature, scale = hidden
    grad = bound_adjoint(grad, signal.value, signal.factor, rule.error_bound)
    at_z = grad * signal.tangent
    at_tangent = grad * slope
    if scale is None:
        return at_tangent, None, at_z.mul_(curvature), None
    radial = row_dot(at_z, slope)
    at_z.mul_(curvature)
    across = row_dot(value, at_tangent)
    at_value = (at_tangent * (signal.along * -scale)).addcmul_(signal.back, across * -scale)
    at_back = at_tangent.addcmul_(value, across, value=-1).mul_(scale)
    return at_back, at_value, at_z, radial


def length_factor(x: torch.Tensor, bound: float | None) -> torch.Tensor | None:
    """What scales ``x`` down to length ``bound`` along its last dimension; ``None`` without a bound."""
    if bound is None:
        return None
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    factor = length.reciprocal_() if bound == 1 else length.reciprocal_().mul_(bound)
    return factor.clamp_(max=1)  # exactly 1 where x is not too long


def bound_adjoint(grad, bounded, factor, bound: float | None) -> torch.Tensor:
    """The adjoint of x from that of ``bounded = factor x``; where x was not too long they are the same."""
    if factor is None:
        return grad
    along = row_dot(bounded, grad).mul_(-1 / (bound * bound)).masked_fill_(factor >= 1, 0)
    return torch.addcmul(grad, bounded, along).mul_(factor)


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner products along the last dimension, which is kept."""
    return (a * b).sum(-1, keepdim=True)
