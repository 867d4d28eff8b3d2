"""Triton backward of ``delta_memory``: recompute the chunk states, scan their gradients back, then by chunk.

Five steps after the recomputed forward, with ``dS, dU`` the gradients of the state and momentum that a chunk
*ends* with, and ``Z`` its pseudo-values:

1. ``read_gradients``: what the outputs alone ask of Z and V, ``(B ∘ QKᵀ)ᵀ dO`` and ``(E ∘ QKᵀ)ᵀ dO``, and the
   gradient of ``QKᵀ``;
2. ``scan_gradients`` (sequential): completes dZ, carries ``dS, dU`` to the chunk's start;
3. ``solve_gradients``: back through ``Z = T R``: dV, and the gradient of ``KKᵀ``;
4. ``state_gradients``: products with a state; dQ, dK;
5. ``rate_gradients``: gathers the terms of decay, erase and momentum that came from states.

A gradient of a decay from token j to token t goes to every factor between them: ``sum_over_spans``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nl_kernels.ops.delta_memory import launch
from nl_kernels.ops.delta_memory.triton_forward import plan_states
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_between,
    decay_from_start,
    decay_matrix,
    finish_loads,
    load_tile,
    locate_chunk,
    locate_sequence,
    matmul,
    safe_log,
    store_tile,
    sum_over_spans,
    total_log,
)
from nl_kernels.triton_support.targets import architecture_of


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
def scan_gradients_kernel(
    q,
    k,
    do,
    log_decay,
    momentum,
    key_transform,
    momentum_key_transform,
    carried_before,
    momentum_tail,
    d_pseudo,
    d_value,
    d_final_state,
    d_final_momentum,
    d_chunk_states,
    d_chunk_momenta,
    d_initial_state,
    d_initial_momentum,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program a sequence, head and tile of the value width: carries dS (and dU) back over the chunks.

    Writes the gradient of the state that each chunk ends with, completes dZ and the state's part of dV in
    place, and writes the gradients of the initial state and momentum.
    """
    program = tl.program_id(0)
    sequence = program // H
    head = program % H
    start, length, first_chunk = locate_sequence(sequence, cu_seqlens, chunk_offsets, T, BLOCK_C)
    row = tl.arange(0, BLOCK_C)
    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    state_mask = (key_column < KEY_DIM)[:, None] & (value_column < VALUE_DIM)[None, :]
    public = program.to(tl.int64) * VALUE_DIM * KEY_DIM
    public += value_column[None, :] * KEY_DIM + key_column[:, None]

    d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_final_state is not None:
        d_state += tl.load(d_final_state + public, mask=state_mask, other=0.0).to(tl.float32)
    if momentum is not None:
        d_velocity = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if d_final_momentum is not None:
            d_velocity += tl.load(d_final_momentum + public, mask=state_mask, other=0.0).to(tl.float32)

    chunks = tl.cdiv(length, BLOCK_C)
    for step in range(0, chunks):
        index = chunks - 1 - step
        state_row = ((first_chunk + index) * H + head) * KEY_DIM + key_column
        store_tile(d_chunk_states, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, d_state)
        valid = index * BLOCK_C + row < length
        token = (start + index * BLOCK_C + row) * H + head
        query = load_tile(q, token, valid, key_column, KEY_DIM)
        key = load_tile(k, token, valid, key_column, KEY_DIM)
        transform = load_tile(key_transform, token, valid, key_column, KEY_DIM)
        d_output = load_tile(do, token, valid, value_column, VALUE_DIM)
        d_pseudo_tile = load_tile(d_pseudo, token, valid, value_column, VALUE_DIM).to(tl.float32)

        log_a = tl.load(log_decay + token, mask=valid, other=0.0)
        total, residue, total_before, _residue_before = cumulate_log(log_a)
        all_total, all_residue = total_log(log_a)
        tail = decay_between(all_total, all_residue, total, residue)
        kept = decay_from_start(all_total)
        read_decay = decay_from_start(total_before) if READ_BEFORE else decay_from_start(total)

        from_state = matmul(key, d_state, STATE)
        d_pseudo_tile += tail[:, None] * from_state
        store_tile(d_pseudo, token, valid, value_column, VALUE_DIM, d_pseudo_tile)
        if momentum is not None:
            store_tile(d_chunk_momenta, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, d_velocity)
            log_mu = safe_log(tl.load(momentum + token, mask=valid, other=1.0))
            mu_total, mu_residue, _, _ = cumulate_log(log_mu)
            mu_all_total, mu_all_residue = total_log(log_mu)
            mu_start = tl.where(valid, decay_from_start(mu_total), 0.0)
            mu_tail = decay_between(mu_all_total, mu_all_residue, mu_total, mu_residue)
            mixed_tail = tl.load(momentum_tail + token, mask=valid, other=0.0)
            d_value_tile = load_tile(d_value, token, valid, value_column, VALUE_DIM).to(tl.float32)
            d_value_tile += mixed_tail[:, None] * from_state
            d_value_tile += mu_tail[:, None] * matmul(key, d_velocity, STATE)
            store_tile(d_value, token, valid, value_column, VALUE_DIM, d_value_tile)

            carried = tl.load(carried_before + token, mask=valid, other=0.0)
            if not READ_BEFORE:
                carried = tl.exp(log_a) * carried + mu_start
            d_velocity = decay_from_start(mu_all_total) * d_velocity
            d_velocity += tl.sum(tail * mu_start, 0) * d_state
            d_velocity += matmul(tl.trans(query), (scale * carried)[:, None] * d_output, STATE)
            momentum_transform = load_tile(momentum_key_transform, token, valid, key_column, KEY_DIM)
            d_velocity -= matmul(tl.trans(momentum_transform), d_pseudo_tile, STATE)
        d_state = kept * d_state + matmul(tl.trans(query), (scale * read_decay)[:, None] * d_output, STATE)
        d_state -= matmul(tl.trans(transform), d_pseudo_tile, STATE)

    tl.store(d_initial_state + public, d_state, mask=state_mask)
    if momentum is not None:
        tl.store(d_initial_momentum + public, d_velocity, mask=state_mask)


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


