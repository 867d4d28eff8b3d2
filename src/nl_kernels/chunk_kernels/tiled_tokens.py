"""What a call's tokens give every chunk before any state is known, and what its decays get back.

Tokens are brought into chunks of LENGTH rows each, [batches, chunks · LENGTH, ·], with zeros in rows that
hold no token. ``coefficients`` [batches, 8, chunks · LENGTH] has one number a token: the cumulated log decay,
its residue, both before the token itself (see :mod:`nl_kernels.triton_support.language`), ``before``,
``after`` and ``to_end`` of :class:`nl_kernels.delta_chunk.Spread`, and the rate. ``final`` is [batches,
chunks].
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import unit
from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_between,
    decay_from_start,
    finish_loads,
    total_log,
)

BEFORE: tl.constexpr = tl.constexpr(4)
AFTER: tl.constexpr = tl.constexpr(5)
TO_END: tl.constexpr = tl.constexpr(6)
RATE: tl.constexpr = tl.constexpr(7)

MIXED_TO_END: tl.constexpr = tl.constexpr(3)  # of the momenta
CARRIED_TO_END: tl.constexpr = tl.constexpr(4)


@triton.jit
def locate_chunk_tokens(
    batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK: tl.constexpr, LENGTH: tl.constexpr
):
    """Where the rows ``t`` of a chunk lie among a batch's tokens, and which of them hold one."""
    lead = offset % CHUNK
    first = tl.maximum(chunk * CHUNK - lead, 0)
    last = tl.minimum((chunk + 1) * CHUNK - lead, tokens)
    column = first + t
    valid = (t < LENGTH) & (column < last)
    if begin is not None:
        slot = column.to(tl.int64)
        if origin is not None:
            slot += tl.load(origin + batch)
        valid = valid & (slot >= tl.load(begin + batch)) & (slot < tl.load(stop + batch))
    return batch * tokens + column, valid


