"""Gradients of decay, erase and momentum, from the terms that came from states."""

import triton
import triton.language as tl

from nl_kernels.ops.delta_memory.triton_decays import (
    decay_between,
    decay_from_start,
    decays_of,
    load_pairs,
    pairs_of,
    sum_over_spans,
)
from nl_kernels.triton_support.language import finish_loads, locate_chunk


@triton.jit
def _sum_tiles(terms, offset, mask, stride, TILES: tl.constexpr):
    """The sum over tiles of the terms at ``offset``, always in the same order."""
    result = tl.load(terms + offset, mask=mask, other=0.0)
    for tile in range(1, TILES):
        result += tl.load(terms + offset + tile * stride, mask=mask, other=0.0)
    return result


@triton.jit
def _suffix_sum(x, INCLUSIVE: tl.constexpr):
    """``out[i] = Σ_{t ≥ i} x[t]`` (or t > i)."""
    result = tl.cumsum(x, 0, reverse=True)
    if not INCLUSIVE:
        result -= x
    return result


@triton.jit(do_not_specialize=["tokens", "T", "H"])
def rate_gradients_kernel(
    erase,
    decays,
    pairs,
    token_terms,
    chunk_terms,
    d_log_decay,
    d_erase,
    d_momentum,
    chunk_table,
    tokens,
    T,
    H,
    MOMENTUM: tl.constexpr,
    BEFORE: tl.constexpr,
    KEY_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk and head: adds the states' part to the gradients of the rates, in place.

    Each term is the gradient of one decay (b, c, B_C, …); a decay's gradient goes to every factor in it.
    Where a factor may be zero and its gradient is not (momentum), the product of the *others* is formed.
    """
    program = tl.program_id(0)
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + program % H
    token_count = tokens.to(tl.int64) * H
    chunk_count = tl.num_programs(0)
    one = tl.arange(0, 1)
    TOKEN_TERMS: tl.constexpr = 7 if MOMENTUM else 3
    CHUNK_TERMS: tl.constexpr = 3 if MOMENTUM else 1
    token_stride = TOKEN_TERMS * token_count
    chunk_stride = CHUNK_TERMS * chunk_count

    alpha, mu, carried_before, momentum_tail = decays_of(decays, program.to(tl.int64), BLOCK_C, MOMENTUM)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    tail = decay_between(alpha, count - 1, row, BLOCK_C)
    start_before = decay_from_start(alpha, row - 1)

    read_term = _sum_tiles(token_terms, token, valid, token_stride, KEY_TILES)
    erase_term = _sum_tiles(token_terms, token + token_count, valid, token_stride, KEY_TILES)
    tail_term = _sum_tiles(token_terms, token + 2 * token_count, valid, token_stride, KEY_TILES)
    kept_term = _sum_tiles(chunk_terms, program + one, one == 0, chunk_stride, KEY_TILES)

    d_erase_token = tl.load(d_erase + token, mask=valid, other=0.0) + start_before * erase_term
    d_log = tl.load(d_log_decay + token, mask=valid, other=0.0)
    d_log += _suffix_sum(decay_from_start(alpha, row - BEFORE) * read_term, not BEFORE)
    d_log += _suffix_sum(start_before * beta * erase_term, False)
    d_log += decay_from_start(alpha, count - 1) * kept_term
    if MOMENTUM:
        carried_read = _sum_tiles(token_terms, token + 3 * token_count, valid, token_stride, KEY_TILES)
        carried_erase = _sum_tiles(token_terms, token + 4 * token_count, valid, token_stride, KEY_TILES)
        mixed_tail_term = _sum_tiles(token_terms, token + 5 * token_count, valid, token_stride, KEY_TILES)
        mu_tail_term = _sum_tiles(token_terms, token + 6 * token_count, valid, token_stride, KEY_TILES)
        carried_term = _sum_tiles(chunk_terms, program + chunk_count + one, one == 0, chunk_stride, KEY_TILES)
        mu_kept = _sum_tiles(chunk_terms, program + 2 * chunk_count + one, one == 0, chunk_stride, KEY_TILES)

        lower = row[:, None] >= row[None, :]
        strict = row[:, None] > row[None, :]
        mu_pairs, _ = pairs_of(pairs, program.to(tl.int64), BLOCK_C)
        mu_matrix = load_pairs(mu_pairs, row[:, None], row[None, :], BLOCK_C)
        mu_before = load_pairs(mu_pairs, row[:, None] - 1, row[None, :], BLOCK_C)
        mu_start = decay_from_start(mu, row)
        mu_tail = decay_between(mu, count - 1, row, BLOCK_C)
        mixed_tail = tl.load(momentum_tail + row)

        # c⁻ = B⁻ s, and c = α c⁻ + s: from the reads and the solve to the factors of B⁻ and α …
        before = decay_between(alpha, row[:, None] - 1, row[None, :], BLOCK_C)
        carried = tl.load(carried_before + row)
        d_erase_token += carried * carried_erase
        d_carried = beta * carried_erase
        d_start = tail * carried_term
        if BEFORE:
            d_carried += carried_read
        else:
            through = decay_between(alpha, row, row - 1, BLOCK_C) * carried_read
            d_carried += through
            d_start += carried_read
            d_log += through * carried
        carried_pairs = d_carried[:, None] * mu_start[None, :] * before
        d_log += sum_over_spans(carried_pairs, row[:, None] < row[None, :], strict, SOLVE)
        # The conditions keep products out of fused additions, which would make lanes differ in a last bit.
        mixed_terms = tl.where(lower, mu_matrix * mixed_tail_term[None, :], 0.0)
        tail_term += tl.sum(mixed_terms, 1) + mu_start * carried_term
        # … and to those of s.
        d_start += tl.sum(tl.where(strict, before * d_carried[:, None], 0.0), 0)
        started = tl.sum(tl.where(lower, mu_matrix * d_start[:, None], 0.0), 0)
        d_mu = tl.load(d_momentum + token, mask=valid, other=0.0)
        d_mu += (started + mu_tail * mu_kept) * decay_from_start(mu, row - 1)
        # The last rows of E and M.
        d_mu += mixed_tail * tl.sum(tl.where(strict, mu_before * mixed_tail_term[None, :], 0.0), 1)
        d_mu += mu_tail * tl.sum(tl.where(strict, mu_before * mu_tail_term[None, :], 0.0), 1)
        finish_loads(BLOCK_C)
        tl.store(d_momentum + token, d_mu, mask=valid)
    ended = tail * tail_term
    d_log += tl.cumsum(ended, 0) - ended
    finish_loads(BLOCK_C)
    tl.store(d_log_decay + token, d_log, mask=valid)
    tl.store(d_erase + token, d_erase_token, mask=valid)
