"""The adjoint of a chunk's gates: of the spans of every layer's decays, and of the rates, to their logits.

A sum over memories in a fixed order, by row of the call: nothing is added by several programs.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.tiled_tokens import layer_spans, locate_chunk_tokens, sum_tiles
from nl_kernels.triton_support.language import finish_loads


@triton.jit
def _group_spans(
    before, to_end, strict_rows, strict_columns, inner, rate, at_rate, final, n, batches, chunks, chunk, t,
    LENGTH: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    WEIGHT_TILES: tl.constexpr, WEIGHT_BLOCK: tl.constexpr,
):  # fmt: skip
    """What the spans of a layer of GROUPS memories contribute, as :func:`layer_spans`, and that of the rate.

    ``before`` comes in PARTS, [PARTS · N, LENGTH].
    """
    inside = t < LENGTH
    found = tl.zeros(t.shape, tl.float64)
    start = tl.sum(found, 0)
    total = tl.zeros(t.shape, tl.float32)
    for memory in range(0, GROUPS):
        batch = memory * batches + n
        more, more_start = layer_spans(
            None, to_end, None, strict_rows, strict_columns, None, None, inner, rate, final,
            batch, chunks, chunk, LENGTH, 0, t, inside, LENGTH, TILES, WEIGHT_TILES, WEIGHT_BLOCK,
        )  # fmt: skip
        found += more
        start += more_start
        total += tl.load(at_rate + batch * LENGTH + t, mask=inside, other=0.0)
    if before is not None:
        for part in range(0, PARTS):
            place = before + (part * batches + n) * LENGTH + t
            share = tl.load(place, mask=inside, other=0.0).to(tl.float64)
            found -= share
            start += tl.sum(share, 0)
    return found, start, total


@triton.jit
def _read_spans(after, full_rows, full_columns, n, t, LENGTH: tl.constexpr, TILES: tl.constexpr):
    """What the spans of a running read contribute."""
    inside = t < LENGTH
    shifted = inside & (t > 0)
    place = after + n * LENGTH + t
    found = -tl.load(place - 1, mask=shifted, other=0.0).to(tl.float64)
    if full_rows is not None:
        found += sum_tiles(full_columns, n, t - 1, shifted, LENGTH, TILES)
        found -= sum_tiles(full_rows, n, t - 1, shifted, LENGTH, TILES)
    return found, tl.sum(tl.load(place, mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit(do_not_specialize=["batches", "tokens", "offset", "chunks", "chunk"])
def gates_adjoint_kernel(
    before0,
    to_end0,
    strict_rows0,
    strict_columns0,
    inner0,
    rate0,
    at_rate0,
    before1,
    to_end1,
    strict_rows1,
    strict_columns1,
    inner1,
    rate1,
    at_rate1,
    before2,
    to_end2,
    strict_rows2,
    strict_columns2,
    inner2,
    rate2,
    at_rate2,
    after0,
    full_rows0,
    full_columns0,
    after1,
    full_rows1,
    full_columns1,
    shared_to_end,
    shared_log,
    final,
    logits,
    rate_max,
    begin,
    stop,
    origin,
    at_logits,
    operand,
    at_parameters,
    batches,
    tokens,
    offset,
    chunks,
    chunk,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    TILES: tl.constexpr,
    GATES: tl.constexpr,
    PARTS0: tl.constexpr,
    WEIGHT_TILES0: tl.constexpr,
    WEIGHT_BLOCK0: tl.constexpr,
    WEIGHT_TILES1: tl.constexpr,
    WEIGHT_BLOCK1: tl.constexpr,
    WEIGHT_TILES2: tl.constexpr,
    WEIGHT_BLOCK2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoints of the gates' logits [2N, LENGTH], rate and then retention; one program a row.

    Layers number 0 are those of all memories as one, 1 and 2 the last ones of the three wide memories and of
    the two gates, which linear memories do not have; of reads 0 is the first. What they have is as in
    :func:`~nl_kernels.chunk_kernels.tiled_tokens.decay_adjoint_kernel`. ``operand`` [N, LENGTH, GATES] gets
    the logits' side by side; largest rate and both biases get their sums over the chunk, added to
    ``at_parameters`` [N, 3]. ``shared_…`` is what momentum adds.
    """
    n = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < LENGTH
    found, at_start, at_rate = _group_spans(
        before0, to_end0, strict_rows0, strict_columns0, inner0, rate0, at_rate0, final, n, batches, chunks,
        chunk, t, LENGTH, TILES, 1, PARTS0, WEIGHT_TILES0, WEIGHT_BLOCK0,
    )  # fmt: skip
    if inner1 is not None:
        more, more_start, more_rate = _group_spans(
            before1, to_end1, strict_rows1, strict_columns1, inner1, rate1, at_rate1, final, n, batches,
            chunks, chunk, t, LENGTH, TILES, 3, 3, WEIGHT_TILES1, WEIGHT_BLOCK1,
        )  # fmt: skip
        found += more
        at_start += more_start
        at_rate += more_rate
        more, more_start, more_rate = _group_spans(
            before2, to_end2, strict_rows2, strict_columns2, inner2, rate2, at_rate2, final, n, batches,
            chunks, chunk, t, LENGTH, TILES, 2, 2, WEIGHT_TILES2, WEIGHT_BLOCK2,
        )  # fmt: skip
        found += more
        at_start += more_start
        at_rate += more_rate
    if after0 is not None:
        more, more_start = _read_spans(after0, full_rows0, full_columns0, n, t, LENGTH, TILES)
        found += more
        at_start += more_start
    if after1 is not None:
        more, more_start = _read_spans(after1, full_rows1, full_columns1, n, t, LENGTH, TILES)
        found += more
        at_start += more_start
    _, valid = locate_chunk_tokens(n, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    if shared_to_end is not None:
        found += tl.load(shared_to_end + n * LENGTH + t - 1, mask=inside & (t > 0), other=0.0)
    at_log = tl.cumsum(tl.where(t == 0, found + at_start, found), 0).to(tl.float32)
    if shared_log is not None:
        at_log += tl.load(shared_log + n * LENGTH + t, mask=inside, other=0.0)
    at_log = tl.where(valid, at_log, 0.0)
    at_rate = tl.where(valid, at_rate, 0.0)

    largest = tl.load(rate_max + n)
    fraction = tl.sigmoid(tl.load(logits + n * LENGTH + t, mask=inside, other=0.0))
    retained = tl.load(logits + (batches + n) * LENGTH + t, mask=inside, other=0.0)
    at_rate_logit = at_rate * largest * fraction * (1 - fraction)
    at_retention_logit = at_log * tl.sigmoid(-retained)
    tl.store(at_logits + n * LENGTH + t, at_rate_logit, mask=inside)
    tl.store(at_logits + (batches + n) * LENGTH + t, at_retention_logit, mask=inside)
    if operand is not None:
        column = tl.arange(0, GATES)[None, :]
        tile = tl.where(column == 0, at_rate_logit[:, None], 0.0)
        tile += tl.where(column == 1, at_retention_logit[:, None], 0.0)
        place = operand + (n * LENGTH + t)[:, None] * GATES + column
        tl.store(place, tile.to(operand.dtype.element_ty), mask=inside[:, None] & (column < GATES))
    total = at_parameters + 3 * n
    at_largest = tl.load(total) + tl.sum(at_rate * fraction, 0)
    at_bias = tl.load(total + 1) + tl.sum(at_rate_logit, 0)
    at_retention = tl.load(total + 2) + tl.sum(at_retention_logit, 0)
    finish_loads(1)
    tl.store(total, at_largest)
    tl.store(total + 1, at_bias)
    tl.store(total + 2, at_retention)


@triton.jit
def _sum_groups(x, n, batches, t, inside, LENGTH: tl.constexpr, GROUPS: tl.constexpr):
    """Over the memories of a layer, of numbers by token."""
    found = tl.zeros(t.shape, tl.float32)
    for memory in range(0, GROUPS):
        found += tl.load(x + (memory * batches + n) * LENGTH + t, mask=inside, other=0.0)
    return found


@triton.jit
def _sum_weights(
    x, n, batches, chunks, chunk, GROUPS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Over the memories of a layer and the tiles of their weights."""
    tile = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for memory in range(0, GROUPS):
        place = x + ((memory * batches + n) * chunks + chunk) * TILES + tile
        found += tl.load(place, mask=tile < TILES, other=0.0)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["batches", "chunks", "chunk"])
def velocity_sums_kernel(
    mixed_to_end0,
    carried_to_end0,
    mixed_inner0,
    carried_inner0,
    mixed_to_end1,
    carried_to_end1,
    mixed_inner1,
    carried_inner1,
    mixed_to_end2,
    carried_to_end2,
    mixed_inner2,
    carried_inner2,
    mixed_to_end,
    carried_to_end,
    mixed_inner,
    carried_inner,
    batches,
    chunks,
    chunk,
    LENGTH: tl.constexpr,
    WEIGHT_TILES0: tl.constexpr,
    WEIGHT_BLOCK0: tl.constexpr,
    WEIGHT_TILES1: tl.constexpr,
    WEIGHT_BLOCK1: tl.constexpr,
    WEIGHT_TILES2: tl.constexpr,
    WEIGHT_BLOCK2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the adjoint of momenta takes of all layers, numbered as above, as of one; one program a row."""
    n = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < LENGTH
    mixed = _sum_groups(mixed_to_end0, n, batches, t, inside, LENGTH, 1)
    carried = _sum_groups(carried_to_end0, n, batches, t, inside, LENGTH, 1)
    at_mixed = _sum_weights(mixed_inner0, n, batches, chunks, chunk, 1, WEIGHT_TILES0, WEIGHT_BLOCK0)
    at_carried = _sum_weights(carried_inner0, n, batches, chunks, chunk, 1, WEIGHT_TILES0, WEIGHT_BLOCK0)
    if mixed_inner1 is not None:
        mixed += _sum_groups(mixed_to_end1, n, batches, t, inside, LENGTH, 3)
        carried += _sum_groups(carried_to_end1, n, batches, t, inside, LENGTH, 3)
        at_mixed += _sum_weights(mixed_inner1, n, batches, chunks, chunk, 3, WEIGHT_TILES1, WEIGHT_BLOCK1)
        at_carried += _sum_weights(carried_inner1, n, batches, chunks, chunk, 3, WEIGHT_TILES1, WEIGHT_BLOCK1)
        mixed += _sum_groups(mixed_to_end2, n, batches, t, inside, LENGTH, 2)
        carried += _sum_groups(carried_to_end2, n, batches, t, inside, LENGTH, 2)
        at_mixed += _sum_weights(mixed_inner2, n, batches, chunks, chunk, 2, WEIGHT_TILES2, WEIGHT_BLOCK2)
        at_carried += _sum_weights(carried_inner2, n, batches, chunks, chunk, 2, WEIGHT_TILES2, WEIGHT_BLOCK2)
    tl.store(mixed_to_end + n * LENGTH + t, mixed, mask=inside)
    tl.store(carried_to_end + n * LENGTH + t, carried, mask=inside)
    tl.store(mixed_inner + n * chunks + chunk, at_mixed)
    tl.store(carried_inner + n * chunks + chunk, at_carried)
