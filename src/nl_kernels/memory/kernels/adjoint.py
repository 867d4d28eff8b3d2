"""The backward kernel of a bank of memories: a row of tokens, the last chunk first."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.generate import (
    AFTER,
    QUERY_SCALE,
    given_tokens,
    locate_row,
    locate_tokens,
    make_tokens,
    rates_of,
)
from nl_kernels.memory.kernels.layer import (
    columns_at,
    columns_of,
    first_rows,
    last_rows,
    put_base,
    rows_at,
    vector_at,
)
from nl_kernels.memory.kernels.layer_adjoint import vector_shares
from nl_kernels.memory.kernels.learn import at_row, learn_chunk, own_clock
from nl_kernels.memory.kernels.learn_adjoint import deep_errors_adjoint, linear_errors_adjoint, update_layer
from nl_kernels.memory.kernels.tokens_adjoint import (
    gates_adjoint,
    inputs_adjoint,
    made_adjoint,
    store_rates,
    store_tokens,
    tokens_adjoint,
    unit_adjoint,
)


@triton.jit
def period_base(
    base, kept, resumed, anchor, rows, row, start, places, IN: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """:func:`put_base` of a chunk from the weights ``kept`` at its period's start; whether that is the
    chunk's own.

    ``places`` are the first slot of ``kept`` for this head, and the chunk that it belongs to.
    """
    clock = own_clock(rows[0], SHAPE)
    period = start - start % clock
    slot = places[0] + (period // SHAPE.CHUNK - places[1])
    inside = period > row[3]
    put_base(base, kept + slot * SIZE, resumed, inside, anchor, rows, IN, BLOCK, SHAPE, RULE)
    return (period == start) & (start > row[3])


@triton.jit
def clear_layer(layer, cut, rows, IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """Gradients in memory become zero where ``cut``."""
    for start in range(0, BLOCK, SHAPE.SLICE):
        offsets, inside = columns_of(rows, start, IN, SHAPE.SLICE)
        tl.store(layer + offsets, 0.0, mask=inside & cut)


@triton.jit
def cut_gradients(first, last, start, stop, SHAPE: tl.constexpr):
    """Gradients of weights and snapshots, pairs, become zero where the gradient is cut after the chunk."""
    end = start + SHAPE.CHUNK
    cut = (end % SHAPE.TRUNCATE == 0) & (end <= stop)
    clear_layer(last[0], cut, last_rows(SHAPE), SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE)
    clear_layer(last[1], cut, last_rows(SHAPE), SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE)
    if SHAPE.HIDDEN > 0:
        clear_layer(first[0], cut, first_rows(SHAPE), SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE)
        clear_layer(first[1], cut, first_rows(SHAPE), SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE)


@triton.jit
def store_shares(shares, place, SHAPE: tl.constexpr):
    """All blocks' shares in the gradients of rates (two) and log decays, to scratch."""
    C: tl.constexpr = SHAPE.BLOCK_C
    at = tl.arange(0, SHAPE.BLOCKS)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(place + at[:, None, :], shares[0])
    tl.store(place + SHAPE.BLOCKS * C + at, shares[1])
    tl.store(place + 2 * SHAPE.BLOCKS * C + at[:, None, :], shares[2])


@triton.jit
def add_gates(place, rate_max, rate_bias, retention_bias):
    """A head's gradients of the gates' parameters, added to those in memory."""
    rate_max += tl.load(place)
    rate_bias += tl.load(place + 1)
    retention_bias += tl.load(place + 2)
    tl.debug_barrier()  # all threads load what one of them stores
    tl.store(place, rate_max)
    tl.store(place + 1, rate_bias)
    tl.store(place + 2, retention_bias)


