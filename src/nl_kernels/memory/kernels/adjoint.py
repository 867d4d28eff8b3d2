"""The backward kernel of a bank of memories: a row of tokens, the last chunk first."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.forward import end_layer, own_clock
from nl_kernels.memory.kernels.fragments import put_operand, put_rows, put_weights, weights_at
from nl_kernels.memory.kernels.generate import (
    D_SCALE,
    gates_of,
    given_tokens,
    locate_row,
    locate_tokens,
    make_tokens,
    vectors_at,
)
from nl_kernels.memory.kernels.layer import locate_rows, memory_of, take_layer
from nl_kernels.memory.kernels.layer_adjoint import vector_shares
from nl_kernels.memory.kernels.learn import learn_chunk
from nl_kernels.memory.kernels.learn_adjoint import deep_errors_adjoint, linear_errors_adjoint, update_layer
from nl_kernels.memory.kernels.tokens_adjoint import (
    gates_adjoint,
    inputs_adjoint,
    made_adjoint,
    query_adjoint,
    store_numbers,
    store_tokens,
    tokens_adjoint,
)


@triton.jit
def take_gradients(
    scratch, resumed, anchor, d_running, d_snapshot, d_anchor, program, LAYER: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """A layer's gradients, anchor and first snapshot to scratch."""
    take_layer(scratch + LAYER.RESUMED, None, resumed, None, program, LAYER, BANK)
    take_layer(scratch + LAYER.STATE, scratch + LAYER.D_STATE_OPERAND, d_running, None, program, LAYER, BANK)
    take_layer(scratch + LAYER.SNAPSHOT, None, d_snapshot, None, program, LAYER, BANK)
    if BANK.ANCHORED:
        take_layer(scratch + LAYER.ANCHOR, scratch + LAYER.ANCHOR_OPERAND, anchor, None, program, LAYER, BANK)
        take_layer(scratch + LAYER.D_ANCHOR, None, d_anchor, None, program, LAYER, BANK)


