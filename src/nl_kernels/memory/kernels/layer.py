"""One layer of a bank of memories over a chunk, on tiles.
 A tile's first axis counts blocks of rows of weights, one for each warp, so that what a warp computes for its
rows no other warp needs: a product of [B, rows, in] and [B, in, C] crosses no warps. Tokens are the last
axis. A matrix of pairs of tokens is [.., j, t]: the earlier token, then the later one. Weights stream through
in slices of columns, which bounds what is held whatever their width.
"""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_width,
    product,
    put_operand,
    put_rows,
    put_weights,
    rounded,
    weights_at,
)
from nl_kernels.triton_support.language import activation

_NORM_EPS: tl.constexpr = tl.constexpr(1e-6)  # memory_rule.NORM_EPS
_LOG_ZERO: tl.constexpr = tl.constexpr(-1000.0)  # triton_support.language


@triton.jit
def zeros_of(ROWS: tl.constexpr, BANK: tl.constexpr):
    """[B, rows, C]."""
    BLOCKS: tl.constexpr = BANK.BLOCKS
    BLOCK_C: tl.constexpr = BANK.BLOCK_C
    return tl.zeros([BLOCKS, ROWS, BLOCK_C], tl.float32)


@triton.jit
def memory_of(BANK: tl.constexpr):
    """The memory [B] of each block."""
    return tl.arange(0, BANK.BLOCKS) // BANK.PER


@triton.jit
def narrow_of(BANK: tl.constexpr):
    """Which blocks are of memories whose outputs are bounded one by one [B, 1, 1], or ``None``."""
    if BANK.NARROW > 0:
        return memory_of(BANK)[:, None, None] >= BANK.WIDE


