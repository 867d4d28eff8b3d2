"""A chunk's products in PyTorch: what a level reads, the step that its weights take, and the way back.

Autograd follows all of it; :func:`read_backward` is the derivative written out, for steps that are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nl_kernels.memory.state import map_tensors
from nl_kernels.ops.continuum.state import (
    NO_MOMENTA,
    RULES_WITH_MOMENTUM,
    ContinuumLevel,
    Weights,
    initial_weights,
    state_dtype,
)
from nl_kernels.ops.continuum.update import erasing, evened_out, with_row_norms

IN_PLACE = False
"""Whether steps overwrite the weights; autograd follows those that make new ones."""


class Evaluated(NamedTuple):
    """What the MLP makes of the inputs of a chunk: what a step and a backward pass need of it."""

    outputs: Weights  # [B, C, H], [B, C, D], [B, C, H]: of the linear layers
    hidden: torch.Tensor  # [B, C, H]
    slopes: tuple[torch.Tensor, ...]  # ∂hidden/∂up's output, and with a gate ∂hidden/∂gate's output


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """``down σ(up x)`` with GELU, or ``down (SiLU(gate x) ∘ up x)``."""
    opened = _product(x, up)
    hidden = F.gelu(opened) if gate is None else F.silu(_product(x, gate)) * opened
    return _product(hidden, down)


def evaluate(x: torch.Tensor, weights: Weights) -> Evaluated:
    """The MLP with its intermediate values."""
    up = _product(x, weights.up)
    if weights.gate is None:
        gate, hidden = None, F.gelu(up)
        slopes = (torch.ops.aten.gelu_backward(torch.ones_like(up), up),)
    else:
        gate = _product(x, weights.gate)
        opening = torch.sigmoid(gate)
        opened = gate * opening
        hidden = opened * up
        slopes = (opened, up * (opening + opened * (1 - opening)))
    return Evaluated(Weights(up, _product(hidden, weights.down), gate), hidden, slopes)


def mlp_backward(
    error: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    input_gradient: bool,
) -> list[torch.Tensor | None]:
    """Gradients of x, up, down, gate: the operator ``continuum_mlp_backward``."""
    weights, wide = cast(Weights(up, down, gate), x.dtype), state_dtype(x.dtype)
    evaluated = evaluate(x, weights)
    signals = _signals(error, weights, evaluated.slopes)
    layers = [(signals[0], x), (error, evaluated.hidden), *((signal, x) for signal in signals[1:])]
    sums = [signal.to(wide).mT @ inputs.to(wide) for signal, inputs in layers]
    return [_to_inputs(signals, weights) if input_gradient else None, *sums]


def read(x: torch.Tensor, weights: Weights, records: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The MLP's outputs for x [B, C, D]; with ``records`` what :func:`read_backward` needs of them."""
    if not records:
        return mlp(x, *weights), ()
    evaluated = evaluate(x, weights)
    return evaluated.outputs.down, (evaluated.hidden, *evaluated.slopes)


def learn(
    level: ContinuumLevel,
    reads: torch.Tensor | None,
    keys: torch.Tensor,
    targets: torch.Tensor,
    weights: Weights,
    momenta: Weights,
    norms: Weights | None,
    rates: torch.Tensor,
    records: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], Weights, Weights]:
    """Read a chunk, and one step on it, all gradients at ``weights`` (Eq. 71); nothing is overwritten.

    Args:
        reads: [B, C, D], of any dtype; None: the keys are what is read.
        keys, targets: [B, C, D] in the dtype of the steps.
        weights: of all sequences or of each, of any dtype.
        norms: row norms to restore; None: rows are as the step leaves them.
        rates: [B, C], 0 where there is no token.

    Returns:
        What :func:`read` returns; and weights and momenta after the step.
    """
    weights = cast(weights, keys.dtype)
    y, kept = (None, ()) if reads is None else read(reads, weights, records)
    evaluated = evaluate(keys, weights)
    factors = step_factors(level, weights, evaluated, keys, targets, rates)
    new, after = [], []
    parts = zip(weights, initial_weights(level), momenta, norms or NO_MOMENTA, factors)
    for weight, initial, momentum, norm, sides in parts:
        if weight is not None:
            left, right = sides[0].mT, sides[1]
            if weight.ndim == 3 and not level.retains_all:  # of all sequences: the level's own, not moved yet
                # every rule adds to the weight, so what is retained of it may come first
                weight = torch.lerp(initial.to(weight.dtype), weight, level.retention)
            if level.rule not in RULES_WITH_MOMENTUM:
                weight = torch.baddbmm(weight, left, right, alpha=-1)
            else:
                if momentum is None:
                    momentum = left @ right
                else:
                    momentum = torch.baddbmm(momentum, left, right, beta=level.momentum_decay)
                weight = weight - (momentum if level.rule == "momentum" else evened_out(momentum))
            if norm is not None:
                weight = with_row_norms(weight, norm)
        new.append(weight)
        after.append(momentum)
    if reads is None:
        y, kept = evaluated.outputs.down, (evaluated.hidden, *evaluated.slopes) if records else ()
    return y, kept, Weights(*new), Weights(*after)


