"""The derivatives of :mod:`nl_kernels.memory.kernels.layer` written out, on the same tiles.
 A gradient is called ``d_…`` and has the shape of what it belongs to. Those of decays are kept as their
products with the decays, so that exact zeros stay harmless. What sums over rows of all blocks is left as a
share of each block, [B, ..]: shares are added up once, in scratch memory.
"""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_width,
    operands_at,
    pairs_at,
    product,
    rounded,
    rows_of,
    turned_rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.layer import memory_sum, zeros_of


@triton.jit
def hidden_adjoint(grad, hidden, radial, BANK: tl.constexpr, PER: tl.constexpr):
    """The gradient of z from that of n(σ(z)) [B, h, C]; ``hidden`` is of :func:`~.layer.activated`.

    ``radial`` [B, 1, C] is the gradient of ‖σ(z)‖⁻¹ itself, times itself (:func:`signal_adjoint`), or
    ``None``.
    """
    value, slope, _, scale = hidden
    if BANK.NORMALIZED:
        along = memory_sum(value * grad, PER)
        if radial is not None:
            along += radial
        grad = (grad - value * along) * scale
    return grad * slope


@triton.jit
def bound_adjoint(grad, bounded, factor, narrow, BOUND: tl.constexpr, PER: tl.constexpr):
    """The gradient of x from that of ``bounded = factor x`` of :func:`~.layer.length_factor`."""
    if BOUND > 0:
        along = tl.where(factor < 1, memory_sum(bounded * grad, PER) * (-1 / (BOUND * BOUND)), 0.0)
        moved = (grad + bounded * along) * factor
        if narrow is not None:
            moved = tl.where(narrow, tl.where(factor < 1, 0.0, grad), moved)  # at the bound a number stays
        grad = moved
    return grad


@triton.jit
def signal_adjoint(grad, back, hidden, signal, BANK: tl.constexpr, PER: tl.constexpr):
    """Gradients from that of the error signal: of ``back``, of n(σ(z)), of z by way of σ', and ``radial``.

    ``signal`` is of :func:`~.layer.error_signal`.
    """
    value, slope, curvature, scale = hidden
    bounded, tangent, along, factor = signal
    grad = bound_adjoint(grad, bounded, factor, None, BANK.BOUND, PER)
    d_slope = grad * tangent
    d_back = grad * slope
    radial = tl.zeros(scale.shape, tl.float32)
    d_value = tl.zeros(value.shape, tl.float32)
    if BANK.NORMALIZED:
        radial = memory_sum(d_slope * slope, PER)
        across = memory_sum(value * d_back, PER)
        d_value = (d_back * along + back * across) * -scale
        d_back = (d_back - value * across) * scale
    return d_back, d_value, d_slope * curvature, radial


@triton.jit
def vector_shares(place, BANK: tl.constexpr):
    """The sum of all blocks' shares [C] of a number a token in scratch."""
    C: tl.constexpr = BANK.BLOCK_C
    COUNT: tl.constexpr = BANK.BLOCKS
    total = tl.load(place + tl.arange(0, C))
    for i in tl.static_range(1, COUNT):
        total += tl.load(place + i * C + tl.arange(0, C))
    return total


@triton.jit
def decays_adjoint(d_strict, d_full, before, after, to_end, final, BANK: tl.constexpr):
    """The gradient of the log decays [B, 1, C] from those of :func:`~.layer.decays_at`'s results, each times
    the result itself: matrices [B, j, t], vectors [B, 1, C], ``final`` [B, 1, 1].

    A span from j to t holds the logs of j + 1 … t, and each of them gets the span's gradient. Spans are
    summed directly: differences of sums would not vanish across a reset. No span begins at the last token:
    its row of the matrices takes the spans that begin with the chunk.
    """
    C: tl.constexpr = BANK.BLOCK_C
    j = tl.arange(0, C)[None, :, None] + 0 * tl.arange(0, BANK.BLOCKS)[:, None, None]
    t = tl.arange(0, C)[None, None, :]
    begun = (j < t) | (j == C - 1)
    spans = rounded(tl.where(j == C - 1, before, d_strict), BANK)
    out = tl.where(begun, product(spans, rounded((j > t).to(tl.float32), BANK), BANK), 0.0)
    spans = rounded(tl.where(j == C - 1, after, d_full), BANK)
    out += tl.where(begun, product(spans, rounded((j >= t).to(tl.float32), BANK), BANK), 0.0)
    out += product(
        rounded(tl.where(j == 0, to_end, 0.0 * d_full), BANK), rounded((j < t).to(tl.float32), BANK), BANK
    )
    return tl.sum(out, 1)[:, None, :] + final


