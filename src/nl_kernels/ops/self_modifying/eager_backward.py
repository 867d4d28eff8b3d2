"""A segment of whole chunks with its derivative written out: the fast path of the chunked implementation.

It serves what training mostly runs: two-layer memories with a normalised hidden layer, per-layer erase at
the given rate, one clock, constant targets, no momentum, every sequence on the same grid. At chunks of
some 16 tokens an autograd graph costs as much as the operations in it; this has fewer, and no graph.

N = sequences × heads; the five memories lie memory first as in ``eager.py``: tensors [5N, c, ·], first layers
[5N, h, D], last layers [3N, D, h] and [2N, 1, h]. A gradient's name is ``d_`` and the name of its tensor.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nl_kernels.delta_chunk import ChunkCoefficients, LayerWrites, Spread, read_layer
from nl_kernels.hidden_layer import hidden_layer
from nl_kernels.memory_rule import NORM_EPS, MemoryRule, activate, curvature

MEMORIES = 5
WIDE = 3  # of which key, value and memory have outputs as wide as their inputs


@dataclasses.dataclass(frozen=True)
class FastOptions:
    """What the fast path needs to know: the rule and whether reads are running."""

    rule: MemoryRule
    running_read: bool


def supports(rule: MemoryRule) -> bool:
    """Whether the fast path implements ``rule``."""
    return rule.normalize_hidden and rule.erase == "per_layer" and not rule.proximal


class FastSegment(torch.autograd.Function):
    """``(options, inputs, gates, anchor, state) -> (outputs [N, n·c, D], state)``.

    ``inputs`` is one tensor [n, 5N, c, D]; gates are rate_max, rate_bias and retention_bias [N, 1]; the
    anchor is three tensors or three ``None``; the state is (first, last, gate).
    """

    @staticmethod
    def forward(ctx, options, inputs, rate_max, rate_bias, retention_bias, *layers):
        anchor, state = layers[:3], layers[3:]
        chunks, outputs = [], []
        for x in inputs.unbind(0):
            chunk, o, state = _forward_chunk(options, x, (rate_max, rate_bias, retention_bias), anchor, state)
            chunks.append(chunk)
            outputs.append(o)
        ctx.options, ctx.chunks, ctx.anchor, ctx.rate_max = options, chunks, anchor, rate_max
        return (torch.cat(outputs, 1), *state)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, *d_state):
        anchored = ctx.anchor[0] is not None
        size = ctx.chunks[0].x.shape[1]
        d_state = [x.clone() for x in d_state]
        d_anchor = [torch.zeros_like(x) if anchored else None for x in d_state]
        d_inputs, d_gates = [], [0, 0, 0]
        for i in reversed(range(len(ctx.chunks))):
            d_o = d_output[:, i * size : (i + 1) * size]
            d_x, d_gate = _backward_chunk(
                ctx.options, ctx.chunks[i], ctx.rate_max, ctx.anchor, d_o, d_state, d_anchor
            )
            ctx.chunks[i] = None
            d_inputs.append(d_x)
            d_gates = [a + b for a, b in zip(d_gates, d_gate)]
        return (None, torch.stack(d_inputs[::-1]), *d_gates, *d_anchor, *d_state)


class _Layer(NamedTuple):
    """One group of layers over a chunk, as :func:`_write` leaves it for the backward pass."""

    state: torch.Tensor
    x: torch.Tensor
    erase: torch.Tensor  # β times the decay from the chunk's start
    inverse: torch.Tensor
    to_end: torch.Tensor
    final: torch.Tensor
    recalled: torch.Tensor
    solved: torch.Tensor
    values: torch.Tensor


class _Hidden(NamedTuple):
    """A normalised hidden layer: its input z, its value, and 1/‖σ(z)‖."""

    z: torch.Tensor
    value: torch.Tensor
    scale: torch.Tensor


class _Chunk(NamedTuple):
    """What the backward pass needs of one chunk."""

    x: torch.Tensor
    base: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    served: _Hidden
    k: torch.Tensor
    k_scale: torch.Tensor
    sigmoid: torch.Tensor
    rate: torch.Tensor
    retention: torch.Tensor
    tokens: torch.Tensor
    learned: _Hidden
    apart: torch.Tensor
    slope: torch.Tensor
    errors: tuple[tuple, tuple]
    back: torch.Tensor
    along: torch.Tensor
    signal: tuple
    products: torch.Tensor
    gram: torch.Tensor
    inverse: torch.Tensor
    layers: tuple[_Layer, _Layer, _Layer]


def _forward_chunk(options: FastOptions, x, gates, anchor, state):
    rule = options.rule
    rate_max, rate_bias, retention_bias = gates
    rows, size = len(rate_max), x.shape[1]
    wide = WIDE * rows
    base = state if anchor[0] is None else tuple(a + b for a, b in zip(state, anchor))
    first, last, gate = base

    # Keys, values, rates and retentions, and the snapshot read.
    served = _hidden(torch.bmm(x, first.mT), rule)
    k, v, o = torch.bmm(served.value[:wide], last.mT).split(rows)
    if rule.projection_residual:
        k, v = k + x[:rows], v + x[rows : 2 * rows]
    k_scale = (_dot(k, k) + NORM_EPS).rsqrt()
    k = k * k_scale
    rate, retention = torch.bmm(served.value[wide:], gate.mT)[..., 0].split(rows)
    sigmoid = torch.sigmoid(rate + rate_bias)
    rate = (rate_max * sigmoid)[..., None]
    retention = retention + retention_bias
    products = _products(F.logsigmoid(retention))

    # Errors and error signals at the keys.
    tokens = torch.cat([k, v], 1).repeat(MEMORIES, 1, 1)
    learned = _hidden(torch.bmm(tokens, first.mT), rule)
    hidden = learned.value[:, :size]
    apart = hidden - learned.value[:, size:]
    error = torch.bmm(apart[:wide], last.mT).view(WIDE, rows, size, -1)
    if rule.target_residual:
        error -= v
    if rule.projection_residual:
        error[:2] += k
    if rule.residual:
        error[2] += k
    errors = (_bound(error.flatten(0, 1), rule), _bound(torch.bmm(apart[wide:], gate.mT), rule))
    _, slope = activate(learned.z[:, :size], rule.activation)
    back = torch.cat([torch.bmm(errors[0][0], last), errors[1][0] * gate])
    along = _dot(hidden, back)
    signal = _bound(torch.addcmul(back, hidden, along, value=-1).mul_(slope * learned.scale[:, :size]), rule)

    # The writes. Gram matrices and inverses: the five hidden layers, then the one of the shared keys.
    keys = tokens[:, :size]
    gram = torch.cat([torch.bmm(hidden, hidden.mT), torch.bmm(k, k.mT)])
    below = (rate * products[:, :-1, 1:]) * gram.view(MEMORIES + 1, rows, size, size)
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.solve_triangular(
        below.flatten(0, 1), eye.expand_as(gram), upper=False, unitriangular=True
    )
    by_token = torch.cat([-rate, rate * products[:, :-1, :1], products[:, -1, 1:, None]], -1)
    negative_rate, erase, to_end = by_token.repeat(MEMORIES, 1, 1).split(1, -1)
    final = products[:, -1:, :1].repeat(MEMORIES, 1, 1)
    shared = inverse[MEMORIES * rows :].repeat(MEMORIES, 1, 1)
    layers = (
        _write(state[0], keys, negative_rate * signal[0], erase, shared, to_end, final),
        _write(
            state[1],
            hidden[:wide],
            negative_rate[:wide] * errors[0][0],
            erase[:wide],
            inverse[:wide],
            to_end[:wide],
            final[:wide],
        ),
        _write(
            state[2],
            hidden[wide:],
            negative_rate[wide:] * errors[1][0],
            erase[wide:],
            inverse[wide : MEMORIES * rows],
            to_end[wide:],
            final[wide:],
        ),
    )
    after = tuple(
        torch.baddbmm(layer.final * layer.state, layer.values.mT, layer.to_end * layer.x) for layer in layers
    )
    chunk = _Chunk(
        x,
        base,
        served,
        k,
        k_scale,
        sigmoid,
        rate,
        retention,
        tokens,
        learned,
        apart,
        slope,
        errors,
        back,
        along,
        signal,
        products,
        gram,
        inverse,
        layers,
    )
    if options.running_read:
        o = _read_running(rule, *_running_inputs(chunk, anchor))
    return chunk, o + x[2 * rows : wide] if rule.residual else o, after


def _backward_chunk(options: FastOptions, chunk: _Chunk, rate_max, anchor, d_o, d_state, d_anchor):
    """Gradients of a chunk's inputs and gates; those of the state and the anchor are updated in place."""
    rule = options.rule
    rows, size = chunk.k.shape[:2]
    wide = WIDE * rows
    first, last, gate = chunk.base
    hidden, scale = chunk.learned.value[:, :size], chunk.learned.scale[:, :size]
    d_values = [None, None, None]
    d_products = torch.zeros_like(chunk.products)
    d_k = d_hidden_read = d_query = None
    if options.running_read:
        d_query, d_k, d_hidden_read, d_values[0], d_values[1], d_products, d_old, d_fixed = (
            _back_through_read(options, chunk, anchor, d_o)
        )

    # The writes.
    found = [_write_backward(*each) for each in zip(chunk.layers, d_state, d_values)]
    d_state[:] = [each[0] for each in found]
    if options.running_read:
        memory = slice(2 * rows, wide)
        for total, fixed, d_layer, d_constant in zip(d_state[:2], d_anchor[:2], d_old, d_fixed):
            total[memory] += d_layer
            if fixed is not None:
                fixed[memory] += d_constant
    d_keys, d_hidden = found[0][1], torch.cat([found[1][1], found[2][1]])
    d_signal_write, d_error_write, d_narrow_write = (each[2] for each in found)
    d_erase, d_to_end, d_final = (found[0][i] + torch.cat([found[1][i], found[2][i]]) for i in (3, 5, 6))
    d_inverse = torch.cat([found[1][4], found[2][4], found[0][4].view(MEMORIES, rows, size, size).sum(0)])
    transposed = chunk.inverse.mT
    d_below = torch.bmm(torch.bmm(transposed, d_inverse), transposed).neg_().view(-1, rows, size, size)
    strict = chunk.products[:, :-1, 1:]
    d_gram = (d_below * (chunk.rate * strict)).flatten(0, 1)
    d_gram = d_gram + d_gram.mT
    d_hidden.baddbmm_(d_gram[: MEMORIES * rows], hidden)
    by_below = (d_below * chunk.gram.view_as(d_below)).sum(0)
    d_erase = d_erase.view(MEMORIES, rows, size, 1).sum(0)
    d_rate = (by_below * strict).sum(-1, keepdim=True)
    d_rate.addcmul_(d_erase, chunk.products[:, :-1, :1])
    d_products[:, :-1, 1:].addcmul_(by_below, chunk.rate)
    d_products[:, :-1, :1].addcmul_(d_erase, chunk.rate)
    d_products[:, -1, 1:] += d_to_end.view(MEMORIES, rows, size).sum(0)
    d_products[:, -1, 0] += d_final.view(MEMORIES, rows).sum(0)
    d_key = torch.bmm(d_gram[MEMORIES * rows :], chunk.k)
    d_key += d_keys.view(MEMORIES, *d_key.shape).sum(0)
    if d_k is not None:
        d_key += d_k
    if d_hidden_read is not None:
        d_hidden[2 * rows : wide] += d_hidden_read
    by_rate = _dot(d_signal_write, chunk.signal[0])
    by_rate[:wide] += _dot(d_error_write, chunk.errors[0][0])
    by_rate[wide:] += _dot(d_narrow_write, chunk.errors[1][0])
    d_rate -= by_rate.view(MEMORIES, rows, size, 1).sum(0)
    negative_rate = -chunk.rate.repeat(MEMORIES, 1, 1)

    # The error signals.
    d_flat = _bound_backward(d_signal_write * negative_rate, chunk.signal, rule)
    slope_scale = chunk.slope * scale
    flat = torch.addcmul(chunk.back, hidden, chunk.along, value=-1).mul_(d_flat)
    d_slope = flat * scale
    d_scale = _dot(flat, chunk.slope)
    d_flat *= slope_scale
    across = _dot(hidden, d_flat)
    d_back = torch.addcmul(d_flat, hidden, across, value=-1)
    d_hidden.addcmul_(d_flat, chunk.along, value=-1).addcmul_(chunk.back, across, value=-1)
    d_error = torch.baddbmm(d_error_write * negative_rate[:wide], d_back[:wide], last.mT)
    d_narrow = torch.baddbmm(d_narrow_write * negative_rate[wide:], d_back[wide:], gate.mT)
    d_last = torch.bmm(chunk.errors[0][0].mT, d_back[:wide])
    d_gate = torch.bmm(chunk.errors[1][0].mT, d_back[wide:])

    # The errors.
    d_error = _bound_backward(d_error, chunk.errors[0], rule)
    d_narrow = _bound_backward(d_narrow, chunk.errors[1], rule)
    by_memory = d_error.view(WIDE, rows, size, -1)
    if rule.projection_residual:
        d_key += by_memory[0]
        d_key += by_memory[1]
    if rule.residual:
        d_key += by_memory[2]
    d_v = -by_memory.sum(0) if rule.target_residual else 0
    d_apart = torch.cat([torch.bmm(d_error, last), torch.bmm(d_narrow, gate)])
    d_value = torch.cat([d_hidden.add_(d_apart), d_apart.neg_()], 1)
    d_last.baddbmm_(d_error.mT, chunk.apart[:wide])
    d_gate.baddbmm_(d_narrow.mT, chunk.apart[wide:])
    d_z = _hidden_backward(chunk.learned, d_value, rule, d_slope, d_scale)
    d_tokens = torch.bmm(d_z, first).view(MEMORIES, rows, 2 * size, -1).sum(0)
    d_first = torch.bmm(d_z.mT, chunk.tokens)
    d_key += d_tokens[:, :size]
    d_v = d_tokens[:, size:] + d_v

    # What served the chunk.
    d_key = torch.addcmul(d_key, chunk.k, _dot(chunk.k, d_key), value=-1).mul_(chunk.k_scale)
    d_wide = torch.cat([d_key, d_v, torch.zeros_like(d_v) if options.running_read else d_o])
    d_log = _products_backward(chunk.products, d_products)
    d_sigmoid = d_rate[..., 0] * chunk.sigmoid
    d_rate_raw = d_sigmoid * rate_max * (1 - chunk.sigmoid)
    d_retention = d_log * torch.sigmoid(-chunk.retention)
    d_gates_raw = torch.cat([d_rate_raw, d_retention])[..., None]
    d_value = torch.cat([torch.bmm(d_wide, last), torch.bmm(d_gates_raw, gate)])
    d_last.baddbmm_(d_wide.mT, chunk.served.value[:wide])
    d_gate.baddbmm_(d_gates_raw.mT, chunk.served.value[wide:])
    d_z = _hidden_backward(chunk.served, d_value, rule, None, None)
    d_first.baddbmm_(d_z.mT, chunk.x)
    d_x = torch.bmm(d_z, first)
    if rule.projection_residual:
        d_x[: 2 * rows] += d_wide[: 2 * rows]
    if rule.residual:
        d_x[2 * rows : wide] += d_o
    if d_query is not None:
        d_x[2 * rows : wide] += d_query
    for total, fixed, d_layer in zip(d_state, d_anchor, (d_first, d_last, d_gate)):
        total += d_layer
        if fixed is not None:
            fixed += d_layer
    d_gates = (d_sigmoid.sum(-1, keepdim=True), d_rate_raw.sum(-1, keepdim=True))
    return d_x, (*d_gates, d_retention.sum(-1, keepdim=True))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)