def read_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    activations: Sequence[torch.Tensor],
    owners: Sequence[tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]],
) -> torch.Tensor:
    """The gradient of x [B, C, D] from that of what was read; adds those of the weights to the totals.

    Args:
        weights: of all sequences or of each; of any dtype.
        activations: from :func:`read`.
        owners: weights that the gradient belongs to: for each the sequences' share in it [B] (None: 1), and
            the totals of its up, down and gate, of all sequences or of each.
    """
    weights = cast(weights, x.dtype)
    hidden, *slopes = activations
    signals = _signals(d_y, weights, slopes)
    layers = [(signals[0], x), (d_y, hidden), *((signal, x) for signal in signals[1:])]
    for share, totals in owners:
        for total, (signal, inputs) in zip(totals, layers):
            if share is not None:
                signal = signal * share[:, None, None].to(signal.dtype)
            if total.ndim == 2:
                signal, inputs = signal.flatten(0, 1), inputs.flatten(0, 1)
            if total.dtype != signal.dtype:
                total += signal.mT @ inputs
            elif total.ndim == 2:
                total.addmm_(signal.mT, inputs)
            else:
                total.baddbmm_(signal.mT, inputs)
    return _to_inputs(signals, weights)


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
    weights = cast(initial_weights(level), state_dtype(level.up.dtype))
    return map_tensors(lambda w: torch.linalg.vector_norm(w, dim=-1), weights)


def step_factors(
    level: ContinuumLevel,
    weights: Weights,
    evaluated: Evaluated,
    keys: torch.Tensor,
    targets: torch.Tensor,
    rates: torch.Tensor,
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Of each weight A [B, C, out] and B [B, C, in], whose Aᵀ B is what the step subtracts (Eq. 71).

    All gradients are at ``weights``, of which ``evaluated`` came.
    """
    bound = level.error_bound
    error = evaluated.outputs.down - targets
    scale = _bounding(error, bound)
    if scale is not None:
        error = error * scale
    outputs, hidden, slopes = evaluated
    signals = _signals(error, weights, slopes)
    layers = [(signals[0], bound, outputs.up, keys), (error, None, outputs.down, hidden)]
    layers += [(signal, bound, outputs.gate, keys) for signal in signals[1:]]
    along = {}
    if level.rule == "dgd":
        along = {id(inputs): erasing(inputs, rates) for inputs in (keys, hidden)}
    factors, rates = [], rates[..., None]
    for signal, bound, output, inputs in layers:
        scale = _bounding(signal, bound)
        if level.rule == "dgd":
            # the erased part X Wᵀ is the layer's own output
            pulled = output + signal if scale is None else torch.addcmul(output, signal, scale)
            factors.append((pulled, along[id(inputs)]))
        else:
            factors.append((signal * (rates if scale is None else rates * scale), inputs))
    return [*factors, *[None] * (3 - len(factors))]


def _signals(error: torch.Tensor, weights: Weights, slopes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient at the outputs of up and gate from that at the MLP's output."""
    back = error @ weights.down
    return [back * slope for slope in slopes]


def _to_inputs(signals: Sequence[torch.Tensor], weights: Weights) -> torch.Tensor:
    inputs = signals[0] @ weights.up
    return inputs if weights.gate is None else inputs + signals[1] @ weights.gate


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x Wᵀ`` in the dtype of x, with one W for all sequences or one for each."""
    weight = weight.to(x.dtype)
    return F.linear(x, weight) if weight.ndim == 2 else x @ weight.mT


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return map_tensors(lambda w: w.to(dtype), weights)


def _bounding(signal: torch.Tensor, bound: float | None) -> torch.Tensor | None:
    """What scales a signal [B, C, width] down to a root mean square of ``bound`` where it is longer."""
    if bound is None:
        return None
    longest = bound * signal.shape[-1] ** 0.5
    length = torch.linalg.vector_norm(signal, dim=-1, keepdim=True)
    return longest / length.clamp_min(longest)