@triton.jit
def read_adjoint(made, decays, rate, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Gradients from that of a running read's rows, the anchor's part apart; it and ω are in scratch.

    Returns that of u; the share in that of ``full`` times itself, and in that of the inner products x qᵀ;
    that of ``after`` times itself.
    """
    _, _, _, _, _, read, scores = made
    rows = rows_of(scratch + LAYER.D_QUERY, BANK.BLOCKS, LAYER.WIDTH, BANK)
    straight = tl.trans(pairs_at(operands_at(scratch + LAYER.SCORES, BANK), False, BANK), 0, 2, 1)
    d_written = product(rows, straight, BANK)
    columns = tl.trans(turned_rows_of(scratch + LAYER.D_QUERY, LAYER.WIDTH, BANK), 0, 2, 1)
    omega = turned_rows_of(scratch + LAYER.OMEGA, LAYER.WIDTH, BANK)
    shares = product(omega, columns, BANK) * -tl.trans(rate, 0, 2, 1)
    d_after = tl.sum(decays[3] * rows.to(tl.float32) * read, 1)[:, None, :]
    return d_written, shares * scores, shares * decays[1], d_after


@triton.jit
def carried_adjoint(state, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """The gradient of u [B, rows, C] from that of the weights after the chunk, but for the decays to the end;
    and that of ``final`` times 1 / ``final`` [B, 1, 1]. ``state`` are the weights before the chunk."""
    ROWS: tl.constexpr = LAYER.WIDTH // BANK.PER
    d_written = zeros_of(ROWS, BANK)
    d_final = tl.sum(d_written, 2)
    for start in range(0, LAYER.BLOCK, BANK.SLICE):
        grad = weights_at(scratch + LAYER.STATE, start, ROWS, LAYER.BLOCK, BANK)
        x = by_width(scratch + LAYER.KEY, start, LAYER.UPTO, LAYER.BLOCK, BANK)
        d_written += product(rounded(grad, BANK), x, BANK)
        d_final += tl.sum(grad * weights_at(state, start, ROWS, LAYER.BLOCK, BANK), 2)
    return d_written, tl.sum(d_final, 1)[:, None, None]


@triton.jit
def write_adjoint(d_written, made, decays, rate, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Gradients of a layer's write from that of u [B, rows, C]; ω is in scratch.

    Returns those of the signal and of the recall [B, rows, C]; shares in that of the inner products x xᵀ, and
    of ``strict`` times itself, [B, j, t]; in those of the rates, [B, 1, C] and [B, C]; and that of ``before``
    times itself.
    """
    _, recalled, gram, surprise, _, _, _ = made
    d_rate = -tl.sum(d_written * surprise, 1)[:, None, :]
    d_signal = d_written * -rate
    if BANK.ERASES:
        inverse = operands_at(scratch + LAYER.INVERSE, BANK)
        straight = tl.trans(pairs_at(inverse, False, BANK), 0, 2, 1)
        d_signal = product(rounded(d_signal, BANK), straight, BANK)
        d_recalled = decays[2] * d_signal
        d_before = tl.sum(d_recalled * recalled, 1)[:, None, :]
        turned = turned_rows_of(scratch + LAYER.OMEGA, LAYER.WIDTH, BANK)
        shares = product(turned, rounded(d_signal, BANK), BANK)
        d_pair_rate = -tl.sum(shares * gram, 2)
        shares *= -tl.trans(rate, 0, 2, 1)
        d_strict = shares * gram
        shares *= decays[0]
    else:
        d_recalled = 0.0 * d_signal
        d_before = 0.0 * d_rate
        shares = zeros_of(BANK.BLOCK_C, BANK)
        d_strict = shares
        d_pair_rate = tl.sum(shares, 2)
    return d_signal, d_recalled, shares, d_strict, d_rate, d_pair_rate, d_before
