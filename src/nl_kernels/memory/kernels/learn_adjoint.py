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
from nl_kernels.memory.kernels.generate import RATE, vectors_at
from nl_kernels.memory.kernels.layer import memory_of, zeros_of
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
    send_back,
)


@triton.jit
def layer_adjoint(
    d_state, state, key, layer, grad, decays, rate, omega, solution, shares,
    LAST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's write and running read: of the signal and of the recall [B, rows, C].

    ``grad``, that of the read's rows, ω and the ``solution`` are in scratch. Shares in those of the inner products
    go to ``shares``, those in the gradients of rates and log decays are returned, [B, 1, C], [B, C], [B, 1, C].
    """
    d_written, d_final = carried_adjoint(d_state, state, key, LAST, WIDTH // SHAPE.PER, BLOCK, SHAPE, RULE)
    d_written *= decays[4]
    d_to_end = tl.sum(layer[3] * d_written, 1)[:, None, :] * -rate
    if RULE.RUNNING:
        by_read, d_full, products, d_after = read_adjoint(
            grad, omega, layer, solution[1], decays, rate, WIDTH, SHAPE, RULE
        )
        put_pairs(shares[1], products, SHAPE)
        d_written += by_read
    d_signal, d_recalled, products, d_strict, d_rate, d_pair_rate, d_before = write_adjoint(
        d_written, omega, layer, solution[0], decays, rate, WIDTH, SHAPE, RULE
    )
    if RULE.ERASES:
        put_pairs(shares[0], products, SHAPE)
    if not RULE.RUNNING:
        d_full, d_after = 0.0 * d_strict, 0.0 * d_before
    d_log = decays_adjoint(d_strict, d_full, d_before, d_after, d_to_end, d_final * decays[5], SHAPE, RULE)
    return d_signal, d_recalled, (d_rate, d_pair_rate, d_log)


@triton.jit
def give_back(
    place, scratch, omega, recalled, errors, d_value, read, decays, rate, gram, products, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Shares of blocks in the gradients of keys, values and queries of the layer that they enter, to scratch.

    ``place`` has the layer's weights. Rows in scratch: ω; gradients of S k; of W̄ k and W̄ v (``None``: minus that
    of W̄ k); and of the reads. ``gram`` and ``products`` have those of the inner products.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    ROWS: tl.constexpr = WIDTH // SHAPE.PER
    PART: tl.constexpr = C * SHAPE.BLOCK_K // 256
    state, base, anchor = operands_of(place, SIZE, RULE)
    d_state = operands_at(place + D_STATE_OPERAND * SIZE, RULE)
    _, _, _, after, to_end, _ = decays
    by_write = turned_rows_of(omega, WIDTH, SHAPE).to(tl.float32)
    by_write = rounded(by_write * tl.trans(to_end * -rate, 0, 2, 1), RULE)
    d_key = turned_rows_of(errors, WIDTH, SHAPE)
    d_read = turned_rows_of(read, WIDTH, SHAPE)
    keys, query = operands_at(scratch + PLACES.KEY, RULE), operands_at(scratch + PLACES.QUERY, RULE)
    if RULE.ERASES:
        d_recalled = turned_rows_of(recalled, WIDTH, SHAPE)
        both = pairs_at(gram, False, SHAPE) + pairs_at(gram, True, SHAPE)
        both = rounded(both, RULE)
    if RULE.RUNNING:
        d_running = rounded(d_read.to(tl.float32) * tl.trans(after, 0, 2, 1), RULE)
        straight = rounded(pairs_at(products, False, SHAPE), RULE)
        turned = rounded(pairs_at(products, True, SHAPE), RULE)
    shares = scratch + PLACES.SHARES
    SHARE: tl.constexpr = SHAPE.BLOCKS * SHAPE.BLOCK_K * C
    for start in range(0, SHAPE.BLOCK_K, SHAPE.SLICE):
        at = shares + start * 16
        x = by_token(keys, start, 0, SHAPE.BLOCK_K, SHAPE)
        weights = weights_at(base, start, ROWS, SHAPE.BLOCK_K, SHAPE)
        key = product(d_key, weights, RULE)
        if d_value is not None:
            value = product(turned_rows_of(d_value, WIDTH, SHAPE), weights, RULE)
        else:
            value = -key
        store_tile(at + SHARE, value, SHAPE.BLOCK_K, SHAPE.PER * PART, PART, SHAPE)
        if not RULE.RUNNING:
            store_tile(at + 2 * SHARE, product(d_read, weights, RULE), SHAPE.BLOCK_K, SHAPE.PER * PART, PART, SHAPE)
        key += product(by_write, weights_at(d_state, start, ROWS, SHAPE.BLOCK_K, SHAPE), RULE)
        if RULE.ERASES:
            weights = weights_at(state, start, ROWS, SHAPE.BLOCK_K, SHAPE)
            key += product(d_recalled, weights, RULE)
            key += product(both, x, RULE)
        if RULE.RUNNING:
            q = by_token(query, start, 0, SHAPE.BLOCK_K, SHAPE)
            key += product(straight, q, RULE)
            weights = weights_at(state, start, ROWS, SHAPE.BLOCK_K, SHAPE)
            by_query = product(d_running, weights, RULE) + product(turned, x, RULE)
            if RULE.ANCHORED:
                weights = weights_at(anchor, start, ROWS, SHAPE.BLOCK_K, SHAPE)
                by_query += product(d_read, weights, RULE)
            store_tile(at + 2 * SHARE, by_query, SHAPE.BLOCK_K, SHAPE.PER * PART, PART, SHAPE)
        store_tile(at, key, SHAPE.BLOCK_K, SHAPE.PER * PART, PART, SHAPE)


@triton.jit
def last_layer_back(
    weights, d_state, decays, rate, omega, recalled, grad, SHAPE: tl.constexpr, RULE: tl.constexpr
):
    """What the last layers' writes and reads give to their keys and queries [B, h, C], their pairs apart."""
    state, base, anchor = weights
    _, _, _, after, to_end, _ = decays
    key = zeros_of(SHAPE.BLOCK_H // SHAPE.PER, SHAPE)
    query = key
    for start in range(0, SHAPE.BLOCK_V, SHAPE.SLICE):
        x = by_width(omega, start, SHAPE.BLOCKS, SHAPE.BLOCK_V, SHAPE).to(tl.float32) * (-rate * to_end)
        key += product(outputs_of(d_state, start, SHAPE), rounded(x, RULE), RULE)
        if RULE.ERASES:
            x = by_width(recalled, start, SHAPE.BLOCKS, SHAPE.BLOCK_V, SHAPE)
            key += product(outputs_of(state, start, SHAPE), x, RULE)
        x = by_width(grad, start, SHAPE.BLOCKS, SHAPE.BLOCK_V, SHAPE)
        if RULE.RUNNING:
            query += product(outputs_of(state, start, SHAPE), rounded(x.to(tl.float32) * after, RULE), RULE)
            if RULE.ANCHORED:
                query += product(outputs_of(anchor, start, SHAPE), x, RULE)
        else:
            query += product(outputs_of(base, start, SHAPE), x, RULE)
    return key, query


@triton.jit
def update_layer(
    place, fresh, decays, key, value, query, d_recalled, d_key, d_value, d_read, more, more_from, made, made_from,
    LAST: tl.constexpr, MADE_LAST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's weights before the chunk, in scratch: running, snapshot and anchor.

    Rows [B, rows, C] and the tokens in scratch that they belong to: of S k; of W̄ k and W̄ v (``None``: minus
    that of W̄ k); of the reads; ``more``, if there is more; and of what the layer ``made`` of other tokens. Where
    ``fresh`` [B, 1, 1] the chunk began with a snapshot of the running weights, which then get the snapshot's
    gradient, too.
    """
    ROWS: tl.constexpr = d_key.shape[1]
    d_state, d_snapshot, d_anchor = place + STATE * SIZE, place + SNAPSHOT * SIZE, place + D_ANCHOR * SIZE
    if RULE.RUNNING:
        d_running = rounded(d_read.to(tl.float32) * decays[3], RULE)
    if value is not None and d_value is None:
        d_value = rounded(-d_key.to(tl.float32), RULE)
    for start in range(0, BLOCK, SHAPE.SLICE):
        x = by_token(key, start, LAST, BLOCK, SHAPE)
        grad = decays[5] * weights_at(d_state, start, ROWS, BLOCK, SHAPE)
        if RULE.ERASES:
            grad += product(d_recalled, x, RULE)
        at_base = product(d_key, x, RULE)
        if value is not None:
            at_base += product(d_value, by_token(value, start, LAST, BLOCK, SHAPE), RULE)
        if more is not None:
            at_base += product(more, by_token(more_from, start, LAST, BLOCK, SHAPE), RULE)
        if made is not None:
            at_base += product(made, by_token(made_from, start, MADE_LAST, BLOCK, SHAPE), RULE)
        x = by_token(query, start, LAST, BLOCK, SHAPE)
        by_anchor = at_base
        if RULE.RUNNING:
            grad += product(d_running, x, RULE)
            if RULE.ANCHORED:
                by_anchor += product(d_read, x, RULE)
        else:
            at_base += product(d_read, x, RULE)
            by_anchor = at_base
        if RULE.ANCHORED:
            by_anchor += weights_at(d_anchor, start, ROWS, BLOCK, SHAPE)
            put_weights(d_anchor, start, by_anchor, BLOCK, SHAPE)
        # Only a snapshot from before the chunk's running weights has a gradient of its own.
        at_base += weights_at(d_snapshot, start, ROWS, BLOCK, SHAPE)
        put_weights(d_snapshot, start, tl.where(fresh, 0.0, at_base), BLOCK, SHAPE)
        grad += tl.where(fresh, at_base, 0.0)
        put_weights(d_state, start, grad, BLOCK, SHAPE)
        put_weights(operands_at(place + D_STATE_OPERAND * SIZE, RULE), start, rounded(grad, RULE), BLOCK, SHAPE)


@triton.jit
def narrow_of(SHAPE: tl.constexpr):
    """Which blocks are of memories whose outputs are bounded one by one [B, 1, 1], or ``None``."""
    if SHAPE.NARROW > 0:
        return memory_of(SHAPE)[:, None, None] >= SHAPE.WIDE


@triton.jit
def linear_errors_adjoint(
    last_state, chunk, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr
):
    """Gradients of the errors and writes of linear memories go to scratch, as do shares in those of the
    tokens.

    ``chunk`` is of :func:`learn_chunk`; the gradient of the reads [outputs, C] is in scratch. Returns the shares
    in the gradients of rates and log decays.
    """
    decays, _, last, _, factor, _ = chunk
    WIDTH: tl.constexpr = SHAPE.BLOCK_V
    rate = tl.load(vectors_at(scratch, RATE, SHAPE, PLACES)[None, None, :])
    omega = operands_at(scratch + PLACES.OMEGA, RULE)
    read = operands_at(scratch + PLACES.READ, RULE)
    recalled = operands_at(scratch + PLACES.RECALLED, RULE)
    errors = operands_at(scratch + PLACES.D_ERROR, RULE)
    place = scratch + PLACES.LAST
    put_rows(omega, rounded(last[3], RULE), WIDTH, SHAPE)
    tl.debug_barrier()
    d_signal, d_recalled, vectors = layer_adjoint(
        place + STATE * SHAPE.LAST_KEPT, last_state, operands_at(scratch + PLACES.KEY, RULE),
        last, read, decays, rate, omega,
        (operands_at(scratch + PLACES.INVERSE, RULE), operands_at(scratch + PLACES.SCORES, RULE)),
        (scratch + PLACES.GRAM, scratch + PLACES.PAIRS), 0, WIDTH, SHAPE.BLOCK_K, SHAPE, RULE,
    )  # fmt: skip
    d_error = bound_adjoint(d_signal, last[0], factor, narrow_of(SHAPE), RULE.BOUND, SHAPE.PER)
    put_rows(errors, rounded(d_error, RULE), WIDTH, SHAPE)
    put_rows(recalled, rounded(d_recalled, RULE), WIDTH, SHAPE)
    tl.debug_barrier()
    give_back(
        place, scratch, omega, recalled, errors, None, read, decays, rate, scratch + PLACES.GRAM,
        scratch + PLACES.PAIRS, SHAPE.LAST_KEPT, WIDTH, SHAPE, RULE, PLACES,
    )  # fmt: skip
    return vectors


@triton.jit
def deep_errors_adjoint(
    first_state, last_state, chunk, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr
):
    """As :func:`linear_errors_adjoint`, of memories of two layers."""
    decays, first, last, hiddens, factor, _ = chunk
    hidden, hidden_value, hidden_query, back, signal = hiddens
    rate = tl.load(vectors_at(scratch, RATE, SHAPE, PLACES)[None, None, :])
    OUT: tl.constexpr = SHAPE.BLOCK_V
    UNITS: tl.constexpr = SHAPE.BLOCK_H
    omega = operands_at(scratch + PLACES.OMEGA, RULE)
    first_omega = operands_at(scratch + PLACES.OMEGA_FIRST, RULE)
    read = operands_at(scratch + PLACES.READ, RULE)
    recalled = operands_at(scratch + PLACES.RECALLED, RULE)
    first_recalled = operands_at(scratch + PLACES.RECALLED_FIRST, RULE)
    keys = operands_at(scratch + PLACES.HIDDEN_KEY, RULE)
    queries = operands_at(scratch + PLACES.D_QUERY, RULE)
    backs = operands_at(scratch + PLACES.D_BACK, RULE)
    errors = operands_at(scratch + PLACES.D_ERROR, RULE)
    gram, products = scratch + PLACES.GRAM, scratch + PLACES.PAIRS
    place = scratch + PLACES.LAST
    weights = operands_of(place, SHAPE.LAST_KEPT, RULE)
    put_rows(omega, rounded(last[3], RULE), OUT, SHAPE)
    put_rows(first_omega, rounded(first[3], RULE), UNITS, SHAPE)
    tl.debug_barrier()

    # The last layers, and what they give to the hidden layers at keys and queries.
    d_error, d_recalled, vectors = layer_adjoint(
        place + STATE * SHAPE.LAST_KEPT, last_state, keys, last, read, decays, rate, omega,
        (operands_at(scratch + PLACES.INVERSE, RULE), operands_at(scratch + PLACES.SCORES, RULE)),
        (gram, products), SHAPE.BLOCKS, OUT, UNITS, SHAPE, RULE,
    )  # fmt: skip
    put_rows(recalled, rounded(d_recalled, RULE), OUT, SHAPE)
    tl.debug_barrier()
    d_hidden, d_query = last_layer_back(
        weights, operands_at(place + D_STATE_OPERAND * SHAPE.LAST_KEPT, RULE), decays, rate, omega, recalled, read,
        SHAPE, RULE,
    )  # fmt: skip
    x = rows_of(keys, SHAPE.BLOCKS, UNITS, SHAPE)
    if RULE.ERASES:
        d_hidden += product(x, tl.trans(pair_sums(gram, True, SHAPE, RULE), 0, 2, 1), RULE)
        d_hidden += product(x, tl.trans(pair_sums(gram, False, SHAPE, RULE), 0, 2, 1), RULE)
    if RULE.RUNNING:
        d_query += product(x, tl.trans(pair_sums(products, True, SHAPE, RULE), 0, 2, 1), RULE)
        x = rows_of(operands_at(scratch + PLACES.HIDDEN_QUERY, RULE), SHAPE.BLOCKS, UNITS, SHAPE)
        d_hidden += product(x, tl.trans(pair_sums(products, False, SHAPE, RULE), 0, 2, 1), RULE)
    d_query = hidden_adjoint(d_query, hidden_query, None, RULE, SHAPE.PER)
    put_rows(queries, rounded(d_query, RULE), UNITS, SHAPE)
    tl.debug_barrier()

    # The first layers and the error signal.
    d_signal, d_recalled, more = layer_adjoint(
        scratch + PLACES.FIRST + STATE * SHAPE.FIRST_KEPT, first_state, operands_at(scratch + PLACES.KEY, RULE),
        first, queries, decays, rate, first_omega,
        (operands_at(scratch + PLACES.INVERSE_FIRST, RULE), operands_at(scratch + PLACES.SCORES_FIRST, RULE)),
        (scratch + PLACES.GRAM_FIRST, scratch + PLACES.PAIRS_FIRST), 0, UNITS, SHAPE.BLOCK_K, SHAPE, RULE,
    )  # fmt: skip
    d_back, by_signal, d_slope, radial = signal_adjoint(d_signal, back, hidden, signal, RULE, SHAPE.PER)
    put_rows(backs, rounded(d_back, RULE), UNITS, SHAPE)
    put_rows(first_recalled, rounded(d_recalled, RULE), UNITS, SHAPE)
    tl.debug_barrier()
    for start in range(0, UNITS, SHAPE.SLICE):
        given = by_width(backs, start, SHAPE.BLOCKS, UNITS, SHAPE)
        d_error += product(weights_at(weights[1], start, OUT // SHAPE.PER, UNITS, SHAPE), given, RULE)
    d_error = bound_adjoint(d_error, last[0], factor, narrow_of(SHAPE), RULE.BOUND, SHAPE.PER)
    put_rows(errors, rounded(d_error, RULE), OUT, SHAPE)
    tl.debug_barrier()

    # The hidden layers at k and v.
    difference = send_back(weights[1], errors, SHAPE, RULE)
    d_key = hidden_adjoint(d_hidden + by_signal + difference, hidden, radial, RULE, SHAPE.PER) + d_slope
    values = None
    if RULE.GENERATES:
        values = operands_at(scratch + PLACES.D_VALUE, RULE)
        d_value = hidden_adjoint(-difference, hidden_value, None, RULE, SHAPE.PER)
        put_rows(values, rounded(d_value, RULE), UNITS, SHAPE)
    put_rows(operands_at(scratch + PLACES.D_KEY, RULE), rounded(d_key, RULE), UNITS, SHAPE)
    tl.debug_barrier()
    give_back(
        scratch + PLACES.FIRST, scratch, first_omega, first_recalled, operands_at(scratch + PLACES.D_KEY, RULE),
        values, queries, decays, rate, scratch + PLACES.GRAM_FIRST, scratch + PLACES.PAIRS_FIRST,
        SHAPE.FIRST_KEPT, UNITS, SHAPE, RULE, PLACES,
    )  # fmt: skip
    return vectors[0] + more[0], vectors[1] + more[1], vectors[2] + more[2]
