"""The derivative of :mod:`nl_kernels.memory.kernels.learn`: one program a head, the last chunk first.
 A chunk is computed again from the weights before it. Its gradients then go back in three stages: errors and
writes, which sum over rows of weights; the tokens, which add up what all blocks of rows have for them; and
the weights, whose gradients are updated in memory.
"""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_token,
    by_width,
    operand_at,
    pair_sums,
    pairs_at,
    product,
    put_operand,
    put_pairs,
    put_rows,
    put_weights,
    rounded,
    rows_of,
    store_tile,
    turned_rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import D_SCALE, GATE_INPUT, RATE, vectors_at
from nl_kernels.memory.kernels.layer import memory_sum, narrow_of, zeros_of
from nl_kernels.memory.kernels.layer_adjoint import (
    bound_adjoint,
    carried_adjoint,
    decays_adjoint,
    hidden_adjoint,
    read_adjoint,
    signal_adjoint,
    write_adjoint,
)
from nl_kernels.memory.kernels.learn import outputs_of, own_scale, send_back


@triton.jit
def layer_adjoint(state, made, decays, rate, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Gradients of a layer's write and running read: of the signal and of the recall [B, rows, C].

    ``state`` are its weights before the chunk, ``made`` is of :func:`~.learn.learn_chunk`; the gradient of
    the read's rows and ω are in scratch. Shares in those of the inner products go to scratch; those in
    gradients of rates and log decays are returned, as vectors.
    """
    d_written, d_final = carried_adjoint(state, scratch, LAYER, BANK)
    d_written *= decays[4]
    d_to_end = tl.sum(made[3] * d_written, 1)[:, None, :] * -rate
    if BANK.RUNNING:
        by_read, d_full, products, d_after = read_adjoint(made, decays, rate, scratch, LAYER, BANK)
        put_pairs(scratch + LAYER.PAIRS, products, BANK)
        d_written += by_read
    d_signal, d_recalled, products, d_strict, d_rate, d_pair_rate, d_before = write_adjoint(
        d_written, made, decays, rate, scratch, LAYER, BANK
    )
    if BANK.ERASES:
        put_pairs(scratch + LAYER.GRAM, products, BANK)
    if not BANK.RUNNING:
        d_full, d_after = 0.0 * d_strict, 0.0 * d_before
    d_log = decays_adjoint(d_strict, d_full, d_before, d_after, d_to_end, d_final * decays[5], BANK)
    return d_signal, d_recalled, (d_rate, d_pair_rate, d_log)


@triton.jit
def give_back(decays, rate, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Shares of blocks in the gradients of keys, values and queries of the layer that they enter, to scratch.

    Rows in scratch: ω; gradients of S k; of W̄ k and, but for linear memories, where it is minus that, of W̄ v;
    and of the reads.
    """
    C: tl.constexpr = BANK.BLOCK_C
    WIDTH: tl.constexpr = LAYER.WIDTH
    ROWS: tl.constexpr = WIDTH // BANK.PER
    PART: tl.constexpr = C * BANK.BLOCK_K // 256
    _, _, _, after, to_end, _ = decays
    by_write = turned_rows_of(scratch + LAYER.OMEGA, WIDTH, BANK).to(tl.float32)
    by_write = rounded(by_write * tl.trans(to_end * -rate, 0, 2, 1), BANK)
    d_key = turned_rows_of(scratch + LAYER.D_KEY, WIDTH, BANK)
    d_read = turned_rows_of(scratch + LAYER.D_QUERY, WIDTH, BANK)
    gram, products = scratch + LAYER.GRAM, scratch + LAYER.PAIRS
    if BANK.ERASES:
        d_recalled = turned_rows_of(scratch + LAYER.RECALLED, WIDTH, BANK)
        both = pairs_at(gram, False, BANK) + pairs_at(gram, True, BANK)
        both = rounded(both, BANK)
    if BANK.RUNNING:
        d_running = rounded(d_read.to(tl.float32) * tl.trans(after, 0, 2, 1), BANK)
        straight = rounded(pairs_at(products, False, BANK), BANK)
        turned = rounded(pairs_at(products, True, BANK), BANK)
    shares = scratch + BANK.SHARES
    SHARE: tl.constexpr = BANK.BLOCKS * BANK.BLOCK_K * C
    for start in range(0, BANK.BLOCK_K, BANK.SLICE):
        at = shares + start * 16
        x = by_token(scratch + BANK.KEY, start, 0, BANK.BLOCK_K, BANK)
        weights = operand_at(scratch + LAYER.BASE_OPERAND, start, ROWS, BANK.BLOCK_K, BANK)
        anchor = scratch + LAYER.ANCHOR_OPERAND
        key = product(d_key, weights, BANK)
        value = -key
        if BANK.GENERATES and BANK.HIDDEN > 0:
            value = product(turned_rows_of(scratch + LAYER.D_VALUE, WIDTH, BANK), weights, BANK)
        if BANK.AT_ANCHOR:  # W_0 k is in the place of W̄ k
            key = product(d_key, operand_at(anchor, start, ROWS, BANK.BLOCK_K, BANK), BANK)
        store_tile(at + SHARE, value, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)
        if not BANK.RUNNING:
            store_tile(
                at + 2 * SHARE, product(d_read, weights, BANK), BANK.BLOCK_K, BANK.PER * PART, PART, BANK
            )
        d_state = operand_at(scratch + LAYER.D_STATE_OPERAND, start, ROWS, BANK.BLOCK_K, BANK)
        key += product(by_write, d_state, BANK)
        if BANK.ERASES:
            weights = operand_at(scratch + LAYER.STATE_OPERAND, start, ROWS, BANK.BLOCK_K, BANK)
            key += product(d_recalled, weights, BANK)
            key += product(both, x, BANK)
        if BANK.RUNNING:
            q = by_token(scratch + BANK.QUERY, start, 0, BANK.BLOCK_K, BANK)
            key += product(straight, q, BANK)
            weights = operand_at(scratch + LAYER.STATE_OPERAND, start, ROWS, BANK.BLOCK_K, BANK)
            by_query = product(d_running, weights, BANK) + product(turned, x, BANK)
            if BANK.ANCHORED:
                by_query += product(d_read, operand_at(anchor, start, ROWS, BANK.BLOCK_K, BANK), BANK)
            store_tile(at + 2 * SHARE, by_query, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)
        store_tile(at, key, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)


@triton.jit
def last_layer_back(decays, rate, scratch, BANK: tl.constexpr):
    """What the last layers' writes and reads give to their keys and queries [B, h, C], their pairs apart."""
    LAYER: tl.constexpr = BANK.LAST
    _, _, _, after, to_end, _ = decays
    key = zeros_of(BANK.BLOCK_H // BANK.PER, BANK)
    query = key
    for start in range(0, BANK.BLOCK_V, BANK.SLICE):
        x = by_width(scratch + LAYER.OMEGA, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
        x = x.to(tl.float32) * (-rate * to_end)
        key += product(outputs_of(scratch + LAYER.D_STATE_OPERAND, start, BANK), rounded(x, BANK), BANK)
        if BANK.ERASES:
            x = by_width(scratch + LAYER.RECALLED, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
            key += product(outputs_of(scratch + LAYER.STATE_OPERAND, start, BANK), x, BANK)
        x = by_width(scratch + LAYER.D_QUERY, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
        if BANK.RUNNING:
            running = rounded(x.to(tl.float32) * after, BANK)
            query += product(outputs_of(scratch + LAYER.STATE_OPERAND, start, BANK), running, BANK)
            if BANK.ANCHORED:
                query += product(outputs_of(scratch + LAYER.ANCHOR_OPERAND, start, BANK), x, BANK)
        else:
            query += product(outputs_of(scratch + LAYER.BASE_OPERAND, start, BANK), x, BANK)
    return key, query


@triton.jit
def update_layer(fresh, decays, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Gradients of a layer's weights before the chunk, in scratch: running, snapshot and anchor.

    They are of the tokens that the layer takes in and of the rows that the stages before have left in scratch
    for them: of S k; of W̄ k and W̄ v (of last layers minus that of W̄ k); of the reads; of two-layer memories'
    last layers also of what they sent back; and of what the layer made of the inputs.
    Where ``fresh`` [B, 1, 1] the chunk began with a snapshot of the running weights, which then get the
    snapshot's gradient, too.
    """
    BLOCK: tl.constexpr = LAYER.BLOCK
    UPTO: tl.constexpr = LAYER.UPTO
    WIDTH: tl.constexpr = LAYER.WIDTH
    ROWS: tl.constexpr = WIDTH // BANK.PER
    MADE_BY: tl.constexpr = UPTO if UPTO > 0 else GATE_INPUT
    d_key = rows_of(scratch + LAYER.D_KEY, BANK.BLOCKS, WIDTH, BANK)
    d_recalled = rows_of(scratch + LAYER.RECALLED, BANK.BLOCKS, WIDTH, BANK)
    d_read = rows_of(scratch + LAYER.D_QUERY, BANK.BLOCKS, WIDTH, BANK)
    if BANK.RUNNING:
        d_running = rounded(d_read.to(tl.float32) * decays[3], BANK)
    if BANK.GENERATES:
        made = rows_of(scratch + LAYER.D_MADE, BANK.BLOCKS, WIDTH, BANK)
        if LAYER.INDEX == 0:
            d_value = rows_of(scratch + LAYER.D_VALUE, BANK.BLOCKS, WIDTH, BANK)
        else:
            d_value = rounded(-d_key.to(tl.float32), BANK)
    if UPTO > 0:
        error = rows_of(scratch + BANK.ERROR, BANK.BLOCKS, WIDTH, BANK)
    for start in range(0, BLOCK, BANK.SLICE):
        x = by_token(scratch + LAYER.KEY, start, UPTO, BLOCK, BANK)
        grad = decays[5] * weights_at(scratch + LAYER.STATE, start, ROWS, BLOCK, BANK)
        if BANK.ERASES:
            grad += product(d_recalled, x, BANK)
        by_key = product(d_key, x, BANK)
        at_base = 0.0 * by_key if BANK.AT_ANCHOR else by_key
        if BANK.GENERATES:
            at_base += product(d_value, by_token(scratch + LAYER.VALUE, start, UPTO, BLOCK, BANK), BANK)
        if UPTO > 0:
            at_base += product(error, by_token(scratch + BANK.D_BACK, start, UPTO, BLOCK, BANK), BANK)
        if BANK.GENERATES:
            at_base += product(made, by_token(scratch + LAYER.INPUTS, start, MADE_BY, BLOCK, BANK), BANK)
        x = by_token(scratch + LAYER.QUERY, start, UPTO, BLOCK, BANK)
        if not BANK.RUNNING:
            at_base += product(d_read, x, BANK)
        by_anchor = at_base
        if BANK.RUNNING:
            grad += product(d_running, x, BANK)
            if BANK.ANCHORED:
                by_anchor += product(d_read, x, BANK)
        if BANK.AT_ANCHOR:  # W_0 k is in the place of W̄ k
            by_anchor += by_key
        if BANK.ANCHORED:
            by_anchor += weights_at(scratch + LAYER.D_ANCHOR, start, ROWS, BLOCK, BANK)
            put_weights(scratch + LAYER.D_ANCHOR, start, by_anchor, BLOCK, BANK)
        # Only a snapshot from before the chunk's running weights has a gradient of its own.
        at_base += weights_at(scratch + LAYER.SNAPSHOT, start, ROWS, BLOCK, BANK)
        put_weights(scratch + LAYER.SNAPSHOT, start, tl.where(fresh, 0.0, at_base), BLOCK, BANK)
        grad += tl.where(fresh, at_base, 0.0)
        put_weights(scratch + LAYER.STATE, start, grad, BLOCK, BANK)
        put_operand(scratch + LAYER.D_STATE_OPERAND, start, grad, BLOCK, BANK)


@triton.jit
def linear_errors_adjoint(last_state, chunk, scratch, BANK: tl.constexpr):
    """Gradients of the errors and writes of linear memories go to scratch, as do shares in those of the
    tokens.

    ``chunk`` is of :func:`~.learn.learn_chunk`; the gradient of the reads [outputs, C] is in scratch. Returns
    the shares in the gradients of rates and log decays.
    """
    decays, _, last, _, factor, _ = chunk
    LAYER: tl.constexpr = BANK.LAST
    rate = tl.load(vectors_at(scratch, RATE, BANK)[None, None, :])
    put_rows(scratch + LAYER.OMEGA, last[3], LAYER.WIDTH, BANK)
    tl.debug_barrier()
    d_signal, d_recalled, vectors = layer_adjoint(last_state, last, decays, rate, scratch, LAYER, BANK)
    if BANK.SCALED:
        by_scale = memory_sum(d_signal * last[0], BANK.PER)
        block = tl.arange(0, BANK.BLOCKS)[:, None, None]
        at = vectors_at(scratch, D_SCALE, BANK)[None, None, :] + 0 * block
        tl.store(at, by_scale, mask=block == BANK.OWN * BANK.PER)
        d_signal *= own_scale(scratch, BANK)
    d_error = bound_adjoint(d_signal, last[0], factor, narrow_of(BANK), BANK.BOUND, BANK.PER)
    put_rows(scratch + LAYER.D_KEY, d_error, LAYER.WIDTH, BANK)
    put_rows(scratch + LAYER.RECALLED, d_recalled, LAYER.WIDTH, BANK)
    tl.debug_barrier()
    give_back(decays, rate, scratch, LAYER, BANK)
    return vectors


@triton.jit
def deep_errors_adjoint(first_state, last_state, chunk, scratch, BANK: tl.constexpr):
    """As :func:`linear_errors_adjoint`, of memories of two layers."""
    decays, first, last, hiddens, factor, _ = chunk
    hidden, hidden_value, hidden_query, back, signal = hiddens
    rate = tl.load(vectors_at(scratch, RATE, BANK)[None, None, :])
    FIRST: tl.constexpr = BANK.FIRST
    LAST: tl.constexpr = BANK.LAST
    OUT: tl.constexpr = BANK.BLOCK_V
    UNITS: tl.constexpr = BANK.BLOCK_H
    gram, products = scratch + LAST.GRAM, scratch + LAST.PAIRS
    put_rows(scratch + LAST.OMEGA, last[3], OUT, BANK)
    put_rows(scratch + FIRST.OMEGA, first[3], UNITS, BANK)
    tl.debug_barrier()

    # The last layers, and what they give to the hidden layers at keys and queries.
    d_error, d_recalled, vectors = layer_adjoint(last_state, last, decays, rate, scratch, LAST, BANK)
    put_rows(scratch + LAST.RECALLED, d_recalled, OUT, BANK)
    tl.debug_barrier()
    d_hidden, d_query = last_layer_back(decays, rate, scratch, BANK)
    x = rows_of(scratch + LAST.KEY, BANK.BLOCKS, UNITS, BANK)
    if BANK.ERASES:
        d_hidden += product(x, tl.trans(pair_sums(gram, True, BANK), 0, 2, 1), BANK)
        d_hidden += product(x, tl.trans(pair_sums(gram, False, BANK), 0, 2, 1), BANK)
    if BANK.RUNNING:
        d_query += product(x, tl.trans(pair_sums(products, True, BANK), 0, 2, 1), BANK)
        x = rows_of(scratch + LAST.QUERY, BANK.BLOCKS, UNITS, BANK)
        d_hidden += product(x, tl.trans(pair_sums(products, False, BANK), 0, 2, 1), BANK)
    d_query = hidden_adjoint(d_query, hidden_query, None, BANK, BANK.PER)
    put_rows(scratch + FIRST.D_QUERY, d_query, UNITS, BANK)
    tl.debug_barrier()

    # The first layers and the error signal.
    d_signal, d_recalled, more = layer_adjoint(first_state, first, decays, rate, scratch, FIRST, BANK)
    d_back, by_signal, d_slope, radial = signal_adjoint(d_signal, back, hidden, signal, BANK, BANK.PER)
    put_rows(scratch + BANK.D_BACK, d_back, UNITS, BANK)
    put_rows(scratch + FIRST.RECALLED, d_recalled, UNITS, BANK)
    tl.debug_barrier()
    for start in range(0, UNITS, BANK.SLICE):
        given = by_width(scratch + BANK.D_BACK, start, BANK.BLOCKS, UNITS, BANK)
        weights = operand_at(scratch + LAST.BASE_OPERAND, start, OUT // BANK.PER, UNITS, BANK)
        d_error += product(weights, given, BANK)
    d_error = bound_adjoint(d_error, last[0], factor, narrow_of(BANK), BANK.BOUND, BANK.PER)
    put_rows(scratch + LAST.D_KEY, d_error, OUT, BANK)
    tl.debug_barrier()

    # The hidden layers at k and v.
    difference = send_back(scratch, scratch + LAST.D_KEY, BANK)
    d_key = hidden_adjoint(d_hidden + by_signal + difference, hidden, radial, BANK, BANK.PER) + d_slope
    if BANK.GENERATES:
        d_value = hidden_adjoint(-difference, hidden_value, None, BANK, BANK.PER)
        put_rows(scratch + FIRST.D_VALUE, d_value, UNITS, BANK)
    put_rows(scratch + FIRST.D_KEY, d_key, UNITS, BANK)
    tl.debug_barrier()
    give_back(decays, rate, scratch, FIRST, BANK)
    return vectors[0] + more[0], vectors[1] + more[1], vectors[2] + more[2]
