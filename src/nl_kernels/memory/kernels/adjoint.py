"""The backward kernel of a bank of memories: a row of tokens, the last chunk first."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.forward import at_row, give_layer, own_clock
from nl_kernels.memory.kernels.fragments import (
    operands_at,
    put_rows,
    put_weights,
    rounded,
    rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import (
    GATE_INPUT,
    gates_of,
    given_tokens,
    locate_row,
    locate_tokens,
    make_tokens,
)
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
    learn_chunk,
)
from nl_kernels.memory.kernels.learn_adjoint import deep_errors_adjoint, linear_errors_adjoint, update_layer
from nl_kernels.memory.kernels.tokens_adjoint import (
    gates_adjoint,
    inputs_adjoint,
    made_adjoint,
    query_adjoint,
    store_rates,
    store_scale,
    store_tokens,
    tokens_adjoint,
)


@triton.jit
def take_gradients(
    place, resumed, anchor, d_running, d_snapshot, d_anchor, rows, IN: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """A layer's gradients, anchor and first snapshot to scratch."""
    d_state = operands_at(place + D_STATE_OPERAND * SIZE, BANK)
    take_layer(place + RESUMED * SIZE, None, resumed, None, rows, IN, BLOCK, BANK)
    take_layer(place + STATE * SIZE, d_state, d_running, None, rows, IN, BLOCK, BANK)
    take_layer(place + SNAPSHOT * SIZE, None, d_snapshot, None, rows, IN, BLOCK, BANK)
    if BANK.ANCHORED:
        at = operands_at(place + ANCHOR_OPERAND * SIZE, BANK)
        take_layer(place + ANCHOR * SIZE, at, anchor, None, rows, IN, BLOCK, BANK)
        take_layer(place + D_ANCHOR * SIZE, None, d_anchor, None, rows, IN, BLOCK, BANK)


