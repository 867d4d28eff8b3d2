"""Gradients through the states: carried back over the chunks, and their products with keys and queries."""

import triton
import triton.language as tl

from nl_kernels.ops.delta_memory.triton_decays import (
    carried_from_start,
    decay_between,
    decay_from_start,
    decays_of,
)
from nl_kernels.triton_support.language import load_tile, locate_chunk, locate_sequence, matmul, store_tile


@triton.jit(do_not_specialize=["T", "H"])
def scan_gradients_kernel(
    q,
    k,
    do,
    decays,
    key_transform,
    momentum_key_transform,
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
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEFORE: tl.constexpr,
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
    if MOMENTUM:
        d_velocity = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if d_final_momentum is not None:
            d_velocity += tl.load(d_final_momentum + public, mask=state_mask, other=0.0).to(tl.float32)

    chunks = tl.cdiv(length, BLOCK_C)
    for step in range(0, chunks):
        index = chunks - 1 - step
        chunk = (first_chunk + index) * H + head
        state_row = chunk * KEY_DIM + key_column
        store_tile(d_chunk_states, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, d_state)
        valid = index * BLOCK_C + row < length
        last = tl.minimum(length - index * BLOCK_C, BLOCK_C) - 1
        token = (start + index * BLOCK_C + row) * H + head
        query = load_tile(q, token // GROUP, valid, key_column, KEY_DIM)
        key = load_tile(k, token // GROUP, valid, key_column, KEY_DIM)
        transform = load_tile(key_transform, token, valid, key_column, KEY_DIM)
        d_output = load_tile(do, token, valid, value_column, VALUE_DIM)
        d_pseudo_tile = load_tile(d_pseudo, token, valid, value_column, VALUE_DIM).to(tl.float32)

        alpha, mu, carried_before, momentum_tail = decays_of(decays, chunk, BLOCK_C, MOMENTUM)
        from_state = matmul(key, d_state, STATE)
        d_pseudo_tile += decay_between(alpha, last, row, BLOCK_C)[:, None] * from_state
        store_tile(d_pseudo, token, valid, value_column, VALUE_DIM, d_pseudo_tile)
        if MOMENTUM:
            store_tile(d_chunk_momenta, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, d_velocity)
            d_value_tile = load_tile(d_value, token, valid, value_column, VALUE_DIM).to(tl.float32)
            d_value_tile += tl.load(momentum_tail + row)[:, None] * from_state
            d_value_tile += decay_between(mu, last, row, BLOCK_C)[:, None] * matmul(key, d_velocity, STATE)
            store_tile(d_value, token, valid, value_column, VALUE_DIM, d_value_tile)

            d_velocity *= decay_from_start(mu, last)
            d_velocity += carried_from_start(alpha, mu, carried_before, last, BLOCK_C, False) * d_state
            carried = carried_from_start(alpha, mu, carried_before, row, BLOCK_C, BEFORE)
            d_velocity += matmul(tl.trans(query), (scale * carried)[:, None] * d_output, STATE)
            momentum_transform = load_tile(momentum_key_transform, token, valid, key_column, KEY_DIM)
            d_velocity -= matmul(tl.trans(momentum_transform), d_pseudo_tile, STATE)
        read_decay = decay_from_start(alpha, row - BEFORE)
        d_state *= decay_from_start(alpha, last)
        d_state += matmul(tl.trans(query), (scale * read_decay)[:, None] * d_output, STATE)
        d_state -= matmul(tl.trans(transform), d_pseudo_tile, STATE)

    tl.store(d_initial_state + public, d_state, mask=state_mask)
    if MOMENTUM:
        tl.store(d_initial_momentum + public, d_velocity, mask=state_mask)


@triton.jit(do_not_specialize=["tokens", "T", "H"])
def state_gradients_kernel(
    q,
    k,
    v,
    do,
    erase,
    decays,
    pseudo_values,
    d_right,
    d_key_query,
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
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program a chunk, head of keys and tile of their width: gradients that are products with a state.

    Writes dQ and dK, summed over the GROUP heads of values that share them, and for each of these and each
    tile the scalar products from which ``rate_gradients_kernel`` makes the gradients of the rates:
    ``token_terms`` [tiles, 3 or 7, B·T·H], ``chunk_terms`` [tiles, 1 or 3, chunks·H].
    """
    key_program = tl.program_id(0)
    tile = tl.program_id(1)
    key_heads = H // GROUP
    start, count = locate_chunk(key_program // key_heads, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    key_token = (start + row) * key_heads + key_program % key_heads
    column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_key = column < KEY_DIM
    token_count = tokens.to(tl.int64) * H
    chunk_count = tl.num_programs(0) * GROUP
    query = load_tile(q, key_token, valid, column, KEY_DIM)
    key = load_tile(k, key_token, valid, column, KEY_DIM)
    query_fp32 = query.to(tl.float32)
    key_fp32 = key.to(tl.float32)
    dq_tile = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    dk_tile = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)

    for member in range(0, GROUP):
        program = key_program.to(tl.int64) * GROUP + member
        token = key_token * GROUP + member
        chunk_row = program * BLOCK_C + row
        state_row = program * KEY_DIM + column
        beta = tl.load(erase + token, mask=valid, other=0.0)
        alpha, mu, carried_before, momentum_tail = decays_of(decays, program, BLOCK_C, MOMENTUM)
        tail = decay_between(alpha, count - 1, row, BLOCK_C)
        read_decay = decay_from_start(alpha, row - BEFORE)
        erased = beta * decay_from_start(alpha, row - 1)
        if MOMENTUM:
            mixed_tail = tl.load(momentum_tail + row)
            mu_tail = decay_between(mu, count - 1, row, BLOCK_C)
            carried = carried_from_start(alpha, mu, carried_before, row, BLOCK_C, BEFORE)
            carried_erased = beta * tl.load(carried_before + row)

        dk_tile += matmul(load_tile(d_key_query, chunk_row, row < BLOCK_C, row, BLOCK_C), query, STATE)
        d_query_key = tl.load(d_key_query + chunk_row[None, :] * BLOCK_C + row[:, None])
        dq_tile += matmul(d_query_key, key, STATE)
        dk_tile += matmul(load_tile(d_key_key, chunk_row, row < BLOCK_C, row, BLOCK_C), key, STATE)

        read_term = tl.zeros([BLOCK_C], tl.float32)
        erase_term = tl.zeros([BLOCK_C], tl.float32)
        tail_term = tl.zeros([BLOCK_C], tl.float32)
        kept_term = 0.0
        if MOMENTUM:
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
            dk_tile -= erased[:, None] * product
            erase_term -= tl.sum(key_fp32 * product, 1)
            product = matmul(pseudo, tl.trans(d_state), STATE)
            dk_tile += tail[:, None] * product
            tail_term += tl.sum(key_fp32 * product, 1)
            d_state_fp32 = d_state.to(tl.float32)
            kept_term += tl.sum(state.to(tl.float32) * d_state_fp32)
            if MOMENTUM:
                value = load_tile(v, token, valid, value_column, VALUE_DIM)
                velocity = load_tile(chunk_momenta, state_row, in_key, value_column, VALUE_DIM)
                d_velocity = load_tile(d_chunk_momenta, state_row, in_key, value_column, VALUE_DIM)
                product = scale * matmul(d_output, tl.trans(velocity), STATE)
                dq_tile += carried[:, None] * product
                carried_read_term += tl.sum(query_fp32 * product, 1)
                product = matmul(d_right_tile, tl.trans(velocity), STATE)
                dk_tile -= carried_erased[:, None] * product
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

        if member == GROUP - 1:
            store_tile(dq, key_token, valid, column, KEY_DIM, dq_tile)
            store_tile(dk, key_token, valid, column, KEY_DIM, dk_tile)
        if not MOMENTUM:
            terms = token_terms + tile * 3 * token_count + token
            tl.store(chunk_terms + tile * chunk_count + program, kept_term)
        else:
            terms = token_terms + tile * 7 * token_count + token
            tl.store(terms + 3 * token_count, carried_read_term, mask=valid)
            tl.store(terms + 4 * token_count, carried_erase_term, mask=valid)
            tl.store(terms + 5 * token_count, mixed_tail_term, mask=valid)
            tl.store(terms + 6 * token_count, mu_tail_term, mask=valid)
            kept_terms = chunk_terms + tile * 3 * chunk_count + program
            tl.store(kept_terms, kept_term)
            tl.store(kept_terms + chunk_count, carried_term)
            tl.store(kept_terms + 2 * chunk_count, mu_kept_term)
        tl.store(terms, read_term, mask=valid)
        tl.store(terms + token_count, erase_term, mask=valid)
        tl.store(terms + 2 * token_count, tail_term, mask=valid)