def _hidden(z: torch.Tensor, rule: MemoryRule) -> _Hidden:
    value = F.silu(z) if rule.activation == "silu" else F.gelu(z)
    scale = (_dot(value, value) + NORM_EPS).rsqrt()
    return _Hidden(z, value.mul_(scale), scale)


def _hidden_backward(hidden: _Hidden, d_value, rule: MemoryRule, d_slope, d_scale) -> torch.Tensor:
    """The gradient of z; ``d_slope`` and ``d_scale`` are of the first tokens alone, where there are any."""
    z, value, scale = hidden
    along = _dot(value, d_value)
    if d_scale is not None:
        size = d_scale.shape[1]
        along[:, :size].addcmul_(scale[:, :size], d_scale)
    _, slope = activate(z, rule.activation)
    d_z = torch.addcmul(d_value, value, along, value=-1).mul_(slope.mul_(scale))
    if d_slope is not None:
        size = d_slope.shape[1]
        d_z[:, :size].addcmul_(d_slope, curvature(z[:, :size], rule.activation))
    return d_z


def _bound(x: torch.Tensor, rule: MemoryRule) -> tuple:
    """x bounded in length, with what its derivative needs."""
    bound = rule.error_bound
    if bound is None:
        return x, None, None
    squared = _dot(x, x)
    factor = bound * squared.clamp(min=bound * bound).rsqrt()
    return x * factor, squared, factor


