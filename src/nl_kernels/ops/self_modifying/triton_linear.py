"""The kernels for linear memories, ``f(x) = W x``: one program a row.

The three wide memories (key, value, memory) are [D, D]; the two gates are rows of one [2, D] matrix. All
share the keys, and with them one gram matrix and one inverse a chunk. States and anchors are read and written
a matrix at a time, and stay in the caches; steps of a chunk are parted by barriers, so that nothing is loaded
and held before its step. In registers for the whole row they would spill.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import length_factor, unit
from nl_kernels.ops.self_modifying.triton_chunk import (
    base_of,
    clock,
    coefficients,
    column_of,
    locate_row,
    locate_tokens,
    log_sigmoid,
    put,
    read_layer,
    residual,
    share_keys,
    take,
    write_layer,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile

GATES: tl.constexpr = tl.constexpr(2)
BLOCK_G: tl.constexpr = tl.constexpr(16)  # rows of the gates' tile


@triton.jit
def elementwise_factor(x, BOUND: tl.constexpr):
    """:func:`length_factor` of each number of a tile: a gate's error is one number wide."""
    factor = tl.full(x.shape, 1.0, tl.float32)
    if BOUND > 0:
        factor = tl.where(tl.abs(x) > BOUND, BOUND / tl.maximum(tl.abs(x), BOUND), 1.0)
    return factor


