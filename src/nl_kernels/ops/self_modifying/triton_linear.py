"""The kernels for linear memories, ``f(x) = W x``: one program a row, forward and backward.

The three wide memories (key, value, memory) are [D, D]; the two gates are rows of one [2, D] matrix. All
share the keys, and with them one gram matrix and one inverse a chunk. With ``RESIDENT`` their states,
anchors and gradients stay in registers for the whole row; otherwise they are read and written a matrix at a
time, and stay in the L2 cache.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import bound_adjoint, gram_adjoint, proximal_adjoint
from nl_kernels.chunk_kernels.forward import length_factor
from nl_kernels.ops.self_modifying.triton_chunk import (
    base_again,
    clear,
    clock,
    coefficients,
    column_of,
    increase,
    locate_row,
    locate_tokens,
    log_sigmoid,
    merge,
    put,
    rates_adjoint,
    read_layer,
    read_layer_adjoint,
    residual,
    settle,
    share_keys,
    take,
    unit,
    unit_adjoint,
    write_layer,
    write_layer_adjoint,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile

_GATES: tl.constexpr = tl.constexpr(2)
_BLOCK_G: tl.constexpr = tl.constexpr(16)  # rows of the gates' tile


@triton.jit
def _held(tile, base, offset, rows, columns, COLUMNS: tl.constexpr, RESIDENT: tl.constexpr):
    """A square matrix from registers, or from memory."""
    if not RESIDENT:
        tile = take(base, offset, rows, COLUMNS, columns, COLUMNS)
    return tile


@triton.jit
def _elementwise_factor(x, BOUND: tl.constexpr):
    """:func:`length_factor` of each number of a tile: a gate's error is one number wide."""
    factor = tl.full(x.shape, 1.0, tl.float32)
    if BOUND > 0:
        factor = tl.where(tl.abs(x) > BOUND, BOUND / tl.maximum(tl.abs(x), BOUND), 1.0)
    return factor


