"""The unit lower-triangular system of a chunk's erases, block by block of tokens.

With K [LENGTH, LENGTH] of :mod:`nl_kernels.delta_adjoint` the system is ``(I + K diag(η)) ω = r``. Blocks on
the diagonal are inverted, all at once; then each program takes some columns of r through the blocks in turn.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.tiled_products import add_product
from nl_kernels.triton_support.language import invert_unit_lower, matmul


@triton.jit(do_not_specialize=["pitch", "start"])
def invert_blocks_kernel(
    gram,
    rate,
    inverses,
    pitch,
    start,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(I + K diag(η))⁻¹`` of one block of tokens a program: [batches, LENGTH / BLOCK, BLOCK, BLOCK]."""
    BLOCKS: tl.constexpr = LENGTH // BLOCK
    program = tl.program_id(0).to(tl.int64)
    batch = program // BLOCKS
    row = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(gram + batch * (LENGTH * LENGTH) + row[:, None] * LENGTH + row[None, :]).to(tl.float32)
    eta = tl.load(rate + batch * pitch + start + row)
    inverse = invert_unit_lower(tile * eta[None, :], BLOCK, PRECISION, 4)
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(inverses + program * (BLOCK * BLOCK) + place, inverse)


@triton.jit(do_not_specialize=["pitch", "start"])
def solve_kernel(
    gram,
    inverses,
    right,
    rate,
    coefficients,
    solution,
    scaled,
    weighted,
    pitch,
    start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """``solution`` [batches, LENGTH, WIDTH]; one program a batch and BLOCK_N columns.

    ``scaled`` is what the blocks hand on: u = −η ω, or, ``TRANSPOSED``, the solution itself; ``weighted`` is
    it times those of the coefficients that ``FACTOR`` names.
    """
    BLOCKS: tl.constexpr = LENGTH // BLOCK
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    batch = (program // COLUMNS).to(tl.int64)
    n = (program % COLUMNS) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK)
    square = gram + batch * (LENGTH * LENGTH)
    rows = batch * (LENGTH * WIDTH)
    for step in range(0, BLOCKS):
        block = step
        if TRANSPOSED:
            block = BLOCKS - 1 - step
        m = block * BLOCK + place
        at = rows + m[:, None] * WIDTH + n[None, :]
        inside = (m < LENGTH)[:, None] & (n < WIDTH)[None, :]
        eta = tl.load(rate + batch * pitch + start + m)
        acc = tl.zeros([BLOCK, BLOCK_N], tl.float32)
        # What this program has stored of other blocks.
        for other in range(0, step):
            k = other * BLOCK + place
            if TRANSPOSED:
                k = (BLOCKS - 1 - other) * BLOCK + place
                tile = tl.trans(tl.load(square + k[:, None] * LENGTH + m[None, :]))
            else:
                tile = tl.load(square + m[:, None] * LENGTH + k[None, :])
            known = tl.load(
                scaled + rows + k[:, None] * WIDTH + n[None, :],
                mask=(k < LENGTH)[:, None] & (n < WIDTH)[None, :],
                other=0.0,
            )
            acc = add_product(acc, tile, known, PRECISION)
        inverse = tl.load(
            inverses + (batch * BLOCKS + block) * (BLOCK * BLOCK) + place[:, None] * BLOCK + place[None, :]
        )
        given = tl.load(right + at, mask=inside, other=0.0)
        if TRANSPOSED:
            found = matmul(tl.trans(inverse), given - eta[:, None] * acc, SOLVE_PRECISION)
            handed = found
        else:
            found = matmul(inverse, given + acc, SOLVE_PRECISION)
            handed = -eta[:, None] * found
        tl.store(solution + at, found, mask=inside)
        tl.store(scaled + at, handed.to(scaled.dtype.element_ty), mask=inside)
        end = tl.load(coefficients + (batch * 8 + FACTOR) * pitch + start + m)
        tl.store(weighted + at, (end[:, None] * handed).to(weighted.dtype.element_ty), mask=inside)
        tl.debug_barrier()
