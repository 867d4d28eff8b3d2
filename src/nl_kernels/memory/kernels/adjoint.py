"""The backward kernel of a bank of memories: a row of tokens, the last chunk first."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    operands_at,
    put_rows,
    put_weights,
    rounded,
    rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import GATE_INPUT, given_tokens, locate_row, locate_tokens, make_tokens
from nl_kernels.memory.kernels.layer import first_rows, last_rows, memory_of, take_layer
from nl_kernels.memory.kernels.layer_adjoint import vector_shares
from nl_kernels.memory.kernels.learn import (
    ANCHOR,
    ANCHOR_OPERAND,
    BASE_OPERAND,
    D_ANCHOR,
    D_STATE_OPERAND,
    RESUMED,
    SNAPSHOT,
    STATE,
    STATE_OPERAND,
    at_row,
    give_layer,
    learn_chunk,
    own_clock,
)
from nl_kernels.memory.kernels.learn_adjoint import deep_errors_adjoint, linear_errors_adjoint, update_layer
from nl_kernels.memory.kernels.tokens_adjoint import (
    gates_adjoint,
    inputs_adjoint,
    made_adjoint,
    query_adjoint,
    store_rates,
    store_tokens,
    tokens_adjoint,
)


@triton.jit
def take_gradients(
    place, resumed, anchor, d_running, d_snapshot, d_anchor, rows, IN: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """A layer's gradients, anchor and first snapshot to scratch."""
    ROWS: tl.constexpr = rows[1].shape[1]
    take_layer(place + RESUMED * SIZE, resumed, rows, IN, BLOCK, SHAPE)
    take_layer(place + STATE * SIZE, d_running, rows, IN, BLOCK, SHAPE)
    take_layer(place + SNAPSHOT * SIZE, d_snapshot, rows, IN, BLOCK, SHAPE)
    if RULE.ANCHORED:
        take_layer(place + ANCHOR * SIZE, anchor, rows, IN, BLOCK, SHAPE)
        take_layer(place + D_ANCHOR * SIZE, d_anchor, rows, IN, BLOCK, SHAPE)
    tl.debug_barrier()
    for start in range(0, BLOCK, SHAPE.SLICE):
        x = weights_at(place + STATE * SIZE, start, ROWS, BLOCK, SHAPE)
        put_weights(operands_at(place + D_STATE_OPERAND * SIZE, RULE), start, rounded(x, RULE), BLOCK, SHAPE)
        if RULE.ANCHORED:
            x = weights_at(place + ANCHOR * SIZE, start, ROWS, BLOCK, SHAPE)
            put_weights(operands_at(place + ANCHOR_OPERAND * SIZE, RULE), start, rounded(x, RULE), BLOCK, SHAPE)


