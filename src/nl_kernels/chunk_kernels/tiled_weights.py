"""Whole weights between chunks: as operands of products, and moved for rows that have met a boundary."""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import finish_loads


@triton.jit(do_not_specialize=["running_pitch", "running_start", "slow_pitch", "slow_start", "chunk"])
def operands_kernel(
    running,
    snapshot,
    slow,
    anchor,
    begin,
    operand,
    base,
    running_pitch,
    running_start,
    slow_pitch,
    slow_start,
    chunk,
    CHUNK: tl.constexpr,
    SLOW_FROM: tl.constexpr,
    SLOW_TO: tl.constexpr,
    SLOW_INSIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The running weights, and those of the snapshot plus the anchor, rounded as operands.

    Matrices of SIZE numbers a batch; those of ``running`` lie ``running_pitch`` apart from ``running_start``
    on. A batch that has met a boundary in this call, before the chunk, serves from its running weights. With
    ``slow`` the numbers from SLOW_FROM to SLOW_TO, or all others, are of a slower clock, and come from there.
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
            given = tl.load(snapshot + batch * SIZE + place, mask=inside, other=0.0)
            if begin is not None:
                given = tl.where(chunk * CHUNK > tl.load(begin + batch), value, given)
            value = given
        if slow is not None:
            at = (place >= SLOW_FROM) & (place < SLOW_TO)
            if not SLOW_INSIDE:
                at = (place < SLOW_FROM) | (place >= SLOW_TO)
            old = tl.load(slow + batch * slow_pitch + slow_start + place, mask=inside & at, other=0.0)
            value = tl.where(at, old, value)
        if anchor is not None:
            value += tl.load(anchor + batch * SIZE + place, mask=inside, other=0.0)
        tl.store(base + batch * SIZE + place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "offset",
        "source_pitch",
        "source_start",
        "target_pitch",
        "target_start",
        "index",
    ]
)
def move_kernel(
    source,
    target,
    begin,
    stop,
    origin,
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
    CLEARS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy or add matrices of the batches that are at a certain place, and with CLEARS leave zeros behind.

    ``WHEN``: "always"; "met", where the call ends at a boundary of the batch; "last", where ``index`` is its
    last chunk; "left", where it is and the call ends within that chunk; both, but for chunk 0, only where a
    boundary of the batch precedes the chunk; "at", where slot ``index`` is a boundary of the batch.
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
        if WHEN == "met":
            moves = (last % CHUNK == 0) & (last > first)
        elif WHEN == "at":
            moves = (first < index) & (index <= last)
        else:
            chunks = tl.cdiv(last, CHUNK)
            if origin is not None:
                chunks -= first // CHUNK
            moves = tl.maximum(chunks, 1) - 1 == index
            moves = moves & ((index == 0) | (index * CHUNK > first))
            if WHEN == "left":
                moves = moves & ((last % CHUNK != 0) | (last == first))
    inside = (place < SIZE) & moves
    from_ = source + batch * source_pitch + source_start + place
    if target is not None:
        value = tl.load(from_, mask=inside, other=0.0)
        to = target + batch * target_pitch + target_start + place
        if ADDS:
            value += tl.load(to, mask=inside, other=0.0)
        finish_loads(BLOCK)
        tl.store(to, value, mask=inside)
    if CLEARS:
        tl.store(from_, tl.zeros([BLOCK], tl.float32), mask=inside)
