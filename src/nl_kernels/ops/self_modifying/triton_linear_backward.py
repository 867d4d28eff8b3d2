"""The backward kernel for linear memories; the layout is that of the forward kernel."""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import bound_adjoint, gram_adjoint, proximal_adjoint
from nl_kernels.chunk_kernels.forward import length_factor, unit
from nl_kernels.ops.self_modifying.triton_chunk import (
    base_again,
    clear,
    clock,
    coefficients,
    increase,
    locate_row,
    locate_tokens,
    merge,
    put,
    rates_adjoint,
    read_layer,
    read_layer_adjoint,
    residual,
    settle,
    share_keys,
    take,
    unit_adjoint,
    write_layer,
    write_layer_adjoint,
)
from nl_kernels.ops.self_modifying.triton_linear import (
    BLOCK_G,
    GATES,
    elementwise_factor,
    serve_memories,
)
from nl_kernels.triton_support.language import finish_loads, load_tile, matmul, store_tile


@triton.jit
def held_tile(tile, base, offset, rows, columns, COLUMNS: tl.constexpr, RESIDENT: tl.constexpr):
    """A square matrix from registers, or from memory."""
    if not RESIDENT:
        tile = take(base, offset, rows, COLUMNS, columns, COLUMNS)
    return tile


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
    g = tl.arange(0, BLOCK_G)
    largest_rate = tl.load(rate_max + head)
    bias, retention = tl.load(rate_bias + head), tl.load(retention_bias + head)
    at = program * 3 * MATRIX
    gate_at = program * GATES * WIDTH

    # What the final snapshot shares with the final running state.
    arrives = (is_last != 0) & ((stop > begin) | (not RESUMED))
    others = arrives & (stop % OTHERS_CLOCK == 0)
    own = arrives & (stop % MEMORY_CLOCK == 0)
    merge(grad_last, grad_snapshot_last, at, others, d, WIDTH, d, WIDTH)
    merge(grad_last, grad_snapshot_last, at + MATRIX, others, d, WIDTH, d, WIDTH)
    merge(grad_last, grad_snapshot_last, at + 2 * MATRIX, own, d, WIDTH, d, WIDTH)
    merge(grad_gate, grad_snapshot_gate, gate_at, others, g, GATES, d, WIDTH)
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
    gates_grad = take(grad_gate, gate_at, g, GATES, d, WIDTH)
    gates_anchor_grad = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if anchor_gate is not None:
        gates_anchor_grad = take(grad_anchor_gate, gate_at, g, GATES, d, WIDTH)
    gates_velocity_grad = gates_anchor_grad
    if MOMENTUM:
        gates_velocity_grad = take(grad_velocity_gate, gate_at, g, GATES, d, WIDTH)
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
            clear(grad_snapshot_gate, gate_at, cut, g, GATES, d, WIDTH)
            tl.debug_barrier()

        # The chunk again, up to the errors.
        gate_state = take(kept_gate, slot * GATES * WIDTH, g, GATES, d, WIDTH)
        gate_base = base_again(
            kept_gate,
            resumed_gate,
            anchor_gate,
            period * GATES * WIDTH,
            gate_at,
            inside,
            g,
            GATES,
            d,
            WIDTH,
        )
        gate_velocity = gate_state
        if MOMENTUM:
            gate_velocity = take(kept_velocity_gate, slot * GATES * WIDTH, g, GATES, d, WIDTH)
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
        k, key_scale, v, z_rate, z_retention, rate, log_decay = serve_memories(
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
        grad = held_tile(memory_grad, grad_last, memory_at, d, d, WIDTH, RESIDENT) * reaches
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
            grad = held_tile(held, grad_last, at + m * MATRIX, d, d, WIDTH, RESIDENT) * reaches
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
        gate_factor = elementwise_factor(error, BOUND)
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
        moved = load_tile(grad_snapshot_gate + gate_at, g, (g < GATES) & leaves, d, WIDTH)
        tl.debug_barrier()
        clear(grad_snapshot_gate, gate_at, leaves, g, GATES, d, WIDTH)
        gates_grad += moved
        if SNAPSHOTS:
            increase(grad_snapshot_gate, gate_at, not fresh, g, GATES, d, WIDTH, at_gates_base)
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
    put(grad_gate, gate_at, True, g, GATES, d, WIDTH, gates_grad)
    if anchor_gate is not None:
        put(grad_anchor_gate, gate_at, True, g, GATES, d, WIDTH, gates_anchor_grad)
    if MOMENTUM:
        put(grad_velocity_gate, gate_at, True, g, GATES, d, WIDTH, gates_velocity_grad)
    rates_at = grad_rates + 3 * program
    largest_sum += tl.load(rates_at)
    bias_sum += tl.load(rates_at + 1)
    retention_sum += tl.load(rates_at + 2)
    finish_loads(1)
    tl.store(rates_at, largest_sum)
    tl.store(rates_at + 1, bias_sum)
    tl.store(rates_at + 2, retention_sum)


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
