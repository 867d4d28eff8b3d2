"""One layer of a bank of memories over a chunk, on tiles.
 A tile's first axis counts blocks of rows of weights, one for each warp, so that what a warp computes for its
rows no other warp needs: a product of [B, rows, in] and [B or 1, in, C] crosses no warps. Tokens are the last
axis. Products then take weights and errors as they lie, none a transposed accumulator. A matrix of pairs of
tokens is [.., j, t]: the earlier token, then the later one. Weights stream through in slices of columns,
which bounds what is held whatever their width.
"""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import activation, matmul

_NORM_EPS: tl.constexpr = tl.constexpr(1e-6)  # memory_rule.NORM_EPS
_LOG_ZERO: tl.constexpr = tl.constexpr(-1000.0)  # triton_support.language


@triton.jit
def product(a, b, RULE: tl.constexpr):
    """``a @ b`` of [B, m, k] and [B, k, n], of which one may be shared by all blocks, [1, ..]."""
    PRECISION: tl.constexpr = RULE.PRECISION
    BLOCKS: tl.constexpr = a.shape[0] if a.shape[0] > b.shape[0] else b.shape[0]
    a = tl.broadcast_to(a, [BLOCKS, a.shape[1], a.shape[2]])
    b = tl.broadcast_to(b, [BLOCKS, b.shape[1], b.shape[2]])
    if PRECISION == "tf32":
        # The hardware drops the last 13 bits, and would take tf32 for truncated.
        a, b = _round_to_tf32(a), _round_to_tf32(b)
    return matmul(a, b, PRECISION)


@triton.jit
def _round_to_tf32(x):
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    return (bits & -8192).to(tl.float32, bitcast=True)


