"""Gradients through the pairs of tokens of a chunk: of the reads, and of the solve for pseudo-values."""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_matrix,
    finish_loads,
    load_tile,
    locate_chunk,
    matmul,
    safe_log,
    store_tile,
    sum_over_spans,
)


@triton.jit(do_not_specialize=["T", "H"])
def read_gradients_kernel(
    q,
    k,
    v,
    do,
    log_decay,
    momentum,
    pseudo_values,
    d_pseudo,
    d_value,
    d_query_key,
    d_log_decay,
    d_momentum,
    chunk_table,
    scale,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk and head: back through ``O = scale · ((B ∘ QKᵀ) Z + (E ∘ QKᵀ) V)``, E = B M.

    Writes the chunk's own part of dZ (and with momentum of dV), the gradient of QKᵀ, and the pairs' part of
    the gradients of log decay (and momentum).
    """
    program = tl.program_id(0)
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + program % H
    chunk_row = program.to(tl.int64) * BLOCK_C + row
    strict = row[:, None] > row[None, :]
    lower = row[:, None] >= row[None, :]

    query_key = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for first in range(0, KEY_DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        query = load_tile(q, token, valid, column, KEY_DIM)
        key = load_tile(k, token, valid, column, KEY_DIM)
        query_key += matmul(query, tl.trans(key), INPUTS)
    query_key *= scale

    log_a = tl.load(log_decay + token, mask=valid, other=0.0)
    total, residue, total_before, residue_before = cumulate_log(log_a)
    # Row i, column t: whether the read at t lies after the factor of i.
    if READ_BEFORE:
        decay = decay_matrix(total_before, residue_before, total, residue, strict)
        ends = row[:, None] < row[None, :]
    else:
        decay = decay_matrix(total, residue, total, residue, lower)
        ends = row[:, None] <= row[None, :]
    attention = tl.trans(decay * query_key)
    if momentum is not None:
        mu = tl.load(momentum + token, mask=valid, other=1.0)
        mu_total, mu_residue, mu_total_before, mu_residue_before = cumulate_log(safe_log(mu))
        mu_matrix = decay_matrix(mu_total, mu_residue, mu_total, mu_residue, lower & valid[:, None])
        mixed = matmul(decay, mu_matrix, SOLVE)
        mixed_attention = tl.trans(mixed * query_key)
        d_mixed_attention = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)

    d_attention = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for first in range(0, VALUE_DIM, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        d_output = load_tile(do, token, valid, column, VALUE_DIM)
        store_tile(d_pseudo, token, valid, column, VALUE_DIM, matmul(attention, d_output, STATE))
        pseudo = load_tile(pseudo_values, token, valid, column, VALUE_DIM)
        d_attention += matmul(d_output, tl.trans(pseudo), STATE)
        if momentum is not None:
            store_tile(d_value, token, valid, column, VALUE_DIM, matmul(mixed_attention, d_output, STATE))
            value = load_tile(v, token, valid, column, VALUE_DIM)
            d_mixed_attention += matmul(d_output, tl.trans(value), INPUTS)

    d_scores = scale * d_attention * decay
    d_decay = d_attention * query_key
    if momentum is not None:
        d_scores += scale * d_mixed_attention * mixed
        d_mixed = tl.where(strict if READ_BEFORE else lower, d_mixed_attention * query_key, 0.0)
        d_decay += matmul(d_mixed, tl.trans(mu_matrix), SOLVE)
        # Mᵀ dM ∘ M⁻ on the diagonal: the factors on both sides of i but not i itself, which may be zero.
        mu_before = decay_matrix(mu_total_before, mu_residue_before, mu_total, mu_residue, strict)
        d_mu = tl.sum(matmul(tl.trans(mixed), d_mixed, SOLVE) * mu_before, 1)
        tl.store(d_momentum + token, d_mu, mask=valid)
    store_tile(d_query_key, chunk_row, row < BLOCK_C, row, BLOCK_C, d_scores)
    tl.store(d_log_decay + token, sum_over_spans(d_decay * decay, ends, strict, SOLVE), mask=valid)


@triton.jit(do_not_specialize=["T", "H"])
def solve_gradients_kernel(
    k,
    v,
    log_decay,
    erase,
    momentum,
    inverse,
    pseudo_values,
    d_pseudo,
    d_value,
    d_key_key,
    dv,
    d_log_decay,
    d_erase,
    d_momentum,
    chunk_table,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk and head: back through ``Z = T R``, ``A = β ∘ B⁻ ∘ KKᵀ`` and with momentum
    ``R ∋ −β ∘ (E⁻ ∘ KKᵀ) V``, E⁻ = B⁻ M.

    Turns dZ into dR = Tᵀ dZ in place, writes dV, the gradient of KKᵀ (made symmetric) and the pairs' part of
    that of erase, and adds to those of log decay and momentum.
    """
    program = tl.program_id(0)
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + program % H
    chunk_row = program.to(tl.int64) * BLOCK_C + row
    strict = row[:, None] > row[None, :]

    key_key = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for first in range(0, KEY_DIM, BLOCK_K):
        key = load_tile(k, token, valid, first + tl.arange(0, BLOCK_K), KEY_DIM)
        key_key += matmul(key, tl.trans(key), INPUTS)
    log_a = tl.load(log_decay + token, mask=valid, other=0.0)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    total, residue, total_before, residue_before = cumulate_log(log_a)
    decay = decay_matrix(total_before, residue_before, total, residue, strict)
    inverse_transposed = tl.trans(load_tile(inverse, chunk_row, row < BLOCK_C, row, BLOCK_C))
    if momentum is not None:
        mu = tl.load(momentum + token, mask=valid, other=1.0)
        mu_total, mu_residue, mu_total_before, mu_residue_before = cumulate_log(safe_log(mu))
        lower = (row[:, None] >= row[None, :]) & valid[:, None]
        mu_matrix = decay_matrix(mu_total, mu_residue, mu_total, mu_residue, lower)
        mixed = matmul(decay, mu_matrix, SOLVE)
        value_solve = tl.trans(beta[:, None] * mixed * key_key)
        d_mixed = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)

    d_system = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for first in range(0, VALUE_DIM, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        d_pseudo_tile = load_tile(d_pseudo, token, valid, column, VALUE_DIM)
        d_right = matmul(inverse_transposed, d_pseudo_tile, STATE)
        store_tile(d_pseudo, token, valid, column, VALUE_DIM, d_right)
        pseudo = load_tile(pseudo_values, token, valid, column, VALUE_DIM)
        d_system -= matmul(d_right, tl.trans(pseudo), STATE)
        if momentum is None:
            store_tile(dv, token, valid, column, VALUE_DIM, d_right)
        else:
            value = load_tile(v, token, valid, column, VALUE_DIM)
            d_mixed -= matmul(d_right, tl.trans(value), STATE)
            d_value_tile = load_tile(d_value, token, valid, column, VALUE_DIM).to(tl.float32)
            d_value_tile -= matmul(value_solve, d_right, STATE)
            store_tile(dv, token, valid, column, VALUE_DIM, d_value_tile)

    d_scores = d_system * decay
    if momentum is not None:
        d_scores += d_mixed * mixed
    tl.store(d_erase + token, tl.sum(d_scores * key_key, 1), mask=valid)
    d_scores *= beta[:, None]
    store_tile(d_key_key, chunk_row, row < BLOCK_C, row, BLOCK_C, d_scores + tl.trans(d_scores))
    key_key *= beta[:, None]
    d_decay = d_system * key_key
    if momentum is not None:
        d_mixed = tl.where(strict, d_mixed * key_key, 0.0)
        d_decay += matmul(d_mixed, tl.trans(mu_matrix), SOLVE)
        mu_before = decay_matrix(mu_total_before, mu_residue_before, mu_total, mu_residue, strict)
        d_mu = tl.sum(matmul(tl.trans(mixed), d_mixed, SOLVE) * mu_before, 1)
        d_mu += tl.load(d_momentum + token, mask=valid, other=0.0)
        finish_loads(BLOCK_C)
        tl.store(d_momentum + token, d_mu, mask=valid)
    d_log = tl.load(d_log_decay + token, mask=valid, other=0.0)
    d_log += sum_over_spans(d_decay * decay, row[:, None] < row[None, :], strict, SOLVE)
    finish_loads(BLOCK_C)
    tl.store(d_log_decay + token, d_log, mask=valid)