def _bound_backward(d_bounded: torch.Tensor, bounded: tuple, rule: MemoryRule) -> torch.Tensor:
    value, squared, factor = bounded
    if factor is None:
        return d_bounded
    # value = factor x, and where x is longer than the bound value has length ``bound``.
    longer = squared > rule.error_bound**2
    across = torch.where(longer, _dot(value, d_bounded), 0).div_(rule.error_bound**2)
    return torch.addcmul(d_bounded, value, across, value=-1).mul_(factor)


def _write(state, x, write, erase, inverse, to_end, final) -> _Layer:
    recalled = torch.bmm(x, state.mT)
    solved = torch.addcmul(write, erase, recalled, value=-1)
    return _Layer(state, x, erase, inverse, to_end, final, recalled, solved, torch.bmm(inverse, solved))


def _write_backward(layer: _Layer, d_after, d_values):
    """Gradients of state, x, write, erase, inverse, to_end and final."""
    state, x, erase, inverse, to_end, final, recalled, solved, values = layer
    d_final = (d_after * state).sum((1, 2), keepdim=True)
    d_state = d_after * final
    decayed = torch.bmm(values, d_after)
    d_to_end = _dot(decayed, x)
    d_x = decayed.mul_(to_end)
    through = torch.bmm(to_end * x, d_after.mT)
    d_values = through if d_values is None else through.add_(d_values)
    d_write = torch.bmm(inverse.mT, d_values)
    d_inverse = torch.bmm(d_values, solved.mT)
    d_erase = _dot(d_write, recalled).neg_()
    d_recalled = d_write * -erase
    d_x.baddbmm_(d_recalled, state)
    d_state.baddbmm_(d_recalled.mT, x)
    return d_state, d_x, d_write, d_erase, d_inverse, d_to_end, d_final


