"""The decays of a chunk: cumulated once, kept for every kernel, and read as any product of factors.

A decay is a log ≤ 0, −∞ included. Logs are cumulated in fp64, and a sum is kept as two fp32 numbers, total
and residue, so that the difference of two large sums is still exact to fp32. They are clamped at −1000, whose
exponential is exactly zero: −∞ never enters a subtraction. Only differences ≤ 0 are exponentiated.

``decays`` is [chunks · heads, 2, C]: totals and residues of α; with momentum [chunks · heads, 6, C]: then
those of μ, c⁻ (what of the momentum at the chunk's start arrives before each row) and the last row of E. Rows
after a chunk's last token have factor 0: what decays from a token to them is 0.
"""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import matmul

# Stands for log(0): its exponential is zero in fp32, and sums of it stay exact in fp64.
_LOG_ZERO: tl.constexpr = tl.constexpr(-1000.0)


@triton.jit
def decays_of(decays, chunk, BLOCK_C: tl.constexpr, MOMENTUM: tl.constexpr):
    """Where the decays of one chunk and head are: those of α, those of μ, c⁻, the last row of E."""
    alpha = decays + chunk * ((6 if MOMENTUM else 2) * BLOCK_C)
    return alpha, alpha + 2 * BLOCK_C, alpha + 4 * BLOCK_C, alpha + 5 * BLOCK_C


@triton.jit
def safe_log(x):
    """``log(x)``, with the clamped log of zero for x = 0."""
    return tl.where(x > 0, tl.log(tl.where(x > 0, x, 1.0)), _LOG_ZERO)


@triton.jit
def store_cumulated(place, row, log, BLOCK_C: tl.constexpr):
    """Cumulate the logs of a chunk's factors; a barrier must follow before they are loaded."""
    cumulated = tl.cumsum(tl.maximum(log, _LOG_ZERO).to(tl.float64), 0)
    total = cumulated.to(tl.float32)
    tl.store(place + row, total)
    tl.store(place + BLOCK_C + row, (cumulated - total.to(tl.float64)).to(tl.float32))


@triton.jit
def decay_from_start(place, to):
    """The product of the factors up to rows ``to``; of none for −1."""
    return tl.exp(tl.load(place + to, mask=to >= 0, other=0.0))


@triton.jit
def decay_between(place, to, start, BLOCK_C: tl.constexpr):
    """The product of the factors after rows ``start`` up to rows ``to``; they broadcast; 0 if to < start."""
    total = tl.load(place + to, mask=to >= 0, other=0.0) - tl.load(place + start, mask=start >= 0, other=0.0)
    residue = tl.load(place + BLOCK_C + to, mask=to >= 0, other=0.0)
    residue -= tl.load(place + BLOCK_C + start, mask=start >= 0, other=0.0)
    return tl.where(start <= to, tl.exp(tl.minimum(total + residue, 0.0)), 0.0)


@triton.jit
def carried_from_start(alpha, mu, carried_before, to, BLOCK_C: tl.constexpr, BEFORE: tl.constexpr):
    """c, or c⁻ if BEFORE: what of the momentum at the chunk's start has arrived at rows ``to``."""
    carried = tl.load(carried_before + to)
    if not BEFORE:
        carried = decay_between(alpha, to, to - 1, BLOCK_C) * carried + decay_from_start(mu, to)
    return carried


@triton.jit
def pairs_of(pairs, chunk, BLOCK_C: tl.constexpr):
    """Where M and E⁻ = B⁻ M of one chunk and head are in ``pairs`` [chunks · heads, 2, C, C]."""
    place = pairs + chunk * (2 * BLOCK_C * BLOCK_C)
    return place, place + BLOCK_C * BLOCK_C


@triton.jit
def load_pairs(place, to, start, BLOCK_C: tl.constexpr):
    """Rows ``to`` (−1: zeros) and columns ``start`` of a matrix, which broadcast, either way up."""
    return tl.load(place + to * BLOCK_C + start, mask=(to >= 0) & (start >= 0), other=0.0)


@triton.jit
def sum_over_spans(pairs, ends_mask, starts_mask, PRECISION: tl.constexpr):
    """``out[i] = Σ_{t, j} ends[i, t] · pairs[t, j] · starts[i, j]``: what every span (j, t) over i holds.

    The gradient of a log factor i from a matrix of decays; of the transposed matrix with the masks exchanged.
    Summing the rectangle, rather than suffix sums of row sums minus column sums, cancels nothing, and is
    exactly zero across a reset.
    """
    return tl.sum(tl.where(starts_mask, matmul(ends_mask.to(tl.float32), pairs, PRECISION), 0.0), 1)