@triton.jit
def _served(
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
    gate = tl.arange(0, _BLOCK_G)
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
    RESIDENT: tl.constexpr,
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
    g = tl.arange(0, _BLOCK_G)
    largest_rate = tl.load(rate_max + head)
    bias, retention = tl.load(rate_bias + head), tl.load(retention_bias + head)
    at = program * 3 * MATRIX
    gate_at = program * _GATES * WIDTH
    source = program * initial_slots + initial_slot

    # The states: in registers, or in the buffers of the final ones.
    key_state, value_state, memory_state = 0.0, 0.0, 0.0
    key_anchor, value_anchor, memory_anchor = 0.0, 0.0, 0.0
    if RESIDENT:
        key_state = take(initial_last, source * 3 * MATRIX, d, WIDTH, d, WIDTH)
        value_state = take(initial_last, source * 3 * MATRIX + MATRIX, d, WIDTH, d, WIDTH)
        memory_state = take(initial_last, source * 3 * MATRIX + 2 * MATRIX, d, WIDTH, d, WIDTH)
        if anchor_last is not None:
            key_anchor = take(anchor_last, at, d, WIDTH, d, WIDTH)
            value_anchor = take(anchor_last, at + MATRIX, d, WIDTH, d, WIDTH)
            memory_anchor = take(anchor_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
    for m in range(3):
        tile_at = at + m * MATRIX
        if not RESIDENT:
            tile = take(initial_last, source * 3 * MATRIX + m * MATRIX, d, WIDTH, d, WIDTH)
            put(final_last, tile_at, True, d, WIDTH, d, WIDTH, tile)
        if MOMENTUM:
            tile = take(initial_velocity_last, source * 3 * MATRIX + m * MATRIX, d, WIDTH, d, WIDTH)
            put(final_velocity_last, tile_at, True, d, WIDTH, d, WIDTH, tile)
        if RESUMED:
            tile = take(resumed_last, tile_at, d, WIDTH, d, WIDTH)
            put(snapshot_last, tile_at, True, d, WIDTH, d, WIDTH, tile)
    gate_state = take(initial_gate, source * _GATES * WIDTH, g, _GATES, d, WIDTH)
    gate_anchor = tl.zeros([_BLOCK_G, BLOCK_D], tl.float32)
    if anchor_gate is not None:
        gate_anchor = take(anchor_gate, gate_at, g, _GATES, d, WIDTH)
    gate_velocity = gate_anchor
    if MOMENTUM:
        gate_velocity = take(initial_velocity_gate, source * _GATES * WIDTH, g, _GATES, d, WIDTH)
    if RESUMED:
        tile = take(resumed_gate, gate_at, g, _GATES, d, WIDTH)
        put(snapshot_gate, gate_at, True, g, _GATES, d, WIDTH, tile)
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
        state = _held(key_state, final_last, at, d, d, WIDTH, RESIDENT)
        key_base = _base(
            state, key_anchor, anchor_last, snapshot_last, fresh, at, d, WIDTH, SNAPSHOTS, RESIDENT
        )
        state = _held(value_state, final_last, at + MATRIX, d, d, WIDTH, RESIDENT)
        value_base = _base(
            state, value_anchor, anchor_last, snapshot_last, fresh, at + MATRIX, d, WIDTH, SNAPSHOTS, RESIDENT
        )
        gate_base = gate_state
        if SNAPSHOTS:
            inside = (g < _GATES) & (not fresh)
            gate_base = tl.where(fresh, gate_state, load_tile(snapshot_gate + gate_at, g, inside, d, WIDTH))
        gate_base += gate_anchor
        xk = load_tile(key_input, token, valid, d, WIDTH)
        xv = load_tile(value_input, token, valid, d, WIDTH)
        xg = load_tile(gate_input, token, valid, d, WIDTH)
        k, _, v, _, _, rate, log_decay = _served(
            xk, xv, xg, key_base, value_base, gate_base, largest_rate, bias, retention, valid,
            PROJECTION, PRECISION,
        )  # fmt: skip
        spreads = coefficients(log_decay, mu, valid, MOMENTUM, BLOCK_C, PRECISION)
        rate, _, inverse = share_keys(k, rate, spreads[0][2], ERASES, PROXIMAL, BLOCK_C, PRECISION)
        difference = k - v
        projected = residual(k, v, PROJECTION, TARGET)

        # Every memory takes its errors in.
        error = matmul(difference, tl.trans(key_base), PRECISION) + projected
        error *= length_factor(error, BOUND)[:, None]
        state = _held(key_state, final_last, at, d, d, WIDTH, RESIDENT)
        state, _ = _take_in(
            state, final_velocity_last, kept_last, kept_velocity_last, snapshot_last, at, kept * 3 * MATRIX,
            keep, leaves, d, WIDTH, k, error, rate, spreads, inverse, ERASES, MOMENTUM, PRECISION,
        )  # fmt: skip
        if RESIDENT:
            key_state = state
        else:
            put(final_last, at, True, d, WIDTH, d, WIDTH, state)

        error = matmul(difference, tl.trans(value_base), PRECISION) + projected
        error *= length_factor(error, BOUND)[:, None]
        state = _held(value_state, final_last, at + MATRIX, d, d, WIDTH, RESIDENT)
        state, _ = _take_in(
            state, final_velocity_last, kept_last, kept_velocity_last, snapshot_last, at + MATRIX,
            kept * 3 * MATRIX + MATRIX, keep, leaves, d, WIDTH, k, error, rate, spreads, inverse,
            ERASES, MOMENTUM, PRECISION,
        )  # fmt: skip
        if RESIDENT:
            value_state = state
        else:
            put(final_last, at + MATRIX, True, d, WIDTH, d, WIDTH, state)

        state = _held(memory_state, final_last, at + 2 * MATRIX, d, d, WIDTH, RESIDENT)
        base = _base(
            state, memory_anchor, anchor_last, snapshot_last, own_fresh, at + 2 * MATRIX, d, WIDTH, SNAPSHOTS,
            RESIDENT,
        )  # fmt: skip
        error = matmul(difference, tl.trans(base), PRECISION) + residual(k, v, RESIDUAL, TARGET)
        error *= length_factor(error, BOUND)[:, None]
        if o is not None:
            q, _ = unit(load_tile(query, token, valid, d, WIDTH))
            if not RUNNING:
                y = matmul(q, tl.trans(base), PRECISION)
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
                y, _, _ = read_layer(q, state, velocity, k, written, spreads, MOMENTUM, PRECISION)
                if anchor_last is not None:
                    fixed = _held(memory_anchor, anchor_last, at + 2 * MATRIX, d, d, WIDTH, RESIDENT)
                    y += matmul(q, tl.trans(fixed), PRECISION)
            if RESIDUAL:
                y += q
            store_tile(o, token, valid, d, WIDTH, y)
        if RESIDENT:
            memory_state = after
        else:
            put(final_last, at + 2 * MATRIX, True, d, WIDTH, d, WIDTH, after)

        error = matmul(difference, tl.trans(gate_base), PRECISION)
        error *= _elementwise_factor(error, BOUND)
        put(snapshot_gate, gate_at, leaves, g, _GATES, d, WIDTH, gate_state)
        if kept_last is not None:
            put(kept_gate, kept * _GATES * WIDTH, keep, g, _GATES, d, WIDTH, gate_state)
            if MOMENTUM:
                put(kept_velocity_gate, kept * _GATES * WIDTH, keep, g, _GATES, d, WIDTH, gate_velocity)
        gate_state, gate_velocity, _, _, _ = write_layer(
            gate_state, gate_velocity, k, error, rate, spreads, inverse, ERASES, MOMENTUM, PRECISION
        )
        if (not RESIDENT) or SNAPSHOTS or MOMENTUM:
            tl.debug_barrier()  # the next chunk reads what other threads of the program have stored

    if o is not None:
        arrives = (stop > begin) | (not RESUMED)
        if RESIDENT:
            put(final_last, at, True, d, WIDTH, d, WIDTH, key_state)
            put(final_last, at + MATRIX, True, d, WIDTH, d, WIDTH, value_state)
            put(final_last, at + 2 * MATRIX, True, d, WIDTH, d, WIDTH, memory_state)
        put(final_gate, gate_at, True, g, _GATES, d, WIDTH, gate_state)
        if MOMENTUM:
            put(final_velocity_gate, gate_at, True, g, _GATES, d, WIDTH, gate_velocity)
        state = _held(key_state, final_last, at, d, d, WIDTH, RESIDENT)
        put(snapshot_last, at, arrives & (stop % OTHERS_CLOCK == 0), d, WIDTH, d, WIDTH, state)
        state = _held(value_state, final_last, at + MATRIX, d, d, WIDTH, RESIDENT)
        put(snapshot_last, at + MATRIX, arrives & (stop % OTHERS_CLOCK == 0), d, WIDTH, d, WIDTH, state)
        state = _held(memory_state, final_last, at + 2 * MATRIX, d, d, WIDTH, RESIDENT)
        put(snapshot_last, at + 2 * MATRIX, arrives & (stop % MEMORY_CLOCK == 0), d, WIDTH, d, WIDTH, state)
        put(snapshot_gate, gate_at, arrives & (stop % OTHERS_CLOCK == 0), g, _GATES, d, WIDTH, gate_state)


@triton.jit
def _base(
    state, anchor, anchor_last, snapshot, fresh, at, d, WIDTH: tl.constexpr, SNAPSHOTS: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """The matrix that a memory serves with: its snapshot, with the anchor."""
    base = state
    if SNAPSHOTS:
        other = load_tile(snapshot + at, d, (d < WIDTH) & (not fresh), d, WIDTH)
        base = tl.where(fresh, state, other)
    if anchor_last is not None:
        base += _held(anchor, anchor_last, at, d, d, WIDTH, RESIDENT)
    return base


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
    if MOMENTUM:
        put(velocities, at, True, d, WIDTH, d, WIDTH, velocity)
    return state, written


@triton.jit(
    do_not_specialize=[
        "T",
        "H",
        "offset",
        "first_chunk",
        "stop_chunk",
        "kept_first_slot",
        "kept_slots",
        "is_last",
    ]
)
def linear_backward_kernel(
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
    resumed_last,
    resumed_gate,
    kept_last,
    kept_gate,
    kept_velocity_last,
    kept_velocity_gate,
    grad_o,
    grad_query,
    grad_key_input,
    grad_value_input,
    grad_gate_input,
    grad_momentum,
    grad_rates,
    grad_last,
    grad_gate,
    grad_velocity_last,
    grad_velocity_gate,
    grad_snapshot_last,
    grad_snapshot_gate,
    grad_anchor_last,
    grad_anchor_gate,
    T,
    H,
    offset,
    first_chunk,
    stop_chunk,
    kept_first_slot,
    kept_slots,
    is_last,
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
    TRUNCATE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of chunks ``first_chunk`` … ``stop_chunk`` − 1, the last chunk first.

    ``kept_…`` [N, slots, ..] are the running states before each of these chunks. ``grad_…`` of states,
    snapshots, anchors and ``grad_rates`` [N, 3] are carried from call to call and updated in place; those of
    states begin as the cotangents of the final ones (``is_last``) and end as those of the initial ones.
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
    g = tl.arange(0, _BLOCK_G)
    largest_rate = tl.load(rate_max + head)
    bias, retention = tl.load(rate_bias + head), tl.load(retention_bias + head)
    at = program * 3 * MATRIX
    gate_at = program * _GATES * WIDTH

    # What the final snapshot shares with the final running state.
    arrives = (is_last != 0) & ((stop > begin) | (not RESUMED))
    others = arrives & (stop % OTHERS_CLOCK == 0)
    own = arrives & (stop % MEMORY_CLOCK == 0)
    merge(grad_last, grad_snapshot_last, at, others, d, WIDTH, d, WIDTH)
    merge(grad_last, grad_snapshot_last, at + MATRIX, others, d, WIDTH, d, WIDTH)
    merge(grad_last, grad_snapshot_last, at + 2 * MATRIX, own, d, WIDTH, d, WIDTH)
    merge(grad_gate, grad_snapshot_gate, gate_at, others, g, _GATES, d, WIDTH)
    tl.debug_barrier()

    key_grad, value_grad, memory_grad = 0.0, 0.0, 0.0
    key_anchor_grad, value_anchor_grad, memory_anchor_grad = 0.0, 0.0, 0.0
    if RESIDENT:
        key_grad = take(grad_last, at, d, WIDTH, d, WIDTH)
        value_grad = take(grad_last, at + MATRIX, d, WIDTH, d, WIDTH)
        memory_grad = take(grad_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
        if anchor_last is not None:
            key_anchor_grad = take(grad_anchor_last, at, d, WIDTH, d, WIDTH)
            value_anchor_grad = take(grad_anchor_last, at + MATRIX, d, WIDTH, d, WIDTH)
            memory_anchor_grad = take(grad_anchor_last, at + 2 * MATRIX, d, WIDTH, d, WIDTH)
    gates_grad = take(grad_gate, gate_at, g, _GATES, d, WIDTH)
    gates_anchor_grad = tl.zeros([_BLOCK_G, BLOCK_D], tl.float32)
    if anchor_gate is not None:
        gates_anchor_grad = take(grad_anchor_gate, gate_at, g, _GATES, d, WIDTH)
    gates_velocity_grad = gates_anchor_grad
    if MOMENTUM:
        gates_velocity_grad = take(grad_velocity_gate, gate_at, g, _GATES, d, WIDTH)
    largest_sum, bias_sum, retention_sum = 0.0, 0.0, 0.0

    row_first = tl.maximum(first_chunk, begin // CHUNK)
    row_stop = tl.minimum(stop_chunk, (stop + CHUNK - 1) // CHUNK)
    for back in range(0, row_stop - row_first):
        chunk = row_stop - 1 - back
        start = chunk * CHUNK
        fresh, leaves = clock(start, begin, stop, OTHERS_CLOCK, CHUNK, RESUMED)
        own_fresh, own_leaves = clock(start, begin, stop, MEMORY_CLOCK, CHUNK, RESUMED)
        token, valid = locate_tokens(start, origin, begin, stop, sequence, head, T, H, CHUNK, BLOCK_C)
        slot = program * kept_slots + (chunk - kept_first_slot)
        kept = slot * 3 * MATRIX
        period = slot - (start % OTHERS_CLOCK) // CHUNK
        own_period = slot - (start % MEMORY_CLOCK) // CHUNK
        inside, own_inside = fresh, own_fresh
        if SNAPSHOTS:
            inside = (start - start % OTHERS_CLOCK > begin) | (not RESUMED)
            own_inside = (start - start % MEMORY_CLOCK > begin) | (not RESUMED)
        mu = tl.full([BLOCK_C], 1.0, tl.float32)
        if MOMENTUM:
            mu = tl.load(momentum + token, mask=valid, other=1.0)
        reaches = 1.0
        if TRUNCATE > 0:
            cut = ((start + CHUNK) % TRUNCATE == 0) & (stop >= start + CHUNK)
            reaches = tl.where(cut, 0.0, 1.0)
            gates_grad *= reaches
            gates_velocity_grad *= reaches
            clear(grad_snapshot_last, at, cut, d, WIDTH, d, WIDTH)
            clear(grad_snapshot_last, at + MATRIX, cut, d, WIDTH, d, WIDTH)
            clear(grad_snapshot_last, at + 2 * MATRIX, cut, d, WIDTH, d, WIDTH)
            clear(grad_snapshot_gate, gate_at, cut, g, _GATES, d, WIDTH)

        # The chunk again, up to the errors.
        gate_state = take(kept_gate, slot * _GATES * WIDTH, g, _GATES, d, WIDTH)
        gate_base = base_again(
            kept_gate,
            resumed_gate,
            anchor_gate,
            period * _GATES * WIDTH,
            gate_at,
            inside,
            g,
            _GATES,
            d,
            WIDTH,
        )
        gate_velocity = gate_state
        if MOMENTUM:
            gate_velocity = take(kept_velocity_gate, slot * _GATES * WIDTH, g, _GATES, d, WIDTH)
        key_base = base_again(
            kept_last, resumed_last, anchor_last, period * 3 * MATRIX, at, inside, d, WIDTH, d, WIDTH
        )
        value_base = base_again(
            kept_last,
            resumed_last,
            anchor_last,
            period * 3 * MATRIX + MATRIX,
            at + MATRIX,
            inside,
            d,
            WIDTH,
            d,
            WIDTH,
        )
        xk = load_tile(key_input, token, valid, d, WIDTH)
        xv = load_tile(value_input, token, valid, d, WIDTH)
        xg = load_tile(gate_input, token, valid, d, WIDTH)
        k, key_scale, v, z_rate, z_retention, rate, log_decay = _served(
            xk, xv, xg, key_base, value_base, gate_base, largest_rate, bias, retention, valid,
            PROJECTION, PRECISION,
        )  # fmt: skip
        spreads = coefficients(log_decay, mu, valid, MOMENTUM, BLOCK_C, PRECISION)
        effective, gram, inverse = share_keys(k, rate, spreads[0][2], ERASES, PROXIMAL, BLOCK_C, PRECISION)
        difference = k - v

        # M_memory: its read, then its write.
        memory_at = at + 2 * MATRIX
        state = take(kept_last, kept + 2 * MATRIX, d, WIDTH, d, WIDTH)
        base = base_again(
            kept_last,
            resumed_last,
            anchor_last,
            own_period * 3 * MATRIX + 2 * MATRIX,
            memory_at,
            own_inside,
            d,
            WIDTH,
            d,
            WIDTH,
        )
        error = matmul(difference, tl.trans(base), PRECISION) + residual(k, v, RESIDUAL, TARGET)
        factor = length_factor(error, BOUND)
        error *= factor[:, None]
        velocity = state
        if MOMENTUM:
            velocity = take(kept_velocity_last, kept + 2 * MATRIX, d, WIDTH, d, WIDTH)
        _, _, surprise, written, recalled = write_layer(
            state, velocity, k, error, effective, spreads, inverse, ERASES, MOMENTUM, PRECISION
        )
        q, query_scale = unit(load_tile(query, token, valid, d, WIDTH))
        at_y = load_tile(grad_o, token, valid, d, WIDTH)
        at_anchor = matmul(tl.trans(at_y), q, PRECISION)
        if RUNNING:
            _, q_recalled, scores = read_layer(q, state, velocity, k, written, spreads, MOMENTUM, PRECISION)
            by_read, read_parts = read_layer_adjoint(
                at_y, q, state, velocity, k, written, q_recalled, scores, spreads, MOMENTUM, PRECISION
            )
            at_q, by_state, by_velocity, at_k, by_written = by_read
            if anchor_last is not None:
                at_q += matmul(at_y, take(anchor_last, memory_at, d, WIDTH, d, WIDTH), PRECISION)
        else:
            at_q = matmul(at_y, base, PRECISION)
            by_state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
            by_velocity, by_written = by_state, tl.zeros(k.shape, tl.float32)
            at_k = by_written
            nothing = tl.zeros([BLOCK_C], tl.float32)
            read_parts = (nothing, tl.zeros([BLOCK_C, BLOCK_C], tl.float32), nothing)
        if RESIDUAL:
            at_q += at_y
        store_tile(grad_query, token, valid, d, WIDTH, unit_adjoint(at_q, q, query_scale))
        grad = _held(memory_grad, grad_last, memory_at, d, d, WIDTH, RESIDENT) * reaches
        by_write, parts = _write_again(
            grad, grad_velocity_last, memory_at, reaches, by_written, state, velocity, k, error, surprise,
            written, recalled, effective, spreads, gram, inverse, d, WIDTH, by_velocity, ERASES, MOMENTUM,
            PRECISION,
        )  # fmt: skip
        at_state, by_k, at_error, at_rate, at_gram = by_write
        strict, before, to_end, final, m_final, c_to_end, c_final = parts
        at_error = bound_adjoint(at_error, error, factor, BOUND)
        at_base = matmul(tl.trans(at_error), difference, PRECISION)
        if RUNNING:
            # The read's share is the anchor's alone: it reads the running state itself.
            by_anchor = at_base + at_anchor
        else:
            at_base += at_anchor
            by_anchor = at_base
        at_difference = matmul(at_error, base, PRECISION)
        at_k += by_k
        at_v = tl.zeros(k.shape, tl.float32)
        if RESIDUAL:
            at_k += at_error
        if TARGET:
            at_v -= at_error
        memory_grad, memory_anchor_grad = settle(
            at_state + by_state, at_base, by_anchor, memory_grad, memory_anchor_grad, grad_last,
            grad_snapshot_last, grad_anchor_last, memory_at, own_fresh, own_leaves, True, d, WIDTH, d, WIDTH,
            SNAPSHOTS, RESIDENT,
        )  # fmt: skip

        # M_key and M_value.
        for m in tl.static_range(2):
            if m == 0:
                base = key_base
                held = key_grad
                held_anchor = key_anchor_grad
            else:
                base = value_base
                held = value_grad
                held_anchor = value_anchor_grad
            state = take(kept_last, kept + m * MATRIX, d, WIDTH, d, WIDTH)
            velocity = state
            if MOMENTUM:
                velocity = take(kept_velocity_last, kept + m * MATRIX, d, WIDTH, d, WIDTH)
            error = matmul(difference, tl.trans(base), PRECISION) + residual(k, v, PROJECTION, TARGET)
            factor = length_factor(error, BOUND)
            error *= factor[:, None]
            _, _, surprise, written, recalled = write_layer(
                state, velocity, k, error, effective, spreads, inverse, ERASES, MOMENTUM, PRECISION
            )
            grad = _held(held, grad_last, at + m * MATRIX, d, d, WIDTH, RESIDENT) * reaches
            by_write, parts = _write_again(
                grad, grad_velocity_last, at + m * MATRIX, reaches, None, state, velocity, k, error, surprise,
                written, recalled, effective, spreads, gram, inverse, d, WIDTH, None,
                ERASES, MOMENTUM, PRECISION,
            )  # fmt: skip
            at_state, by_k, at_error, by_rate, by_gram = by_write
            at_k += by_k
            at_rate += by_rate
            at_gram += by_gram
            strict += parts[0]
            before += parts[1]
            to_end += parts[2]
            final += parts[3]
            m_final += parts[4]
            c_to_end += parts[5]
            c_final += parts[6]
            at_error = bound_adjoint(at_error, error, factor, BOUND)
            at_base = matmul(tl.trans(at_error), difference, PRECISION)
            at_difference += matmul(at_error, base, PRECISION)
            if PROJECTION:
                at_k += at_error
            if TARGET:
                at_v -= at_error
            held, held_anchor = settle(
                at_state, at_base, at_base, held, held_anchor, grad_last, grad_snapshot_last,
                grad_anchor_last, at + m * MATRIX, fresh, leaves, True, d, WIDTH, d, WIDTH, SNAPSHOTS,
                RESIDENT,
            )  # fmt: skip
            if m == 0:
                key_grad = held
                key_anchor_grad = held_anchor
            else:
                value_grad = held
                value_anchor_grad = held_anchor

        # The gates' writes.
        error = matmul(difference, tl.trans(gate_base), PRECISION)
        gate_factor = _elementwise_factor(error, BOUND)
        error *= gate_factor
        _, _, surprise, written, recalled = write_layer(
            gate_state, gate_velocity, k, error, effective, spreads, inverse, ERASES, MOMENTUM, PRECISION
        )
        by_write, parts = write_layer_adjoint(
            gates_grad, gates_velocity_grad, None, gate_state, gate_velocity, k, error, surprise, written,
            recalled, effective, spreads, gram, inverse, ERASES, MOMENTUM, PRECISION,
        )  # fmt: skip
        gates_grad, gates_velocity_grad, by_k, at_error, by_rate, by_gram = by_write
        at_error = tl.where(gate_factor < 1, 0.0, at_error)  # at the bound it no longer moves
        at_gates_base = matmul(tl.trans(at_error), difference, PRECISION)
        at_difference += matmul(at_error, gate_base, PRECISION)
        at_k += by_k + at_difference
        at_v -= at_difference
        at_rate += by_rate
        at_gram += by_gram
        parts = (
            strict + parts[0], before + parts[1], to_end + parts[2], final + parts[3], m_final + parts[4],
            c_to_end + parts[5], c_final + parts[6],
        )  # fmt: skip

        # The keys and rates that all share.
        if ERASES:
            at_k += gram_adjoint(at_gram * spreads[0][2], k, PRECISION)
            if PROXIMAL:
                at_rate, by_k = proximal_adjoint(at_rate, rate, k, effective)
                at_k += by_k
        at_log, at_mu = rates_adjoint(parts, read_parts, mu, valid, spreads, MOMENTUM, BLOCK_C, PRECISION)
        if MOMENTUM:
            tl.store(grad_momentum + token, at_mu, mask=valid)
        at_rate = tl.where(valid, at_rate, 0.0)
        fraction = tl.sigmoid(z_rate)
        at_z_rate = at_rate * largest_rate * fraction * (1 - fraction)
        at_z_retention = at_log * tl.sigmoid(-z_retention)
        largest_sum += tl.sum(at_rate * fraction, 0)
        bias_sum += tl.sum(at_z_rate, 0)
        retention_sum += tl.sum(at_z_retention, 0)

        # The memories that made them.
        at_made = unit_adjoint(at_k, k, key_scale)
        at_x = matmul(at_made, key_base, PRECISION)
        if PROJECTION:
            at_x += at_made
        store_tile(grad_key_input, token, valid, d, WIDTH, at_x)
        at_base = matmul(tl.trans(at_made), xk, PRECISION)
        key_grad, key_anchor_grad = settle(
            None, at_base, at_base, key_grad, key_anchor_grad, grad_last, grad_snapshot_last,
            grad_anchor_last, at, fresh, leaves, False, d, WIDTH, d, WIDTH, SNAPSHOTS, RESIDENT,
        )  # fmt: skip
        at_x = matmul(at_v, value_base, PRECISION)
        if PROJECTION:
            at_x += at_v
        store_tile(grad_value_input, token, valid, d, WIDTH, at_x)
        at_base = matmul(tl.trans(at_v), xv, PRECISION)
        value_grad, value_anchor_grad = settle(
            None, at_base, at_base, value_grad, value_anchor_grad, grad_last, grad_snapshot_last,
            grad_anchor_last, at + MATRIX, fresh, leaves, False, d, WIDTH, d, WIDTH, SNAPSHOTS, RESIDENT,
        )  # fmt: skip
        at_z = tl.where((g == 0)[None, :], at_z_rate[:, None], 0.0)
        at_z += tl.where((g == 1)[None, :], at_z_retention[:, None], 0.0)
        store_tile(grad_gate_input, token, valid, d, WIDTH, matmul(at_z, gate_base, PRECISION))
        at_gates_base += matmul(tl.trans(at_z), xg, PRECISION)
        gates_anchor_grad += at_gates_base
        moved = load_tile(grad_snapshot_gate + gate_at, g, (g < _GATES) & leaves, d, WIDTH)
        tl.debug_barrier()
        clear(grad_snapshot_gate, gate_at, leaves, g, _GATES, d, WIDTH)
        gates_grad += moved
        if SNAPSHOTS:
            increase(grad_snapshot_gate, gate_at, not fresh, g, _GATES, d, WIDTH, at_gates_base)
            at_gates_base = tl.where(fresh, at_gates_base, 0.0)
        gates_grad += at_gates_base
        tl.debug_barrier()

    if RESIDENT:
        put(grad_last, at, True, d, WIDTH, d, WIDTH, key_grad)
        put(grad_last, at + MATRIX, True, d, WIDTH, d, WIDTH, value_grad)
        put(grad_last, at + 2 * MATRIX, True, d, WIDTH, d, WIDTH, memory_grad)
        if anchor_last is not None:
            put(grad_anchor_last, at, True, d, WIDTH, d, WIDTH, key_anchor_grad)
            put(grad_anchor_last, at + MATRIX, True, d, WIDTH, d, WIDTH, value_anchor_grad)
            put(grad_anchor_last, at + 2 * MATRIX, True, d, WIDTH, d, WIDTH, memory_anchor_grad)
    put(grad_gate, gate_at, True, g, _GATES, d, WIDTH, gates_grad)
    if anchor_gate is not None:
        put(grad_anchor_gate, gate_at, True, g, _GATES, d, WIDTH, gates_anchor_grad)
    if MOMENTUM:
        put(grad_velocity_gate, gate_at, True, g, _GATES, d, WIDTH, gates_velocity_grad)
    rates_at = grad_rates + 3 * program
    tl.store(rates_at, tl.load(rates_at) + largest_sum)
    tl.store(rates_at + 1, tl.load(rates_at + 1) + bias_sum)
    tl.store(rates_at + 2, tl.load(rates_at + 2) + retention_sum)


@triton.jit
def _write_again(
    grad, velocity_grads, at, reaches, by_written, state, velocity, k, error, surprise, written, recalled,
    rate, spreads, gram, inverse, d, WIDTH: tl.constexpr, by_velocity,
    ERASES: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`write_layer_adjoint` of a wide memory, whose gradient of U is updated in memory."""
    velocity_grad = grad
    if MOMENTUM:
        velocity_grad = take(velocity_grads, at, d, WIDTH, d, WIDTH) * reaches
    found, parts = write_layer_adjoint(
        grad, velocity_grad, by_written, state, velocity, k, error, surprise, written, recalled, rate,
        spreads, gram, inverse, ERASES, MOMENTUM, PRECISION,
    )  # fmt: skip
    at_state, at_velocity, at_k, at_error, at_rate, at_gram = found
    if MOMENTUM:
        if by_velocity is not None:
            at_velocity += by_velocity
        put(velocity_grads, at, True, d, WIDTH, d, WIDTH, at_velocity)
    return (at_state, at_k, at_error, at_rate, at_gram), parts