def _products(log_decay: torch.Tensor) -> torch.Tensor:
    """[N, c + 1, c + 1], decays over tokens j + 1 … i; the logs are finite, so sums may be subtracted."""
    sums = F.pad(log_decay.cumsum(-1), (1, 0))
    return (sums[:, :, None] - sums[:, None, :]).exp_().tril_()


def _products_backward(products: torch.Tensor, d_products: torch.Tensor) -> torch.Tensor:
    """The gradient of log decays: for token t the sum over entries (i, j) with j < t <= i."""
    total = d_products.mul_(products)
    # Column sums from the bottom up, of the columns left of t.
    return total.flip(-2).cumsum(-2).flip(-2).tril_(-1).sum(-1)[..., 1:]


def _running_inputs(chunk: _Chunk, anchor) -> tuple[torch.Tensor | None, ...]:
    rows, size = chunk.k.shape[:2]
    memory = slice(2 * rows, WIDE * rows)
    first, last, _ = chunk.layers
    return (
        chunk.x[memory],
        chunk.k,
        chunk.learned.value[memory, :size],
        first.values[memory],
        last.values[memory],
        chunk.products,
        first.state[memory],
        last.state[memory],
        *(None if x is None else x[memory] for x in anchor[:2]),
    )


def _read_running(rule, q, k, hidden, first_values, last_values, products, first, last, *anchor):
    """M_memory of the query after each token, in both layers."""
    empty = products[..., :0]
    spread = Spread(empty, products[:, 1:, :1], empty, products[:, 1:, 1:], empty, empty)
    coefficients = ChunkCoefficients(spread, None, None)
    y = q
    for x, values, state, fixed in (
        (k, first_values, first, anchor[0]),
        (hidden, last_values, last, anchor[1]),
    ):
        if x is hidden:
            y = hidden_layer(y, rule).value
        read = read_layer(y, state, None, x, LayerWrites(values, None), coefficients)
        y = read if fixed is None else torch.baddbmm(read, y, fixed.mT)
    return y


def _back_through_read(options: FastOptions, chunk: _Chunk, anchor, d_o):
    """Gradients of :func:`_running_inputs`; small enough to be left to autograd."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in _running_inputs(chunk, anchor)]
    with torch.enable_grad():
        o = _read_running(options.rule, *inputs)
    found = iter(torch.autograd.grad(o, [x for x in inputs if x is not None], d_o))
    grads = [None if x is None else next(found) for x in inputs]
    rows, wide = len(chunk.k), WIDE * len(chunk.k)
    memory = slice(2 * rows, wide)
    d_values = []
    for layer, d in zip(chunk.layers[:2], grads[3:5]):
        full = torch.zeros_like(layer.values)
        full[memory] = d
        d_values.append(full)
    return (*grads[:3], *d_values, grads[5], grads[6:8], grads[8:10])