@triton.jit
def give_gradients(
    place, d_running, d_snapshot, d_anchor, rows, IN: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """A layer's gradients to where they came from."""
    give_layer(place + STATE * SIZE, d_running, rows, IN, BLOCK, SHAPE)
    give_layer(place + SNAPSHOT * SIZE, d_snapshot, rows, IN, BLOCK, SHAPE)
    if RULE.ANCHORED:
        give_layer(place + D_ANCHOR * SIZE, d_anchor, rows, IN, BLOCK, SHAPE)


@triton.jit
def _at_period(
    state, start, CLOCK: tl.constexpr, row, start_at,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Weights kept at the start of the period of ``CLOCK`` that the chunk belongs to, if that was kept."""
    back = start % CLOCK
    chunks = tl.where(start - back > row[3], back // SHAPE.CHUNK, 0)
    return weights_at(state - chunks * SIZE, start_at, ROWS, BLOCK, SHAPE)


@triton.jit
def take_states(
    place, kept, row, start, places, ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Operands of a layer's running weights before the chunk, and of those that it is applied at, to scratch.

    ``kept`` are those at the start of periods, ``places`` the first slot of it for this head and the chunk that it
    belongs to. Returns the chunk's own, and whether they are what it is applied at, too [B, 1, 1].
    """
    state = kept + (places[0] + (start // SHAPE.CHUNK - places[1])) * SIZE
    period = start - start % own_clock(SHAPE)
    inside = (period > row[3])[:, None, None]
    if SHAPE.TRUNCATE > 0:
        end = start + SHAPE.CHUNK
        if (end % SHAPE.TRUNCATE == 0) & (end <= row[4]):  # the gradient is cut after the chunk
            for start_at in range(0, BLOCK, SHAPE.SLICE):
                zeros = 0.0 * weights_at(state, start_at, ROWS, BLOCK, SHAPE)
                put_weights(place + STATE * SIZE, start_at, zeros, BLOCK, SHAPE)
                put_weights(place + SNAPSHOT * SIZE, start_at, zeros, BLOCK, SHAPE)
                at = operands_at(place + D_STATE_OPERAND * SIZE, RULE)
                put_weights(at, start_at, rounded(zeros, RULE), BLOCK, SHAPE)
    for start_at in range(0, BLOCK, SHAPE.SLICE):
        x = weights_at(state, start_at, ROWS, BLOCK, SHAPE)
        put_weights(operands_at(place + STATE_OPERAND * SIZE, RULE), start_at, rounded(x, RULE), BLOCK, SHAPE)
        if SHAPE.MEMORY_CLOCK != SHAPE.CHUNK or SHAPE.OTHERS_CLOCK != SHAPE.CHUNK:
            own = (memory_of(SHAPE) == SHAPE.OWN)[:, None, None]
            x = _at_period(state, start, SHAPE.OTHERS_CLOCK, row, start_at, ROWS, BLOCK, SIZE, SHAPE)
            x = tl.where(own, _at_period(state, start, SHAPE.MEMORY_CLOCK, row, start_at, ROWS, BLOCK, SIZE, SHAPE), x)
        x = tl.where(inside, x, weights_at(place + RESUMED * SIZE, start_at, ROWS, BLOCK, SHAPE))
        if RULE.ANCHORED:
            x += weights_at(place + ANCHOR * SIZE, start_at, ROWS, BLOCK, SHAPE)
        put_weights(operands_at(place + BASE_OPERAND * SIZE, RULE), start_at, rounded(x, RULE), BLOCK, SHAPE)
    return state, (period == start)[:, None, None] & (start > row[3])


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
    first_fresh, last_fresh, decays, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr
):
    """Gradients of all weights before the chunk, from what the tokens' stages have left in scratch."""
    OUT: tl.constexpr = SHAPE.BLOCK_V
    UNITS: tl.constexpr = SHAPE.BLOCK_H
    d_error = rows_of(operands_at(scratch + PLACES.D_ERROR, RULE), SHAPE.BLOCKS, OUT, SHAPE)
    d_recalled = rows_of(operands_at(scratch + PLACES.RECALLED, RULE), SHAPE.BLOCKS, OUT, SHAPE)
    d_read = rows_of(operands_at(scratch + PLACES.READ, RULE), SHAPE.BLOCKS, OUT, SHAPE)
    key, query = operands_at(scratch + PLACES.KEY, RULE), operands_at(scratch + PLACES.QUERY, RULE)
    value, inputs, d_made = None, None, None
    if RULE.GENERATES:
        value = operands_at(scratch + PLACES.VALUE, RULE)
        inputs = operands_at(scratch + PLACES.INPUTS, RULE)
        d_made = rows_of(operands_at(scratch + PLACES.D_MADE, RULE), SHAPE.BLOCKS, OUT, SHAPE)
    if SHAPE.HIDDEN > 0:
        hidden_value, hidden_made = None, None
        if RULE.GENERATES:
            hidden_value = operands_at(scratch + PLACES.HIDDEN_VALUE, RULE)
            hidden_made = operands_at(scratch + PLACES.HIDDEN_MADE, RULE)
        error = rows_of(operands_at(scratch + PLACES.ERROR, RULE), SHAPE.BLOCKS, OUT, SHAPE)
        d_back = operands_at(scratch + PLACES.D_BACK, RULE)
        update_layer(
            scratch + PLACES.LAST, last_fresh, decays, operands_at(scratch + PLACES.HIDDEN_KEY, RULE), hidden_value,
            operands_at(scratch + PLACES.HIDDEN_QUERY, RULE), d_recalled, d_error, None, d_read, error,
            d_back, d_made, hidden_made, SHAPE.BLOCKS, SHAPE.BLOCKS, SHAPE.LAST_KEPT, UNITS, SHAPE, RULE,
        )  # fmt: skip
        d_recalled = rows_of(operands_at(scratch + PLACES.RECALLED_FIRST, RULE), SHAPE.BLOCKS, UNITS, SHAPE)
        d_query = rows_of(operands_at(scratch + PLACES.D_QUERY, RULE), SHAPE.BLOCKS, UNITS, SHAPE)
        d_key = rows_of(operands_at(scratch + PLACES.D_KEY, RULE), SHAPE.BLOCKS, UNITS, SHAPE)
        d_value, d_z = None, None
        if RULE.GENERATES:
            d_value = rows_of(operands_at(scratch + PLACES.D_VALUE, RULE), SHAPE.BLOCKS, UNITS, SHAPE)
            d_z = rows_of(operands_at(scratch + PLACES.D_Z, RULE), SHAPE.BLOCKS, UNITS, SHAPE)
        update_layer(
            scratch + PLACES.FIRST, first_fresh, decays, key, value, query, d_recalled, d_key, d_value,
            d_query, None, None, d_z, inputs, 0, GATE_INPUT, SHAPE.FIRST_KEPT, SHAPE.BLOCK_K, SHAPE, RULE,
        )  # fmt: skip
    else:
        update_layer(
            scratch + PLACES.LAST, last_fresh, decays, key, value, query, d_recalled, d_error, None, d_read,
            None, None, d_made, inputs, 0, GATE_INPUT, SHAPE.LAST_KEPT, SHAPE.BLOCK_K, SHAPE, RULE,
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
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * PLACES.SIZE
    FIRST: tl.constexpr = SHAPE.FIRST_SIZE
    LAST: tl.constexpr = SHAPE.LAST_SIZE
    first_resumed, last_resumed = at_row(resumed, program, FIRST, LAST)
    first_anchor, last_anchor = at_row(anchor, program, FIRST, LAST)
    d_first, d_last = at_row(d_running, program, FIRST, LAST)
    d_first_snapshot, d_last_snapshot = at_row(d_snapshot, program, FIRST, LAST)
    d_first_anchor, d_last_anchor = at_row(d_anchor, program, FIRST, LAST)
    first_kept, last_kept = at_row(kept, 0, 0, 0)
    first, last = scratch + PLACES.FIRST, scratch + PLACES.LAST
    gates = (1.0, 0.0, 0.0)
    if RULE.GENERATES:
        gates = (
            tl.load(tokens.rate_max + head), tl.load(tokens.rate_bias + head), tl.load(tokens.retention_bias + head)
        )  # fmt: skip
    by_rate_max, by_rate, by_retention = 0.0, 0.0, 0.0
    rows = last_rows(SHAPE)
    take_gradients(
        last, last_resumed, last_anchor, d_last, d_last_snapshot, d_last_anchor, rows, SHAPE.LAST_IN,
        SHAPE.LAST_BLOCK, SHAPE.LAST_KEPT, SHAPE, RULE,
    )  # fmt: skip
    if SHAPE.HIDDEN > 0:
        take_gradients(
            first, first_resumed, first_anchor, d_first, d_first_snapshot, d_first_anchor, first_rows(SHAPE),
            SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE.FIRST_KEPT, SHAPE, RULE,
        )  # fmt: skip
    tl.debug_barrier()

    begun = tl.maximum(first_chunk, begin // SHAPE.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + SHAPE.CHUNK - 1) // SHAPE.CHUNK)
    for index in tl.range(begun, ended, disable_licm=True):
        start = (begun + ended - 1 - index) * SHAPE.CHUNK
        row = (sequence, head, origin, begin, stop)
        place = locate_tokens(start, row, T, H, SHAPE)
        _, exists = place
        places = (program * kept_slots, kept_first)
        last_state, last_fresh = take_states(
            last, last_kept, row, start, places, SHAPE.BLOCK_V // SHAPE.PER, SHAPE.LAST_BLOCK, SHAPE.LAST_KEPT,
            SHAPE, RULE,
        )  # fmt: skip
        first_fresh = last_fresh
        if SHAPE.HIDDEN > 0:
            first_state, first_fresh = take_states(
                first, first_kept, row, start, places, SHAPE.BLOCK_H // SHAPE.PER, SHAPE.BLOCK_K,
                SHAPE.FIRST_KEPT, SHAPE, RULE,
            )  # fmt: skip

        # The chunk again.
        first_base = operands_at(first + BASE_OPERAND * SHAPE.FIRST_KEPT, RULE)
        last_base = operands_at(last + BASE_OPERAND * SHAPE.LAST_KEPT, RULE)
        if RULE.GENERATES:
            made_hidden = make_tokens(tokens, first_base, last_base, place, gates, scratch, SHAPE, RULE, PLACES)
        else:
            given_tokens(tokens, place, scratch, SHAPE, RULE, PLACES)
        grad = read_gradient(d_o, place, SHAPE)
        put_rows(operands_at(scratch + PLACES.READ, RULE), rounded(grad, RULE), SHAPE.BLOCK_V, SHAPE)
        tl.debug_barrier()
        found = learn_chunk(scratch, True, SHAPE, RULE, PLACES)

        # Errors and writes.
        if SHAPE.HIDDEN > 0:
            shares = deep_errors_adjoint(first_state, last_state, found, scratch, SHAPE, RULE, PLACES)
        else:
            shares = linear_errors_adjoint(last_state, found, scratch, SHAPE, RULE, PLACES)
        store_shares(shares, scratch + PLACES.RATES, SHAPE)
        tl.debug_barrier()

        # Tokens.
        C: tl.constexpr = SHAPE.BLOCK_C
        d_rate = vector_shares(scratch + PLACES.RATES, SHAPE)
        d_rate += vector_shares(scratch + PLACES.RATES + SHAPE.BLOCKS * C, SHAPE)
        d_log = vector_shares(scratch + PLACES.RATES + 2 * SHAPE.BLOCKS * C, SHAPE)
        d_key, d_value, d_query = tokens_adjoint(d_o, place, scratch, SHAPE, RULE, PLACES)
        if RULE.GENERATES:
            d_query = query_adjoint(d_query, scratch, SHAPE, RULE, PLACES)
            more = gates_adjoint(d_rate, d_log, gates[0], exists, scratch, SHAPE, PLACES)
            by_rate_max += more[0]
            by_rate += more[1]
            by_retention += more[2]
            d_key, d_value = made_adjoint(d_key, d_value, scratch, SHAPE, RULE, PLACES)
            inputs_adjoint(
                d_key, d_value, made_hidden, first_base, last_base, d_tokens, place, scratch, SHAPE, RULE, PLACES
            )
        else:
            store_tokens(d_tokens.key, place, d_key, SHAPE.KEY_DIM)
            store_tokens(d_tokens.value, place, d_value, SHAPE.VALUE_DIM)
            store_rates(d_rate, d_log, d_tokens, place)
        store_tokens(d_tokens.query, place, d_query, SHAPE.KEY_DIM)

        # Weights.
        update_weights(first_fresh, last_fresh, found[0], scratch, SHAPE, RULE, PLACES)
        tl.debug_barrier()

    if RULE.GENERATES:
        add_gates(d_gates + 3 * program, by_rate_max, by_rate, by_retention)
    tl.debug_barrier()
    give_gradients(
        last, d_last, d_last_snapshot, d_last_anchor, rows, SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE.LAST_KEPT,
        SHAPE, RULE,
    )  # fmt: skip
    if SHAPE.HIDDEN > 0:
        give_gradients(
            first, d_first, d_first_snapshot, d_first_anchor, first_rows(SHAPE), SHAPE.KEY_DIM, SHAPE.BLOCK_K,
            SHAPE.FIRST_KEPT, SHAPE, RULE,
        )  # fmt: skip
