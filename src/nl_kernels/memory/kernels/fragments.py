"""Matrices in scratch memory in the order in which tensor cores hold them.

A matrix is cut into tiles of 16 × 16, and a tile's numbers lie as the lanes of a warp hold them in a product
of ``mma.sync``: as the left operand, as the result, and, turned, as the right operand. So a warp takes an
operand with a few wide loads and gives a result away with a few wide stores: no number crosses lanes, and
nothing goes through shared memory. Elsewhere (other tensor cores, the interpreter) it is just an order.
"""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import matmul, round_tf32

_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, BANK: tl.constexpr):
    """``a @ b`` of [B, m, k] and [B, k, n]: operands from scratch, or :func:`rounded` ones."""
    PRECISION: tl.constexpr = (
        "ieee" if _INTERPRETED else BANK.PRECISION
    )  # the interpreter has no bf16 products
    return matmul(a, b, PRECISION)


@triton.jit
def rounded(x, BANK: tl.constexpr):
    """An operand in the precision of the products."""
    PRECISION: tl.constexpr = BANK.PRECISION
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    elif PRECISION == "fp16":
        x = x.to(tl.float16)
    elif PRECISION == "tf32":
        x = round_tf32(x)
    return x


@triton.jit
def operands_at(place, BANK: tl.constexpr):
    """The same place in scratch as one of operands of products."""
    PRECISION: tl.constexpr = BANK.PRECISION
    if PRECISION == "bf16":
        place = place.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    elif PRECISION == "fp16":
        place = place.to(tl.pointer_type(tl.float16), bitcast=True)
    return place


