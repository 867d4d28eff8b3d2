"""Matrices in scratch memory in the order in which tensor cores hold them.

A matrix is cut into tiles of 16 × 16, and a tile's numbers lie as the lanes of a warp hold them in a product of
``mma.sync``: as the left operand, as the result, and, turned, as the right operand. So a warp takes an operand with
a few wide loads and gives a result away with a few wide stores: no number crosses lanes, and nothing goes through
shared memory. Elsewhere (other tensor cores, the interpreter) it is an order like any other.
"""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import matmul


@triton.jit
def product(a, b, RULE: tl.constexpr):
    """``a @ b`` of [B, m, k] and [B, k, n]: operands from scratch, or :func:`rounded` ones."""
    PRECISION: tl.constexpr = RULE.PRECISION
    return matmul(a, b, PRECISION)


@triton.jit
def rounded(x, RULE: tl.constexpr):
    """An operand in the precision of the products."""
    PRECISION: tl.constexpr = RULE.PRECISION
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    elif PRECISION == "fp16":
        x = x.to(tl.float16)
    elif PRECISION == "tf32":
        # The hardware drops the last 13 bits, and would take tf32 for truncated.
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        x = (bits & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit
def operands_at(place, RULE: tl.constexpr):
    """The same place in scratch as one of operands of products."""
    PRECISION: tl.constexpr = RULE.PRECISION
    if PRECISION == "bf16":
        place = place.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    elif PRECISION == "fp16":
        place = place.to(tl.pointer_type(tl.float16), bitcast=True)
    return place


@triton.jit
def _offsets_of(base, TILES: tl.constexpr, ACROSS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets [TILES, 8 / VECTOR, B, 32, VECTOR] of tiles, ``ACROSS`` in a row, from tile ``base`` [B] on."""
    tile = tl.arange(0, TILES)
    tile = tile // ACROSS * (WIDTH // 16) + tile % ACROSS
    part = tl.arange(0, 8 // VECTOR)[None, :, None, None, None] * (32 * VECTOR)
    lane = tl.arange(0, 32)[None, None, None, :, None] * VECTOR
    at = (tile[:, None] + base[None, :])[:, None, :, None, None] * 256
    return at + part + lane + tl.arange(0, VECTOR)[None, None, None, None, :]


@triton.jit
def load_tile(place, base, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """[B, M, N] of matrices [.., WIDTH] from tile ``base`` [B] on."""
    B: tl.constexpr = base.shape[0]
    if place.dtype.element_ty.primitive_bitwidth == 16:
        x = tl.load(place + _offsets_of(base, M * N // 256, N // 16, WIDTH, 8))
        x = tl.reshape(x, [M // 16, N // 16, B, 8, 4, 2, 2, 2])
        x = tl.permute(x, (2, 0, 6, 3, 1, 5, 4, 7))
    else:
        x = tl.load(place + _offsets_of(base, M * N // 256, N // 16, WIDTH, 4))
        x = tl.reshape(x, [M // 16, N // 16, 2, B, 8, 4, 2, 2])
        x = tl.permute(x, (3, 0, 6, 4, 1, 2, 5, 7))
    return tl.reshape(x, [B, M, N])


@triton.jit
def store_tile(place, base, x, WIDTH: tl.constexpr):
    """The inverse of :func:`load_tile`."""
    B: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    x = tl.reshape(x.to(place.dtype.element_ty), [B, M // 16, 2, 8, N // 16, 2, 4, 2])
    if place.dtype.element_ty.primitive_bitwidth == 16:
        x = tl.permute(x, (1, 4, 0, 3, 6, 5, 2, 7))
        x = tl.reshape(x, [M * N // 256, 1, B, 32, 8])
        tl.store(place + _offsets_of(base, M * N // 256, N // 16, WIDTH, 8), x)
    else:
        x = tl.permute(x, (1, 4, 5, 0, 3, 6, 2, 7))
        x = tl.reshape(x, [M * N // 256, 2, B, 32, 4])
        tl.store(place + _offsets_of(base, M * N // 256, N // 16, WIDTH, 4), x)


@triton.jit
def put_rows(place, x, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """Rows [B, rows, C] of the blocks' memories, each memory's ``WIDTH`` in all, to scratch in both forms: as
    [C, WIDTH] and as [WIDTH, C], one behind the other."""
    C: tl.constexpr = SHAPE.BLOCK_C
    block = tl.arange(0, SHAPE.BLOCKS)
    part = block % SHAPE.PER * (x.shape[1] // 16)
    matrix = block // SHAPE.PER * (2 * WIDTH * C // 256)
    store_tile(place, matrix + part, tl.trans(x, 0, 2, 1), WIDTH)
    store_tile(place, matrix + WIDTH * C // 256 + part * (C // 16), x, C)


@triton.jit
def put_tokens(place, x):
    """Tokens [1, C, width] to scratch in both forms of :func:`put_rows`."""
    first = tl.zeros([1], tl.int32)
    store_tile(place, first, x, x.shape[2])
    store_tile(place, first + x.shape[1] * x.shape[2] // 256, tl.trans(x, 0, 2, 1), x.shape[1])


@triton.jit
def by_width(place, memory, start, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """Columns ``start`` … of tokens in scratch, for products over the width: [B, SLICE, C] of ``memory`` [B]."""
    C: tl.constexpr = SHAPE.BLOCK_C
    base = memory * (2 * WIDTH * C // 256) + start // 16
    return tl.trans(load_tile(place, base, C, SHAPE.SLICE, WIDTH), 0, 2, 1)


@triton.jit
def by_token(place, memory, start, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """The same for products over the tokens: [B, C, SLICE]."""
    C: tl.constexpr = SHAPE.BLOCK_C
    base = memory * (2 * WIDTH * C // 256) + WIDTH * C // 256 + start // 16 * (C // 16)
    return tl.trans(load_tile(place, base, SHAPE.SLICE, C, C), 0, 2, 1)


@triton.jit
def rows_of(place, memory, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """The block's rows of tokens in scratch: [B, rows, C] of ``memory`` [B]."""
    C: tl.constexpr = SHAPE.BLOCK_C
    ROWS: tl.constexpr = WIDTH // SHAPE.PER
    part = tl.arange(0, SHAPE.BLOCKS) % SHAPE.PER * (ROWS * C // 256)
    return load_tile(place, memory * (2 * WIDTH * C // 256) + WIDTH * C // 256 + part, ROWS, C, C)


@triton.jit
def turned_rows_of(place, memory, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """The same turned, [B, C, rows]."""
    C: tl.constexpr = SHAPE.BLOCK_C
    ROWS: tl.constexpr = WIDTH // SHAPE.PER
    part = tl.arange(0, SHAPE.BLOCKS) % SHAPE.PER * (ROWS // 16)
    return load_tile(place, memory * (2 * WIDTH * C // 256) + part, C, ROWS, WIDTH)


@triton.jit
def weights_at(place, start, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """Columns ``start`` … of the blocks' rows of weights [.., BLOCK] in scratch: [B, ROWS, SLICE]."""
    base = tl.arange(0, SHAPE.BLOCKS) * (ROWS * BLOCK // 256) + start // 16
    return load_tile(place, base, ROWS, SHAPE.SLICE, BLOCK)


@triton.jit
def put_weights(place, start, x, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """The inverse of :func:`weights_at`."""
    base = tl.arange(0, SHAPE.BLOCKS) * (x.shape[1] * BLOCK // 256) + start // 16
    store_tile(place, base, x, BLOCK)


@triton.jit
def put_pairs(place, x, SHAPE: tl.constexpr):
    """Matrices of pairs of tokens [B, C, C] to scratch, as they are and turned."""
    C: tl.constexpr = SHAPE.BLOCK_C
    base = tl.arange(0, SHAPE.BLOCKS) * (2 * C * C // 256)
    store_tile(place, base, x, C)
    store_tile(place, base + C * C // 256, tl.trans(x, 0, 2, 1), C)


@triton.jit
def pairs_at(place, block, TURNED: tl.constexpr, SHAPE: tl.constexpr):
    """Matrices of :func:`put_pairs` of blocks ``block`` [B]; to be turned again by the one who takes the other."""
    C: tl.constexpr = SHAPE.BLOCK_C
    return load_tile(place, block * (2 * C * C // 256) + TURNED * C * C // 256, C, C, C)
