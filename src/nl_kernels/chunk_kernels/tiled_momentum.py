"""Momentum of layers that do not erase: its coefficients for every chunk, and their adjoints.

The mixture of decay and momentum (:func:`nl_kernels.delta_chunk.chunk_coefficients`) is by token a linear
recurrence, and so is its adjoint: no division by a momentum, which may be 0. ``momenta`` [batches, 8, pitch]
has, as :mod:`.tiled_tokens` for decays, the cumulated log momentum and its residue, and then ``after`` and
``to_end`` of the mixture, ``to_end`` and ``after`` of momentum, whether the token counts, and the momentum.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import row_dot
from nl_kernels.chunk_kernels.tiled_products import decay_tile
from nl_kernels.chunk_kernels.tiled_rows import load_more, load_rows, locate_rows, store_rows
from nl_kernels.chunk_kernels.tiled_tokens import (
    CARRIED_TO_END,
    MIXED_TO_END,
    TO_END,
    locate_chunk_tokens,
    sum_tiles,
)
from nl_kernels.triton_support.language import cumulate_log, decay_between, safe_log

MIXED_AFTER: tl.constexpr = tl.constexpr(2)
CARRIED_AFTER: tl.constexpr = tl.constexpr(5)
APPLIED: tl.constexpr = tl.constexpr(6)
MOMENTUM: tl.constexpr = tl.constexpr(7)


@triton.jit
def _then(first_factor, first, second_factor, second):
    return first_factor * second_factor, second_factor * first + second


@triton.jit
def _recur(factor, added, REVERSE: tl.constexpr):
    """``x_t = added_t + factor_t x_{t−1}`` along the first axis, or from the end with x_{t+1}."""
    _, found = tl.associative_scan((factor, added), 0, _then, reverse=REVERSE)
    return found


@triton.jit
def store_momenta(
    momenta,
    mixed_final,
    carried_final,
    place,
    pitch,
    final,
    t,
    mu,
    next_mu,
    alpha,
    counts,
    to_end,
    LENGTH: tl.constexpr,
):
    """A chunk's numbers by token, from ``place`` on, ``pitch`` apart; the finals at ``final``.

    ``next_mu`` is the momentum of the token after each, 1 after the last; ``alpha`` and ``to_end`` are of the
    decays, ``counts`` is 0 where there is no token.
    """
    inside = t < LENGTH
    carried_after = tl.cumprod(mu, 0)
    mixed_to_end = _recur(next_mu, counts * to_end, True)
    total, residue, _, _ = cumulate_log(safe_log(mu))
    tl.store(momenta + place, total, mask=inside)
    tl.store(momenta + pitch + place, residue, mask=inside)
    mixed_after = _recur(alpha, counts * carried_after, False)
    tl.store(momenta + MIXED_AFTER * pitch + place, mixed_after, mask=inside)
    tl.store(momenta + MIXED_TO_END * pitch + place, mixed_to_end, mask=inside)
    carried_to_end = tl.cumprod(next_mu, 0, reverse=True)
    tl.store(momenta + CARRIED_TO_END * pitch + place, carried_to_end, mask=inside)
    tl.store(momenta + CARRIED_AFTER * pitch + place, carried_after, mask=inside)
    tl.store(momenta + APPLIED * pitch + place, counts, mask=inside)
    tl.store(momenta + MOMENTUM * pitch + place, mu, mask=inside)
    tl.store(mixed_final + final, tl.sum(tl.where(t == 0, mu * mixed_to_end, 0.0), 0))
    tl.store(carried_final + final, tl.sum(tl.where(t == 0, mu * carried_to_end, 0.0), 0))


@triton.jit(do_not_specialize=["tokens", "offset", "chunks"])
def momentum_coefficients_kernel(
    momentum,
    log_decay,
    begin,
    stop,
    origin,
    coefficients,
    momenta,
    mixed_final,
    carried_final,
    tokens,
    offset,
    chunks,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a batch and chunk."""
    program = tl.program_id(0)
    batch = (program // chunks).to(tl.int64)
    chunk = program % chunks
    t = tl.arange(0, BLOCK)
    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    later, later_valid = locate_chunk_tokens(
        batch, chunk, t + 1, begin, stop, origin, tokens, offset, CHUNK, LENGTH
    )
    mu = tl.load(momentum + token, mask=valid, other=1.0)
    next_mu = tl.load(momentum + later, mask=later_valid, other=1.0)
    alpha = tl.exp(tl.load(log_decay + token, mask=valid, other=0.0))
    pitch = chunks * LENGTH
    place = batch * 8 * pitch + chunk * LENGTH + t
    inside = t < LENGTH
    counts = tl.where(valid, 1.0, 0.0)
    to_end = tl.load(coefficients + TO_END * pitch + place, mask=inside, other=0.0)
    final = batch * chunks + chunk
    store_momenta(
        momenta,
        mixed_final,
        carried_final,
        place,
        pitch,
        final,
        t,
        mu,
        next_mu,
        alpha,
        counts,
        to_end,
        LENGTH,
    )


@triton.jit(do_not_specialize=["pitch", "start"])
def decay_matrices_kernel(
    coefficients,
    momenta,
    decays,
    entering,
    pitch,
    start,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``full`` of decays, and that of momenta with 0 for tokens that do not count: [batches, c, c]."""
    TILES: tl.constexpr = LENGTH // BLOCK
    program = tl.program_id(0)
    batch = (program // (TILES * TILES)).to(tl.int64)
    m = (program % (TILES * TILES) // TILES) * BLOCK + tl.arange(0, BLOCK)
    n = (program % TILES) * BLOCK + tl.arange(0, BLOCK)
    place = batch * (LENGTH * LENGTH) + m[:, None] * LENGTH + n[None, :]
    chunk = batch * 8 * pitch + start
    tl.store(decays + place, decay_tile(coefficients + chunk, m, n, LENGTH, pitch, "full"))
    counts = tl.load(momenta + chunk + APPLIED * pitch + m)
    tile = decay_tile(momenta + chunk, m, n, LENGTH, pitch, "full")
    tl.store(entering + place, tile * counts[:, None])


@triton.jit(do_not_specialize=["batches", "pitch", "start", "more_start"])
def written_momentum_rows_kernel(
    at_end,
    at_velocity_end,
    more,
    signal,
    rate,
    momenta,
    at_surprise,
    at_rate,
    to_end,
    carried_to_end,
    batches,
    pitch,
    start,
    more_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MORE_WIDTH: tl.constexpr,
    MORE_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adjoints of the error signal and the rate, and plain ones of ``to_end`` of mixture and momentum.

    ``at_end`` and ``at_velocity_end`` are x times the adjoints of S and U after the chunk, ``more`` what a
    running read gives the writes, as in :func:`.tiled_rows.written_adjoint_rows_kernel`.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    eta = tl.load(rate + batch * pitch + start + t)
    coefficient = momenta + batch * 8 * pitch + start + t
    mixed = tl.load(coefficient + MIXED_TO_END * pitch)
    carried = tl.load(coefficient + CARRIED_TO_END * pitch)
    by_mixed = tl.zeros([ROWS], tl.float32)
    by_carried = tl.zeros([ROWS], tl.float32)
    direct = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        place = row[:, None] * WIDTH + column[None, :]
        mask = (column < WIDTH)[None, :]
        delta = tl.load(signal + place, mask=mask, other=0.0)
        by_state = tl.load(at_end + place, mask=mask, other=0.0)
        by_velocity = tl.load(at_velocity_end + place, mask=mask, other=0.0)
        by_mixed += row_dot(by_state, delta)
        by_carried += row_dot(by_velocity, delta)
        grad = by_state * mixed[:, None] + by_velocity * carried[:, None]
        grad += load_more(more, row, column, more_start, batches * LENGTH, MORE_WIDTH, MORE_COLUMN)
        direct += row_dot(grad, delta)
        tl.store(at_surprise + place, grad * -eta[:, None], mask=mask)
    tl.store(to_end + row, -eta * by_mixed)
    tl.store(carried_to_end + row, -eta * by_carried)
    tl.store(at_rate + row, -direct)


@triton.jit(do_not_specialize=["grad_rows", "grad_start", "pitch", "start"])
def read_momentum_rows_kernel(
    grad,
    recalled,
    momenta,
    weighted,
    mixed_after,
    grad_rows,
    grad_start,
    pitch,
    start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A running read's adjoint times the mixture's ``after``, and the plain adjoint of that."""
    row, batch, t = locate_rows(LENGTH, ROWS)
    tile = load_rows(grad, batch * grad_rows + grad_start + t, WIDTH, BLOCK)
    after = tl.load(momenta + (batch * 8 + MIXED_AFTER) * pitch + start + t)
    store_rows(weighted, row, tile * after[:, None], WIDTH, BLOCK)
    tl.store(mixed_after + row, row_dot(tile, load_rows(recalled, row, WIDTH, BLOCK)))


@triton.jit(do_not_specialize=["pitch", "start"])
def momentum_pairs_kernel(
    at_entering,
    momenta,
    sums,
    pitch,
    start,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What momenta get from the adjoint of ``entering`` [batches, LENGTH, LENGTH], by tiles of columns.

    A column of momentum's ``full`` is a product that each token continues: backwards through the rows.
    """
    TILES: tl.constexpr = LENGTH // BLOCK
    program = tl.program_id(0)
    batch = (program // TILES).to(tl.int64)
    tile_n = program % TILES
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    chunk = momenta + batch * 8 * pitch + start
    place = tl.arange(0, BLOCK)
    below = tl.zeros([BLOCK], tl.float32)
    for step in range(0, TILES):
        tile_m = TILES - 1 - step
        m = tile_m * BLOCK + place
        found = tl.zeros([BLOCK], tl.float32)
        if tile_m >= tile_n:
            counts = tl.load(chunk + APPLIED * pitch + m)
            next_mu = tl.load(chunk + MOMENTUM * pitch + m + 1, mask=m + 1 < LENGTH, other=0.0)
            grad = tl.load(
                at_entering + batch * (LENGTH * LENGTH) + m[:, None] * LENGTH + n[None, :],
                mask=m[:, None] >= n[None, :],
                other=0.0,
            )
            last = (place == BLOCK - 1)[:, None]
            grad = grad * counts[:, None] + tl.where(last, next_mu[:, None] * below[None, :], 0.0)
            grad = _recur(tl.broadcast_to(next_mu[:, None], [BLOCK, BLOCK]), grad, True)
            below = tl.sum(tl.where((place == 0)[:, None], grad, 0.0), 0)
            # The product up to the token before: that of the rows of a matrix one row further up.
            to_total = tl.load(chunk + m - 1, mask=m > 0, other=0.0)
            to_residue = tl.load(chunk + pitch + m - 1, mask=m > 0, other=0.0)
            from_total, from_residue = tl.load(chunk + n), tl.load(chunk + pitch + n)
            log = to_total[:, None] - from_total[None, :] + (to_residue[:, None] - from_residue[None, :])
            before = tl.where(m[:, None] > n[None, :], tl.exp(tl.minimum(log, 0.0)), 0.0)
            found = tl.sum(grad * before, 1)
        tl.store(sums + (batch * TILES + tile_n) * LENGTH + m, found)


@triton.jit
def _sum_of(a, b, row, inside):
    found = tl.load(a + row, mask=inside, other=0.0)
    if b is not None:
        found += tl.load(b + row, mask=inside, other=0.0)
    return found


@triton.jit
def _sum_of_inner(inner, place, TILES: tl.constexpr, BLOCK: tl.constexpr):
    found = tl.zeros([], tl.float32)
    if inner is not None:
        tile = tl.arange(0, BLOCK)
        found = tl.sum(tl.load(inner + place * TILES + tile, mask=tile < TILES, other=0.0), 0)
    return found


@triton.jit
def _decay_of(place, pitch, mask):
    """Each token's own decay, of the coefficients at ``place``; 1 where ``mask`` is not."""
    total = tl.load(place, mask=mask, other=0.0)
    residue = tl.load(place + pitch, mask=mask, other=0.0)
    before = tl.load(place + 2 * pitch, mask=mask, other=0.0)
    residue_before = tl.load(place + 3 * pitch, mask=mask, other=0.0)
    return decay_between(total, residue, before, residue_before)


@triton.jit(do_not_specialize=["tokens", "offset", "chunks", "chunk", "pitch", "start"])
def momentum_adjoint_kernel(
    mixed_to_end0,
    mixed_to_end1,
    carried_to_end0,
    carried_to_end1,
    mixed_after0,
    mixed_after1,
    mixed_inner0,
    mixed_inner1,
    carried_inner0,
    carried_inner1,
    pair_sums,
    begin,
    stop,
    origin,
    coefficients,
    momenta,
    to_end,
    at_log,
    d_momentum,
    tokens,
    offset,
    chunks,
    chunk,
    pitch,
    start,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    TILES: tl.constexpr,
    WEIGHT_TILES0: tl.constexpr,
    WEIGHT_BLOCK0: tl.constexpr,
    WEIGHT_TILES1: tl.constexpr,
    WEIGHT_BLOCK1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a chunk's momenta from plain adjoints of one or two layers; one program a batch.

    ``to_end`` [batches, LENGTH] gets the adjoint of the decays' ``to_end`` times itself, ``at_log`` what log
    decays get from the mixture's ``after``.
    """
    batch = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < LENGTH
    shifted = inside & (t > 0)
    row = batch * LENGTH + t
    place = batch * 8 * pitch + start + t
    mu = tl.load(momenta + MOMENTUM * pitch + place, mask=inside, other=1.0)
    next_mu = tl.load(momenta + MOMENTUM * pitch + place + 1, mask=t + 1 < LENGTH, other=1.0)
    counts = tl.load(momenta + APPLIED * pitch + place, mask=inside, other=0.0)
    previous_mu = tl.load(momenta + MOMENTUM * pitch + place - 1, mask=shifted, other=1.0)
    carried_before = tl.load(momenta + CARRIED_AFTER * pitch + place - 1, mask=shifted, other=1.0)
    final = batch * chunks + chunk
    at_mixed_final = _sum_of_inner(mixed_inner0, final, WEIGHT_TILES0, WEIGHT_BLOCK0)
    at_mixed_final += _sum_of_inner(mixed_inner1, final, WEIGHT_TILES1, WEIGHT_BLOCK1)
    at_carried_final = _sum_of_inner(carried_inner0, final, WEIGHT_TILES0, WEIGHT_BLOCK0)
    at_carried_final += _sum_of_inner(carried_inner1, final, WEIGHT_TILES1, WEIGHT_BLOCK1)

    # ``earlier`` is the adjoint of the instant before each token: what began before it, brought up to it.
    mixed = _sum_of(mixed_to_end0, mixed_to_end1, row, inside)
    earlier = _recur(previous_mu, _sum_of(mixed_to_end0, mixed_to_end1, row - 1, shifted), False)
    earlier += at_mixed_final * carried_before
    grad = earlier * tl.load(momenta + MIXED_TO_END * pitch + place, mask=inside, other=0.0)
    end = tl.load(coefficients + TO_END * pitch + place, mask=inside, other=0.0)
    tl.store(to_end + row, counts * end * (mixed + mu * earlier), mask=inside)
    earlier = _recur(previous_mu, _sum_of(carried_to_end0, carried_to_end1, row - 1, shifted), False)
    earlier += at_carried_final * carried_before
    grad += earlier * tl.load(momenta + CARRIED_TO_END * pitch + place, mask=inside, other=0.0)

    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    if mixed_after0 is not None:
        alpha = _decay_of(coefficients + place, pitch, inside)
        next_alpha = _decay_of(coefficients + place + 1, pitch, t + 1 < LENGTH)
        at_after = _recur(next_alpha, _sum_of(mixed_after0, mixed_after1, row, inside), True)
        mixed_before = tl.load(momenta + MIXED_AFTER * pitch + place - 1, mask=shifted, other=0.0)
        tl.store(at_log + row, at_after * alpha * mixed_before, mask=inside)
        grad += _recur(next_mu, counts * at_after, True) * carried_before
        grad += sum_tiles(pair_sums, batch, t, inside, LENGTH, TILES).to(tl.float32)
    exists = inside & (token - batch * tokens < tokens) & (t < CHUNK)
    if chunk == 0:
        exists = exists & (t < CHUNK - offset % CHUNK)
    tl.store(d_momentum + token, tl.where(valid, grad, 0.0), mask=exists)