@triton.jit(do_not_specialize=["tokens", "offset", "chunks"])
def coefficients_kernel(
    rate,
    log_decay,
    begin,
    stop,
    origin,
    coefficients,
    plain_rate,
    final,
    tokens,
    offset,
    chunks,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a batch and chunk; ``plain_rate`` [batches, pitch] is the last coefficient alone."""
    program = tl.program_id(0)
    batch = (program // chunks).to(tl.int64)
    chunk = program % chunks
    t = tl.arange(0, BLOCK)
    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    log = tl.load(log_decay + token, mask=valid, other=0.0)
    total, residue, total_before, residue_before = cumulate_log(log)
    all_total, all_residue = total_log(log)
    pitch = chunks * LENGTH
    place = coefficients + batch * 8 * pitch + chunk * LENGTH + t
    inside = t < LENGTH
    tl.store(place, total, mask=inside)
    tl.store(place + pitch, residue, mask=inside)
    tl.store(place + 2 * pitch, total_before, mask=inside)
    tl.store(place + 3 * pitch, residue_before, mask=inside)
    tl.store(place + BEFORE * pitch, decay_from_start(total_before), mask=inside)
    tl.store(place + AFTER * pitch, decay_from_start(total), mask=inside)
    to_end = decay_between(all_total, all_residue, total, residue)
    tl.store(place + TO_END * pitch, to_end, mask=inside)
    eta = tl.load(rate + token, mask=valid, other=0.0)
    tl.store(place + RATE * pitch, eta, mask=inside)
    tl.store(plain_rate + batch * pitch + chunk * LENGTH + t, eta, mask=inside)
    tl.store(final + batch * chunks + chunk, decay_from_start(all_total))


@triton.jit(do_not_specialize=["tokens", "offset", "chunks"])
def place_tokens_kernel(
    x,
    begin,
    stop,
    origin,
    coefficients,
    placed,
    effective,
    tokens,
    offset,
    chunks,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens x [batches, tokens, WIDTH] in chunks; ``effective`` [batches, pitch] is their proximal rate.

    ``UNIT``: scaled to unit length.
    """
    parts = LENGTH // ROWS
    program = tl.program_id(0)
    batch = (program // (chunks * parts)).to(tl.int64)
    chunk = program // parts % chunks
    t = (program % parts) * ROWS + tl.arange(0, ROWS)
    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    column = tl.arange(0, BLOCK)
    within = (column < WIDTH)[None, :]
    tile = tl.load(x + token[:, None] * WIDTH + column[None, :], mask=valid[:, None] & within, other=0.0)
    if UNIT:
        tile, _ = unit(tile.to(tl.float32))
    pitch = chunks * LENGTH
    row = batch * pitch + chunk * LENGTH + t
    tl.store(placed + row[:, None] * WIDTH + column[None, :], tile.to(placed.dtype.element_ty), mask=within)
    if effective is not None:
        eta = tl.load(coefficients + (batch * 8 + RATE) * pitch + chunk * LENGTH + t)
        tl.store(effective + row, eta / (1 + eta * tl.sum(tile * tile, 1)))


@triton.jit(do_not_specialize=["pitch", "start"])
def rate_adjoint_kernel(
    given,
    effective,
    direct,
    column_sums,
    total,
    coefficient,
    pitch,
    start,
    LENGTH: tl.constexpr,
    TILES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A layer's adjoint of the given rate, into ``total`` [batches, LENGTH]; one program a batch.

    ``direct`` [batches, LENGTH] less ``column_sums`` [batches, TILES, LENGTH] is that of the rate it erases
    with. ``coefficient`` times its input is what the input gets where that is the proximal rate.
    """
    batch = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < LENGTH
    row = batch * LENGTH + t
    grad = tl.load(direct + row, mask=inside, other=0.0)
    if column_sums is not None:
        for tile in range(0, TILES):
            grad -= tl.load(column_sums + (batch * TILES + tile) * LENGTH + t, mask=inside, other=0.0)
    if PROXIMAL:
        eta = tl.load(given + (batch * 8 + RATE) * pitch + start + t, mask=inside, other=0.0)
        used = tl.load(effective + batch * pitch + start + t, mask=inside, other=0.0)
        share = tl.where(eta > 0, used / tl.where(eta > 0, eta, 1.0), 1.0)
        tl.store(coefficient + row, -2 * grad * used * used, mask=inside)
        grad *= share * share
    if ADDS:
        grad += tl.load(total + row, mask=inside, other=0.0)
        finish_loads(BLOCK)
    tl.store(total + row, grad, mask=inside)


@triton.jit
def sum_tiles(sums, batch, t, inside, LENGTH: tl.constexpr, TILES: tl.constexpr):
    found = tl.zeros(t.shape, tl.float64)
    for tile in range(0, TILES):
        place = sums + (batch * TILES + tile) * LENGTH + t
        found += tl.load(place, mask=inside, other=0.0).to(tl.float64)
    return found


@triton.jit
def layer_spans(
    before,
    to_end,
    after,
    strict_rows,
    strict_columns,
    full_rows,
    full_columns,
    inner,
    rate,
    final,
    batch,
    chunks,
    chunk,
    pitch,
    start,
    t,
    earlier,
    LENGTH: tl.constexpr,
    TILES: tl.constexpr,
    WEIGHT_TILES: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
):
    """What one layer's spans contribute: at the instant after token t, and over the chunk's start."""
    inside = t < LENGTH
    shifted = earlier & (t > 0)  # the numbers of the token before t
    row = batch * LENGTH + t
    found = tl.zeros(t.shape, tl.float64)
    if to_end is not None:
        found += tl.load(to_end + row - 1, mask=shifted, other=0.0).to(tl.float64)
    tiles = tl.arange(0, WEIGHT_BLOCK)
    parts = tl.load(
        inner + (batch * chunks + chunk) * WEIGHT_TILES + tiles, mask=tiles < WEIGHT_TILES, other=0.0
    )
    at_start = tl.sum(parts.to(tl.float64), 0) * tl.load(final + batch * chunks + chunk).to(tl.float64)
    if before is not None:
        part = tl.load(before + row, mask=inside, other=0.0).to(tl.float64)
        found -= part
        at_start += tl.sum(part, 0)
    if strict_rows is not None:
        eta = tl.load(rate + batch * pitch + start + t - 1, mask=shifted, other=0.0).to(tl.float64)
        found -= eta * sum_tiles(strict_columns, batch, t - 1, shifted, LENGTH, TILES)
        found -= sum_tiles(strict_rows, batch, t, inside, LENGTH, TILES)
    if after is not None:
        part = tl.load(after + row - 1, mask=shifted, other=0.0).to(tl.float64)
        found -= part
        at_start += tl.sum(tl.load(after + row, mask=inside, other=0.0).to(tl.float64), 0)
    if full_rows is not None:
        found += sum_tiles(full_columns, batch, t - 1, shifted, LENGTH, TILES)
        found -= sum_tiles(full_rows, batch, t - 1, shifted, LENGTH, TILES)
    return found, at_start


@triton.jit(do_not_specialize=["tokens", "offset", "chunks", "chunk"])
def decay_adjoint_kernel(
    before0,
    to_end0,
    after0,
    strict_rows0,
    strict_columns0,
    full_rows0,
    full_columns0,
    inner0,
    rate0,
    before1,
    to_end1,
    after1,
    strict_rows1,
    strict_columns1,
    full_rows1,
    full_columns1,
    inner1,
    rate1,
    shared_to_end,
    shared_log,
    rate_total,
    final,
    begin,
    stop,
    origin,
    d_log_decay,
    d_rate,
    tokens,
    offset,
    chunks,
    chunk,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    TILES: tl.constexpr,
    WEIGHT_TILES0: tl.constexpr,
    WEIGHT_BLOCK0: tl.constexpr,
    WEIGHT_TILES1: tl.constexpr,
    WEIGHT_BLOCK1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of log decays and rates of one chunk, one program a batch.

    By layer come adjoints of the parts of the decays' spread, each times the part itself: ``before``,
    ``to_end`` and ``after`` [batches, LENGTH], sums over rows and columns of ``strict`` (columns still
    without −``rate``) and ``full`` [batches, TILES, LENGTH], and ``inner`` [batches, chunks, tiles of the
    weight], of ``final`` but for itself. ``shared_…`` is what momentum adds. A span from token j to i holds
    the logs of j + 1 … i: a sum over instants of what begins there less what ends there.
    """
    batch = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < LENGTH
    pitch = chunks * LENGTH
    start = chunk * LENGTH
    found, at_start = layer_spans(
        before0, to_end0, after0, strict_rows0, strict_columns0, full_rows0, full_columns0, inner0, rate0,
        final, batch, chunks, chunk, pitch, start, t, inside, LENGTH, TILES, WEIGHT_TILES0, WEIGHT_BLOCK0,
    )  # fmt: skip
    if inner1 is not None:
        more, more_at_start = layer_spans(
            before1, to_end1, after1, strict_rows1, strict_columns1, full_rows1, full_columns1, inner1, rate1,
            final, batch, chunks, chunk, pitch, start, t, inside, LENGTH, TILES, WEIGHT_TILES1, WEIGHT_BLOCK1,
        )  # fmt: skip
        found += more
        at_start += more_at_start
    if shared_to_end is not None:
        found += tl.load(shared_to_end + batch * LENGTH + t - 1, mask=inside & (t > 0), other=0.0)
    found = tl.cumsum(tl.where(t == 0, found + at_start, found), 0)
    if shared_log is not None:
        found += tl.load(shared_log + batch * LENGTH + t, mask=inside, other=0.0)
    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    exists = inside & (token - batch * tokens < tokens) & (t < CHUNK)
    if chunk == 0:
        exists = exists & (t < CHUNK - offset % CHUNK)
    tl.store(d_log_decay + token, tl.where(valid, found, 0.0).to(tl.float32), mask=exists)
    grad = tl.load(rate_total + batch * LENGTH + t, mask=inside, other=0.0)
    tl.store(d_rate + token, tl.where(valid, grad, 0.0), mask=exists)