@triton.jit
def _at_period(state, start, CLOCK: tl.constexpr, row, start_at, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Weights kept at the start of the period of ``CLOCK`` that the chunk belongs to, if that was kept."""
    back = start % CLOCK
    chunks = tl.where(start - back > row[3], back // BANK.CHUNK, 0)
    place = state - chunks * LAYER.KEPT
    return weights_at(place, start_at, LAYER.WIDTH // BANK.PER, LAYER.BLOCK, BANK)


@triton.jit
def take_states(scratch, kept, row, start, places, LAYER: tl.constexpr, BANK: tl.constexpr):
    """Operands of a layer's running weights before the chunk, and of those that it is applied at, to scratch.

    ``places`` are the first slot of ``kept`` for this head, and the chunk that it belongs to. Returns the
    chunk's own, and whether they are what it is applied at, too [B, 1, 1].
    """
    ROWS: tl.constexpr = LAYER.WIDTH // BANK.PER
    BLOCK: tl.constexpr = LAYER.BLOCK
    state = kept[LAYER.INDEX] + (places[0] + (start // BANK.CHUNK - places[1])) * LAYER.KEPT
    period = start - start % own_clock(BANK)
    inside = (period > row[3])[:, None, None]
    if BANK.TRUNCATE > 0:
        end = start + BANK.CHUNK
        if (end % BANK.TRUNCATE == 0) & (end <= row[4]):  # the gradient is cut after the chunk
            for start_at in range(0, BLOCK, BANK.SLICE):
                zeros = 0.0 * weights_at(state, start_at, ROWS, BLOCK, BANK)
                put_weights(scratch + LAYER.STATE, start_at, zeros, BLOCK, BANK)
                put_weights(scratch + LAYER.SNAPSHOT, start_at, zeros, BLOCK, BANK)
                put_operand(scratch + LAYER.D_STATE_OPERAND, start_at, zeros, BLOCK, BANK)
    for start_at in range(0, BLOCK, BANK.SLICE):
        x = weights_at(state, start_at, ROWS, BLOCK, BANK)
        put_operand(scratch + LAYER.STATE_OPERAND, start_at, x, BLOCK, BANK)
        if BANK.MEMORY_CLOCK != BANK.CHUNK or BANK.OTHERS_CLOCK != BANK.CHUNK:
            own = (memory_of(BANK) == BANK.OWN)[:, None, None]
            x = _at_period(state, start, BANK.OTHERS_CLOCK, row, start_at, LAYER, BANK)
            x = tl.where(own, _at_period(state, start, BANK.MEMORY_CLOCK, row, start_at, LAYER, BANK), x)
        x = tl.where(inside, x, weights_at(scratch + LAYER.RESUMED, start_at, ROWS, BLOCK, BANK))
        if BANK.ANCHORED:
            x += weights_at(scratch + LAYER.ANCHOR, start_at, ROWS, BLOCK, BANK)
        put_operand(scratch + LAYER.BASE_OPERAND, start_at, x, BLOCK, BANK)
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
    LAST: tl.constexpr = BANK.LAST
    token, exists = place
    memory, row, _, within = locate_rows(LAST, BANK)
    inside = exists[None, None, :] & within & (memory == BANK.OWN)
    return tl.load(d_o + token[None, None, :] * BANK.VALUE_DIM + row, mask=inside, other=0.0).to(tl.float32)


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
    FIRST: tl.constexpr = BANK.FIRST
    LAST: tl.constexpr = BANK.LAST
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * BANK.SIZE
    gates = gates_of(tokens, head, BANK)
    by_rate_max, by_rate, by_retention = 0.0, 0.0, 0.0
    take_gradients(scratch, resumed, anchor, d_running, d_snapshot, d_anchor, program, LAST, BANK)
    if BANK.HIDDEN > 0:
        take_gradients(scratch, resumed, anchor, d_running, d_snapshot, d_anchor, program, FIRST, BANK)
    tl.debug_barrier()

    begun = tl.maximum(first_chunk, begin // BANK.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + BANK.CHUNK - 1) // BANK.CHUNK)
    for index in tl.range(begun, ended, disable_licm=True):
        start = (begun + ended - 1 - index) * BANK.CHUNK
        row = (sequence, head, origin, begin, stop)
        place = locate_tokens(start, row, T, H, BANK)
        _, exists = place
        places = (program * kept_slots, kept_first)
        last_state, fresh = take_states(scratch, kept, row, start, places, LAST, BANK)
        if BANK.HIDDEN > 0:
            first_state, fresh = take_states(scratch, kept, row, start, places, FIRST, BANK)

        # The chunk again.
        if BANK.GENERATES:
            made_hidden = make_tokens(tokens, place, gates, scratch, BANK)
        else:
            given_tokens(tokens, place, scratch, BANK)
        put_rows(scratch + BANK.LAST.D_QUERY, read_gradient(d_o, place, BANK), BANK.BLOCK_V, BANK)
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
                store_numbers(d_tokens.rate, place, tl.load(vectors_at(scratch, D_SCALE, BANK)))
            inputs_adjoint(d_key, d_value, made_hidden, d_tokens, place, scratch, BANK)
        else:
            store_tokens(d_tokens.key, place, d_key, BANK.KEY_DIM)
            store_tokens(d_tokens.value, place, d_value, BANK.VALUE_DIM)
            store_numbers(d_tokens.rate, place, d_rate)
            store_numbers(d_tokens.log_decay, place, d_log)
        store_tokens(d_tokens.query, place, d_query, BANK.KEY_DIM)

        # Weights.
        update_layer(fresh, found[0], scratch, LAST, BANK)
        if BANK.HIDDEN > 0:
            update_layer(fresh, found[0], scratch, FIRST, BANK)
        tl.debug_barrier()

    if BANK.GENERATES:
        add_gates(d_gates + 3 * program, by_rate_max, by_rate, by_retention)
    tl.debug_barrier()
    end_layer(scratch, d_running, d_snapshot, d_anchor, program, LAST, BANK)
    if BANK.HIDDEN > 0:
        end_layer(scratch, d_running, d_snapshot, d_anchor, program, FIRST, BANK)
