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
    operands_at,
    pair_sums,
    pairs_at,
    product,
    put_pairs,
    put_rows,
    put_weights,
    rounded,
    rows_of,
    store_tile,
    turned_rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import D_SCALE, RATE, vectors_at
from nl_kernels.memory.kernels.layer import memory_of, memory_sum, zeros_of
from nl_kernels.memory.kernels.layer_adjoint import (
    bound_adjoint,
    carried_adjoint,
    decays_adjoint,
    hidden_adjoint,
    read_adjoint,
    signal_adjoint,
    write_adjoint,
)
from nl_kernels.memory.kernels.learn import (
    D_ANCHOR,
    D_STATE_OPERAND,
    SNAPSHOT,
    STATE,
    operands_of,
    outputs_of,
    own_scale,
    send_back,
)


@triton.jit
def layer_adjoint(
    d_state, state, key, layer, grad, decays, rate, omega, solution, shares, LAST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's write and running read: of the signal and of the recall [B, rows, C].

    ``grad``, that of the read's rows, ω and the ``solution`` are in scratch. Shares in those of the inner
    products go to ``shares``; those in gradients of rates and log decays are returned, as vectors.
    """
    d_written, d_final = carried_adjoint(d_state, state, key, LAST, WIDTH // BANK.PER, BLOCK, BANK)
    d_written *= decays[4]
    d_to_end = tl.sum(layer[3] * d_written, 1)[:, None, :] * -rate
    if BANK.RUNNING:
        by_read, d_full, products, d_after = read_adjoint(
            grad, omega, layer, solution[1], decays, rate, WIDTH, BANK
        )
        put_pairs(shares[1], products, BANK)
        d_written += by_read
    d_signal, d_recalled, products, d_strict, d_rate, d_pair_rate, d_before = write_adjoint(
        d_written, omega, layer, solution[0], decays, rate, WIDTH, BANK
    )
    if BANK.ERASES:
        put_pairs(shares[0], products, BANK)
    if not BANK.RUNNING:
        d_full, d_after = 0.0 * d_strict, 0.0 * d_before
    d_log = decays_adjoint(d_strict, d_full, d_before, d_after, d_to_end, d_final * decays[5], BANK)
    return d_signal, d_recalled, (d_rate, d_pair_rate, d_log)


@triton.jit
def give_back(
    place, scratch, omega, recalled, errors, d_value, read, decays, rate, gram, products, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """Shares of blocks in the gradients of keys, values and queries of the layer that they enter, to scratch.

    ``place`` has the layer's weights. Rows in scratch: ω; gradients of S k; of W̄ k and W̄ v (``None``: minus
    that of W̄ k); and of the reads. ``gram`` and ``products`` have those of the inner products.
    """
    C: tl.constexpr = BANK.BLOCK_C
    ROWS: tl.constexpr = WIDTH // BANK.PER
    PART: tl.constexpr = C * BANK.BLOCK_K // 256
    state, base, anchor = operands_of(place, SIZE, BANK)
    d_state = operands_at(place + D_STATE_OPERAND * SIZE, BANK)
    _, _, _, after, to_end, _ = decays
    by_write = turned_rows_of(omega, WIDTH, BANK).to(tl.float32)
    by_write = rounded(by_write * tl.trans(to_end * -rate, 0, 2, 1), BANK)
    d_key = turned_rows_of(errors, WIDTH, BANK)
    d_read = turned_rows_of(read, WIDTH, BANK)
    keys, query = operands_at(scratch + BANK.KEY, BANK), operands_at(scratch + BANK.QUERY, BANK)
    if BANK.ERASES:
        d_recalled = turned_rows_of(recalled, WIDTH, BANK)
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
        x = by_token(keys, start, 0, BANK.BLOCK_K, BANK)
        weights = weights_at(base, start, ROWS, BANK.BLOCK_K, BANK)
        key = product(d_key, weights, BANK)
        value = -key
        if d_value is not None:
            value = product(turned_rows_of(d_value, WIDTH, BANK), weights, BANK)
        if BANK.AT_ANCHOR:  # W_0 k is in the place of W̄ k
            key = product(d_key, weights_at(anchor, start, ROWS, BANK.BLOCK_K, BANK), BANK)
        store_tile(at + SHARE, value, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)
        if not BANK.RUNNING:
            store_tile(
                at + 2 * SHARE, product(d_read, weights, BANK), BANK.BLOCK_K, BANK.PER * PART, PART, BANK
            )
        key += product(by_write, weights_at(d_state, start, ROWS, BANK.BLOCK_K, BANK), BANK)
        if BANK.ERASES:
            weights = weights_at(state, start, ROWS, BANK.BLOCK_K, BANK)
            key += product(d_recalled, weights, BANK)
            key += product(both, x, BANK)
        if BANK.RUNNING:
            q = by_token(query, start, 0, BANK.BLOCK_K, BANK)
            key += product(straight, q, BANK)
            weights = weights_at(state, start, ROWS, BANK.BLOCK_K, BANK)
            by_query = product(d_running, weights, BANK) + product(turned, x, BANK)
            if BANK.ANCHORED:
                weights = weights_at(anchor, start, ROWS, BANK.BLOCK_K, BANK)
                by_query += product(d_read, weights, BANK)
            store_tile(at + 2 * SHARE, by_query, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)
        store_tile(at, key, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)


@triton.jit
def last_layer_back(weights, d_state, decays, rate, omega, recalled, grad, BANK: tl.constexpr):
    """What the last layers' writes and reads give to their keys and queries [B, h, C], their pairs apart."""
    state, base, anchor = weights
    _, _, _, after, to_end, _ = decays
    key = zeros_of(BANK.BLOCK_H // BANK.PER, BANK)
    query = key
    for start in range(0, BANK.BLOCK_V, BANK.SLICE):
        x = by_width(omega, start, BANK.BLOCKS, BANK.BLOCK_V, BANK).to(tl.float32) * (-rate * to_end)
        key += product(outputs_of(d_state, start, BANK), rounded(x, BANK), BANK)
        if BANK.ERASES:
            x = by_width(recalled, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
            key += product(outputs_of(state, start, BANK), x, BANK)
        x = by_width(grad, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
        if BANK.RUNNING:
            query += product(outputs_of(state, start, BANK), rounded(x.to(tl.float32) * after, BANK), BANK)
            if BANK.ANCHORED:
                query += product(outputs_of(anchor, start, BANK), x, BANK)
        else:
            query += product(outputs_of(base, start, BANK), x, BANK)
    return key, query


@triton.jit
def update_layer(
    place, fresh, decays, key, value, query, d_recalled, d_key, d_value, d_read, more, more_from, made,
    made_from, LAST: tl.constexpr, MADE_LAST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's weights before the chunk, in scratch: running, snapshot and anchor.

    Rows [B, rows, C] and the tokens in scratch that they belong to: of S k; of W̄ k and W̄ v (``None``: minus
    that of W̄ k); of the reads; ``more``, if there is more; and of what the layer ``made`` of other tokens.
    Where ``fresh`` [B, 1, 1] the chunk began with a snapshot of the running weights, which then get the
    snapshot's gradient, too.
    """
    ROWS: tl.constexpr = d_key.shape[1]
    d_state, d_snapshot, d_anchor = place + STATE * SIZE, place + SNAPSHOT * SIZE, place + D_ANCHOR * SIZE
    if BANK.RUNNING:
        d_running = rounded(d_read.to(tl.float32) * decays[3], BANK)
    if value is not None and d_value is None:
        d_value = rounded(-d_key.to(tl.float32), BANK)
    for start in range(0, BLOCK, BANK.SLICE):
        x = by_token(key, start, LAST, BLOCK, BANK)
        grad = decays[5] * weights_at(d_state, start, ROWS, BLOCK, BANK)
        if BANK.ERASES:
            grad += product(d_recalled, x, BANK)
        by_key = product(d_key, x, BANK)
        at_base = 0.0 * by_key if BANK.AT_ANCHOR else by_key
        if value is not None:
            at_base += product(d_value, by_token(value, start, LAST, BLOCK, BANK), BANK)
        if more is not None:
            at_base += product(more, by_token(more_from, start, LAST, BLOCK, BANK), BANK)
        if made is not None:
            at_base += product(made, by_token(made_from, start, MADE_LAST, BLOCK, BANK), BANK)
        x = by_token(query, start, LAST, BLOCK, BANK)
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
            by_anchor += weights_at(d_anchor, start, ROWS, BLOCK, BANK)
            put_weights(d_anchor, start, by_anchor, BLOCK, BANK)
        # Only a snapshot from before the chunk's running weights has a gradient of its own.
        at_base += weights_at(d_snapshot, start, ROWS, BLOCK, BANK)
        put_weights(d_snapshot, start, tl.where(fresh, 0.0, at_base), BLOCK, BANK)
        grad += tl.where(fresh, at_base, 0.0)
        put_weights(d_state, start, grad, BLOCK, BANK)
        put_weights(
            operands_at(place + D_STATE_OPERAND * SIZE, BANK), start, rounded(grad, BANK), BLOCK, BANK
        )


@triton.jit
def narrow_of(BANK: tl.constexpr):
    """Which blocks are of memories whose outputs are bounded one by one [B, 1, 1], or ``None``."""
    if BANK.NARROW > 0:
        return memory_of(BANK)[:, None, None] >= BANK.WIDE


@triton.jit
def linear_errors_adjoint(last_state, chunk, scratch, BANK: tl.constexpr):
    """Gradients of the errors and writes of linear memories go to scratch, as do shares in those of the
    tokens.

    ``chunk`` is of :func:`learn_chunk`; the gradient of the reads [outputs, C] is in scratch. Returns the
    shares in the gradients of rates and log decays.
    """
    decays, _, last, _, factor, _ = chunk
    WIDTH: tl.constexpr = BANK.BLOCK_V
    rate = tl.load(vectors_at(scratch, RATE, BANK)[None, None, :])
    omega = operands_at(scratch + BANK.OMEGA, BANK)
    read = operands_at(scratch + BANK.READ, BANK)
    recalled = operands_at(scratch + BANK.RECALLED, BANK)
    errors = operands_at(scratch + BANK.D_ERROR, BANK)
    place = scratch + BANK.LAST
    put_rows(omega, rounded(last[3], BANK), WIDTH, BANK)
    tl.debug_barrier()
    d_signal, d_recalled, vectors = layer_adjoint(
        place + STATE * BANK.LAST_KEPT, last_state, operands_at(scratch + BANK.KEY, BANK), last, read, decays,
        rate, omega, (operands_at(scratch + BANK.INVERSE, BANK), operands_at(scratch + BANK.SCORES, BANK)),
        (scratch + BANK.GRAM, scratch + BANK.PAIRS), 0, WIDTH, BANK.BLOCK_K, BANK,
    )  # fmt: skip
    if BANK.SCALED:
        by_scale = memory_sum(d_signal * last[0], BANK.PER)
        block = tl.arange(0, BANK.BLOCKS)[:, None, None]
        at = vectors_at(scratch, D_SCALE, BANK)[None, None, :] + 0 * block
        tl.store(at, by_scale, mask=block == BANK.OWN * BANK.PER)
        d_signal *= own_scale(scratch, BANK)
    d_error = bound_adjoint(d_signal, last[0], factor, narrow_of(BANK), BANK.BOUND, BANK.PER)
    put_rows(errors, rounded(d_error, BANK), WIDTH, BANK)
    put_rows(recalled, rounded(d_recalled, BANK), WIDTH, BANK)
    tl.debug_barrier()
    give_back(
        place, scratch, omega, recalled, errors, None, read, decays, rate, scratch + BANK.GRAM,
        scratch + BANK.PAIRS, BANK.LAST_KEPT, WIDTH, BANK,
    )  # fmt: skip
    return vectors


@triton.jit
def deep_errors_adjoint(first_state, last_state, chunk, scratch, BANK: tl.constexpr):
    """As :func:`linear_errors_adjoint`, of memories of two layers."""
    decays, first, last, hiddens, factor, _ = chunk
    hidden, hidden_value, hidden_query, back, signal = hiddens
    rate = tl.load(vectors_at(scratch, RATE, BANK)[None, None, :])
    OUT: tl.constexpr = BANK.BLOCK_V
    UNITS: tl.constexpr = BANK.BLOCK_H
    omega = operands_at(scratch + BANK.OMEGA, BANK)
    first_omega = operands_at(scratch + BANK.OMEGA_FIRST, BANK)
    read = operands_at(scratch + BANK.READ, BANK)
    recalled = operands_at(scratch + BANK.RECALLED, BANK)
    first_recalled = operands_at(scratch + BANK.RECALLED_FIRST, BANK)
    keys = operands_at(scratch + BANK.HIDDEN_KEY, BANK)
    queries = operands_at(scratch + BANK.D_QUERY, BANK)
    backs = operands_at(scratch + BANK.D_BACK, BANK)
    errors = operands_at(scratch + BANK.D_ERROR, BANK)
    gram, products = scratch + BANK.GRAM, scratch + BANK.PAIRS
    place = scratch + BANK.LAST
    weights = operands_of(place, BANK.LAST_KEPT, BANK)
    put_rows(omega, rounded(last[3], BANK), OUT, BANK)
    put_rows(first_omega, rounded(first[3], BANK), UNITS, BANK)
    tl.debug_barrier()

    # The last layers, and what they give to the hidden layers at keys and queries.
    d_error, d_recalled, vectors = layer_adjoint(
        place + STATE * BANK.LAST_KEPT, last_state, keys, last, read, decays, rate, omega,
        (operands_at(scratch + BANK.INVERSE, BANK), operands_at(scratch + BANK.SCORES, BANK)),
        (gram, products), BANK.BLOCKS, OUT, UNITS, BANK,
    )  # fmt: skip
    put_rows(recalled, rounded(d_recalled, BANK), OUT, BANK)
    tl.debug_barrier()
    d_hidden, d_query = last_layer_back(
        weights, operands_at(place + D_STATE_OPERAND * BANK.LAST_KEPT, BANK), decays, rate, omega, recalled,
        read, BANK,
    )  # fmt: skip
    x = rows_of(keys, BANK.BLOCKS, UNITS, BANK)
    if BANK.ERASES:
        d_hidden += product(x, tl.trans(pair_sums(gram, True, BANK), 0, 2, 1), BANK)
        d_hidden += product(x, tl.trans(pair_sums(gram, False, BANK), 0, 2, 1), BANK)
    if BANK.RUNNING:
        d_query += product(x, tl.trans(pair_sums(products, True, BANK), 0, 2, 1), BANK)
        x = rows_of(operands_at(scratch + BANK.HIDDEN_QUERY, BANK), BANK.BLOCKS, UNITS, BANK)
        d_hidden += product(x, tl.trans(pair_sums(products, False, BANK), 0, 2, 1), BANK)
    d_query = hidden_adjoint(d_query, hidden_query, None, BANK, BANK.PER)
    put_rows(queries, rounded(d_query, BANK), UNITS, BANK)
    tl.debug_barrier()

    # The first layers and the error signal.
    d_signal, d_recalled, more = layer_adjoint(
        scratch + BANK.FIRST + STATE * BANK.FIRST_KEPT, first_state, operands_at(scratch + BANK.KEY, BANK),
        first, queries, decays, rate, first_omega,
        (operands_at(scratch + BANK.INVERSE_FIRST, BANK), operands_at(scratch + BANK.SCORES_FIRST, BANK)),
        (scratch + BANK.GRAM_FIRST, scratch + BANK.PAIRS_FIRST), 0, UNITS, BANK.BLOCK_K, BANK,
    )  # fmt: skip
    d_back, by_signal, d_slope, radial = signal_adjoint(d_signal, back, hidden, signal, BANK, BANK.PER)
    put_rows(backs, rounded(d_back, BANK), UNITS, BANK)
    put_rows(first_recalled, rounded(d_recalled, BANK), UNITS, BANK)
    tl.debug_barrier()
    for start in range(0, UNITS, BANK.SLICE):
        given = by_width(backs, start, BANK.BLOCKS, UNITS, BANK)
        d_error += product(weights_at(weights[1], start, OUT // BANK.PER, UNITS, BANK), given, BANK)
    d_error = bound_adjoint(d_error, last[0], factor, narrow_of(BANK), BANK.BOUND, BANK.PER)
    put_rows(errors, rounded(d_error, BANK), OUT, BANK)
    tl.debug_barrier()

    # The hidden layers at k and v.
    difference = send_back(weights[1], errors, BANK)
    d_key = hidden_adjoint(d_hidden + by_signal + difference, hidden, radial, BANK, BANK.PER) + d_slope
    values = None
    if BANK.GENERATES:
        values = operands_at(scratch + BANK.D_VALUE, BANK)
        d_value = hidden_adjoint(-difference, hidden_value, None, BANK, BANK.PER)
        put_rows(values, rounded(d_value, BANK), UNITS, BANK)
    put_rows(operands_at(scratch + BANK.D_KEY, BANK), rounded(d_key, BANK), UNITS, BANK)
    tl.debug_barrier()
    give_back(
        scratch + BANK.FIRST, scratch, first_omega, first_recalled, operands_at(scratch + BANK.D_KEY, BANK),
        values, queries, decays, rate, scratch + BANK.GRAM_FIRST, scratch + BANK.PAIRS_FIRST, BANK.FIRST_KEPT,
        UNITS, BANK,
    )  # fmt: skip
    return vectors[0] + more[0], vectors[1] + more[1], vectors[2] + more[2]