@triton.jit
def zeros_of(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """[B, rows, C]."""
    BLOCKS: tl.constexpr = SHAPE.BLOCKS
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    return tl.zeros([BLOCKS, ROWS, BLOCK_C], tl.float32)


@triton.jit
def locate_rows(
    OUT: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, SHAPE: tl.constexpr
):
    """Of each row of the tile: its memory [B, 1, 1], its number there, its number in the layer, and whether
    there is one."""
    block = tl.arange(0, SHAPE.BLOCKS)
    memory = (block // SHAPE.PER)[:, None, None]
    row = (block % SHAPE.PER)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    wide = memory < WIDE
    index = tl.where(wide, memory * OUT + row, WIDE * OUT + (memory - WIDE) * NARROW + row)
    exists = (memory < SHAPE.MEMORIES) & (row < tl.where(wide, OUT, NARROW))
    return memory, row, index, exists


@triton.jit
def first_rows(SHAPE: tl.constexpr):
    """:func:`locate_rows` of first layers: rows are units of the hidden layer."""
    return locate_rows(SHAPE.HIDDEN, 0, SHAPE.MEMORIES, SHAPE.BLOCK_H // SHAPE.PER, SHAPE)


@triton.jit
def last_rows(SHAPE: tl.constexpr):
    """:func:`locate_rows` of last layers: rows are outputs."""
    return locate_rows(SHAPE.VALUE_DIM, SHAPE.NARROW, SHAPE.WIDE, SHAPE.BLOCK_V // SHAPE.PER, SHAPE)


@triton.jit
def columns_of(rows, start, IN: tl.constexpr, SLICE: tl.constexpr):
    """Offsets [B, rows, SLICE] of columns ``start`` … of a layer [.., in], and which of them there are."""
    _, _, index, exists = rows
    column = start + tl.arange(0, SLICE)[None, None, :]
    return index * IN + column, exists & (column < IN)


@triton.jit
def turned_columns_of(rows, start, IN: tl.constexpr, SLICE: tl.constexpr):
    """As :func:`columns_of`, of the layer turned: [B, SLICE, rows]."""
    _, _, index, exists = rows
    column = start + tl.arange(0, SLICE)[None, :, None]
    return tl.trans(index, 0, 2, 1) * IN + column, tl.trans(exists, 0, 2, 1) & (column < IN)


@triton.jit
def outputs_of(start, SHAPE: tl.constexpr):
    """Offsets [B, h, SLICE] of outputs ``start`` … of last layers turned, and which of them there are."""
    memory, unit, _, exists = first_rows(SHAPE)
    output = start + tl.arange(0, SHAPE.SLICE)[None, None, :]
    wide = memory < SHAPE.WIDE
    row = tl.where(
        wide, memory * SHAPE.VALUE_DIM, SHAPE.WIDE * SHAPE.VALUE_DIM + (memory - SHAPE.WIDE) * SHAPE.NARROW
    )
    inside = exists & (output < tl.where(wide, SHAPE.VALUE_DIM, SHAPE.NARROW))
    return (row + output) * SHAPE.HIDDEN + unit, inside


@triton.jit
def load_weights(weights, places):
    """Weights at the places of :func:`columns_of` or its like, zero where there are none."""
    offsets, inside = places
    return tl.load(weights + offsets, mask=inside, other=0.0)


@triton.jit
def put_base(
    base, snapshot, resumed, inside, anchor, rows,
    IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The weights that a layer is applied at, snapshot and anchor, to ``base``.

    Where not ``inside`` [B, 1, 1] the snapshot is ``resumed``, the one that the call began with.
    """
    for start in range(0, BLOCK, SHAPE.SLICE):
        offsets, exists = columns_of(rows, start, IN, SHAPE.SLICE)
        if resumed is None:
            x = tl.load(snapshot + offsets, mask=exists, other=0.0)
        else:
            x = tl.load(snapshot + offsets, mask=exists & inside, other=0.0)
            x += tl.load(resumed + offsets, mask=exists & (inside == 0), other=0.0)
        if RULE.ANCHORED:
            x += tl.load(anchor + offsets, mask=exists, other=0.0)
        tl.store(base + offsets, x, mask=exists)


@triton.jit
def columns_at(place, memory, start, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, SLICE: tl.constexpr):
    """Numbers ``start`` … of tokens [.., SIZE, C] in scratch: [B, SLICE, C] by ``memory``, or [1, ..] if
    shared."""
    number = start + tl.arange(0, SLICE)[None, :, None]
    token = tl.arange(0, BLOCK_C)[None, None, :]
    if memory is not None:
        number += memory * SIZE
    return tl.load(place + number * BLOCK_C + token)


@triton.jit
def tokens_at(place, memory, start, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, SLICE: tl.constexpr):
    """As :func:`columns_at` with the tokens first: [B or 1, C, SLICE]."""
    number = start + tl.arange(0, SLICE)[None, None, :]
    token = tl.arange(0, BLOCK_C)[None, :, None]
    if memory is not None:
        number += memory * SIZE
    return tl.load(place + number * BLOCK_C + token)


@triton.jit
def rows_at(place, rows, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BY_MEMORY: tl.constexpr):
    """Pointers [B, rows, C] to tokens [.., SIZE, C] in scratch: each memory has its own, or all the same."""
    memory, row, _, _ = rows
    if BY_MEMORY:
        row = row + memory * SIZE
    return place + row * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]


@triton.jit
def vector_at(place, BLOCK_C: tl.constexpr):
    """A number a token [C]; loaded, not kept: so few are cheaper than moving them between layouts."""
    return tl.load(place + tl.arange(0, BLOCK_C))


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
def decays_of(log, BLOCK_C: tl.constexpr):
    """``strict, full`` [1, j, t], ``before, after, to_end`` [1, 1, C] and ``final`` from log decays [C].

    ``strict``: the product of the factors after j and before t, ``full`` up to t; ``before`` and ``after``:
    of those before and up to a token; ``to_end``: of those after it; ``final``: of all.
    """
    j = tl.arange(0, BLOCK_C)[None, :, None]
    t = tl.arange(0, BLOCK_C)[None, None, :]
    # In fp64, so that differences of sums are right to fp32; clamped, so that −∞ is never subtracted.
    log = tl.maximum(log, _LOG_ZERO).to(tl.float64)
    at_j, at_t = log[None, :, None], log[None, None, :]
    zeros = tl.zeros([1, BLOCK_C, BLOCK_C], tl.float64)
    sum_j = tl.sum(tl.where(t <= j, at_t + zeros, 0.0), 2)[:, :, None]
    sum_t = tl.sum(tl.where(j <= t, at_j + zeros, 0.0), 1)[:, None, :]
    total = tl.sum(log, 0)
    strict = tl.where(j < t, _exp(sum_t - at_t - sum_j), 0.0)
    full = tl.where(j <= t, _exp(sum_t - sum_j), 0.0)
    return strict, full, _exp(sum_t - at_t), _exp(sum_t), _exp(total - sum_t), _exp(total)


@triton.jit
def _exp(x):
    return tl.exp(tl.minimum(tl.cast(x, tl.float32), 0.0))


@triton.jit
def pairs(a, b, memory_a, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, RULE: tl.constexpr):
    """Inner products [B or 1, j, t] of tokens ``a`` and ``b`` in scratch, each [.., SIZE, C]."""
    return product(
        tokens_at(a, memory_a, 0, SIZE, BLOCK_C, SIZE),
        columns_at(b, memory_a, 0, SIZE, BLOCK_C, SIZE),
        RULE,
    )


@triton.jit
def invert(A, BLOCK_C: tl.constexpr, RULE: tl.constexpr):
    """``(I + A)⁻¹`` of strictly upper triangular matrices [B, C, C].

    Blocks of four by substitution, then pairs of inverted blocks are merged by products. Powers of A instead
    would grow like binomials when keys repeat.
    """
    j = tl.arange(0, BLOCK_C)[None, :, None]
    t = tl.arange(0, BLOCK_C)[None, None, :]
    near = tl.where(j // 4 == t // 4, A, 0.0)
    inverse = tl.where(j == t, 1.0, 0.0) + tl.zeros(A.shape, tl.float32)
    for i in tl.static_range(1, 4):
        inverse -= product(inverse, tl.where(t % 4 == i, near, 0.0), RULE)
    if BLOCK_C > 4:
        inverse = _merge_inverses(inverse, A, j, t, 4, RULE)
    if BLOCK_C > 8:
        inverse = _merge_inverses(inverse, A, j, t, 8, RULE)
    if BLOCK_C > 16:
        inverse = _merge_inverses(inverse, A, j, t, 16, RULE)
    if BLOCK_C > 32:
        inverse = _merge_inverses(inverse, A, j, t, 32, RULE)
    return inverse


@triton.jit
def _merge_inverses(inverse, A, j, t, SIZE: tl.constexpr, RULE: tl.constexpr):
    coupling = (j // (2 * SIZE) == t // (2 * SIZE)) & (j // SIZE < t // SIZE)
    return inverse - product(product(inverse, tl.where(coupling, A, 0.0), RULE), inverse, RULE)


@triton.jit
def activated(z, RULE: tl.constexpr, PER: tl.constexpr):
    """``n(σ(z))`` [B, h, C], σ'(z), σ''(z) and 1/‖σ(z)‖ [B, 1, C] (1 when it is not normalised)."""
    ACTIVATION: tl.constexpr = RULE.ACTIVATION
    value, slope, curvature = activation(z, ACTIVATION)
    scale = tl.full([z.shape[0], 1, z.shape[2]], 1.0, tl.float32)
    if RULE.NORMALIZED:
        scale = tl.rsqrt(memory_sum(value * value, PER) + _NORM_EPS)
        value = value * scale
    return value, slope, curvature, scale


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
def error_signal(back, hidden, RULE: tl.constexpr, PER: tl.constexpr):
    """The error signal at z from ``back``, the one at n(σ(z)): ``signal, tangent, along, factor``.

    ``hidden`` is of :func:`activated`; the last two are [B, 1, C], ``signal`` is bounded.
    """
    value, slope, _, scale = hidden
    along = memory_sum(value * back, PER)
    tangent = back
    if RULE.NORMALIZED:
        tangent = (back - value * along) * scale
    signal = tangent * slope
    factor = length_factor(signal, None, RULE.BOUND, PER)
    return signal * factor, tangent, along, factor


@triton.jit
def erase(key, memory, rate, strict, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, RULE: tl.constexpr):
    """``K = strict ∘ x xᵀ`` [B or 1, j, t] and ``(I + diag(η) K)⁻¹`` of the layers whose keys lie at
    ``key``."""
    gram = tl.zeros([1, BLOCK_C, BLOCK_C], tl.float32)
    inverse = gram
    if RULE.ERASES:
        gram = pairs(key, key, memory, SIZE, BLOCK_C, RULE) * strict
        inverse = invert(gram * rate[None, :, None], BLOCK_C, RULE)
    return gram, inverse


@triton.jit
def write(signal, recalled, rate, before, inverse, RULE: tl.constexpr):
    """ω and u [B, rows, C] of errors ``signal`` and the recall S x: the chunk adds Σ u xᵀ to what decays."""
    if RULE.ERASES:
        signal = product(signal + before * recalled, inverse, RULE)
    return signal, signal * -rate[None, None, :]
