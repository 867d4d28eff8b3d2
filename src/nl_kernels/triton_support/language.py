"""Building blocks of the kernels' dialect: products, tiles, chunks. No op's formulas.

Conventions of every kernel in this package:

* A product names its precision. ``"bf16"`` and ``"fp16"`` cast both operands; ``"tf32"`` (which cuts off),
  ``"rounded tf32"``, ``"tf32x3"`` and ``"ieee"`` take fp32 operands. All accumulate in fp32.
* Offsets that grow with the batch or the length are 64-bit.
"""

import triton
import triton.language as tl

_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1/√(2π)

_MOST_THREADS: tl.constexpr = tl.constexpr(1024)  # of a program, on any GPU


@triton.jit
def finish_loads(SIZE: tl.constexpr):
    """Between the loads of a tile of ``SIZE`` numbers and its store to where they came from.

    Of a tile with fewer numbers than threads every number is loaded by several threads and stored by one of
    them: without a barrier a late thread would load what the early one has stored.
    """
    if SIZE < _MOST_THREADS:
        tl.debug_barrier()


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in fp32 accumulation, with operands in the named precision."""
    if PRECISION == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "fp16":
        result = tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif PRECISION == "rounded tf32":
        result = tl.dot(round_tf32(a), round_tf32(b), input_precision="tf32")
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return result


@triton.jit
def round_tf32(x):
    """The nearest number with tf32's 10 bits: a tensor core would cut the others off."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a @ b``, operands in the named precision; in 16 bits that is bf16 alone."""
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "rounded tf32":
        acc = tl.dot(round_tf32(a), round_tf32(b), acc, input_precision="tf32")
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_operand(place, row, column, ROWS, COLUMNS, WIDTH: tl.constexpr, TURNED: tl.constexpr):
    """A tile of the ROWS × COLUMNS matrix at ``place``, or of the transpose of what is there."""
    if TURNED:
        mask = (column < COLUMNS)[:, None] & (row < ROWS)[None, :]
        tile = tl.trans(tl.load(place + column[:, None] * WIDTH + row[None, :], mask=mask, other=0.0))
    else:
        mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
        tile = tl.load(place + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def activation(z, ACTIVATION: tl.constexpr):
    """``σ(z), σ'(z), σ''(z)`` of "silu" or "gelu"."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        value = z * s
        slope = s + value * (1 - s)
        curvature = (2 * slope - value) * (1 - s)
    else:
        cdf = 0.5 * (1 + tl.erf(z * _SQRT_HALF))
        density = _DENSITY_AT_0 * tl.exp(-0.5 * z * z)
        value = z * cdf
        slope = cdf + z * density
        curvature = density * (2 - z * z)
    return value, slope, curvature


@triton.jit
def load_tile(base, rows, row_mask, columns, WIDTH: tl.constexpr):
    """``[rows, columns]`` of a matrix of row offsets ``rows`` (in rows of WIDTH), zero outside."""
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    return tl.load(pointers, mask=row_mask[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, row_mask, columns, WIDTH: tl.constexpr, value):
    """The inverse of :func:`load_tile`; rounds to the buffer's dtype."""
    pointers = base + rows[:, None] * WIDTH + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=row_mask[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def products_of_rows(a, b, rows, row_mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ bᵀ`` of the rows ``rows`` of two matrices of WIDTH columns, BLOCK columns at a time."""
    result = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        left = load_tile(a, rows, row_mask, column, WIDTH)
        result += matmul(left, tl.trans(load_tile(b, rows, row_mask, column, WIDTH)), PRECISION)
    return result


@triton.jit
def locate_chunk(chunk, chunk_table, T, BLOCK_C: tl.constexpr):
    """First token and number of tokens (0: unused) of a chunk; ``chunk_table`` [chunks, 2] if packed."""
    chunk = chunk.to(tl.int64)
    if chunk_table is not None:
        start = tl.load(chunk_table + 2 * chunk)
        count = tl.load(chunk_table + 2 * chunk + 1)
    else:
        chunks_per_sequence = tl.cdiv(T, BLOCK_C)
        first = (chunk % chunks_per_sequence) * BLOCK_C
        start = (chunk // chunks_per_sequence) * T + first
        count = tl.minimum(T - first, BLOCK_C)
    return start, count


@triton.jit
def locate_sequence(sequence, cu_seqlens, chunk_offsets, T, BLOCK_C: tl.constexpr):
    """First token, number of tokens, first chunk of a sequence."""
    sequence = sequence.to(tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - start
        first_chunk = tl.load(chunk_offsets + sequence)
    else:
        start = sequence * T
        length = T + 0 * sequence
        first_chunk = sequence * tl.cdiv(T, BLOCK_C)
    return start, length, first_chunk


@triton.jit
def invert_unit_lower(A, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + A)^{-1}`` of a strictly lower triangular ``A`` [C, C], C a power of two from 16 to 64.

    Of 2 × 2 blocks on the diagonal the inverse is I − A; then pairs of inverted blocks are merged by
    products, ``[[P, 0], [-Q L P, Q]]``. Up to 16 × 16 each warp (of four) does so for a block of its own, in
    registers. Squaring a nilpotent A instead would need fewer products, but its powers grow like binomials
    when keys repeat (10^17 at C = 64).
    """
    BLOCKS: tl.constexpr = BLOCK_C // 16
    block = tl.arange(0, BLOCKS)
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    same_block = (block[:, None] == block[None, :])[:, None, :, None]
    tiles = tl.reshape(A, [BLOCKS, 16, BLOCKS, 16])
    diagonal = tl.sum(tl.where(same_block, tiles, 0.0), 2)
    inverse = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -diagonal, 0.0))
    inverse = _merge_inverses(inverse, diagonal, row, column, 2, PRECISION)
    inverse = _merge_inverses(inverse, diagonal, row, column, 4, PRECISION)
    inverse = _merge_inverses(inverse, diagonal, row, column, 8, PRECISION)
    result = tl.reshape(tl.where(same_block, inverse[:, :, None, :], 0.0), [BLOCK_C, BLOCK_C])

    row = tl.arange(0, BLOCK_C)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    if BLOCK_C >= 32:
        result = _merge_inverses(result, A, row, column, 16, PRECISION)
    if BLOCK_C >= 64:
        result = _merge_inverses(result, A, row, column, 32, PRECISION)
    return result


@triton.jit
def _merge_inverses(inverse, A, row, column, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks of 2·SIZE from those of SIZE (block diagonal in ``inverse``)."""
    coupling = (row // (2 * SIZE) == column // (2 * SIZE)) & (row // SIZE > column // SIZE)
    lower = tl.where(coupling, A, 0.0)
    return inverse - matmul(matmul(inverse, lower, PRECISION), inverse, PRECISION)
