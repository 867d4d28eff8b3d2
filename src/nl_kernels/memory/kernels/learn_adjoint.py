"""The derivative of :mod:`nl_kernels.memory.kernels.learn`: one program a head, the last chunk first.
 A chunk is computed again from the weights before it. Its gradients then go back in three stages: errors and
writes, which sum over rows of weights; the tokens, which add up what all blocks of rows have for them; and
the weights, whose gradients are updated in memory.
"""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.generate import (
    memory_inputs,
)
from nl_kernels.memory.kernels.layer import (
    columns_at,
    columns_of,
    first_rows,
    last_rows,
    load_weights,
    outputs_of,
    product,
    rows_at,
    tokens_at,
    turned_columns_of,
    vector_at,
    zeros_of,
)
from nl_kernels.memory.kernels.layer_adjoint import (
    bound_adjoint,
    carried_adjoint,
    decays_adjoint,
    hidden_adjoint,
    pair_shares,
    read_adjoint,
    signal_adjoint,
    square_at,
    turned_rows_at,
    turned_square_at,
    write_adjoint,
)
from nl_kernels.memory.kernels.learn import send_back


@triton.jit
def keep_layer(place, layer, rows, SIZE: tl.constexpr, squares, SHAPE: tl.constexpr, RULE: tl.constexpr):
    """ω, the inverse and the scores of a layer go to scratch, to be taken back turned."""
    C: tl.constexpr = SHAPE.BLOCK_C
    inverse, scores = squares
    tl.store(rows_at(place, rows, SIZE, C, True), layer[4])
    tl.store(square_at(inverse, layer[3].shape[0], C), layer[3])
    if RULE.RUNNING:
        tl.store(square_at(scores, layer[7].shape[0], C), layer[7])


@triton.jit
def add_vectors(total, more):
    """Shares in the gradients of rates and log decays, of two layers."""
    return total[0] + more[0], total[1] + more[1], total[2] + more[2]