@triton.jit
def give_gradients(
    place, d_running, d_snapshot, d_anchor, rows, IN: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """A layer's gradients to where they came from."""
    give_layer(place + STATE * SIZE, d_running, rows, IN, BLOCK, BANK)
    give_layer(place + SNAPSHOT * SIZE, d_snapshot, rows, IN, BLOCK, BANK)
    if BANK.ANCHORED:
        give_layer(place + D_ANCHOR * SIZE, d_anchor, rows, IN, BLOCK, BANK)


@triton.jit
def _at_period(
    state, start, CLOCK: tl.constexpr, row, start_at, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """Weights kept at the start of the period of ``CLOCK`` that the chunk belongs to, if that was kept."""
    back = start % CLOCK
    chunks = tl.where(start - back > row[3], back // BANK.CHUNK, 0)
    return weights_at(state - chunks * SIZE, start_at, ROWS, BLOCK, BANK)


@triton.jit
def take_states(
    place, kept, row, start, places, ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """Operands of a layer's running weights before the chunk, and of those that it is applied at, to scratch.

    ``places`` are the first slot of ``kept`` for this head, and the chunk that it belongs to. Returns the
    chunk's own, and whether they are what it is applied at, too [B, 1, 1].
    """
    state = kept + (places[0] + (start // BANK.CHUNK - places[1])) * SIZE
    period = start - start % own_clock(BANK)
    inside = (period > row[3])[:, None, None]
    if BANK.TRUNCATE > 0:
        end = start + BANK.CHUNK
        if (end % BANK.TRUNCATE == 0) & (end <= row[4]):  # the gradient is cut after the chunk
            for start_at in range(0, BLOCK, BANK.SLICE):
                zeros = 0.0 * weights_at(state, start_at, ROWS, BLOCK, BANK)
                put_weights(place + STATE * SIZE, start_at, zeros, BLOCK, BANK)
                put_weights(place + SNAPSHOT * SIZE, start_at, zeros, BLOCK, BANK)
                at = operands_at(place + D_STATE_OPERAND * SIZE, BANK)
                put_weights(at, start_at, rounded(zeros, BANK), BLOCK, BANK)
    for start_at in range(0, BLOCK, BANK.SLICE):
        x = weights_at(state, start_at, ROWS, BLOCK, BANK)
        put_weights(operands_at(place + STATE_OPERAND * SIZE, BANK), start_at, rounded(x, BANK), BLOCK, BANK)
        if BANK.MEMORY_CLOCK != BANK.CHUNK or BANK.OTHERS_CLOCK != BANK.CHUNK:
            own = (memory_of(BANK) == BANK.OWN)[:, None, None]
            x = _at_period(state, start, BANK.OTHERS_CLOCK, row, start_at, ROWS, BLOCK, SIZE, BANK)
            x = tl.where(
                own, _at_period(state, start, BANK.MEMORY_CLOCK, row, start_at, ROWS, BLOCK, SIZE, BANK), x
            )
        x = tl.where(inside, x, weights_at(place + RESUMED * SIZE, start_at, ROWS, BLOCK, BANK))
        if BANK.ANCHORED:
            x += weights_at(place + ANCHOR * SIZE, start_at, ROWS, BLOCK, BANK)
        put_weights(operands_at(place + BASE_OPERAND * SIZE, BANK), start_at, rounded(x, BANK), BLOCK, BANK)
    return state, (period == start)[:, None, None] & (start > row[3])


@triton.jit
def store_shares(shares, place, BANK: tl.constexpr):
    """All blocks' shares in the gradients of rates (two) and log decays, to scratch."""
    C: tl.constexpr = BANK.BLOCK_C
    at = tl.arange(0, BANK.BLOCKS)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(place + at[:, None, :], shares[0])
    tl.store(place + BANK.BLOCKS * C + at, shares[1])
    tl.store(place + 2 * BANK.BLOCKS * C + at[:, None, :], shares[2])


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
def read_gradient(d_o, place, BANK: tl.constexpr):
    """The gradient of the reads, as rows [B, outputs, C] of the memory that is read; zero for the others."""
    token, exists = place
    memory, row, _, within = last_rows(BANK)
    inside = exists[None, None, :] & within & (memory == BANK.OWN)
    return tl.load(d_o + token[None, None, :] * BANK.VALUE_DIM + row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def update_weights(first_fresh, last_fresh, decays, scratch, BANK: tl.constexpr):
    """Gradients of all weights before the chunk, from what the tokens' stages have left in scratch."""
    OUT: tl.constexpr = BANK.BLOCK_V
    UNITS: tl.constexpr = BANK.BLOCK_H
    d_error = rows_of(operands_at(scratch + BANK.D_ERROR, BANK), BANK.BLOCKS, OUT, BANK)
    d_recalled = rows_of(operands_at(scratch + BANK.RECALLED, BANK), BANK.BLOCKS, OUT, BANK)
    d_read = rows_of(operands_at(scratch + BANK.READ, BANK), BANK.BLOCKS, OUT, BANK)
    key, query = operands_at(scratch + BANK.KEY, BANK), operands_at(scratch + BANK.QUERY, BANK)
    value, inputs, d_made = None, None, None
    if BANK.GENERATES:
        value = operands_at(scratch + BANK.VALUE, BANK)
        inputs = operands_at(scratch + BANK.INPUTS, BANK)
        d_made = rows_of(operands_at(scratch + BANK.D_MADE, BANK), BANK.BLOCKS, OUT, BANK)
    if BANK.HIDDEN > 0:
        hidden_value, hidden_made = None, None
        if BANK.GENERATES:
            hidden_value = operands_at(scratch + BANK.HIDDEN_VALUE, BANK)
            hidden_made = operands_at(scratch + BANK.HIDDEN_MADE, BANK)
        error = rows_of(operands_at(scratch + BANK.ERROR, BANK), BANK.BLOCKS, OUT, BANK)
        d_back = operands_at(scratch + BANK.D_BACK, BANK)
        update_layer(
            scratch + BANK.LAST, last_fresh, decays, operands_at(scratch + BANK.HIDDEN_KEY, BANK),
            hidden_value, operands_at(scratch + BANK.HIDDEN_QUERY, BANK), d_recalled, d_error, None, d_read,
            error, d_back, d_made, hidden_made, BANK.BLOCKS, BANK.BLOCKS, BANK.LAST_KEPT, UNITS, BANK,
        )  # fmt: skip
        d_recalled = rows_of(operands_at(scratch + BANK.RECALLED_FIRST, BANK), BANK.BLOCKS, UNITS, BANK)
        d_query = rows_of(operands_at(scratch + BANK.D_QUERY, BANK), BANK.BLOCKS, UNITS, BANK)
        d_key = rows_of(operands_at(scratch + BANK.D_KEY, BANK), BANK.BLOCKS, UNITS, BANK)
        d_value, d_z = None, None
        if BANK.GENERATES:
            d_value = rows_of(operands_at(scratch + BANK.D_VALUE, BANK), BANK.BLOCKS, UNITS, BANK)
            d_z = rows_of(operands_at(scratch + BANK.D_Z, BANK), BANK.BLOCKS, UNITS, BANK)
        update_layer(
            scratch + BANK.FIRST, first_fresh, decays, key, value, query, d_recalled, d_key, d_value, d_query,
            None, None, d_z, inputs, 0, GATE_INPUT, BANK.FIRST_KEPT, BANK.BLOCK_K, BANK,
        )  # fmt: skip
    else:
        update_layer(
            scratch + BANK.LAST, last_fresh, decays, key, value, query, d_recalled, d_error, None, d_read,
            None, None, d_made, inputs, 0, GATE_INPUT, BANK.LAST_KEPT, BANK.BLOCK_K, BANK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "offset", "first_chunk", "stop_chunk", "kept_first", "kept_slots"])
def learn_adjoint_kernel(
    tokens, kept, resumed, anchor, d_o, d_tokens, d_running, d_snapshot, d_anchor, d_gates, scratch, T, H,
    offset, first_chunk, stop_chunk, kept_first, kept_slots, BANK: tl.constexpr,
):  # fmt: skip
    """Gradients of chunks ``first_chunk`` … ``stop_chunk`` − 1 of each head, the last chunk first.

    ``kept`` [N, slots, ..] are the running weights before each of these chunks, ``resumed`` the snapshot that
    the call began with. Gradients of weights and of gates [N, 3] are updated in place: those of weights begin
    as the gradients of the weights after the chunks, and end as those of the weights before.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * BANK.SIZE
    FIRST: tl.constexpr = BANK.FIRST_SIZE
    LAST: tl.constexpr = BANK.LAST_SIZE
    first_resumed, last_resumed = at_row(resumed, program, FIRST, LAST)
    first_anchor, last_anchor = at_row(anchor, program, FIRST, LAST)
    d_first, d_last = at_row(d_running, program, FIRST, LAST)
    d_first_snapshot, d_last_snapshot = at_row(d_snapshot, program, FIRST, LAST)
    d_first_anchor, d_last_anchor = at_row(d_anchor, program, FIRST, LAST)
    first_kept, last_kept = at_row(kept, 0, 0, 0)
    first, last = scratch + BANK.FIRST, scratch + BANK.LAST
    gates = gates_of(tokens, head, BANK)
    by_rate_max, by_rate, by_retention = 0.0, 0.0, 0.0
    rows = last_rows(BANK)
    take_gradients(
        last, last_resumed, last_anchor, d_last, d_last_snapshot, d_last_anchor, rows, BANK.LAST_IN,
        BANK.LAST_BLOCK, BANK.LAST_KEPT, BANK,
    )  # fmt: skip
    if BANK.HIDDEN > 0:
        take_gradients(
            first, first_resumed, first_anchor, d_first, d_first_snapshot, d_first_anchor, first_rows(BANK),
            BANK.KEY_DIM, BANK.BLOCK_K, BANK.FIRST_KEPT, BANK,
        )  # fmt: skip
    tl.debug_barrier()

    begun = tl.maximum(first_chunk, begin // BANK.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + BANK.CHUNK - 1) // BANK.CHUNK)
    for index in tl.range(begun, ended, disable_licm=True):
        start = (begun + ended - 1 - index) * BANK.CHUNK
        row = (sequence, head, origin, begin, stop)
        place = locate_tokens(start, row, T, H, BANK)
        _, exists = place
        places = (program * kept_slots, kept_first)
        last_state, last_fresh = take_states(
            last, last_kept, row, start, places, BANK.BLOCK_V // BANK.PER, BANK.LAST_BLOCK, BANK.LAST_KEPT,
            BANK,
        )  # fmt: skip
        first_fresh = last_fresh
        if BANK.HIDDEN > 0:
            first_state, first_fresh = take_states(
                first, first_kept, row, start, places, BANK.BLOCK_H // BANK.PER, BANK.BLOCK_K,
                BANK.FIRST_KEPT, BANK,
            )  # fmt: skip

        # The chunk again.
        first_base = operands_at(first + BASE_OPERAND * BANK.FIRST_KEPT, BANK)
        last_base = operands_at(last + BASE_OPERAND * BANK.LAST_KEPT, BANK)
        if BANK.GENERATES:
            made_hidden = make_tokens(tokens, first_base, last_base, place, gates, scratch, BANK)
        else:
            given_tokens(tokens, place, scratch, BANK)
        grad = read_gradient(d_o, place, BANK)
        put_rows(operands_at(scratch + BANK.READ, BANK), rounded(grad, BANK), BANK.BLOCK_V, BANK)
        tl.debug_barrier()
        found = learn_chunk(scratch, True, BANK)

        # Errors and writes.
        if BANK.HIDDEN > 0:
            shares = deep_errors_adjoint(first_state, last_state, found, scratch, BANK)
        else:
            shares = linear_errors_adjoint(last_state, found, scratch, BANK)
        store_shares(shares, scratch + BANK.RATES, BANK)
        tl.debug_barrier()

        # Tokens.
        C: tl.constexpr = BANK.BLOCK_C
        d_rate = vector_shares(scratch + BANK.RATES, BANK)
        d_rate += vector_shares(scratch + BANK.RATES + BANK.BLOCKS * C, BANK)
        d_log = vector_shares(scratch + BANK.RATES + 2 * BANK.BLOCKS * C, BANK)
        d_key, d_value, d_query = tokens_adjoint(d_o, place, scratch, BANK)
        if BANK.GENERATES:
            d_query = query_adjoint(d_query, scratch, BANK)
            more = gates_adjoint(d_rate, d_log, gates[0], exists, scratch, BANK)
            by_rate_max += more[0]
            by_rate += more[1]
            by_retention += more[2]
            d_key, d_value = made_adjoint(d_key, d_value, scratch, BANK)
            if BANK.SCALED:
                store_scale(d_tokens, place, scratch, BANK)
            inputs_adjoint(d_key, d_value, made_hidden, first_base, last_base, d_tokens, place, scratch, BANK)
        else:
            store_tokens(d_tokens.key, place, d_key, BANK.KEY_DIM)
            store_tokens(d_tokens.value, place, d_value, BANK.VALUE_DIM)
            store_rates(d_rate, d_log, d_tokens, place)
        store_tokens(d_tokens.query, place, d_query, BANK.KEY_DIM)

        # Weights.
        update_weights(first_fresh, last_fresh, found[0], scratch, BANK)
        tl.debug_barrier()

    if BANK.GENERATES:
        add_gates(d_gates + 3 * program, by_rate_max, by_rate, by_retention)
    tl.debug_barrier()
    give_gradients(
        last, d_last, d_last_snapshot, d_last_anchor, rows, BANK.LAST_IN, BANK.LAST_BLOCK, BANK.LAST_KEPT,
        BANK,
    )  # fmt: skip
    if BANK.HIDDEN > 0:
        give_gradients(
            first, d_first, d_first_snapshot, d_first_anchor, first_rows(BANK), BANK.KEY_DIM, BANK.BLOCK_K,
            BANK.FIRST_KEPT, BANK,
        )  # fmt: skip
