"""Batched products over tiles with fused element-wise work, of which large chunks are made.

An operand is a matrix a batch of [batches, rows, WIDTH] in memory, from row ``start`` of its batch and a
column on; *turned* ones are read as their transpose. A launch may be for several memories of each of the
call's ``batches``: its batches are then memory first, ``step`` rows from one memory's to the next's. Matrices
of a chunk have all LENGTH rows, with zeros where there is no token. Per-token numbers of a chunk,
``coefficients`` [batches, 8, pitch], are listed in :mod:`.tiled_tokens`.
"""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import decay_between

TOTAL: tl.constexpr = tl.constexpr(0)
RESIDUE: tl.constexpr = tl.constexpr(1)
TOTAL_BEFORE: tl.constexpr = tl.constexpr(2)
RESIDUE_BEFORE: tl.constexpr = tl.constexpr(3)


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a @ b``, operands in the named precision (see :mod:`nl_kernels.triton_support.language`)."""
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
def add_term(
    acc,
    a,
    b,
    m,
    n,
    k_from,
    k_stop,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + a[m, k_from:k_stop] @ b[k_from:k_stop, n]``."""
    for first in range(k_from, k_stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = load_operand(a, m, k, M, K, A_WIDTH, A_TURNED)
        right = load_operand(b, k, n, K, N, B_WIDTH, B_TURNED)
        acc = add_product(acc, left, right, PRECISION)
    return acc


@triton.jit
def decay_tile(coefficients, m, n, LENGTH: tl.constexpr, pitch, DECAY: tl.constexpr):
    """The decays from token n to just after ("full") or just before ("strict") token m, 0 above the diagonal.

    ``coefficients`` points at the chunk's first token.
    """
    from_total = tl.load(coefficients + TOTAL * pitch + n, mask=n < LENGTH, other=0.0)
    from_residue = tl.load(coefficients + RESIDUE * pitch + n, mask=n < LENGTH, other=0.0)
    if DECAY == "strict":
        to_total = tl.load(coefficients + TOTAL_BEFORE * pitch + m, mask=m < LENGTH, other=0.0)
        to_residue = tl.load(coefficients + RESIDUE_BEFORE * pitch + m, mask=m < LENGTH, other=0.0)
        below = m[:, None] > n[None, :]
    else:
        to_total = tl.load(coefficients + TOTAL * pitch + m, mask=m < LENGTH, other=0.0)
        to_residue = tl.load(coefficients + RESIDUE * pitch + m, mask=m < LENGTH, other=0.0)
        below = m[:, None] >= n[None, :]
    decay = decay_between(to_total[:, None], to_residue[:, None], from_total[None, :], from_residue[None, :])
    return tl.where(below, decay, 0.0)


# Extents to loop over come at run time too: loops of known length are unrolled, at a minute a compilation.
_INTEGERS = [
    *(f"k{i}" for i in range(4)),
    *(f"{x}{i}_{kind}" for i in range(4) for x in "ab" for kind in ("rows", "start", "step")),
    *(f"{x}_{kind}" for x in ("add0", "add1", "out") for kind in ("rows", "start", "step", "limit")),
    "batches",
    *(f"{x}_{kind}" for x in ("aside", "against") for kind in ("rows", "start", "step")),
    "pitch",
    "start",
    "chunks",
    "chunk",
]


@triton.jit(do_not_specialize=_INTEGERS)
def product_kernel(
    a0,
    b0,
    a1,
    b1,
    a2,
    b2,
    a3,
    b3,
    coefficients,
    final,
    aside,
    add0,
    add1,
    out,
    against,
    inner,
    inner1,
    final1,
    matrix,
    k0,
    k1,
    k2,
    k3,
    a0_rows,
    a0_start,
    a0_step,
    b0_rows,
    b0_start,
    b0_step,
    a1_rows,
    a1_start,
    a1_step,
    b1_rows,
    b1_start,
    b1_step,
    a2_rows,
    a2_start,
    a2_step,
    b2_rows,
    b2_start,
    b2_step,
    a3_rows,
    a3_start,
    a3_step,
    b3_rows,
    b3_start,
    b3_step,
    add0_rows,
    add0_start,
    add0_step,
    add0_limit,
    add1_rows,
    add1_start,
    add1_step,
    add1_limit,
    out_rows,
    out_start,
    out_step,
    out_limit,
    aside_rows,
    aside_start,
    aside_step,
    against_rows,
    against_start,
    against_step,
    batches,
    pitch,
    start,
    chunks,
    chunk,
    M: tl.constexpr,
    N: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    A0_TURNED: tl.constexpr,
    A0_WIDTH: tl.constexpr,
    A0_COLUMN: tl.constexpr,
    B0_TURNED: tl.constexpr,
    B0_WIDTH: tl.constexpr,
    B0_COLUMN: tl.constexpr,
    SPAN0: tl.constexpr,
    A1_TURNED: tl.constexpr,
    A1_WIDTH: tl.constexpr,
    A1_COLUMN: tl.constexpr,
    B1_TURNED: tl.constexpr,
    B1_WIDTH: tl.constexpr,
    B1_COLUMN: tl.constexpr,
    SPAN1: tl.constexpr,
    A2_TURNED: tl.constexpr,
    A2_WIDTH: tl.constexpr,
    A2_COLUMN: tl.constexpr,
    B2_TURNED: tl.constexpr,
    B2_WIDTH: tl.constexpr,
    B2_COLUMN: tl.constexpr,
    SPAN2: tl.constexpr,
    A3_TURNED: tl.constexpr,
    A3_WIDTH: tl.constexpr,
    A3_COLUMN: tl.constexpr,
    B3_TURNED: tl.constexpr,
    B3_WIDTH: tl.constexpr,
    B3_COLUMN: tl.constexpr,
    SPAN3: tl.constexpr,
    ADD0_WIDTH: tl.constexpr,
    ADD0_COLUMN: tl.constexpr,
    ADD1_WIDTH: tl.constexpr,
    ADD1_COLUMN: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    OUT_COLUMN: tl.constexpr,
    FACTOR: tl.constexpr,
    DECAY: tl.constexpr,
    ASIDE_TERMS: tl.constexpr,
    ASIDE_ADDS: tl.constexpr,
    ADD0_SIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = (factor a0 b0 + a1 b1 + a2 b2 + a3 b3) · decay · matrix ± add0 + add1``, one program a tile.

    ``SPAN…`` is "l" where a is lower triangular, "u" where it is upper triangular, "d" where the product is
    needed on and below the diagonal alone, "-" elsewhere. ``FACTOR`` scales the rows of the first term by
    those of the coefficients (−1: not). The sum of the first ``ASIDE_TERMS`` terms (−1: the first one, not
    scaled) goes to ``aside``, added to what it holds with ``ASIDE_ADDS``. ``add0`` and ``add1`` are scaled
    by ``final`` and ``final1`` [batches, chunks], where given; ``inner`` and ``inner1`` [batches, chunks,
    tiles] get their inner products, before that, with ``against``.
    """
    TILES_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    batch = (program // (TILES_M * TILES_N)).to(tl.int64)
    row = batch % batches
    memory = batch // batches
    tile = program % (TILES_M * TILES_N)
    first_m = (tile // TILES_N) * BLOCK_M
    first_n = (tile % TILES_N) * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    aside_place = aside
    if aside is not None:
        aside_place += (row * aside_rows + memory * aside_step + aside_start) * N

    if a0 is not None:
        acc = _next_term(
            acc,
            a0 + (row * a0_rows + memory * a0_step + a0_start) * A0_WIDTH + A0_COLUMN,
            b0 + (row * b0_rows + memory * b0_step + b0_start) * B0_WIDTH + B0_COLUMN,
            m, n, first_m, first_n, k0, M, N, K0, A0_WIDTH, B0_WIDTH, A0_TURNED, B0_TURNED,
            SPAN0, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip
    if ASIDE_TERMS < 0:
        _put_aside(aside_place, acc, m, n, inside, N, ASIDE_ADDS)
    if FACTOR >= 0:
        place = coefficients + (batch * 8 + FACTOR) * pitch + start
        acc *= tl.load(place + m, mask=m < M, other=0.0)[:, None]
    if ASIDE_TERMS == 1:
        _put_aside(aside_place, acc, m, n, inside, N, ASIDE_ADDS)
    if a1 is not None:
        acc = _next_term(
            acc,
            a1 + (row * a1_rows + memory * a1_step + a1_start) * A1_WIDTH + A1_COLUMN,
            b1 + (row * b1_rows + memory * b1_step + b1_start) * B1_WIDTH + B1_COLUMN,
            m, n, first_m, first_n, k1, M, N, K1, A1_WIDTH, B1_WIDTH, A1_TURNED, B1_TURNED,
            SPAN1, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip
    if ASIDE_TERMS == 2:
        _put_aside(aside_place, acc, m, n, inside, N, ASIDE_ADDS)
    if a2 is not None:
        acc = _next_term(
            acc,
            a2 + (row * a2_rows + memory * a2_step + a2_start) * A2_WIDTH + A2_COLUMN,
            b2 + (row * b2_rows + memory * b2_step + b2_start) * B2_WIDTH + B2_COLUMN,
            m, n, first_m, first_n, k2, M, N, K2, A2_WIDTH, B2_WIDTH, A2_TURNED, B2_TURNED,
            SPAN2, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip
    if ASIDE_TERMS == 3:
        _put_aside(aside_place, acc, m, n, inside, N, ASIDE_ADDS)
    if a3 is not None:
        acc = _next_term(
            acc,
            a3 + (row * a3_rows + memory * a3_step + a3_start) * A3_WIDTH + A3_COLUMN,
            b3 + (row * b3_rows + memory * b3_step + b3_start) * B3_WIDTH + B3_COLUMN,
            m, n, first_m, first_n, k3, M, N, K3, A3_WIDTH, B3_WIDTH, A3_TURNED, B3_TURNED,
            SPAN3, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip

    if DECAY != "":
        acc *= decay_tile(coefficients + batch * 8 * pitch + start, m, n, M, pitch, DECAY)
    if matrix is not None:
        acc *= tl.load(matrix + batch * (M * N) + m[:, None] * N + n[None, :], mask=inside, other=0.0)
    if inner is not None:
        place = against + (row * against_rows + memory * against_step + against_start) * N
        place += m[:, None] * N + n[None, :]
        other = tl.load(place, mask=inside, other=0.0)
    if add0 is not None:
        place = add0 + (row * add0_rows + memory * add0_step + add0_start) * ADD0_WIDTH + ADD0_COLUMN
        place += m[:, None] * ADD0_WIDTH + n[None, :]
        added = tl.load(place, mask=inside & (m < add0_limit)[:, None], other=0.0).to(tl.float32)
        if inner is not None:
            to = inner + (batch * chunks + chunk) * (TILES_M * TILES_N) + tile
            tl.store(to, tl.sum(tl.sum(added * other, 1), 0))
        if final is not None:
            added *= tl.load(final + batch * chunks + chunk)
        acc += ADD0_SIGN * added
    if add1 is not None:
        place = add1 + (row * add1_rows + memory * add1_step + add1_start) * ADD1_WIDTH + ADD1_COLUMN
        place += m[:, None] * ADD1_WIDTH + n[None, :]
        added = tl.load(place, mask=inside & (m < add1_limit)[:, None], other=0.0).to(tl.float32)
        if inner1 is not None:
            to = inner1 + (batch * chunks + chunk) * (TILES_M * TILES_N) + tile
            tl.store(to, tl.sum(tl.sum(added * other, 1), 0))
        if final1 is not None:
            added *= tl.load(final1 + batch * chunks + chunk)
        acc += added
    if out is not None:
        place = out + (row * out_rows + memory * out_step + out_start) * OUT_WIDTH + OUT_COLUMN
        place += m[:, None] * OUT_WIDTH + n[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside & (m < out_limit)[:, None])


@triton.jit
def _put_aside(aside, acc, m, n, inside, N: tl.constexpr, ADDS: tl.constexpr):
    place = aside + m[:, None] * N + n[None, :]
    if ADDS:
        acc += tl.load(place, mask=inside, other=0.0)
    tl.store(place, acc, mask=inside)


@triton.jit
def _next_term(
    acc,
    a,
    b,
    m,
    n,
    first_m,
    first_n,
    extent,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One term's part of a tile; ``extent`` is K at run time."""
    k_from = 0
    k_stop = extent
    if SPAN == "l":
        k_stop = tl.minimum(first_m + BLOCK_M, extent)
    if SPAN == "u":
        k_from = (first_m // BLOCK_K) * BLOCK_K
    if SPAN == "d":
        k_stop = tl.where(first_n < first_m + BLOCK_M, extent, 0)
    return add_term(
        acc,
        a,
        b,
        m,
        n,
        k_from,
        k_stop,
        M,
        N,
        K,
        A_WIDTH,
        B_WIDTH,
        A_TURNED,
        B_TURNED,
        BLOCK_K,
        PRECISION,
    )


@triton.jit(do_not_specialize=["extent", "a_rows", "a_start", "b_rows", "b_start", "pitch", "start"])
def pair_adjoint_kernel(
    a,
    b,
    weights,
    coefficients,
    rate,
    out,
    row_sums,
    column_sums,
    extent,
    a_rows,
    a_start,
    b_rows,
    b_start,
    pitch,
    start,
    LENGTH: tl.constexpr,
    K: tl.constexpr,
    B_WIDTH: tl.constexpr,
    B_COLUMN: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From a bᵀ, the adjoint of a matrix ``decay ∘ x yᵀ`` of pairs of tokens: ``weights`` [batches, c, c].

    ``out`` gets that of x yᵀ. With ``rate`` (the pairs of what is erased) its columns are scaled by −η, and
    ``out`` is the sum of it and its transpose. ``row_sums`` and ``column_sums`` [batches, tiles, LENGTH] get,
    tile by tile, the sums of the adjoint of ``decay`` times itself; those over columns without the −η.
    """
    TILES: tl.constexpr = (LENGTH + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    batch = (program // (TILES * TILES)).to(tl.int64)
    tile_m = program % (TILES * TILES) // TILES
    tile_n = program % TILES
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < LENGTH)[:, None] & (n < LENGTH)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    stop = tl.where(tile_n <= tile_m, extent, 0)
    acc = add_term(
        acc,
        a + (batch * a_rows + a_start) * K,
        b + (batch * b_rows + b_start) * B_WIDTH + B_COLUMN,
        m,
        n,
        0,
        stop,
        LENGTH,
        LENGTH,
        K,
        K,
        B_WIDTH,
        False,
        True,
        BLOCK_K,
        PRECISION,
    )
    square = batch * (LENGTH * LENGTH)
    entries = acc * tl.load(
        weights + square + m[:, None] * LENGTH + n[None, :], mask=inside & (tile_n <= tile_m), other=0.0
    )
    weighted = acc * decay_tile(coefficients + batch * 8 * pitch + start, m, n, LENGTH, pitch, DECAY)
    sums = (batch * TILES + tile_m) * LENGTH + n
    tl.store(column_sums + sums, tl.sum(entries, 0), mask=n < LENGTH)
    place = square + m[:, None] * LENGTH + n[None, :]
    if rate is not None:
        eta = tl.load(rate + batch * pitch + start + n, mask=n < LENGTH, other=0.0)
        entries *= -eta[None, :]
        weighted *= -eta[None, :]
        if tile_m == tile_n:
            tl.store(out + place, (weighted + tl.trans(weighted)).to(out.dtype.element_ty), mask=inside)
        elif tile_n < tile_m:
            tl.store(out + place, weighted.to(out.dtype.element_ty), mask=inside)
            mirrored = square + n[:, None] * LENGTH + m[None, :]
            tl.store(out + mirrored, tl.trans(weighted).to(out.dtype.element_ty), mask=tl.trans(inside))
    elif out is not None:
        tl.store(out + place, weighted.to(out.dtype.element_ty), mask=inside)
    sums = (batch * TILES + tile_n) * LENGTH + m
    tl.store(row_sums + sums, tl.sum(entries, 1), mask=m < LENGTH)
