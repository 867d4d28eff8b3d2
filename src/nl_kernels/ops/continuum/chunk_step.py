"""A level's MLP on the tokens of one chunk, and the step of its weights that these tokens make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nl_kernels.ops.continuum.state import ContinuumLevel, state_dtype
from nl_kernels.ops.continuum.update import evened_out, with_row_norms


class Weights(NamedTuple):
    """Shared by all sequences ([H, D], …) until the first step, of each one ([B, H, D], …) from then on.

    Also momenta (None: zero) and row norms, in the same places.
    """

    up: torch.Tensor | None
    down: torch.Tensor | None
    gate: torch.Tensor | None


NO_MOMENTA = Weights(None, None, None)


class Served(NamedTuple):
    """What the MLP makes of the inputs of a chunk: what a step and a backward pass need of it."""

    outputs: Weights  # [B, C, H], [B, C, D], [B, C, H]: of the linear layers
    hidden: torch.Tensor  # [B, C, H]
    slopes: tuple[torch.Tensor, ...]  # ∂hidden/∂up's output, and with a gate ∂hidden/∂gate's output


def mlp(inner: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """``down σ(up x)`` with GELU, or ``down (SiLU(gate x) ∘ up x)``."""
    opened = product(inner, up)
    hidden = F.gelu(opened) if gate is None else F.silu(product(inner, gate)) * opened
    return product(hidden, down)


def mlp_backward(
    error: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    rates: torch.Tensor | None,
    error_bound: float | None,
    input_gradient: bool,
) -> list[torch.Tensor | None]:
    """Gradients of x, up, down, gate; see :func:`.registration.mlp_backward`."""
    weights = Weights(*(None if w is None else w.to(x.dtype) for w in (up, down, gate)))
    served = serve(x, weights)
    back = error @ weights.down
    signals = [back * slope for slope in served.slopes]
    grad_x = None
    if input_gradient:
        grad_x = (
            signals[0] @ weights.up if gate is None else signals[0] @ weights.up + signals[1] @ weights.gate
        )
    sums = [_token_sum(signals[0], x, rates, error_bound), _token_sum(error, served.hidden, rates, None)]
    return [grad_x, *sums, None if gate is None else _token_sum(signals[1], x, rates, error_bound)]


def chunk_sums(
    keys: torch.Tensor,
    inputs: torch.Tensor,
    value: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    rates: torch.Tensor,
    error_bound: float | None,
    output: bool,
) -> list[torch.Tensor | None]:
    """What a chunk's step by sgd or momentum subtracts, from its tokens: Σ_t η_t δ_t x_tᵀ of each layer.

    Args:
        keys, inputs: [B, C, D]; the targets are ``value`` [D, D] times the inputs.
        up, down, gate: of all sequences or of each; of any dtype.
        rates: [B, C], 0 where there is no token.
        output: also the MLP's outputs on the keys.

    Returns:
        The outputs or None, and the sums of up, down and gate (or None), [B, ..] in fp32 (fp64 for fp64).
    """
    weights = Weights(*(None if w is None else w.to(keys.dtype) for w in (up, down, gate)))
    served = serve(keys, weights)
    error = served.outputs.down - F.linear(inputs, value.to(inputs.dtype))
    scale = _bounding(error, error_bound)
    if scale is not None:
        error = error * scale
    back = error @ weights.down
    sums = [_token_sum(back * slope, keys, rates, error_bound) for slope in served.slopes]
    sums.insert(1, _token_sum(error, served.hidden, rates, None))
    return [served.outputs.down if output else None, *sums, *[None] * (3 - len(sums))]


def read_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    owners: Sequence[tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]],
) -> torch.Tensor:
    """The gradient of x [B, C, D] from that of the MLP's outputs; adds those of the weights to the totals.

    Args:
        up, down, gate: of all sequences or of each; of any dtype.
        owners: weights that the gradient belongs to: for each the tokens' share in it [B, C] (None: 1), and
            the totals of its up, down and gate, of all sequences or of each.
    """
    weights = Weights(*(None if w is None else w.to(x.dtype) for w in (up, down, gate)))
    served = serve(x, weights)
    back = grad @ weights.down
    signals = [back * slope for slope in served.slopes]
    layers = [(signals[0], x), (grad, served.hidden), *((s, x) for s in signals[1:])]
    for share, totals in owners:
        for total, (signal, inputs) in zip(totals, layers):
            found = _token_sum(signal, inputs, share, None)
            total += found.sum(0) if total.ndim == 2 else found
    grad_x = signals[0] @ weights.up
    return grad_x if gate is None else grad_x + signals[1] @ weights.gate


def _token_sum(
    signal: torch.Tensor, inputs: torch.Tensor, rates: torch.Tensor | None, bound: float | None
) -> torch.Tensor:
    signal, inputs = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (signal, inputs))
    if rates is not None:
        scale = _bounding(signal, bound)
        signal = signal * (rates[..., None] if scale is None else rates[..., None] * scale)
    return signal.mT @ inputs


def product(inner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x Wᵀ`` in the dtype of x, with one W for all sequences or one for each."""
    weight = weight.to(inner.dtype)
    return F.linear(inner, weight) if weight.ndim == 2 else inner @ weight.mT