@triton.jit
def locate_rows(LAYER: tl.constexpr, BANK: tl.constexpr):
    """Of each row of a layer's tile, an output: its memory [B, 1, 1], its number there, its number in the
    layer, and whether there is one."""
    ROWS: tl.constexpr = LAYER.WIDTH // BANK.PER
    block = tl.arange(0, BANK.BLOCKS)
    memory = (block // BANK.PER)[:, None, None]
    row = (block % BANK.PER)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    wide = memory < LAYER.WIDE
    narrow = LAYER.WIDE * LAYER.OUT + (memory - LAYER.WIDE) * LAYER.NARROW + row
    index = tl.where(wide, memory * LAYER.OUT + row, narrow)
    exists = (memory < BANK.MEMORIES) & (row < tl.where(wide, LAYER.OUT, LAYER.NARROW))
    return memory, row, index, exists


@triton.jit
def columns_of(rows, start, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Offsets [B, rows, SLICE] of columns ``start`` … of the caller's layer [.., in], and which there are."""
    _, _, index, exists = rows
    column = start + tl.arange(0, BANK.SLICE)[None, None, :]
    return index * LAYER.IN + column, exists & (column < LAYER.IN)


@triton.jit
def take_layer(place, operand, bank, more, program, LAYER: tl.constexpr, BANK: tl.constexpr):
    """A program's layer of the caller's ``bank``, with the layer ``more`` added, to scratch, in fp32 and as
    an operand; zeros outside."""
    rows = locate_rows(LAYER, BANK)
    for start in range(0, LAYER.BLOCK, BANK.SLICE):
        offsets, exists = columns_of(rows, start, LAYER, BANK)
        x = tl.load(bank[LAYER.INDEX] + program * LAYER.NUMBERS + offsets, mask=exists, other=0.0)
        if more is not None:
            x += tl.load(more + program * LAYER.NUMBERS + offsets, mask=exists, other=0.0)
        if place is not None:
            put_weights(place, start, x, LAYER.BLOCK, BANK)
        if operand is not None:
            put_operand(operand, start, x, LAYER.BLOCK, BANK)


@triton.jit
def give_layer(place, bank, program, LAYER: tl.constexpr, BANK: tl.constexpr):
    """The inverse of :func:`take_layer`."""
    rows = locate_rows(LAYER, BANK)
    for start in range(0, LAYER.BLOCK, BANK.SLICE):
        offsets, exists = columns_of(rows, start, LAYER, BANK)
        x = weights_at(place, start, LAYER.WIDTH // BANK.PER, LAYER.BLOCK, BANK)
        tl.store(bank[LAYER.INDEX] + program * LAYER.NUMBERS + offsets, x, mask=exists)


@triton.jit
def memory_sum(x, PER: tl.constexpr):
    """Sums over the rows of each memory, [B, 1, C] from [B, rows, C]."""
    BLOCKS: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[2]
    sums = tl.sum(x, 1)
    if PER > 1:
        whole = tl.sum(tl.reshape(sums, [BLOCKS // PER, PER, C]), 1)
        sums = tl.reshape(tl.broadcast_to(whole[:, None, :], [BLOCKS // PER, PER, C]), [BLOCKS, C])
    return sums[:, None, :]


@triton.jit
def put_decays(place, vectors, log, BLOCK_C: tl.constexpr):
    """What follows from log decays [C] goes to scratch, to be taken by :func:`decays_at`."""
    j = tl.arange(0, BLOCK_C)[:, None]
    t = tl.arange(0, BLOCK_C)[None, :]
    # In fp64, so that differences of sums are right to fp32; clamped, so that −∞ is never subtracted.
    log = tl.maximum(log, _LOG_ZERO).to(tl.float64)
    at_j, at_t = log[:, None], log[None, :]
    zeros = tl.zeros([BLOCK_C, BLOCK_C], tl.float64)
    sum_j = tl.sum(tl.where(t <= j, at_t + zeros, 0.0), 1)[:, None]
    sum_t = tl.sum(tl.where(j <= t, at_j + zeros, 0.0), 0)[None, :]
    total = tl.sum(log, 0)
    at = place + j * BLOCK_C + t
    tl.store(at, tl.where(j < t, _exp(sum_t - at_t - sum_j), 0.0))
    tl.store(at + BLOCK_C * BLOCK_C, tl.where(j <= t, _exp(sum_t - sum_j), 0.0))
    tl.store(vectors + t, _exp(sum_t - at_t))
    tl.store(vectors + BLOCK_C + t, _exp(sum_t))
    tl.store(vectors + 2 * BLOCK_C + t, _exp(total - sum_t))


@triton.jit
def _exp(x):
    return tl.exp(tl.minimum(tl.cast(x, tl.float32), 0.0))


@triton.jit
def decays_at(place, vectors, BLOCK_C: tl.constexpr):
    """``strict, full`` [1, j, t], ``before, after, to_end`` [1, 1, C] and ``final`` [1, 1, 1].

    ``strict``: the product of the factors after j and before t, ``full`` up to t; ``before`` and ``after``:
    of those before and up to a token; ``to_end``: of those after it; ``final``: of all.
    """
    at = place + tl.arange(0, BLOCK_C)[None, :, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    token = vectors + tl.arange(0, BLOCK_C)[None, None, :]
    last = vectors + BLOCK_C + BLOCK_C - 1 + tl.arange(0, 1)[None, None, :]
    return (
        tl.load(at), tl.load(at + BLOCK_C * BLOCK_C), tl.load(token), tl.load(token + BLOCK_C),
        tl.load(token + 2 * BLOCK_C), tl.load(last),
    )  # fmt: skip


@triton.jit
def pairs(a, b, UPTO: tl.constexpr, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """Inner products [B, j, t] of tokens ``a`` and ``b`` in scratch, of memories up to ``UPTO``."""
    out = zeros_of(BANK.BLOCK_C, BANK)
    for start in range(0, WIDTH, BANK.SLICE):
        left = tl.trans(by_width(a, start, UPTO, WIDTH, BANK), 0, 2, 1)
        out += product(left, by_width(b, start, UPTO, WIDTH, BANK), BANK)
    return out


@triton.jit
def invert(A, BLOCK_C: tl.constexpr, BANK: tl.constexpr):
    """``(I + A)⁻¹`` of strictly upper triangular matrices [B, C, C].

    Blocks of four by substitution, then pairs of inverted blocks are merged by products. Powers of A instead
    would grow like binomials when keys repeat.
    """
    j = tl.arange(0, BLOCK_C)[None, :, None]
    t = tl.arange(0, BLOCK_C)[None, None, :]
    near = tl.where(j // 4 == t // 4, A, 0.0)
    inverse = tl.where(j == t, 1.0, 0.0) + tl.zeros(A.shape, tl.float32)
    for i in tl.static_range(1, 4):
        column = rounded(tl.where(t % 4 == i, near, 0.0), BANK)
        inverse -= product(rounded(inverse, BANK), column, BANK)
    if BLOCK_C > 4:
        inverse = _merge_inverses(inverse, A, j, t, 4, BANK)
    if BLOCK_C > 8:
        inverse = _merge_inverses(inverse, A, j, t, 8, BANK)
    if BLOCK_C > 16:
        inverse = _merge_inverses(inverse, A, j, t, 16, BANK)
    if BLOCK_C > 32:
        inverse = _merge_inverses(inverse, A, j, t, 32, BANK)
    return inverse


@triton.jit
def _merge_inverses(inverse, A, j, t, SIZE: tl.constexpr, BANK: tl.constexpr):
    coupling = (j // (2 * SIZE) == t // (2 * SIZE)) & (j // SIZE < t // SIZE)
    both = rounded(inverse, BANK)
    across = product(both, rounded(tl.where(coupling, A, 0.0), BANK), BANK)
    return inverse - product(rounded(across, BANK), both, BANK)


@triton.jit
def activated(z, BANK: tl.constexpr, PER: tl.constexpr):
    """``n(σ(z))`` [B, h, C], σ'(z), σ''(z) and 1/‖σ(z)‖ [B, 1, C] (1 when it is not normalised)."""
    ACTIVATION: tl.constexpr = BANK.ACTIVATION
    value, slope, curvature = activation(z, ACTIVATION)
    scale = tl.full([z.shape[0], 1, z.shape[2]], 1.0, tl.float32)
    if BANK.NORMALIZED:
        scale = tl.rsqrt(memory_sum(value * value, PER) + _NORM_EPS)
        value = value * scale
    return value, slope, curvature, scale


@triton.jit
def put_hidden(z, place, BANK: tl.constexpr):
    """:func:`activated` hidden layers, whose values go to scratch."""
    hidden = activated(z, BANK, BANK.PER)
    put_rows(place, hidden[0], BANK.BLOCK_H, BANK)
    return hidden


@triton.jit
def length_factor(x, narrow, BOUND: tl.constexpr, PER: tl.constexpr):
    """What scales a memory's rows down to length ``BOUND`` [B, rows or 1, C]: 1 where they are not too long.

    Rows of ``narrow`` memories [B, 1, 1] are bounded one by one; ``None``: there are none. A ``BOUND`` of 0
    stands for no bound.
    """
    factor = tl.full([x.shape[0], 1, x.shape[2]], 1.0, tl.float32)
    if BOUND > 0:
        squares = memory_sum(x * x, PER)
        if narrow is not None:
            squares = tl.where(narrow, x * x, squares)
        too_long = squares > BOUND * BOUND
        factor = tl.where(too_long, BOUND * tl.rsqrt(tl.where(too_long, squares, 1.0)), 1.0)
    return factor


@triton.jit
def error_signal(back, hidden, BANK: tl.constexpr, PER: tl.constexpr):
    """The error signal at z from ``back``, the one at n(σ(z)): ``signal, tangent, along, factor``.

    ``hidden`` is of :func:`activated`; the last two are [B, 1, C], ``signal`` is bounded.
    """
    value, slope, _, scale = hidden
    along = memory_sum(value * back, PER)
    tangent = back
    if BANK.NORMALIZED:
        tangent = (back - value * along) * scale
    signal = tangent * slope
    factor = length_factor(signal, None, BANK.BOUND, PER)
    return signal * factor, tangent, along, factor
