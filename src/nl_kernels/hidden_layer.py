"""The hidden layer ``n(σ(z))`` of a memory, and the error signal that flows back through it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.memory_rule import MemoryRule, activate, bound_length, inverse_norm


class Hidden(NamedTuple):
    """A hidden layer [.., h]: its value, the slope σ'(z), and 1/‖σ(z)‖ [.., 1] when it is normalised."""

    value: torch.Tensor
    slope: torch.Tensor
    scale: torch.Tensor | None


def hidden_layer(z: torch.Tensor, rule: MemoryRule) -> Hidden:
    """``n(σ(z))`` with what its derivative needs."""
    value, slope = activate(z, rule.activation)
    if not rule.normalize_hidden:
        return Hidden(value, slope, None)
    scale = inverse_norm(value)
    return Hidden(value * scale, slope, scale)


def hidden_gradient(back: torch.Tensor, hidden: Hidden, rule: MemoryRule) -> torch.Tensor:
    """The error signal at z, bounded, from ``back``, the one at ``n(σ(z))``."""
    value, slope, scale = hidden
    if scale is not None:
        back = scale * (back - value * (value * back).sum(-1, keepdim=True))
    return bound_length(back * slope, rule.error_bound)