def serve(inner: torch.Tensor, weights: Weights) -> Served:
    """The MLP with its intermediate values."""
    up = product(inner, weights.up)
    if weights.gate is None:
        gate, hidden = None, F.gelu(up)
        slopes = (torch.ops.aten.gelu_backward(torch.ones_like(up), up),)
    else:
        gate = product(inner, weights.gate)
        opening = torch.sigmoid(gate)
        opened = gate * opening
        hidden = opened * up
        slopes = (opened, up * (opening + opened * (1 - opening)))
    return Served(Weights(up, product(hidden, weights.down), gate), hidden, slopes)


def keys_of(level: ContinuumLevel, inputs: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """The keys of tokens n(x), in their dtype."""
    if level.key is None:
        return inputs
    keys = F.linear(inputs, level.key.to(inputs.dtype))
    return F.rms_norm(keys, keys.shape[-1:], None, norm_eps)


def row_norms(level: ContinuumLevel) -> Weights | None:
    """The row norms to restore after each step, [out] of each matrix."""
    if not level.restore_norms:
        return None
    dtype = state_dtype(level.up.dtype)
    return Weights(
        *(
            None if w is None else torch.linalg.vector_norm(w.to(dtype), dim=-1)
            for w in (level.up, level.down, level.gate)
        )
    )


def learn(
    level: ContinuumLevel,
    weights: Weights,
    momenta: Weights,
    norms: Weights | None,
    served: Served,
    keys: torch.Tensor,
    targets: torch.Tensor,
    rates: torch.Tensor,
) -> tuple[Weights, Weights]:
    """Weights and momenta after one step on a chunk, all gradients at ``weights`` (Eq. 71).

    Args:
        served: the MLP on ``keys`` at ``weights``.
        norms: row norms to restore; None: rows are as the step leaves them.
        keys, targets: [B, C, D].
        rates: [B, C].
    """
    error = served.outputs.down - targets
    scale = _bounding(error, level.error_bound)
    if scale is not None:
        error = error * scale
    back = error @ weights.down
    rule = _Rule(level, rates)
    keyed = rule.written_along(keys)
    signals = {"down": (error, None, rule.written_along(served.hidden))}
    for name, slope in zip(("up", "gate"), served.slopes):
        signal = back * slope
        signals[name] = (signal, _bounding(signal, level.error_bound), keyed)
    new, after = {"gate": None}, {"gate": None}
    for name, (signal, scale, along) in signals.items():
        weight = getattr(weights, name)
        if weight.ndim == 3 and not level.retains_all:  # of all sequences: the level's own, not moved yet
            # every rule adds to the weight, so what is retained of it may come first
            weight = torch.lerp(getattr(level, name).to(weight.dtype), weight, level.retention)
        new[name], after[name] = rule.step(
            weight,
            getattr(momenta, name),
            signal,
            scale,
            getattr(served.outputs, name),
            along,
        )
        if norms is not None:
            new[name] = with_row_norms(new[name], getattr(norms, name))
    return Weights(**new), Weights(**after)


class _Rule:
    """How a matrix W changes, given its inputs X, outputs X Wᵀ and bounded output gradients G of a chunk."""

    def __init__(self, level: ContinuumLevel, rates: torch.Tensor) -> None:
        self.rule, self.decay = level.rule, level.momentum_decay
        self.rates = rates[..., None]

    def written_along(self, inputs: torch.Tensor) -> torch.Tensor:
        """The rows [B, C, in] along which a layer with these inputs is written.

        With D = diag(rates): X, as the rates go with the signals; for dgd D X (I + Xᵀ D X)^{-1} =
        (I + D X Xᵀ)^{-1} D X, by the smaller of the two systems. No square root of the rates: its derivative
        at 0 is infinite.
        """
        if self.rule != "dgd":
            return inputs
        rated = inputs * self.rates
        tokens, width = inputs.shape[-2:]
        eye = torch.eye(min(tokens, width), dtype=inputs.dtype, device=inputs.device)
        if tokens < width:
            return torch.linalg.inv(eye + rated @ inputs.mT) @ rated
        return rated @ torch.linalg.inv(eye + inputs.mT @ rated)

    def step(
        self,
        weight: torch.Tensor,
        momentum: torch.Tensor | None,
        signal: torch.Tensor,
        scale: torch.Tensor | None,
        output: torch.Tensor,
        along: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The new weight and momentum; ``scale`` [B, C, 1] bounds the signal and None leaves it."""
        if self.rule == "dgd":
            # the erased part X Wᵀ is the layer's own output
            pulled = output + signal if scale is None else torch.addcmul(output, signal, scale)
            return torch.baddbmm(weight, pulled.mT, along, alpha=-1), None
        rated = signal * (self.rates if scale is None else self.rates * scale)
        if self.rule == "sgd":
            return torch.baddbmm(weight, rated.mT, along, alpha=-1), None
        if momentum is None:
            momentum = rated.mT @ along
        else:
            momentum = torch.baddbmm(momentum, rated.mT, along, beta=self.decay)
        return weight - (momentum if self.rule == "momentum" else evened_out(momentum)), momentum


def _bounding(signal: torch.Tensor, bound: float | None) -> torch.Tensor | None:
    """What scales a signal [B, C, width] down to a root mean square of ``bound`` where it is longer."""
    if bound is None:
        return None
    longest = bound * signal.shape[-1] ** 0.5
    length = torch.linalg.vector_norm(signal, dim=-1, keepdim=True)
    return longest / length.clamp_min(longest)
