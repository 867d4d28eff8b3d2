"""Gradients through the pairs of tokens of a chunk: of the reads, and of the solve for pseudo-values.

Each kernel computes its matrices the way up in which its products take them, so that no transposed result of
a product is an operand of another (which compilers for Hopper have got wrong).
"""

import triton
import triton.language as tl

from nl_kernels.ops.delta_memory.triton_decays import (
    decay_between,
    decays_of,
    load_pairs,
    pairs_of,
    sum_over_spans,
)
from nl_kernels.triton_support.language import (
    finish_loads,
    load_tile,
    locate_chunk,
    matmul,
    products_of_rows,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "H"])
def read_gradients_kernel(
    q,
    k,
    v,
    do,
    decays,
    pairs,
    pseudo_values,
    d_pseudo,
    d_value,
    d_key_query,
    d_log_decay,
    d_momentum,
    chunk_table,
    scale,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk and head: back through ``O = scale · ((B ∘ QKᵀ) Z + (E ∘ QKᵀ) V)``, E = B M.

    Writes the chunk's own part of dZ (and with momentum of dV), the gradient of KQᵀ, and the pairs' part of
    the gradients of log decay (and momentum). Every matrix of pairs here is [write, read].
    """
    program = tl.program_id(0)
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + program % H
    program = program.to(tl.int64)
    alpha, _, _, _ = decays_of(decays, program, BLOCK_C, MOMENTUM)
    write = row[:, None]
    seen = row[None, :] - BEFORE  # the row whose state is read

    key_query = scale * products_of_rows(k, q, token // GROUP, valid, KEY_DIM, BLOCK_K, INPUTS)
    decay = decay_between(alpha, seen, write, BLOCK_C)
    attention = decay * key_query
    d_attention = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    if MOMENTUM:
        mu_pairs, before = pairs_of(pairs, program, BLOCK_C)
        mixed = load_pairs(before, row[None, :], row[:, None], BLOCK_C)
        if not BEFORE:
            mixed *= decay_between(alpha, row, row - 1, BLOCK_C)[None, :]
            mixed += load_pairs(mu_pairs, row[None, :], row[:, None], BLOCK_C)
        mixed_attention = mixed * key_query
        d_mixed = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)

    for first in range(0, VALUE_DIM, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        d_output = load_tile(do, token, valid, column, VALUE_DIM)
        store_tile(d_pseudo, token, valid, column, VALUE_DIM, matmul(attention, d_output, STATE))
        pseudo = load_tile(pseudo_values, token, valid, column, VALUE_DIM)
        d_attention += matmul(pseudo, tl.trans(d_output), STATE)
        if MOMENTUM:
            store_tile(d_value, token, valid, column, VALUE_DIM, matmul(mixed_attention, d_output, STATE))
            value = load_tile(v, token, valid, column, VALUE_DIM)
            d_mixed += matmul(value, tl.trans(d_output), INPUTS)

    d_scores = scale * d_attention * decay
    if MOMENTUM:
        d_scores += scale * d_mixed * mixed
    store_tile(d_key_query, program * BLOCK_C + row, row < BLOCK_C, row, BLOCK_C, d_scores)
    d_decay = d_attention * key_query
    if MOMENTUM:
        d_mixed = tl.where(write <= seen, d_mixed * key_query, 0.0)
        tl.debug_barrier()
        # Mᵀ dM ∘ M⁻ on the diagonal: the factors on both sides of i but not i itself, which may be zero.
        mu_before = load_pairs(mu_pairs, row[:, None] - 1, row[None, :], BLOCK_C)
        d_mu = tl.sum(mixed * matmul(mu_before, d_mixed, SOLVE), 1)
        tl.store(d_momentum + token, d_mu, mask=valid)
        tl.debug_barrier()
        d_decay += matmul(load_pairs(mu_pairs, row[:, None], row[None, :], BLOCK_C), d_mixed, SOLVE)
        tl.debug_barrier()
        decay = decay_between(alpha, seen, write, BLOCK_C)
    d_log = sum_over_spans(d_decay * decay, row[:, None] > row[None, :], row[:, None] <= seen, SOLVE)
    tl.store(d_log_decay + token, d_log, mask=valid)


@triton.jit(do_not_specialize=["T", "H"])
def solve_gradients_kernel(
    k,
    v,
    erase,
    decays,
    pairs,
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
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
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
    that of erase, and adds to those of log decay and momentum. Matrices of pairs are [erasure, write].
    """
    program = tl.program_id(0)
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + program % H
    program = program.to(tl.int64)
    chunk_row = program * BLOCK_C + row
    alpha, _, _, _ = decays_of(decays, program, BLOCK_C, MOMENTUM)

    key_key = products_of_rows(k, k, token // GROUP, valid, KEY_DIM, BLOCK_K, INPUTS)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    decay = decay_between(alpha, row[:, None] - 1, row[None, :], BLOCK_C)
    inverse_transposed = tl.load(inverse + chunk_row[None, :] * BLOCK_C + row[:, None])
    d_system = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    if MOMENTUM:
        mu_pairs, mixed = pairs_of(pairs, program, BLOCK_C)
        value_solve = load_pairs(mixed, row[None, :], row[:, None], BLOCK_C) * key_key
        value_solve *= tl.load(erase + token, mask=valid, other=0.0)[None, :]
        d_mixed = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)

    for first in range(0, VALUE_DIM, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        d_pseudo_tile = load_tile(d_pseudo, token, valid, column, VALUE_DIM)
        d_right = matmul(inverse_transposed, d_pseudo_tile, STATE)
        store_tile(d_pseudo, token, valid, column, VALUE_DIM, d_right)
        pseudo = load_tile(pseudo_values, token, valid, column, VALUE_DIM)
        d_system -= matmul(d_right, tl.trans(pseudo), STATE)
        if MOMENTUM:
            value = load_tile(v, token, valid, column, VALUE_DIM)
            d_mixed -= matmul(d_right, tl.trans(value), STATE)
            d_value_tile = load_tile(d_value, token, valid, column, VALUE_DIM).to(tl.float32)
            d_value_tile -= matmul(value_solve, d_right, STATE)
            store_tile(dv, token, valid, column, VALUE_DIM, d_value_tile)
        else:
            store_tile(dv, token, valid, column, VALUE_DIM, d_right)

    d_scores = d_system * decay
    if MOMENTUM:
        mixed_decay = load_pairs(mixed, row[:, None], row[None, :], BLOCK_C)
        d_scores += d_mixed * mixed_decay
    tl.store(d_erase + token, tl.sum(d_scores * key_key, 1), mask=valid)
    d_scores *= beta[:, None]
    store_tile(d_key_key, chunk_row, row < BLOCK_C, row, BLOCK_C, d_scores + tl.trans(d_scores))
    key_key *= beta[:, None]
    d_decay = d_system * key_key
    if MOMENTUM:
        d_mixed = tl.where(row[:, None] > row[None, :], d_mixed * key_key, 0.0)
        d_decay += matmul(d_mixed, load_pairs(mu_pairs, row[None, :], row[:, None], BLOCK_C), SOLVE)
        mu_before = load_pairs(mu_pairs, row[None, :] - 1, row[:, None], BLOCK_C)
        d_mu = tl.sum(mixed_decay * matmul(d_mixed, mu_before, SOLVE), 0)
        d_mu += tl.load(d_momentum + token, mask=valid, other=0.0)
        finish_loads(BLOCK_C)
        tl.store(d_momentum + token, d_mu, mask=valid)
    d_log = tl.load(d_log_decay + token, mask=valid, other=0.0)
    ends = row[:, None] < row[None, :]
    d_log += sum_over_spans(d_decay * decay, ends, row[:, None] > row[None, :], SOLVE)
    finish_loads(BLOCK_C)
    tl.store(d_log_decay + token, d_log, mask=valid)