@triton.jit
def read_gradient(d_o, place, SHAPE: tl.constexpr):
    """The gradient of the reads, as rows [B, outputs, C] of the memory that is read; zero for the others."""
    token, exists = place
    memory, row, _, within = last_rows(SHAPE)
    inside = exists[None, None, :] & within & (memory == SHAPE.OWN)
    return tl.load(d_o + token[None, None, :] * SHAPE.VALUE_DIM + row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def update_weights(
    first_grads, last_grads, first_fresh, last_fresh, final, d_made, d_z, tokens, place, scratch,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of all weights before the chunk, from what the tokens' stages have left in scratch."""
    C: tl.constexpr = SHAPE.BLOCK_C
    rows = last_rows(SHAPE)
    after = scratch + PLACES.VECTORS + AFTER * C
    query = scratch + PLACES.QUERY
    d_error = tl.load(rows_at(scratch + PLACES.D_ERROR, rows, SHAPE.BLOCK_V, C, True))
    d_recalled = tl.load(rows_at(scratch + PLACES.RECALLED, rows, SHAPE.BLOCK_V, C, True))
    d_read = tl.load(rows_at(scratch + PLACES.READ, rows, SHAPE.BLOCK_V, C, True))
    key, value = scratch + PLACES.KEY, None
    if RULE.GENERATES:
        value = scratch + PLACES.VALUE
    if SHAPE.HIDDEN > 0:
        hidden, hidden_value, made_from = scratch + PLACES.HIDDEN_KEY, None, None
        if RULE.GENERATES:
            hidden_value, made_from = scratch + PLACES.HIDDEN_VALUE, scratch + PLACES.HIDDEN_MADE
        error = tl.load(rows_at(scratch + PLACES.ERROR, rows, SHAPE.BLOCK_V, C, True))
        update_layer(
            last_grads, rows, last_fresh, final, hidden, hidden_value, scratch + PLACES.HIDDEN_QUERY, rows[0],
            d_recalled, d_error, None, d_read, error, scratch + PLACES.D_BACK, d_made, made_from, tokens,
            place, after,
            SHAPE.HIDDEN, SHAPE.BLOCK_H, SHAPE, RULE,
        )  # fmt: skip
        units = first_rows(SHAPE)
        d_recalled = tl.load(rows_at(scratch + PLACES.RECALLED_FIRST, units, SHAPE.BLOCK_H, C, True))
        d_query = tl.load(rows_at(scratch + PLACES.D_QUERY, units, SHAPE.BLOCK_H, C, True))
        d_key = tl.load(rows_at(scratch + PLACES.D_KEY, units, SHAPE.BLOCK_H, C, True))
        if RULE.GENERATES:
            d_value = tl.load(rows_at(scratch + PLACES.D_VALUE, units, SHAPE.BLOCK_H, C, True))
        else:
            d_value: tl.constexpr = None
        update_layer(
            first_grads, units, first_fresh, final, key, value, query, None, d_recalled, d_key, d_value,
            d_query, None,
            None, d_z, None, tokens, place, after, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE, RULE,
        )  # fmt: skip
    else:
        update_layer(
            last_grads, rows, last_fresh, final, key, value, query, None, d_recalled, d_error, None, d_read,
            None, None,
            d_made, None, tokens, place, after, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE, RULE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "offset", "first_chunk", "stop_chunk", "kept_first", "kept_slots"])
def learn_adjoint_kernel(
    tokens, kept, resumed, anchor, d_o, d_tokens, d_running, d_snapshot, d_anchor, d_gates, scratch,
    T, H, offset, first_chunk, stop_chunk, kept_first, kept_slots,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of chunks ``first_chunk`` … ``stop_chunk`` − 1 of each head, the last chunk first.

    ``kept`` [N, slots, ..] are the running weights before each of these chunks, ``resumed`` the snapshot that
    the call began with. Gradients of weights and of gates [N, 3] are updated in place: those of weights begin
    as the gradients of the weights after the chunks, and end as those of the weights before.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * PLACES.SIZE
    first_resumed, last_resumed = at_row(resumed, program, SHAPE)
    first_anchor, last_anchor = at_row(anchor, program, SHAPE)
    d_first, d_last = at_row(d_running, program, SHAPE)
    d_first_snapshot, d_last_snapshot = at_row(d_snapshot, program, SHAPE)
    d_first_anchor, d_last_anchor = at_row(d_anchor, program, SHAPE)
    first_base, last_base = scratch + PLACES.FIRST_BASE, scratch + PLACES.LAST_BASE
    rate_max, gates = 1.0, (0.0, 0.0)
    if RULE.GENERATES:
        rate_max = tl.load(tokens.rate_max + head)
        gates = (tl.load(tokens.rate_bias + head), tl.load(tokens.retention_bias + head))
    by_rate_max, by_rate, by_retention = 0.0, 0.0, 0.0
    rows = last_rows(SHAPE)

    begun = tl.maximum(first_chunk, begin // SHAPE.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + SHAPE.CHUNK - 1) // SHAPE.CHUNK)
    for index in tl.range(begun, ended, disable_licm=True):
        chunk = begun + ended - 1 - index
        start = chunk * SHAPE.CHUNK
        row = (sequence, head, origin, begin, stop)
        place = locate_tokens(start, row, T, H, SHAPE)
        _, exists = place
        first_state, last_state = at_row(kept, program * kept_slots + (chunk - kept_first), SHAPE)
        places = (program * kept_slots, kept_first)
        last_fresh = period_base(
            last_base, kept.last, last_resumed, last_anchor, rows, row, start, places, SHAPE.LAST_IN,
            SHAPE.LAST_BLOCK,
            SHAPE.LAST_SIZE, SHAPE, RULE,
        )  # fmt: skip
        first_fresh = last_fresh
        if SHAPE.HIDDEN > 0:
            first_fresh = period_base(
                first_base, kept.first, first_resumed, first_anchor, first_rows(SHAPE), row, start, places,
                SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE.FIRST_SIZE, SHAPE, RULE,
            )  # fmt: skip
        if SHAPE.TRUNCATE > 0:
            cut_gradients((d_first, d_first_snapshot), (d_last, d_last_snapshot), start, stop, SHAPE)
        tl.debug_barrier()

        # The chunk again.
        if RULE.GENERATES:
            made_hidden = make_tokens(
                tokens, first_base, last_base, place, gates, scratch, SHAPE, RULE, PLACES
            )
        else:
            given_tokens(tokens, place, scratch, SHAPE, PLACES)
        tl.debug_barrier()
        rate, log = rates_of(rate_max, exists, scratch, SHAPE, RULE, PLACES)
        first_weights = (first_state, first_base, first_anchor)
        last_weights = (last_state, last_base, last_anchor)
        found = learn_chunk(first_weights, last_weights, rate, log, scratch, True, SHAPE, RULE, PLACES)
        final = found[0][5]
        after = scratch + PLACES.VECTORS + AFTER * C + tl.arange(0, C)
        tl.store(after[None, None, :], found[0][3])
        grad = read_gradient(d_o, place, SHAPE)
        tl.store(rows_at(scratch + PLACES.READ, rows, SHAPE.BLOCK_V, C, True), grad)

        # Errors and writes.
        if SHAPE.HIDDEN > 0:
            shares = deep_errors_adjoint(
                d_first, d_last, first_weights, last_weights, found, rate, scratch, SHAPE, RULE, PLACES
            )
        else:
            shares = linear_errors_adjoint(d_last, last_weights, found, rate, scratch, SHAPE, RULE, PLACES)
        store_shares(shares, scratch + PLACES.RATES, SHAPE)
        tl.debug_barrier()

        # Tokens.
        d_rate = vector_shares(scratch + PLACES.RATES, SHAPE)
        d_rate += vector_shares(scratch + PLACES.RATES + SHAPE.BLOCKS * C, SHAPE)
        d_log = vector_shares(scratch + PLACES.RATES + 2 * SHAPE.BLOCKS * C, SHAPE)
        d_key, d_value, d_query = tokens_adjoint(d_o, place, scratch, SHAPE, RULE, PLACES)
        if RULE.GENERATES:
            query = columns_at(scratch + PLACES.QUERY, None, 0, SHAPE.BLOCK_K, C, SHAPE.BLOCK_K)
            d_query = unit_adjoint(d_query, query, vector_at(scratch + PLACES.VECTORS + QUERY_SCALE * C, C))
            d_rate, d_retention, d_rate_max = gates_adjoint(
                d_rate, d_log, rate_max, exists, scratch, SHAPE, PLACES
            )
            by_rate_max += tl.sum(d_rate_max, 0)
            by_rate += tl.sum(d_rate, 0)
            by_retention += tl.sum(d_retention, 0)
            d_made = made_adjoint(d_key, d_value, (d_rate, d_retention), scratch, SHAPE, PLACES)
            d_z = inputs_adjoint(
                d_made, made_hidden, first_base, last_base, d_tokens, place, scratch, SHAPE, RULE, PLACES
            )
        else:
            store_tokens(d_tokens.key, place, d_key, SHAPE.KEY_DIM)
            store_tokens(d_tokens.value, place, d_value, SHAPE.VALUE_DIM)
            store_rates(d_rate, d_log, d_tokens, place)
            d_made = None
            d_z = None
        store_tokens(d_tokens.query, place, d_query, SHAPE.KEY_DIM)

        # Weights.
        update_weights(
            (d_first, d_first_snapshot, d_first_anchor), (d_last, d_last_snapshot, d_last_anchor),
            first_fresh,
            last_fresh, final, d_made, d_z, tokens, place, scratch, SHAPE, RULE, PLACES,
        )  # fmt: skip
        tl.debug_barrier()

    if RULE.GENERATES:
        add_gates(d_gates + 3 * program, by_rate_max, by_rate, by_retention)
