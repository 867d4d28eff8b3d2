"""Whole weights between chunks: as operands of products, and moved for rows that have met a boundary."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["running_pitch", "running_start"])
def operands_kernel(
    running,
    snapshot,
    anchor,
    operand,
    base,
    running_pitch,
    running_start,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The running weights, and those of the snapshot plus the anchor, rounded as operands.

    Matrices of SIZE numbers a batch; those of ``running`` lie ``running_pitch`` apart from ``running_start``
    on.
    """
    PARTS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    batch = (program // PARTS).to(tl.int64)
    place = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    value = tl.load(running + batch * running_pitch + running_start + place, mask=inside, other=0.0)
    if operand is not None:
        tl.store(operand + batch * SIZE + place, value.to(operand.dtype.element_ty), mask=inside)
    if base is not None:
        if snapshot is not None:
            value = tl.load(snapshot + batch * SIZE + place, mask=inside, other=0.0)
        if anchor is not None:
            value += tl.load(anchor + batch * SIZE + place, mask=inside, other=0.0)
        tl.store(base + batch * SIZE + place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["source_pitch", "source_start", "target_pitch", "target_start", "index"])
def move_kernel(
    source,
    target,
    begin,
    stop,
    tokens,
    offset,
    source_pitch,
    source_start,
    target_pitch,
    target_start,
    index,
    CHUNK: tl.constexpr,
    WHEN: tl.constexpr,
    ADDS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy or add matrices of the batches that are at a certain place.

    ``WHEN``: "always"; "met", where the call ends at a boundary of the batch; "last", where ``index`` is its
    last chunk; "left", where it is and the call ends within that chunk.
    """
    PARTS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    batch = (program // PARTS).to(tl.int64)
    place = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)
    if WHEN == "always":
        moves = batch >= 0
    else:
        if begin is not None:
            first = tl.load(begin + batch)
            last = tl.load(stop + batch)
        else:
            first = offset % CHUNK + 0 * batch
            last = first + tokens
        met = (last % CHUNK == 0) & (last > first)
        if WHEN == "met":
            moves = met
        else:
            moves = tl.maximum(tl.cdiv(last, CHUNK) - first // CHUNK, 1) - 1 == index
            if WHEN == "left":
                moves = moves & ((last % CHUNK != 0) | (last == first))
    inside = (place < SIZE) & moves
    value = tl.load(source + batch * source_pitch + source_start + place, mask=inside, other=0.0)
    to = target + batch * target_pitch + target_start + place
    if ADDS:
        value += tl.load(to, mask=inside, other=0.0)
    tl.store(to, value, mask=inside)
