"""The definition: one sequence, one level, one token at a time; gradients of the local loss by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from nl_kernels.memory.state import map_tensors
from nl_kernels.ops.continuum.state import (
    RULES_WITH_MOMENTUM,
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    Weights,
    entry_type,
    fast_part,
    initial_weights,
    state_dtype,
)
from nl_kernels.ops.newton_schulz import MUON_COEFFICIENTS


class _Sequence(NamedTuple):
    """One sequence's state at one level."""

    weights: Weights
    momenta: Weights
    pending: list[tuple[torch.Tensor, torch.Tensor]]  # input and rate of each token since the last step
    slower: int  # tokens since the last step of the next slower level
    position: int = 0  # tokens since the last step, also of a level that steps by nothing


def continuum_memory_reference(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str,
    level_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    initial_state: ContinuumState | None,
    output_final_state: bool,
    detach_updates: bool,
    norm_eps: float,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """See :func:`nl_kernels.continuum_memory`."""
    state, total = [], x
    for index, level in enumerate(levels):
        rows = []
        for b in range(x.shape[0]):
            start = _start(initial_state, levels, index, b, state_dtype(x.dtype), detach_updates)
            period = _reset_period(levels, index, variant)
            rows.append(_run(x[b], level, b, mask, start, period, norm_eps, detach_updates))
        y = torch.stack([row[0] for row in rows])
        after = [row[1] for row in rows]
        kind = entry_type(levels, index, variant)
        if kind is ContinuumLevelState:
            state.append(_stack_states(level, after, x))
        elif kind is ContinuumClock:
            state.append(ContinuumClock(torch.tensor([row.position for row in after], device=x.device)))
        else:
            state.append(None)
        if variant == "independent":
            total = total + (y if level_weights is None else level_weights[index].to(y.dtype) * y)
        else:
            total = x = x + y
    if mask is not None:
        total = total.masked_fill(~mask[..., None], 0.0)
    return total, tuple(state) if output_final_state else None


def continuum_flush_reference(
    state: ContinuumState,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str,
    detach_updates: bool,
    norm_eps: float,
) -> ContinuumState:
    """See :func:`nl_kernels.continuum_flush`."""
    flushed = []
    for index, level in enumerate(levels):
        if not isinstance(state[index], ContinuumLevelState):
            flushed.append(state[index] and ContinuumClock(torch.zeros_like(state[index].position)))
            continue
        dtype, rows = state[index].up.dtype, []
        for b in range(state[index].position.shape[0]):
            start = _start(state, levels, index, b, dtype, detach_updates)
            weights, momenta = start.weights, start.momenta
            if start.pending:
                weights, momenta = _step(level, weights, momenta, start.pending, norm_eps, detach_updates)
            if _reset_period(levels, index, variant) and start.slower:
                weights, momenta = _initial(level, dtype)
            rows.append(_Sequence(weights, momenta, [], 0))
        flushed.append(_stack_states(level, rows, state[index].pending_inputs))
    return tuple(flushed)


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """See :func:`nl_kernels.continuum_mlp`: token by token in fp64; gradients by autograd."""
    rows = []
    for b in range(x.shape[0]):
        weights = map_tensors(lambda w, b=b: w[b].double(), Weights(up, down, gate))
        rows.append(torch.stack([_mlp(token, weights) for token in x[b].double()]))
    return torch.stack(rows).to(x.dtype)


def _reset_period(levels: Sequence[ContinuumLevel], index: int, variant: str) -> int | None:
    """The tokens after which the next slower level steps, and takes this one back to its start."""
    if variant != "nested" or index + 1 == len(levels):
        return None
    return levels[index + 1].chunk_size


def _initial(level: ContinuumLevel, dtype: torch.dtype, b: int = 0) -> tuple[Weights, Weights]:
    given = initial_weights(level)
    weights = map_tensors(lambda w: (w[b] if w.ndim == 3 else w).to(dtype), given)
    return weights, map_tensors(torch.zeros_like, weights)


def _start(
    state: ContinuumState | None,
    levels: Sequence[ContinuumLevel],
    index: int,
    b: int,
    dtype: torch.dtype,
    detach_updates: bool,
) -> _Sequence:
    level = levels[index]
    weights, momenta = _initial(level, dtype, b)
    before = None if state is None else state[index]
    if not isinstance(before, ContinuumLevelState):
        return _Sequence(weights, momenta, [], 0, 0 if before is None else int(before.position[b]))
    weights, given = (map_tensors(lambda w: w[b], part) for part in fast_part(before, detach_updates))
    momenta = given if level.rule in RULES_WITH_MOMENTUM else momenta
    pending = [
        (before.pending_inputs[b, p], before.pending_rates[b, p]) for p in range(int(before.position[b]))
    ]
    after = state[index + 1] if index + 1 < len(levels) else None
    return _Sequence(weights, momenta, pending, 0 if after is None else int(after.position[b]))


def _run(
    x: torch.Tensor,
    level: ContinuumLevel,
    b: int,
    mask: torch.Tensor | None,
    start: _Sequence,
    reset_period: int | None,
    norm_eps: float,
    detach_updates: bool,
) -> tuple[torch.Tensor, _Sequence]:
    """The MLP's outputs [T, D] for one sequence [T, D], and its state after them."""
    compute = state_dtype(x.dtype)
    weights, momenta, pending, slower = start.weights, start.momenta, list(start.pending), start.slower
    position = start.position
    rates = torch.as_tensor(level.rate, dtype=compute, device=x.device)
    outputs = []
    for t in range(x.shape[0]):
        if mask is not None and not mask[b, t]:
            outputs.append(torch.zeros_like(x[t]))
            continue
        inner = F.rms_norm(x[t], x.shape[-1:], level.norm, norm_eps)
        outputs.append(_mlp(inner.to(compute), weights).to(x.dtype))
        if not level.steps:
            position = (position + 1) % level.chunk_size if level.chunk_size else 0
            continue
        pending.append((inner.to(compute), rates[b, t] if rates.ndim else rates))
        slower += 1
        if len(pending) == level.chunk_size:
            weights, momenta = _step(level, weights, momenta, pending, norm_eps, detach_updates)
            pending = []
        if slower == reset_period:
            weights, momenta = _initial(level, compute)
            slower = 0
    return torch.stack(outputs), _Sequence(weights, momenta, pending, slower, position)


def _mlp(inner: torch.Tensor, weights: Weights, shifts: Sequence[torch.Tensor] = (0.0, 0.0, 0.0)):
    """The MLP of one token [D]; ``shifts`` are added to the outputs of up, down and gate."""
    return weights.down @ _hidden(inner, weights, shifts) + shifts[1]


def _hidden(inner: torch.Tensor, weights: Weights, shifts: Sequence[torch.Tensor] = (0.0, 0.0, 0.0)):
    up = weights.up @ inner + shifts[0]
    return F.gelu(up) if weights.gate is None else F.silu(weights.gate @ inner + shifts[2]) * up


def _step(
    level: ContinuumLevel,
    weights: Weights,
    momenta: Weights,
    pending: list[tuple[torch.Tensor, torch.Tensor]],
    norm_eps: float,
    detach_updates: bool,
) -> tuple[Weights, Weights]:
    """Weights and momenta after one step on the tokens of a chunk, all gradients at ``weights`` (Eq. 71)."""
    sums = [None if w is None else torch.zeros_like(w) for w in weights]
    grams = [None if w is None else torch.eye(w.shape[1], dtype=w.dtype, device=w.device) for w in weights]
    for key_of, target_of, rate in _pairs(level, pending):
        for i, (signal, layer_input) in enumerate(_signals(level, weights, key_of, target_of, norm_eps)):
            sums[i] = sums[i] + rate * torch.outer(signal, layer_input)
            grams[i] = grams[i] + rate * torch.outer(layer_input, layer_input)
    stepped, after = [], []
    for w, total, gram, m, start in zip(weights, sums, grams, momenta, (level.up, level.down, level.gate)):
        if w is None:
            stepped.append(None)
            after.append(None)
            continue
        if level.rule == "dgd":
            # argmin over W of ½‖W − w‖² + Σ_t η_t (δ_tᵀ W x_t + ½‖W x_t‖²)
            new = torch.linalg.solve(gram, w - total, left=False)
        elif level.rule == "sgd":
            new = w - total
        else:
            m = level.momentum_decay * m + total
            new = w - (m if level.rule == "momentum" else _evened_out(m))
        new = new - (1 - level.retention) * (w - start.to(w.dtype))
        if level.restore_norms:
            lengths = start.to(new.dtype).norm(dim=1, keepdim=True)
            now = new.norm(dim=1, keepdim=True)
            new = lengths * new / torch.where(now > 0, now, 1)
        if detach_updates:
            new, m = new.detach() + (w - w.detach()), m.detach()
        stepped.append(new)
        after.append(m)
    return Weights(*stepped), Weights(*after)


def _pairs(
    level: ContinuumLevel, pending: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What is learned from a chunk: the input of a key, that of its target, and the rate."""
    if not level.predict_next:
        return [(inner, inner, rate) for inner, rate in pending]
    return [(inner, following, rate) for (inner, _), (following, rate) in itertools.pairwise(pending)]


def _evened_out(momentum: torch.Tensor) -> torch.Tensor:
    """Five of Muon's quintics on M / ‖M‖_F, then scaled to the norm of M."""
    if not momentum.any():
        return 0 * momentum
    a, b, c = MUON_COEFFICIENTS
    x = momentum / momentum.norm()
    for _ in range(5):
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    return x * (momentum.norm() / x.norm())


def _signals(
    level: ContinuumLevel,
    weights: Weights,
    inner: torch.Tensor,
    target_of: torch.Tensor,
    norm_eps: float,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For up, down and gate: the loss's gradient at the layer's output, bounded, and the input."""
    key = inner
    if level.key is not None:
        key = F.rms_norm(level.key.to(inner.dtype) @ inner, inner.shape, None, norm_eps)
    target = level.value.to(inner.dtype) @ target_of
    with torch.enable_grad():
        shifts = [torch.zeros_like(w[:, 0]).requires_grad_() for w in weights if w is not None]
        loss = _loss(_mlp(key, weights, shifts) - target, level.error_bound)
        signals = torch.autograd.grad(loss, shifts, create_graph=True)
    inputs = [key, _hidden(key, weights), key][: len(signals)]
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


def _stack_states(level: ContinuumLevel, rows: list[_Sequence], x: torch.Tensor) -> ContinuumLevelState:
    empty = x.new_zeros(0, x.shape[-1], dtype=state_dtype(x.dtype))
    pending = [zip(*row.pending) if row.pending else (empty, empty[:, 0]) for row in rows]
    inputs, rates = (
        pad_sequence([torch.stack(p) if isinstance(p, tuple) else p for p in parts], batch_first=True)
        for parts in zip(*pending)
    )
    fast, momenta = (
        [None if parts[0] is None else torch.stack(parts) for parts in zip(*of)]
        for of in ([row.weights for row in rows], [row.momenta for row in rows])
    )
    position = torch.tensor([len(row.pending) for row in rows], device=x.device)
    momenta = momenta if level.rule in RULES_WITH_MOMENTUM else ()
    return ContinuumLevelState(*fast, inputs, rates, position, *momenta)