@triton.jit(do_not_specialize=["tokens", "T", "H"])
def state_gradients_kernel(
    q,
    k,
    v,
    do,
    log_decay,
    erase,
    momentum,
    carried_before,
    momentum_tail,
    pseudo_values,
    d_right,
    d_query_key,
    d_key_key,
    chunk_states,
    chunk_momenta,
    d_chunk_states,
    d_chunk_momenta,
    dq,
    dk,
    token_terms,
    chunk_terms,
    chunk_table,
    scale,
    tokens,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program a chunk, head and tile of the key width: gradients that are products with a state.

    Writes dQ and dK, and for each tile the scalar products from which :func:`rate_gradients_kernel` makes
    the gradients of the rates: ``token_terms`` [tiles, 3 or 7, B·T·H], ``chunk_terms``
    [tiles, 1 or 3, chunks·H].
    """
    program = tl.program_id(0)
    tile = tl.program_id(1)
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + program % H
    chunk_row = program.to(tl.int64) * BLOCK_C + row
    column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    state_row = program.to(tl.int64) * KEY_DIM + column
    in_key = column < KEY_DIM

    log_a = tl.load(log_decay + token, mask=valid, other=0.0)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    total, residue, total_before, _residue_before = cumulate_log(log_a)
    all_total, all_residue = total_log(log_a)
    tail = decay_between(all_total, all_residue, total, residue)
    start_before = decay_from_start(total_before)
    read_decay = start_before if READ_BEFORE else decay_from_start(total)
    if momentum is not None:
        log_mu = safe_log(tl.load(momentum + token, mask=valid, other=1.0))
        mu_total, mu_residue, _, _ = cumulate_log(log_mu)
        mu_all_total, mu_all_residue = total_log(log_mu)
        mu_tail = decay_between(mu_all_total, mu_all_residue, mu_total, mu_residue)
        mixed_tail = tl.load(momentum_tail + token, mask=valid, other=0.0)
        carried = tl.load(carried_before + token, mask=valid, other=0.0)
        erased = beta * carried
        if not READ_BEFORE:
            carried = tl.exp(log_a) * carried + decay_from_start(mu_total)

    query = load_tile(q, token, valid, column, KEY_DIM)
    key = load_tile(k, token, valid, column, KEY_DIM)
    query_fp32 = query.to(tl.float32)
    key_fp32 = key.to(tl.float32)
    pairs = load_tile(d_query_key, chunk_row, row < BLOCK_C, row, BLOCK_C)
    dq_tile = matmul(pairs, key, STATE)
    dk_tile = matmul(tl.trans(pairs), query, STATE)
    dk_tile += matmul(load_tile(d_key_key, chunk_row, row < BLOCK_C, row, BLOCK_C), key, STATE)

    read_term = tl.zeros([BLOCK_C], tl.float32)
    erase_term = tl.zeros([BLOCK_C], tl.float32)
    tail_term = tl.zeros([BLOCK_C], tl.float32)
    kept_term = 0.0
    if momentum is not None:
        carried_read_term = tl.zeros([BLOCK_C], tl.float32)
        carried_erase_term = tl.zeros([BLOCK_C], tl.float32)
        mixed_tail_term = tl.zeros([BLOCK_C], tl.float32)
        mu_tail_term = tl.zeros([BLOCK_C], tl.float32)
        carried_term = 0.0
        mu_kept_term = 0.0
    for first in range(0, VALUE_DIM, BLOCK_V):
        value_column = first + tl.arange(0, BLOCK_V)
        d_output = load_tile(do, token, valid, value_column, VALUE_DIM)
        d_right_tile = load_tile(d_right, token, valid, value_column, VALUE_DIM)
        pseudo = load_tile(pseudo_values, token, valid, value_column, VALUE_DIM)
        state = load_tile(chunk_states, state_row, in_key, value_column, VALUE_DIM)
        d_state = load_tile(d_chunk_states, state_row, in_key, value_column, VALUE_DIM)

        product = scale * matmul(d_output, tl.trans(state), STATE)
        dq_tile += read_decay[:, None] * product
        read_term += tl.sum(query_fp32 * product, 1)
        product = matmul(d_right_tile, tl.trans(state), STATE)
        dk_tile -= (beta * start_before)[:, None] * product
        erase_term -= tl.sum(key_fp32 * product, 1)
        product = matmul(pseudo, tl.trans(d_state), STATE)
        dk_tile += tail[:, None] * product
        tail_term += tl.sum(key_fp32 * product, 1)
        d_state_fp32 = d_state.to(tl.float32)
        kept_term += tl.sum(state.to(tl.float32) * d_state_fp32)
        if momentum is not None:
            value = load_tile(v, token, valid, value_column, VALUE_DIM)
            velocity = load_tile(chunk_momenta, state_row, in_key, value_column, VALUE_DIM)
            d_velocity = load_tile(d_chunk_momenta, state_row, in_key, value_column, VALUE_DIM)
            product = scale * matmul(d_output, tl.trans(velocity), STATE)
            dq_tile += carried[:, None] * product
            carried_read_term += tl.sum(query_fp32 * product, 1)
            product = matmul(d_right_tile, tl.trans(velocity), STATE)
            dk_tile -= erased[:, None] * product
            carried_erase_term -= tl.sum(key_fp32 * product, 1)
            product = matmul(value, tl.trans(d_state), STATE)
            dk_tile += mixed_tail[:, None] * product
            mixed_tail_term += tl.sum(key_fp32 * product, 1)
            product = matmul(value, tl.trans(d_velocity), STATE)
            dk_tile += mu_tail[:, None] * product
            mu_tail_term += tl.sum(key_fp32 * product, 1)
            velocity_fp32 = velocity.to(tl.float32)
            carried_term += tl.sum(velocity_fp32 * d_state_fp32)
            mu_kept_term += tl.sum(velocity_fp32 * d_velocity.to(tl.float32))

    store_tile(dq, token, valid, column, KEY_DIM, dq_tile)
    store_tile(dk, token, valid, column, KEY_DIM, dk_tile)
    token_count = tokens.to(tl.int64) * H
    chunk_count = tl.num_programs(0)
    if momentum is None:
        terms = token_terms + tile * 3 * token_count + token
        tl.store(chunk_terms + tile * chunk_count + program, kept_term)
    else:
        terms = token_terms + tile * 7 * token_count + token
        tl.store(terms + 3 * token_count, carried_read_term, mask=valid)
        tl.store(terms + 4 * token_count, carried_erase_term, mask=valid)
        tl.store(terms + 5 * token_count, mixed_tail_term, mask=valid)
        tl.store(terms + 6 * token_count, mu_tail_term, mask=valid)
        chunk_terms += tile * 3 * chunk_count + program
        tl.store(chunk_terms, kept_term)
        tl.store(chunk_terms + chunk_count, carried_term)
        tl.store(chunk_terms + 2 * chunk_count, mu_kept_term)
    tl.store(terms, read_term, mask=valid)
    tl.store(terms + token_count, erase_term, mask=valid)
    tl.store(terms + 2 * token_count, tail_term, mask=valid)


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


def plan_backward(
    do: torch.Tensor,
    d_final_state: torch.Tensor | None,
    d_final_momentum: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    momentum: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float,
    read: str,
    chunk_size: int,
    architecture: str,
) -> tuple[list[KernelCall], tuple[torch.Tensor | None, ...]]:
    """The calls of the backward pass and the gradients they fill; runs nothing (meta tensors will do)."""
    plan = launch.plan_chunks(q, k, v, momentum, cu_seqlens, chunk_size=chunk_size, architecture=architecture)
    calls, states, final_state, final_momentum = plan_states(
        plan, k, v, log_decay, erase, momentum, initial_state, initial_momentum, keep_inverse=True
    )
    work = plan.precision.workspace
    has = momentum is not None
    key_tiles = plan.tiles(state_gradients_kernel, "key")
    rates = (plan.batch * plan.tokens * plan.heads, plan.chunks * plan.heads)
    pairs = (plan.chunks, plan.heads, plan.block_c, plan.block_c)
    inputs = {"q": q, "k": k, "v": v, "do": do, "log_decay": log_decay, "erase": erase, "momentum": momentum}
    saved = {
        "key_transform": states.key_transform,
        "momentum_key_transform": states.momentum_key_transform,
        "pseudo_values": states.pseudo_values,
        "inverse": states.inverse,
        "carried_before": states.carried_before,
        "momentum_tail": states.momentum_tail,
        "chunk_states": states.chunk_states,
        "chunk_momenta": states.chunk_momenta,
    }
    d_pseudo = torch.empty_like(v, dtype=work)
    work_buffers = {
        "d_pseudo": d_pseudo,
        "d_right": d_pseudo,
        "d_value": torch.empty_like(v, dtype=work) if has else None,
        "d_chunk_states": torch.empty_like(states.chunk_states),
        "d_chunk_momenta": torch.empty_like(states.chunk_states) if has else None,
        "d_query_key": k.new_empty(pairs, dtype=work),
        "d_key_key": k.new_empty(pairs, dtype=work),
        "token_terms": k.new_empty((key_tiles, 7 if has else 3, rates[0]), dtype=torch.float32),
        "chunk_terms": k.new_empty((key_tiles, 3 if has else 1, rates[1]), dtype=torch.float32),
    }
    gradients = {
        "dq": torch.empty_like(q),
        "dk": torch.empty_like(k),
        "dv": torch.empty_like(v),
        "d_log_decay": torch.empty_like(log_decay),
        "d_erase": torch.empty_like(erase),
        "d_momentum": torch.empty_like(momentum) if has else None,
        "d_initial_state": torch.empty_like(final_state),
        "d_initial_momentum": torch.empty_like(final_momentum) if has else None,
    }
    arguments = {
        **inputs,
        **saved,
        **work_buffers,
        **gradients,
        "d_final_state": d_final_state,
        "d_final_momentum": d_final_momentum,
        "scale": scale,
        "tokens": plan.batch * plan.tokens,
    }
    calls += [
        plan.call(read_gradients_kernel, arguments, read=read),
        plan.call(scan_gradients_kernel, arguments, tiles="value", scan=True, read=read),
        plan.call(solve_gradients_kernel, arguments),
        plan.call(state_gradients_kernel, arguments, tiles="key", read=read),
        plan.call(rate_gradients_kernel, arguments, read=read, key_tiles=key_tiles),
    ]
    return calls, tuple(gradients.values())


def delta_memory_backward(
    do: torch.Tensor,
    d_final_state: torch.Tensor | None,
    d_final_momentum: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    momentum: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float,
    read: str,
    chunk_size: int,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients ``(dq, dk, dv, dlog_decay, derase, dmomentum, dinitial_state, dinitial_momentum)``.

    Each in the dtype of its input (the initial states' in fp32, present also when the input was not), the
    two momentum entries ``None`` without momentum. Needs the inputs only; ``None`` for a final cotangent is
    zero.

    Raises:
        NotImplementedError: a head wider than :data:`launch.MAX_HEAD_DIM`, or fp64.
    """
    given = (q, k, v, log_decay, erase, momentum, initial_state, initial_momentum)
    do, q, k, v = launch.contiguous(do, q, k, v)
    log_decay, erase, momentum, initial_state, initial_momentum = launch.contiguous_fp32(
        log_decay, erase, momentum, initial_state, initial_momentum
    )
    d_final_state, d_final_momentum = launch.contiguous_fp32(d_final_state, d_final_momentum)
    calls, gradients = plan_backward(
        do,
        d_final_state,
        d_final_momentum,
        q,
        k,
        v,
        log_decay,
        erase,
        momentum,
        initial_state,
        initial_momentum,
        cu_seqlens,
        scale=scale,
        read=read,
        chunk_size=chunk_size,
        architecture=architecture_of(k.device),
    )
    run_calls(calls, k.device)
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, given))