@triton.jit
def _offsets_of(
    TILES: tl.constexpr, ACROSS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, UPTO: tl.constexpr,
    BY_MEMORY: tl.constexpr, BY_PART: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """Offsets [TILES, 8 / VECTOR, B, 32, VECTOR] of tiles, ``ACROSS`` in a row of a matrix ``WIDTH`` wide.

    They depend on constants alone, so that tiles at different places share them: a memory's are ``BY_MEMORY``
    tiles behind those of the memory before, up to memory ``UPTO``, and ``BY_PART`` a block of one memory.
    """
    tile = tl.arange(0, TILES)
    tile = tile // ACROSS * (WIDTH // 16) + tile % ACROSS
    block = tl.arange(0, BANK.BLOCKS)
    base = tl.minimum(block // BANK.PER, UPTO) * BY_MEMORY + block % BANK.PER * BY_PART
    part = tl.arange(0, 8 // VECTOR)[None, :, None, None, None] * (32 * VECTOR)
    lane = tl.arange(0, 32)[None, None, None, :, None] * VECTOR
    at = (tile[:, None] + base[None, :])[:, None, :, None, None] * 256
    return at + part + lane + tl.arange(0, VECTOR)[None, None, None, None, :]


@triton.jit
def load_tile(
    place, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, UPTO: tl.constexpr, BY_MEMORY: tl.constexpr,
    BY_PART: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """[B, M, N] of matrices ``WIDTH`` wide in scratch; the strides are of :func:`_offsets_of`."""
    B: tl.constexpr = BANK.BLOCKS
    if place.dtype.element_ty.primitive_bitwidth == 16:
        x = tl.load(place + _offsets_of(M * N // 256, N // 16, WIDTH, 8, UPTO, BY_MEMORY, BY_PART, BANK))
        x = tl.reshape(x, [M // 16, N // 16, B, 8, 4, 2, 2, 2])
        x = tl.permute(x, (2, 0, 6, 3, 1, 5, 4, 7))
    else:
        x = tl.load(place + _offsets_of(M * N // 256, N // 16, WIDTH, 4, UPTO, BY_MEMORY, BY_PART, BANK))
        x = tl.reshape(x, [M // 16, N // 16, 2, B, 8, 4, 2, 2])
        x = tl.permute(x, (3, 0, 6, 4, 1, 2, 5, 7))
    return tl.reshape(x, [B, M, N])


@triton.jit
def store_tile(
    place, x, WIDTH: tl.constexpr, BY_MEMORY: tl.constexpr, BY_PART: tl.constexpr, BANK: tl.constexpr
):
    """The inverse of :func:`load_tile`."""
    B: tl.constexpr = BANK.BLOCKS
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    x = tl.reshape(x.to(place.dtype.element_ty), [B, M // 16, 2, 8, N // 16, 2, 4, 2])
    if place.dtype.element_ty.primitive_bitwidth == 16:
        x = tl.reshape(tl.permute(x, (1, 4, 0, 3, 6, 5, 2, 7)), [M * N // 256, 1, B, 32, 8])
        tl.store(place + _offsets_of(M * N // 256, N // 16, WIDTH, 8, B, BY_MEMORY, BY_PART, BANK), x)
    else:
        x = tl.reshape(tl.permute(x, (1, 4, 5, 0, 3, 6, 2, 7)), [M * N // 256, 2, B, 32, 4])
        tl.store(place + _offsets_of(M * N // 256, N // 16, WIDTH, 4, B, BY_MEMORY, BY_PART, BANK), x)


@triton.jit
def put_rows(place, x, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """Rows [B, rows, C] of the blocks' memories, each memory's ``WIDTH`` in all, to scratch in both forms: as
    [C, WIDTH] and as [WIDTH, C], one behind the other."""
    C: tl.constexpr = BANK.BLOCK_C
    ROWS: tl.constexpr = x.shape[1]
    place, x = operands_at(place, BANK), rounded(x, BANK)
    store_tile(place, tl.trans(x, 0, 2, 1), WIDTH, 2 * WIDTH * C // 256, ROWS // 16, BANK)
    store_tile(place + WIDTH * C, x, C, 2 * WIDTH * C // 256, ROWS * C // 256, BANK)


@triton.jit
def element_at(place, row, column, WIDTH: tl.constexpr):
    """Pointers to numbers of one matrix [.., WIDTH], for tiles that lie as usual.

    Triton 3.7.1 miscompiles sums of tiles as :func:`load_tile` has them where threads outnumber numbers.
    """
    at = (row // 16 * (WIDTH // 16) + column // 16) * 256 + row % 16 // 8 * 2 + column % 2
    if place.dtype.element_ty.primitive_bitwidth == 16:
        at += row % 8 * 32 + column % 8 // 2 * 8 + column % 16 // 8 * 4
    else:
        at += row % 8 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 128
    return place + at


@triton.jit
def tokens_at(place, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """Pointers [C, WIDTH] to tokens in scratch."""
    return element_at(place, tl.arange(0, BANK.BLOCK_C)[:, None], tl.arange(0, WIDTH)[None, :], WIDTH)


@triton.jit
def put_tokens(place, x, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """Tokens [C, WIDTH] to scratch in both forms of :func:`put_rows`."""
    C: tl.constexpr = BANK.BLOCK_C
    place = operands_at(place, BANK)
    x = rounded(x, BANK).to(place.dtype.element_ty)
    tl.store(tokens_at(place, WIDTH, BANK), x)
    turned = element_at(place + WIDTH * C, tl.arange(0, WIDTH)[None, :], tl.arange(0, C)[:, None], C)
    tl.store(turned, x)


@triton.jit
def by_width(place, start, UPTO: tl.constexpr, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """Columns ``start`` … of tokens in scratch, for products over the width: [B, SLICE, C].

    Each block takes those of its memory, up to memory ``UPTO``: 0 where all have the same.
    """
    C: tl.constexpr = BANK.BLOCK_C
    place = operands_at(place, BANK) + start * 16
    return tl.trans(load_tile(place, C, BANK.SLICE, WIDTH, UPTO, 2 * WIDTH * C // 256, 0, BANK), 0, 2, 1)


@triton.jit
def by_token(place, start, UPTO: tl.constexpr, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """The same for products over the tokens: [B, C, SLICE]."""
    C: tl.constexpr = BANK.BLOCK_C
    place = operands_at(place, BANK) + (WIDTH * C + start * C)
    return tl.trans(load_tile(place, BANK.SLICE, C, C, UPTO, 2 * WIDTH * C // 256, 0, BANK), 0, 2, 1)


@triton.jit
def rows_of(place, UPTO: tl.constexpr, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """The block's rows of tokens in scratch, [B, rows, C]."""
    C: tl.constexpr = BANK.BLOCK_C
    ROWS: tl.constexpr = WIDTH // BANK.PER
    place = operands_at(place, BANK) + WIDTH * C
    return load_tile(place, ROWS, C, C, UPTO, 2 * WIDTH * C // 256, ROWS * C // 256, BANK)


@triton.jit
def turned_rows_of(place, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """The same of the block's memory, turned, [B, C, rows]."""
    C: tl.constexpr = BANK.BLOCK_C
    ROWS: tl.constexpr = WIDTH // BANK.PER
    place = operands_at(place, BANK)
    return load_tile(place, C, ROWS, WIDTH, BANK.BLOCKS, 2 * WIDTH * C // 256, ROWS // 16, BANK)


@triton.jit
def weights_at(place, start, ROWS: tl.constexpr, BLOCK: tl.constexpr, BANK: tl.constexpr):
    """Columns ``start`` … of the blocks' rows of weights [.., BLOCK] in scratch: [B, ROWS, SLICE]."""
    PART: tl.constexpr = ROWS * BLOCK // 256
    return load_tile(place + start * 16, ROWS, BANK.SLICE, BLOCK, BANK.BLOCKS, BANK.PER * PART, PART, BANK)


@triton.jit
def put_weights(place, start, x, BLOCK: tl.constexpr, BANK: tl.constexpr):
    """The inverse of :func:`weights_at`."""
    PART: tl.constexpr = x.shape[1] * BLOCK // 256
    store_tile(place + start * 16, x, BLOCK, BANK.PER * PART, PART, BANK)


@triton.jit
def put_operand(place, start, x, BLOCK: tl.constexpr, BANK: tl.constexpr):
    """The same as operands of products."""
    put_weights(operands_at(place, BANK), start, rounded(x, BANK), BLOCK, BANK)


@triton.jit
def operand_at(place, start, ROWS: tl.constexpr, BLOCK: tl.constexpr, BANK: tl.constexpr):
    """The inverse of :func:`put_operand`."""
    return weights_at(operands_at(place, BANK), start, ROWS, BLOCK, BANK)


@triton.jit
def put_pairs(place, x, BANK: tl.constexpr):
    """Matrices of pairs of tokens [B, C, C] to scratch, as they are and turned."""
    C: tl.constexpr = BANK.BLOCK_C
    PART: tl.constexpr = 2 * C * C // 256
    store_tile(place, x, C, BANK.PER * PART, PART, BANK)
    store_tile(place + C * C, tl.trans(x, 0, 2, 1), C, BANK.PER * PART, PART, BANK)


@triton.jit
def pairs_at(place, TURNED: tl.constexpr, BANK: tl.constexpr):
    """Matrices of :func:`put_pairs`; to be turned again by the one who takes the other."""
    C: tl.constexpr = BANK.BLOCK_C
    PART: tl.constexpr = 2 * C * C // 256
    return load_tile(place + TURNED * C * C, C, C, C, BANK.BLOCKS, BANK.PER * PART, PART, BANK)


@triton.jit
def pair_sums(place, TURNED: tl.constexpr, BANK: tl.constexpr):
    """The sum of such matrices of all blocks of a memory, as operands."""
    C: tl.constexpr = BANK.BLOCK_C
    PART: tl.constexpr = 2 * C * C // 256
    total = load_tile(place + TURNED * C * C, C, C, C, BANK.BLOCKS, BANK.PER * PART, 0, BANK)
    PER: tl.constexpr = BANK.PER
    for i in tl.static_range(1, PER):
        at = place + (TURNED * C * C + i * 2 * C * C)
        total += load_tile(at, C, C, C, BANK.BLOCKS, BANK.PER * PART, 0, BANK)
    return rounded(total, BANK)