@triton.jit
def serve_memories(
    xk, xv, xg, key_base, value_base, gate_base, rate_max, rate_bias, retention_bias, valid,
    PROJECTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the memories make: k and its scale, v, both gates before the sigmoid, η and log α."""
    made = matmul(xk, tl.trans(key_base), PRECISION)
    v = matmul(xv, tl.trans(value_base), PRECISION)
    if PROJECTION:
        made += xk
        v += xv
    k, key_scale = unit(made)
    gates = matmul(xg, tl.trans(gate_base), PRECISION)
    gate = tl.arange(0, BLOCK_G)
    z_rate = column_of(gates, gate, 0) + rate_bias
    z_retention = column_of(gates, gate, 1) + retention_bias
    rate = tl.where(valid, rate_max * tl.sigmoid(z_rate), 0.0)
    log_decay = tl.where(valid, log_sigmoid(z_retention), 0.0)
    return k, key_scale, v, z_rate, z_retention, rate, log_decay


@triton.jit(
    do_not_specialize=[
        "T", "H", "offset", "first_chunk", "stop_chunk", "initial_slots", "initial_slot",
        "kept_every", "kept_first_slot", "kept_slots",
    ]
)  # fmt: skip
def linear_forward_kernel(
    query,
    key_input,
    value_input,
    gate_input,
    momentum,
    spans,
    rate_max,
    rate_bias,
    retention_bias,
    anchor_last,
    anchor_gate,
    initial_last,
    initial_gate,
    initial_velocity_last,
    initial_velocity_gate,
    resumed_last,
    resumed_gate,
    o,
    final_last,
    final_gate,
    final_velocity_last,
    final_velocity_gate,
    snapshot_last,
    snapshot_gate,
    kept_last,
    kept_gate,
    kept_velocity_last,
    kept_velocity_gate,
    T,
    H,
    offset,
    first_chunk,
    stop_chunk,
    initial_slots,
    initial_slot,
    kept_every,
    kept_first_slot,
    kept_slots,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    MEMORY_CLOCK: tl.constexpr,
    OTHERS_CLOCK: tl.constexpr,
    RUNNING: tl.constexpr,
    ERASES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PROJECTION: tl.constexpr,
    TARGET: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reads ``o`` and the states after chunks ``first_chunk`` … ``stop_chunk`` − 1 of every row.

    ``initial_…`` [N, slots, ..] are read at ``initial_slot``; ``kept_…`` [N, slots, ..] get the running
    states before every ``kept_every``-th chunk. ``resumed_…`` is the snapshot before the call, absent at a
    boundary.
    """
    MOMENTUM: tl.constexpr = momentum is not None
    RESUMED: tl.constexpr = resumed_last is not None
    SNAPSHOTS: tl.constexpr = RESUMED or MEMORY_CLOCK != OTHERS_CLOCK
    MATRIX: tl.constexpr = WIDTH * WIDTH
    program = tl.program_id(0).to(tl.int64)
    sequence = program // H
    head = program % H
    origin, begin, stop = locate_row(spans, sequence, offset, T)
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    largest_rate = tl.load(rate_max + head)
    bias, retention = tl.load(rate_bias + head), tl.load(retention_bias + head)
    at = program * 3 * MATRIX
    gate_at = program * GATES * WIDTH
    source = program * initial_slots + initial_slot

    # The states lie in the buffers of the final ones.
    for m in range(3):
        tile_at = at + m * MATRIX
        tile = take(initial_last, source * 3 * MATRIX + m * MATRIX, d, WIDTH, d, WIDTH)
        put(final_last, tile_at, True, d, WIDTH, d, WIDTH, tile)
        if MOMENTUM:
            tile = take(initial_velocity_last, source * 3 * MATRIX + m * MATRIX, d, WIDTH, d, WIDTH)
            put(final_velocity_last, tile_at, True, d, WIDTH, d, WIDTH, tile)
        if RESUMED:
            tile = take(resumed_last, tile_at, d, WIDTH, d, WIDTH)
            put(snapshot_last, tile_at, True, d, WIDTH, d, WIDTH, tile)
    gate_state = take(initial_gate, source * GATES * WIDTH, g, GATES, d, WIDTH)
    gate_anchor = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if anchor_gate is not None:
        gate_anchor = take(anchor_gate, gate_at, g, GATES, d, WIDTH)
    gate_velocity = gate_anchor
    if MOMENTUM:
        gate_velocity = take(initial_velocity_gate, source * GATES * WIDTH, g, GATES, d, WIDTH)
    if RESUMED:
        tile = take(resumed_gate, gate_at, g, GATES, d, WIDTH)
        put(snapshot_gate, gate_at, True, g, GATES, d, WIDTH, tile)
    tl.debug_barrier()

    row_first = tl.maximum(first_chunk, begin // CHUNK)
    row_stop = tl.minimum(stop_chunk, (stop + CHUNK - 1) // CHUNK)
    for chunk in range(row_first, row_stop):
        start = chunk * CHUNK
        fresh, leaves = clock(start, begin, stop, OTHERS_CLOCK, CHUNK, RESUMED)
        own_fresh, own_leaves = clock(start, begin, stop, MEMORY_CLOCK, CHUNK, RESUMED)
        token, valid = locate_tokens(start, origin, begin, stop, sequence, head, T, H, CHUNK, BLOCK_C)
        keep = False
        kept = 0 * program
        if kept_last is not None:
            keep = chunk % kept_every == 0
            kept = program * kept_slots + (chunk // kept_every - kept_first_slot)
        mu = tl.full([BLOCK_C], 1.0, tl.float32)
        if MOMENTUM:
            mu = tl.load(momentum + token, mask=valid, other=1.0)

        # The memories make k, v and the gates.
        key_base = base_of(final_last, snapshot_last, anchor_last, at, fresh, d, WIDTH, d, WIDTH, SNAPSHOTS)
        value_base = base_of(
            final_last, snapshot_last, anchor_last, at + MATRIX, fresh, d, WIDTH, d, WIDTH, SNAPSHOTS
        )
        gate_base = gate_state
        if SNAPSHOTS:
            inside = (g < GATES) & (not fresh)
            gate_base = tl.where(fresh, gate_state, load_tile(snapshot_gate + gate_at, g, inside, d, WIDTH))
        gate_base += gate_anchor
        xk = load_tile(key_input, token, valid, d, WIDTH)
        xv = load_tile(value_input, token, valid, d, WIDTH)
        xg = load_tile(gate_input, token, valid, d, WIDTH)
        k, _, v, _, _, rate, log_decay = serve_memories(
            xk, xv, xg, key_base, value_base, gate_base, largest_rate, bias, retention, valid,
            PROJECTION, PRECISION,
        )  # fmt: skip
        spreads = coefficients(log_decay, mu, valid, MOMENTUM, BLOCK_C, PRECISION)
        rate, _, inverse = share_keys(k, rate, spreads[0][2], ERASES, PROXIMAL, BLOCK_C, PRECISION)
        difference = k - v
        projected = residual(k, v, PROJECTION, TARGET)

        # Every memory takes its errors in.
        tl.debug_barrier()
        key_base = base_of(final_last, snapshot_last, anchor_last, at, fresh, d, WIDTH, d, WIDTH, SNAPSHOTS)
        error = matmul(difference, tl.trans(key_base), PRECISION) + projected
        error *= length_factor(error, BOUND)[:, None]
        tl.debug_barrier()
        state = take(final_last, at, d, WIDTH, d, WIDTH)
        state, _ = _take_in(
            state, final_velocity_last, kept_last, kept_velocity_last, snapshot_last, at, kept * 3 * MATRIX,
            keep, leaves, d, WIDTH, k, error, rate, spreads, inverse, ERASES, MOMENTUM, PRECISION,
        )  # fmt: skip
        put(final_last, at, True, d, WIDTH, d, WIDTH, state)

        tl.debug_barrier()
        value_base = base_of(
            final_last, snapshot_last, anchor_last, at + MATRIX, fresh, d, WIDTH, d, WIDTH, SNAPSHOTS
        )
        error = matmul(difference, tl.trans(value_base), PRECISION) + projected
        error *= length_factor(error, BOUND)[:, None]
        tl.debug_barrier()
        state = take(final_last, at + MATRIX, d, WIDTH, d, WIDTH)
        state, _ = _take_in(
            state, final_velocity_last, kept_last, kept_velocity_last, snapshot_last, at + MATRIX,
            kept * 3 * MATRIX + MATRIX, keep, leaves, d, WIDTH, k, error, rate, spreads, inverse,
            ERASES, MOMENTUM, PRECISION,
        )  # fmt: skip
        put(final_last, at + MATRIX, True, d, WIDTH, d, WIDTH, state)

        tl.debug_barrier()
        base = base_of(
            final_last, snapshot_last, anchor_last, at + 2 * MATRIX, own_fresh, d, WIDTH, d, WIDTH, SNAPSHOTS
        )
        error = matmul(difference, tl.trans(base), PRECISION) + residual(k, v, RESIDUAL, TARGET)
        error *= length_factor(error, BOUND)[:, None]
        if o is not None:
            q, _ = unit(load_tile(query, token, valid, d, WIDTH))
            if not RUNNING:
                y = matmul(q, tl.trans(base), PRECISION)
        tl.debug_barrier()
        state = take(final_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
        velocity = state
        if MOMENTUM:
            velocity = take(final_velocity_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
        after, written = _take_in(
            state, final_velocity_last, kept_last, kept_velocity_last, snapshot_last, at + 2 * MATRIX,
            kept * 3 * MATRIX + 2 * MATRIX, keep, own_leaves, d, WIDTH, k, error, rate, spreads, inverse,
            ERASES, MOMENTUM, PRECISION,
        )  # fmt: skip
        if o is not None:
            if RUNNING:
                tl.debug_barrier()
                q, _ = unit(load_tile(query, token, valid, d, WIDTH))
                state = take(final_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
                y, _, _ = read_layer(q, state, velocity, k, written, spreads, MOMENTUM, PRECISION)
                if anchor_last is not None:
                    fixed = take(anchor_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
                    y += matmul(q, tl.trans(fixed), PRECISION)
            if RESIDUAL:
                y += q
            store_tile(o, token, valid, d, WIDTH, y)
        tl.debug_barrier()
        put(final_last, at + 2 * MATRIX, True, d, WIDTH, d, WIDTH, after)

        tl.debug_barrier()
        error = matmul(difference, tl.trans(gate_base), PRECISION)
        error *= elementwise_factor(error, BOUND)
        put(snapshot_gate, gate_at, leaves, g, GATES, d, WIDTH, gate_state)
        if kept_last is not None:
            put(kept_gate, kept * GATES * WIDTH, keep, g, GATES, d, WIDTH, gate_state)
            if MOMENTUM:
                put(kept_velocity_gate, kept * GATES * WIDTH, keep, g, GATES, d, WIDTH, gate_velocity)
        gate_state, gate_velocity, _, _, _ = write_layer(
            gate_state, gate_velocity, k, error, rate, spreads, inverse, ERASES, MOMENTUM, PRECISION
        )
        tl.debug_barrier()  # the next chunk reads what other threads of the program have stored

    if o is not None:
        arrives = (stop > begin) | (not RESUMED)
        put(final_gate, gate_at, True, g, GATES, d, WIDTH, gate_state)
        if MOMENTUM:
            put(final_velocity_gate, gate_at, True, g, GATES, d, WIDTH, gate_velocity)
        state = take(final_last, at, d, WIDTH, d, WIDTH)
        put(snapshot_last, at, arrives & (stop % OTHERS_CLOCK == 0), d, WIDTH, d, WIDTH, state)
        state = take(final_last, at + MATRIX, d, WIDTH, d, WIDTH)
        put(snapshot_last, at + MATRIX, arrives & (stop % OTHERS_CLOCK == 0), d, WIDTH, d, WIDTH, state)
        state = take(final_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
        put(snapshot_last, at + 2 * MATRIX, arrives & (stop % MEMORY_CLOCK == 0), d, WIDTH, d, WIDTH, state)
        put(snapshot_gate, gate_at, arrives & (stop % OTHERS_CLOCK == 0), g, GATES, d, WIDTH, gate_state)


@triton.jit
def _take_in(
    state, velocities, kept, kept_velocities, snapshot, at, kept_at, keep, leaves, d, WIDTH: tl.constexpr,
    k, error, rate, spreads, inverse, ERASES: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A wide memory's state after the chunk and what it wrote; copies of the state before it where wanted."""
    put(snapshot, at, leaves, d, WIDTH, d, WIDTH, state)
    if kept is not None:
        put(kept, kept_at, keep, d, WIDTH, d, WIDTH, state)
    velocity = state
    if MOMENTUM:
        velocity = take(velocities, at, d, WIDTH, d, WIDTH)
        if kept is not None:
            put(kept_velocities, kept_at, keep, d, WIDTH, d, WIDTH, velocity)
    state, velocity, _, written, _ = write_layer(
        state, velocity, k, error, rate, spreads, inverse, ERASES, MOMENTUM, PRECISION
    )
    tl.debug_barrier()  # whoever loads a number need not be the one who stores it
    if MOMENTUM:
        put(velocities, at, True, d, WIDTH, d, WIDTH, velocity)
    return state, written