@triton.jit
def layer_adjoint(
    d_state, state, rows, key, memory, layer, grad, decays, rate, omega, squares, shares,
    SIZE: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's write and running read: of the signal and of the recall [B, rows, C].

    ``grad`` is that of the read's rows, in scratch. Shares in those of the inner products go to ``shares``,
    those in the gradients of rates and log decays are returned, [B, 1, C], [B, C], [B, 1, C].
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    d_written, d_final = carried_adjoint(d_state, state, rows, key, memory, IN, BLOCK, SHAPE, RULE)
    d_written *= decays[4]
    d_to_end = tl.sum(layer[4] * d_written, 1)[:, None, :] * -rate[None, None, :]
    turned = tl.load(turned_rows_at(omega, rows, SIZE, C))
    if RULE.RUNNING:
        scores = tl.load(turned_square_at(squares[1], layer[7].shape[0], C))
        by_read = tl.load(rows_at(grad, rows, SIZE, C, True))
        by_read, d_full, products, d_after = read_adjoint(by_read, layer, turned, scores, decays, rate, RULE)
        tl.store(square_at(shares[1], SHAPE.BLOCKS, C), products)
        d_written += by_read
    inverse = tl.load(turned_square_at(squares[0], layer[3].shape[0], C))
    d_signal, d_recalled, products, d_strict, d_rate, d_pair_rate, d_before = write_adjoint(
        d_written, layer, turned, inverse, decays, rate, SHAPE, RULE
    )
    tl.store(square_at(shares[0], SHAPE.BLOCKS, C), products)
    if not RULE.RUNNING:
        d_full, d_after = 0.0 * d_strict, 0.0 * d_before
    d_log = decays_adjoint(d_strict, d_full, d_before, d_after, d_to_end, d_final * decays[5], SHAPE, RULE)
    return d_signal, d_recalled, (d_rate, d_pair_rate, d_log)


@triton.jit
def give_back(
    d_state, layer, rows, written, d_recalled, d_key, d_value, d_read, d_fixed, place,
    SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Shares in the gradients of keys, values and queries of the layer that they enter, to ``place``.

    Of rows [B, rows, C]: u times the decays to the end; gradients of S k; of W̄ k and W̄ v (``None``: minus
    that of W̄ k); of S q, and of W_0 q, or W̄ q where reads are of the snapshot.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    state, base, anchor = layer
    block = tl.arange(0, SHAPE.BLOCKS)[:, None, None]
    for start in range(0, SHAPE.BLOCK_K, SHAPE.SLICE):
        places = turned_columns_of(rows, start, SHAPE.KEY_DIM, SHAPE.SLICE)
        weights = load_weights(base, places)
        key = product(weights, d_key, RULE)
        value = -key
        if d_value is not None:
            value = product(weights, d_value, RULE)
        if RULE.RUNNING:
            query = zeros_of(SHAPE.SLICE, SHAPE)
            if RULE.ANCHORED:
                query += product(load_weights(anchor, places), d_fixed, RULE)
        else:
            query = product(weights, d_fixed, RULE)
        key += product(load_weights(d_state, places), written, RULE)
        if RULE.ERASES or RULE.RUNNING:
            weights = load_weights(state, places)
        if RULE.ERASES:
            key += product(weights, d_recalled, RULE)
        if RULE.RUNNING:
            query += product(weights, d_read, RULE)
        number = start + tl.arange(0, SHAPE.SLICE)[None, :, None]
        at = (block * SHAPE.BLOCK_K + number) * C + tl.arange(0, C)[None, None, :]
        tl.store(place + at, key)
        tl.store(place + SHAPE.BLOCKS * SHAPE.BLOCK_K * C + at, value)
        tl.store(place + 2 * SHAPE.BLOCKS * SHAPE.BLOCK_K * C + at, query)


@triton.jit
def last_layer_back(
    d_state, layer, decays, rate, omega, recalled, grad,
    SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """What the last layers' writes and reads give to their keys and queries [B, h, C], their pairs apart."""
    C: tl.constexpr = SHAPE.BLOCK_C
    state, base, anchor = layer
    memory, _, _, _ = first_rows(SHAPE)
    _, _, _, after, to_end, _ = decays
    key = zeros_of(SHAPE.BLOCK_H // SHAPE.PER, SHAPE)
    query = key
    for start in range(0, SHAPE.BLOCK_V, SHAPE.SLICE):
        places = outputs_of(start, SHAPE)
        running = load_weights(state, places)
        x = columns_at(omega, memory, start, SHAPE.BLOCK_V, C, SHAPE.SLICE) * (-rate[None, None, :] * to_end)
        key += product(load_weights(d_state, places), x, RULE)
        if RULE.ERASES:
            x = columns_at(recalled, memory, start, SHAPE.BLOCK_V, C, SHAPE.SLICE)
            key += product(running, x, RULE)
        x = columns_at(grad, memory, start, SHAPE.BLOCK_V, C, SHAPE.SLICE)
        if RULE.RUNNING:
            query += product(running, x * after, RULE)
            if RULE.ANCHORED:
                query += product(load_weights(anchor, places), x, RULE)
        else:
            query += product(load_weights(base, places), x, RULE)
    return key, query


@triton.jit
def update_layer(
    grads, rows, fresh, final, key, value, query, memory, d_recalled, d_key, d_value, d_read, more, more_from,
    made, made_from, tokens, place, after,
    IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's weights before the chunk, in place: running, snapshot and anchor, ``grads``.

    Rows [B, rows, C] and the tokens in scratch that they belong to: of S k; of W̄ k and W̄ v (``None``: minus
    that of W̄ k); of the reads; ``more``, if there is more; and of what the layer ``made`` of other tokens,
    or of the caller's where ``made_from`` is ``None``. Where ``fresh`` [B, 1, 1] the chunk began with a
    snapshot of the running weights, which then get the snapshot's gradient, too.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    d_state, d_snapshot, d_anchor = grads
    token, exists = place
    block = tl.arange(0, SHAPE.BLOCKS)[:, None, None] // SHAPE.PER
    for start in range(0, BLOCK, SHAPE.SLICE):
        offsets, inside = columns_of(rows, start, IN, SHAPE.SLICE)
        x = tokens_at(key, memory, start, BLOCK, C, SHAPE.SLICE)
        grad = final * tl.load(d_state + offsets, mask=inside, other=0.0)
        if RULE.ERASES:
            grad += product(d_recalled, x, RULE)
        if value is not None:
            v = tokens_at(value, memory, start, BLOCK, C, SHAPE.SLICE)
            if d_value is None:
                x -= v
        at_base = product(d_key, x, RULE)
        if d_value is not None:
            at_base += product(d_value, v, RULE)
        if more is not None:
            x = tokens_at(more_from, memory, start, BLOCK, C, SHAPE.SLICE)
            at_base += product(more, x, RULE)
        if made is not None:
            if made_from is not None:
                x = tokens_at(made_from, memory, start, BLOCK, C, SHAPE.SLICE)
            else:
                number = start + tl.arange(0, SHAPE.SLICE)[None, None, :]
                x = memory_inputs(tokens, block, (token[None, :, None], exists[None, :, None]), number, SHAPE)
            at_base += product(made, x, RULE)
        x = tokens_at(query, memory, start, BLOCK, C, SHAPE.SLICE)
        by_anchor = at_base
        if RULE.RUNNING:
            grad += product(d_read, x * vector_at(after, C)[None, :, None], RULE)
            if RULE.ANCHORED:
                by_anchor += product(d_read, x, RULE)
        else:
            at_base += product(d_read, x, RULE)
            by_anchor = at_base
        # Only a snapshot from before the chunk's running weights has a gradient of its own.
        at_base += tl.load(d_snapshot + offsets, mask=inside, other=0.0)
        tl.store(d_state + offsets, grad + tl.where(fresh, at_base, 0.0), mask=inside)
        tl.store(d_snapshot + offsets, tl.where(fresh, 0.0, at_base), mask=inside)
        if RULE.ANCHORED:
            total = tl.load(d_anchor + offsets, mask=inside, other=0.0) + by_anchor
            tl.store(d_anchor + offsets, total, mask=inside)


@triton.jit
def linear_errors_adjoint(
    d_last, weights, chunk, rate, scratch,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of the errors and writes of linear memories go to scratch, as do shares in those of the
    tokens.

    ``chunk`` is of :func:`learn_chunk`; the gradient of the reads [memories, outputs, C] is in scratch.
    Returns the shares in the gradients of rates and log decays.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    decays, _, last, _, factor, _ = chunk
    rows = last_rows(SHAPE)
    squares = (scratch + PLACES.INVERSE, scratch + PLACES.SCORES)
    keep_layer(scratch + PLACES.OMEGA, last, rows, SHAPE.BLOCK_V, squares, SHAPE, RULE)
    tl.debug_barrier()
    d_signal, d_recalled, vectors = layer_adjoint(
        d_last, weights[0], rows, scratch + PLACES.KEY, None, last, scratch + PLACES.READ, decays, rate,
        scratch + PLACES.OMEGA, squares,
        (scratch + PLACES.GRAM, scratch + PLACES.PAIRS), SHAPE.BLOCK_V, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE,
        RULE,
    )  # fmt: skip
    d_error = bound_adjoint(d_signal, last[0], factor, narrow_of(rows, SHAPE), RULE.BOUND, SHAPE.PER)
    tl.store(rows_at(scratch + PLACES.D_ERROR, rows, SHAPE.BLOCK_V, C, True), d_error)
    tl.store(rows_at(scratch + PLACES.RECALLED, rows, SHAPE.BLOCK_V, C, True), d_recalled)
    grad = tl.load(rows_at(scratch + PLACES.READ, rows, SHAPE.BLOCK_V, C, True))
    give_back(
        d_last, weights, rows, last[4] * (-rate[None, None, :] * decays[4]), d_recalled, d_error, None,
        decays[3] * grad, grad,
        scratch + PLACES.SHARES, SHAPE, RULE,
    )  # fmt: skip
    return vectors


@triton.jit
def narrow_of(rows, SHAPE: tl.constexpr):
    """Which blocks are of memories whose outputs are bounded one by one [B, 1, 1], or ``None``."""
    if SHAPE.NARROW > 0:
        return rows[0] >= SHAPE.WIDE


@triton.jit
def deep_errors_adjoint(
    d_first, d_last, first_weights, last_weights, chunk, rate, scratch,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """As :func:`linear_errors_adjoint`, of memories of two layers."""
    C: tl.constexpr = SHAPE.BLOCK_C
    decays, first, last, hiddens, factor, _ = chunk
    hidden, hidden_value, hidden_query, back, signal = hiddens
    rows, units = last_rows(SHAPE), first_rows(SHAPE)
    memory = rows[0]
    squares = (scratch + PLACES.INVERSE, scratch + PLACES.SCORES)
    first_squares = (scratch + PLACES.INVERSE_FIRST, scratch + PLACES.SCORES_FIRST)
    keep_layer(scratch + PLACES.OMEGA, last, rows, SHAPE.BLOCK_V, squares, SHAPE, RULE)
    keep_layer(scratch + PLACES.OMEGA_FIRST, first, units, SHAPE.BLOCK_H, first_squares, SHAPE, RULE)
    tl.debug_barrier()

    # The last layers, and what they give to the hidden layers at keys and queries.
    d_error, d_recalled, vectors = layer_adjoint(
        d_last, last_weights[0], rows, scratch + PLACES.HIDDEN_KEY, memory, last, scratch + PLACES.READ,
        decays, rate,
        scratch + PLACES.OMEGA, squares, (scratch + PLACES.GRAM, scratch + PLACES.PAIRS),
        SHAPE.BLOCK_V, SHAPE.HIDDEN, SHAPE.BLOCK_H, SHAPE, RULE,
    )  # fmt: skip
    tl.store(rows_at(scratch + PLACES.RECALLED, rows, SHAPE.BLOCK_V, C, True), d_recalled)
    tl.debug_barrier()
    d_hidden, d_query = last_layer_back(
        d_last, last_weights, decays, rate, scratch + PLACES.OMEGA, scratch + PLACES.RECALLED,
        scratch + PLACES.READ, SHAPE, RULE,
    )  # fmt: skip
    if RULE.ERASES:
        pairs = pair_shares(scratch + PLACES.GRAM, memory, False, SHAPE)
        pairs += pair_shares(scratch + PLACES.GRAM, memory, True, SHAPE)
        d_hidden += product(hidden[0], pairs, RULE)
    if RULE.RUNNING:
        pairs = pair_shares(scratch + PLACES.PAIRS, memory, False, SHAPE)
        d_query += product(hidden[0], pairs, RULE)
        pairs = pair_shares(scratch + PLACES.PAIRS, memory, True, SHAPE)
        d_hidden += product(hidden_query[0], pairs, RULE)
    d_query = hidden_adjoint(d_query, hidden_query, None, RULE, SHAPE.PER)
    tl.store(rows_at(scratch + PLACES.D_QUERY, units, SHAPE.BLOCK_H, C, True), d_query)
    tl.debug_barrier()

    # The first layers and the error signal.
    d_signal, d_recalled, more = layer_adjoint(
        d_first, first_weights[0], units, scratch + PLACES.KEY, None, first, scratch + PLACES.D_QUERY,
        decays, rate,
        scratch + PLACES.OMEGA_FIRST, first_squares, (scratch + PLACES.GRAM_FIRST, scratch +
        PLACES.PAIRS_FIRST),
        SHAPE.BLOCK_H, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE, RULE,
    )  # fmt: skip
    d_back, by_signal, d_slope, radial = signal_adjoint(d_signal, back, hidden, signal, RULE, SHAPE.PER)
    tl.store(rows_at(scratch + PLACES.D_BACK, units, SHAPE.BLOCK_H, C, True), d_back)
    tl.debug_barrier()
    for start in range(0, SHAPE.BLOCK_H, SHAPE.SLICE):
        weights = load_weights(last_weights[1], columns_of(rows, start, SHAPE.HIDDEN, SHAPE.SLICE))
        x = columns_at(scratch + PLACES.D_BACK, memory, start, SHAPE.BLOCK_H, C, SHAPE.SLICE)
        d_error += product(weights, x, RULE)
    d_error = bound_adjoint(d_error, last[0], factor, narrow_of(rows, SHAPE), RULE.BOUND, SHAPE.PER)
    tl.store(rows_at(scratch + PLACES.D_ERROR, rows, SHAPE.BLOCK_V, C, True), d_error)
    tl.debug_barrier()

    # The hidden layers at k and v.
    difference = send_back(last_weights[1], scratch + PLACES.D_ERROR, SHAPE, RULE)
    d_key = hidden_adjoint(d_hidden + by_signal + difference, hidden, radial, RULE, SHAPE.PER) + d_slope
    if RULE.GENERATES:
        d_value = hidden_adjoint(-difference, hidden_value, None, RULE, SHAPE.PER)
        tl.store(rows_at(scratch + PLACES.D_VALUE, units, SHAPE.BLOCK_H, C, True), d_value)
    else:
        d_value: tl.constexpr = None
    tl.store(rows_at(scratch + PLACES.D_KEY, units, SHAPE.BLOCK_H, C, True), d_key)
    tl.store(rows_at(scratch + PLACES.RECALLED_FIRST, units, SHAPE.BLOCK_H, C, True), d_recalled)
    d_query = tl.load(rows_at(scratch + PLACES.D_QUERY, units, SHAPE.BLOCK_H, C, True))
    give_back(
        d_first, first_weights, units, first[4] * (-rate[None, None, :] * decays[4]), d_recalled, d_key,
        d_value, decays[3] * d_query,
        d_query, scratch + PLACES.SHARES, SHAPE, RULE,
    )  # fmt: skip
    return add_vectors(vectors, more)
