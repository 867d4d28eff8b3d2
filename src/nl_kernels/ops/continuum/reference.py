"""The definition: one sequence, one level, one token at a time; gradients of the local loss by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nl_kernels.ops.continuum.state import ContinuumLevel, ContinuumLevelState, ContinuumState, state_dtype


class _Weights(NamedTuple):
    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None


def continuum_memory_reference(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    mask: torch.Tensor | None,
    initial_state: ContinuumState | None,
    output_final_state: bool,
    norm_eps: float,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """See :func:`nl_kernels.continuum_memory`."""
    state = []
    for index, level in enumerate(levels):
        before = None if initial_state is None else initial_state[index]
        rows = [_sequence(x[b], level, b, mask, before, norm_eps) for b in range(x.shape[0])]
        x = torch.stack([row[0] for row in rows])
        state.append(_stack_states([row[1:] for row in rows], x) if level.steps else None)
    return x, tuple(state) if output_final_state else None


def _sequence(
    x: torch.Tensor,
    level: ContinuumLevel,
    b: int,
    mask: torch.Tensor | None,
    before: ContinuumLevelState | None,
    norm_eps: float,
) -> tuple[torch.Tensor, _Weights, list[tuple[torch.Tensor, torch.Tensor]]]:
    """One sequence [T, D] through one level: outputs, weights, and (input, rate) of pending tokens."""
    compute = state_dtype(x.dtype)
    if before is None:
        weights = _Weights(
            *(None if w is None else w.to(compute) for w in (level.up, level.down, level.gate))
        )
        pending = []
    else:
        weights = _Weights(before.up[b], before.down[b], None if before.gate is None else before.gate[b])
        pending = [
            (before.pending_inputs[b, p], before.pending_rates[b, p]) for p in range(int(before.position[b]))
        ]
    rates = torch.as_tensor(level.rate, dtype=compute, device=x.device)
    outputs = []
    for t in range(x.shape[0]):
        if mask is not None and not mask[b, t]:
            outputs.append(torch.zeros_like(x[t]))
            continue
        inner = F.rms_norm(x[t], x.shape[-1:], level.norm, norm_eps)
        outputs.append(x[t] + _mlp(inner.to(compute), weights).to(x.dtype))
        if level.steps:
            pending.append((inner.to(compute), rates[b, t] if rates.ndim else rates))
            if len(pending) == level.chunk_size:
                weights, pending = _step(level, weights, pending, norm_eps), []
    return torch.stack(outputs), weights, pending


def _mlp(inner: torch.Tensor, weights: _Weights, shifts: Sequence[torch.Tensor] = (0.0, 0.0, 0.0)):
    """The MLP of one token [D]; ``shifts`` are added to the outputs of up, down and gate."""
    up = weights.up @ inner + shifts[0]
    hidden = F.gelu(up) if weights.gate is None else F.silu(weights.gate @ inner + shifts[2]) * up
    return weights.down @ hidden + shifts[1]


def _step(
    level: ContinuumLevel,
    weights: _Weights,
    pending: list[tuple[torch.Tensor, torch.Tensor]],
    norm_eps: float,
) -> _Weights:
    """The weights after one step on the tokens of a chunk, all gradients at ``weights`` (Eq. 71)."""
    sums = [None if w is None else torch.zeros_like(w) for w in weights]
    grams = [None if w is None else torch.eye(w.shape[1], dtype=w.dtype, device=w.device) for w in weights]
    for inner, rate in pending:
        for i, (signal, layer_input) in enumerate(_signals(level, weights, inner, norm_eps)):
            sums[i] = sums[i] + rate * torch.outer(signal, layer_input)
            grams[i] = grams[i] + rate * torch.outer(layer_input, layer_input)
    stepped = []
    for w, total, gram in zip(weights, sums, grams):
        if w is None:
            stepped.append(None)
        elif level.rule == "sgd":
            stepped.append(w - total)
        else:
            # argmin over W of ½‖W − w‖² + Σ_t η_t (δ_tᵀ W x_t + ½‖W x_t‖²)
            stepped.append(torch.linalg.solve(gram, w - total, left=False))
    return _Weights(*stepped)


def _signals(
    level: ContinuumLevel, weights: _Weights, inner: torch.Tensor, norm_eps: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For up, down and gate: the loss's gradient at the layer's output, bounded, and the input."""
    key = F.rms_norm(level.key.to(inner.dtype) @ inner, inner.shape, None, norm_eps)
    target = level.value.to(inner.dtype) @ inner
    with torch.enable_grad():
        shifts = [torch.zeros_like(w[:, 0]).requires_grad_() for w in weights if w is not None]
        loss = _loss(_mlp(key, weights, shifts) - target, level.error_bound)
        signals = torch.autograd.grad(loss, shifts, create_graph=True)
    up = weights.up @ key
    hidden = F.gelu(up) if weights.gate is None else F.silu(weights.gate @ key) * up
    inputs = [key, hidden, key][: len(signals)]
    return [
        (_bounded(signal, level.error_bound), layer_input) for signal, layer_input in zip(signals, inputs)
    ]


def _loss(error: torch.Tensor, bound: float | None) -> torch.Tensor:
    """½‖error‖², continued linearly where the root mean square of the error exceeds ``bound``."""
    mean_square = error.square().mean()
    if bound is None or mean_square <= bound**2:
        return 0.5 * error.square().sum()
    return error.numel() * (bound * mean_square.sqrt() - 0.5 * bound**2)


def _bounded(signal: torch.Tensor, bound: float | None) -> torch.Tensor:
    mean_square = signal.square().mean()
    if bound is None or mean_square <= bound**2:
        return signal
    return signal * (bound / mean_square.sqrt())


def _stack_states(
    rows: list[tuple[_Weights, list[tuple[torch.Tensor, torch.Tensor]]]], x: torch.Tensor
) -> ContinuumLevelState:
    longest = max(len(pending) for _, pending in rows)
    empty = x.new_zeros(x.shape[-1], dtype=state_dtype(x.dtype))
    padded = [pending + [(empty, empty[0])] * (longest - len(pending)) for _, pending in rows]
    return ContinuumLevelState(
        up=torch.stack([w.up for w, _ in rows]),
        down=torch.stack([w.down for w, _ in rows]),
        gate=None if rows[0][0].gate is None else torch.stack([w.gate for w, _ in rows]),
        pending_inputs=torch.stack(
            [torch.stack([i for i, _ in p]) if p else empty[None, :][:0] for p in padded]
        ),
        pending_rates=torch.stack([torch.stack([r for _, r in p]) if p else empty[:0] for p in padded]),
        position=torch.tensor([len(pending) for _, pending in rows], device=x.device),
    )
