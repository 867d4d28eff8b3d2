"""Gradients of decay, erase and momentum, from the terms that came from states."""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_between,
    decay_from_start,
    decay_matrix,
    finish_loads,
    locate_chunk,
    safe_log,
    sum_over_spans,
    total_log,
)


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
    log_decay,
    erase,
    momentum,
    carried_before,
    momentum_tail,
    token_terms,
    chunk_terms,
    d_log_decay,
    d_erase,
    d_momentum,
    chunk_table,
    tokens,
    T,
    H,
    READ_BEFORE: tl.constexpr,
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
    strict = row[:, None] > row[None, :]
    lower = row[:, None] >= row[None, :]
    token_count = tokens.to(tl.int64) * H
    chunk_count = tl.num_programs(0)
    one = tl.arange(0, 1)
    TOKEN_TERMS: tl.constexpr = 3 if momentum is None else 7
    CHUNK_TERMS: tl.constexpr = 1 if momentum is None else 3
    token_stride = TOKEN_TERMS * token_count
    chunk_stride = CHUNK_TERMS * chunk_count

    log_a = tl.load(log_decay + token, mask=valid, other=0.0)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    total, residue, total_before, residue_before = cumulate_log(log_a)
    all_total, all_residue = total_log(log_a)
    tail = decay_between(all_total, all_residue, total, residue)
    kept = decay_from_start(all_total)
    start_before = decay_from_start(total_before)
    read_decay = start_before if READ_BEFORE else decay_from_start(total)

    read_term = _sum_tiles(token_terms, token, valid, token_stride, KEY_TILES)
    erase_term = _sum_tiles(token_terms, token + token_count, valid, token_stride, KEY_TILES)
    tail_term = _sum_tiles(token_terms, token + 2 * token_count, valid, token_stride, KEY_TILES)
    kept_term = _sum_tiles(chunk_terms, program + one, one == 0, chunk_stride, KEY_TILES)

    d_erase_token = tl.load(d_erase + token, mask=valid, other=0.0) + start_before * erase_term
    d_log = tl.load(d_log_decay + token, mask=valid, other=0.0)
    d_log += _suffix_sum(read_decay * read_term, not READ_BEFORE)
    d_log += _suffix_sum(start_before * beta * erase_term, False)
    d_log += kept * kept_term
    if momentum is not None:
        carried_read = _sum_tiles(token_terms, token + 3 * token_count, valid, token_stride, KEY_TILES)
        carried_erase = _sum_tiles(token_terms, token + 4 * token_count, valid, token_stride, KEY_TILES)
        mixed_tail_term = _sum_tiles(token_terms, token + 5 * token_count, valid, token_stride, KEY_TILES)
        mu_tail_term = _sum_tiles(token_terms, token + 6 * token_count, valid, token_stride, KEY_TILES)
        carried_term = _sum_tiles(chunk_terms, program + chunk_count + one, one == 0, chunk_stride, KEY_TILES)
        mu_kept = _sum_tiles(chunk_terms, program + 2 * chunk_count + one, one == 0, chunk_stride, KEY_TILES)

        mu = tl.load(momentum + token, mask=valid, other=1.0)
        mu_total, mu_residue, mu_total_before, mu_residue_before = cumulate_log(safe_log(mu))
        mu_all_total, mu_all_residue = total_log(safe_log(mu))
        mu_matrix = decay_matrix(mu_total, mu_residue, mu_total, mu_residue, lower & valid[:, None])
        mu_before = decay_matrix(mu_total_before, mu_residue_before, mu_total, mu_residue, strict)
        mu_start = tl.where(valid, decay_from_start(mu_total), 0.0)
        mu_start_before = decay_from_start(mu_total_before)
        mu_tail = decay_between(mu_all_total, mu_all_residue, mu_total, mu_residue)
        mixed_tail = tl.load(momentum_tail + token, mask=valid, other=0.0)

        # c⁻ = B⁻ s, and c = α c⁻ + s: from the reads and the solve to the factors of B⁻ and α …
        before = decay_matrix(total_before, residue_before, total, residue, strict)
        carried = tl.load(carried_before + token, mask=valid, other=0.0)
        d_erase_token += carried * carried_erase
        d_carried = beta * carried_erase
        d_start = tail * carried_term
        if READ_BEFORE:
            d_carried += carried_read
        else:
            through = tl.exp(log_a) * carried_read
            d_carried += through
            d_start += carried_read
            d_log += through * carried
        pairs = d_carried[:, None] * mu_start[None, :] * before
        d_log += sum_over_spans(pairs, row[:, None] < row[None, :], strict, SOLVE)
        tail_term += tl.sum(mu_matrix * mixed_tail_term[None, :], 1) + mu_start * carried_term
        # … and to those of s.
        d_start = tl.where(valid, d_start + tl.sum(before * d_carried[:, None], 0), 0.0)
        d_mu = tl.load(d_momentum + token, mask=valid, other=0.0)
        d_mu += (tl.sum(mu_matrix * d_start[:, None], 0) + mu_tail * mu_kept) * mu_start_before
        # The last rows of E and M.
        d_mu += mixed_tail * tl.sum(mu_before * mixed_tail_term[None, :], 1)
        d_mu += mu_tail * tl.sum(mu_before * mu_tail_term[None, :], 1)
        finish_loads(BLOCK_C)
        tl.store(d_momentum + token, d_mu, mask=valid)
    ended = tail * tail_term
    d_log += tl.cumsum(ended, 0) - ended
    finish_loads(BLOCK_C)
    tl.store(d_log_decay + token, d_log, mask=valid)
    tl.store(d_erase + token, d_erase_token, mask=valid)
