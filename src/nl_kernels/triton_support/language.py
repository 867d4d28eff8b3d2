"""Building blocks of the kernels' dialect: products, decays, tiles, chunks. No op's formulas.

Conventions of every kernel in this package:

* A product names its precision. ``"bf16"`` and ``"fp16"`` cast both operands; ``"tf32"``, ``"tf32x3"`` and
  ``"ieee"`` take fp32 operands. All accumulate in fp32.
* A decay is a log ≤ 0, −∞ included. Logs are cumulated in fp64, and the sum is handed on as two fp32 numbers,
  ``(total, residue)``, so that the difference of two large sums is still exact to fp32. They are clamped at
  −1000, whose exponential is exactly zero: −∞ never enters a subtraction. Only differences ≤ 0 are
  exponentiated.
* Offsets that grow with the batch or the length are 64-bit.
"""

import triton
import triton.language as tl

# Stands for log(0): its exponential is zero in fp32, and sums of it stay exact in fp64.
_LOG_ZERO: tl.constexpr = tl.constexpr(-1000.0)

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
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return result


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a @ b``, operands in the named precision; in 16 bits that is bf16 alone."""
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
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
def safe_log(x):
    """``log(x)``, with the clamped log of zero for x = 0."""
    return tl.where(x > 0, tl.log(tl.where(x > 0, x, 1.0)), _LOG_ZERO)


@triton.jit
def cumulate_log(x):
    """Inclusive cumulated form of the logs ``x`` [C], and of the same without each row's own factor.

    Returns ``total, residue, total_before, residue_before``.
    """
    clamped = tl.maximum(x, _LOG_ZERO).to(tl.float64)
    cumulated = tl.cumsum(clamped, 0)
    total, residue = _split(cumulated)
    total_before, residue_before = _split(cumulated - clamped)
    return total, residue, total_before, residue_before


@triton.jit
def total_log(x):
    """The cumulated form ``(total, residue)`` of all of ``x`` [C]: the last row of :func:`cumulate_log`."""
    return _split(tl.sum(tl.maximum(x, _LOG_ZERO).to(tl.float64), 0))


@triton.jit
def _split(x):
    """An fp64 number as the sum of two fp32 ones."""
    high = tl.cast(x, tl.float32)
    return high, tl.cast(x - tl.cast(high, tl.float64), tl.float32)


@triton.jit
def decay_from_start(total):
    """The product of all factors so far, from their cumulated form."""
    return tl.exp(tl.minimum(total, 0.0))


@triton.jit
def decay_between(to_total, to_residue, from_total, from_residue):
    """The product of the factors after ``from`` up to ``to``, each a cumulated form; shapes broadcast."""
    return tl.exp(tl.minimum((to_total - from_total) + (to_residue - from_residue), 0.0))


@triton.jit
def decay_matrix(to_total, to_residue, from_total, from_residue, mask):
    """``[t, j]`` = the product of the factors after j up to t where ``mask``, else 0."""
    decay = decay_between(to_total[:, None], to_residue[:, None], from_total[None, :], from_residue[None, :])
    return tl.where(mask, decay, 0.0)


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
def invert_unit_lower(A, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, BASE: tl.constexpr = 16):
    """``(I + A)^{-1}`` of a strictly lower triangular ``A`` [C, C], C a power of two ≥ 16.

    Forward substitution inside the diagonal blocks of BASE × BASE (all of them at once), then pairs of
    inverted blocks are merged by products, ``[[P, 0], [-Q L P, Q]]``. Squaring a nilpotent A instead would
    need no substitution, but its powers grow like binomials when keys repeat (10^17 at C = 64). A step of the
    substitution waits for the one before: a small BASE, 4 or 8, is for programs that are a chain of chunks.
    """
    BLOCKS: tl.constexpr = BLOCK_C // BASE
    block = tl.arange(0, BLOCKS)
    row = tl.arange(0, BASE)
    same_block = block[:, None] == block[None, :]
    tiles = tl.reshape(A, [BLOCKS, BASE, BLOCKS, BASE])
    diagonal = tl.sum(tl.where(same_block[:, None, :, None], tiles, 0.0), 2)
    identity = (row[:, None] == row[None, :]).to(tl.float32)
    inverse = tl.broadcast_to(identity[None, :, :], [BLOCKS, BASE, BASE])
    for i in range(1, BASE):
        is_row = (row == i)[None, :, None]
        coefficients = tl.sum(tl.where(is_row, diagonal, 0.0), 1)
        eliminated = tl.sum(coefficients[:, :, None] * inverse, 1)
        inverse = tl.where(is_row, inverse - eliminated[:, None, :], inverse)
    spread = tl.where(same_block[:, None, :, None], inverse[:, :, None, :], 0.0)
    result = tl.reshape(spread, [BLOCK_C, BLOCK_C])

    rows = tl.arange(0, BLOCK_C)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    if BASE <= 4:
        result = _merge_inverses(result, A, rows, columns, 4, PRECISION)
    if BASE <= 8:
        result = _merge_inverses(result, A, rows, columns, 8, PRECISION)
    if BLOCK_C >= 32:
        result = _merge_inverses(result, A, rows, columns, 16, PRECISION)
    if BLOCK_C >= 64:
        result = _merge_inverses(result, A, rows, columns, 32, PRECISION)
    if BLOCK_C >= 128:
        result = _merge_inverses(result, A, rows, columns, 64, PRECISION)
    return result


@triton.jit
def _merge_inverses(inverse, A, rows, columns, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks of 2·SIZE from those of SIZE (block diagonal in ``inverse``)."""
    coupling = (rows // (2 * SIZE) == columns // (2 * SIZE)) & (rows // SIZE > columns // SIZE)
    lower = tl.where(coupling, A, 0.0)
    return inverse - matmul(matmul(inverse, lower, PRECISION), inverse, PRECISION)


@triton.jit
def sum_over_spans(pairs, ends_mask, starts_mask, PRECISION: tl.constexpr):
    """``out[i] = Σ_{t, j} ends[i, t] · pairs[t, j] · starts[i, j]``: what every span (j, t) over i holds.

    The gradient of a log factor i from a matrix of decays. Summing the rectangle, rather than suffix sums
    of row sums minus column sums, cancels nothing, and is exactly zero across a reset.
    """
    return tl.sum(tl.where(starts_mask, matmul(ends_mask.to(tl.float32), pairs, PRECISION), 0.0), 1)
