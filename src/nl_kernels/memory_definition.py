"""The definition of a memory and of what one token writes to it; the token-loop references are built on it.

Everything is batched over any leading dimensions: weights [..., out, in], vectors [..., width],
rates [...]. Source: arXiv 2512.24695, Eqs. 57 and 88-91.
"""

from __future__ import annotations

import torch

from nl_kernels.memory.state import State, map_tensors
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule, activate, bound_length, inverse_norm


def memory_output(weights: DeepMemoryWeights, x: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """f(x) = W1 n(σ(W2 x)), or W x for a linear memory; without any residual."""
    if weights.outer is None:
        return _apply(weights.inner, x)
    hidden, _ = activate(_apply(weights.inner, x), rule.activation)
    if rule.normalize_hidden:
        hidden = hidden * inverse_norm(hidden)
    return _apply(weights.outer, hidden)


def memory_error(
    weights: DeepMemoryWeights,
    anchor: DeepMemoryWeights,
    k: torch.Tensor,
    target: torch.Tensor,
    rule: MemoryRule,
    residual: bool,
) -> torch.Tensor:
    """The gradient of ``½‖M(k) − target‖²`` by M(k), scaled down to ``rule.error_bound`` where longer.

    A linear memory's weights may be those of the ``anchor`` here: see ``rule.error_at``.
    """
    if rule.errs_at_anchor(weights.outer is None):
        weights = anchor
    error = memory_output(weights, k, rule) - target
    return bound_length(error + k if residual else error, rule.error_bound)


def memory_gradients(
    weights: DeepMemoryWeights, x: torch.Tensor, error: torch.Tensor, rule: MemoryRule
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``error`` at f(x), by layer: pairs (δ, input), first layer first; the layer's gradient is δ inputᵀ.

    With ``rule.error_bound`` the error signal that reaches the hidden layer is scaled down to it.
    """
    if weights.outer is None:
        return [(error, x)]
    hidden, slope = activate(_apply(weights.inner, x), rule.activation)
    back = _apply(weights.outer.transpose(-1, -2), error)
    if rule.normalize_hidden:
        scale = inverse_norm(hidden)
        hidden = hidden * scale
        back = scale * (back - hidden * (hidden * back).sum(-1, keepdim=True))
    return [(bound_length(back * slope, rule.error_bound), x), (error, hidden)]


def write_memory(
    weights: DeepMemoryWeights,
    velocity: DeepMemoryWeights | None,
    gradients: list[list[tuple[torch.Tensor, torch.Tensor]]],
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum_decay: torch.Tensor | None,
    rule: MemoryRule,
) -> tuple[DeepMemoryWeights, DeepMemoryWeights]:
    """One step of all layers by :func:`write_layer`, from the pairs of each."""
    written = [
        write_layer(
            weight,
            None if velocity is None else velocity[i],
            pairs,
            rate,
            log_decay,
            momentum_decay,
            rule,
            first_layer=i == 0,
        )
        for i, (weight, pairs) in enumerate(zip(weights, gradients))
    ]
    written += [(None, None)] * (2 - len(written))
    return tuple(map(DeepMemoryWeights, *written))


def choose(here: torch.Tensor, new: State, old: State) -> State:
    """A state with ``new`` for the sequences ``here`` [B], else ``old``."""
    return map_tensors(lambda x, y: torch.where(here.view(-1, *(1,) * (x.ndim - 1)), y, x), old, new)


def write_layer(
    state: torch.Tensor,
    momentum: torch.Tensor | None,
    gradients: list[tuple[torch.Tensor, torch.Tensor]],
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum_decay: torch.Tensor | None,
    rule: MemoryRule,
    first_layer: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One step of a layer: ``U ← μU − sη Σ δxᵀ``, ``W ← αW − η(Wx)xᵀ + U`` (Eq. 88), and the new (W, U).

    The sum runs over the pairs (δ, x) in ``gradients``; the erase is along the first x, and a layer that does
    not erase leaves that term out. The share s of a write is 1 − μ where the rule averages writes, else 1.
    Without momentum U is the write alone.
    """
    erases = rule.erases(first_layer)
    x = gradients[0][1]
    rate = rate[..., None]
    if erases and rule.proximal:
        rate = rate / (1 + rate * x.square().sum(-1, keepdim=True))
    write = -sum(_outer(rate * delta, pair_input) for delta, pair_input in gradients)
    if momentum is not None:
        share = rule.share(momentum_decay)
        if share is not None:
            write = share[..., None, None] * write
        write = momentum = momentum_decay[..., None, None] * momentum + write
    updated = log_decay.exp()[..., None, None] * state + write
    if erases:
        updated = updated - _outer(rate * _apply(state, x), x)
    return updated, momentum


def _apply(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (matrix @ x[..., None])[..., 0]


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[..., :, None] * b[..., None, :]
