"""The backward kernel for two-layer memories; the layout is that of the forward kernel."""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import (
    bound_adjoint,
    gram_adjoint,
    hidden_adjoint,
    proximal_adjoint,
    signal_adjoint,
)
from nl_kernels.chunk_kernels.forward import activated, unit
from nl_kernels.ops.self_modifying.triton_chunk import (
    base_again,
    clear,
    clock,
    coefficients,
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
    unit_adjoint,
    write_layer,
    write_layer_adjoint,
)
from nl_kernels.ops.self_modifying.triton_two_layer import BLOCK_G, errors_of, serve_rows
from nl_kernels.triton_support.language import finish_loads, load_tile, matmul, store_tile


@triton.jit
def _give_back(
    k, v, remainder, q, at_y, rate, key_rate, gram, inverse, spreads, reaches,
    kept_first, kept_last, kept_velocity_first, kept_velocity_last, resumed_first, resumed_last,
    anchor_first, anchor_last, grad_first, grad_last, grad_velocity_first, grad_velocity_last,
    grad_snapshot_first, grad_snapshot_last, grad_anchor_first, grad_anchor_last,
    kept_first_at, kept_last_at, base_first_at, base_last_at, first_at, last_at, inside, fresh, leaves,
    rows, ROWS: tl.constexpr, d, WIDTH: tl.constexpr, h, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr, ERASES: tl.constexpr, ERASES_LAST: tl.constexpr,
    PROXIMAL: tl.constexpr, BOUND: tl.constexpr, SNAPSHOTS: tl.constexpr, MOMENTUM: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The derivative of one memory over the chunk; gradients of its states are updated in memory.

    ``q`` and ``at_y`` are the queries and the adjoint of the running read, or ``None``.

    Returns adjoints: of k, v and q; of the error (for what its residuals add); of the rate, the first layers'
    rate and their K; the seven parts of the writes' coefficients and the three of the read's.
    """
    first = base_again(
        kept_first, resumed_first, anchor_first, base_first_at, first_at, inside, h, HIDDEN, d, WIDTH
    )
    last = base_again(
        kept_last, resumed_last, anchor_last, base_last_at, last_at, inside, rows, ROWS, h, HIDDEN
    )
    keys, values, error, factor, back, signal = errors_of(
        k, v, first, last, remainder, ACTIVATION, NORMALIZED, BOUND, PRECISION
    )
    difference = keys[0] - values[0]
    last_rate, last_gram, last_inverse = share_keys(
        keys[0], rate, spreads[0][2], ERASES_LAST, PROXIMAL, BLOCK_C, PRECISION
    )
    first_state = take(kept_first, kept_first_at, h, HIDDEN, d, WIDTH)
    last_state = take(kept_last, kept_last_at, rows, ROWS, h, HIDDEN)
    first_velocity, last_velocity = first_state, last_state
    first_grad = take(grad_first, first_at, h, HIDDEN, d, WIDTH) * reaches
    last_grad = take(grad_last, last_at, rows, ROWS, h, HIDDEN) * reaches
    first_velocity_grad, last_velocity_grad = first_grad, last_grad
    if MOMENTUM:
        first_velocity = take(kept_velocity_first, kept_first_at, h, HIDDEN, d, WIDTH)
        last_velocity = take(kept_velocity_last, kept_last_at, rows, ROWS, h, HIDDEN)
        first_velocity_grad = take(grad_velocity_first, first_at, h, HIDDEN, d, WIDTH) * reaches
        last_velocity_grad = take(grad_velocity_last, last_at, rows, ROWS, h, HIDDEN) * reaches
    _, _, first_surprise, first_written, first_recalled = write_layer(
        first_state, first_velocity, k, signal[0], key_rate, spreads, inverse, ERASES, MOMENTUM, PRECISION
    )
    _, _, last_surprise, last_written, last_recalled = write_layer(
        last_state, last_velocity, keys[0], error, last_rate, spreads, last_inverse, ERASES_LAST, MOMENTUM,
        PRECISION,
    )  # fmt: skip

    # The running read, last layer first.
    at_k, at_q = tl.zeros(k.shape, tl.float32), tl.zeros(k.shape, tl.float32)
    at_hidden = tl.zeros(difference.shape, tl.float32)
    by_first_written, by_last_written = None, None
    nothing = tl.zeros([BLOCK_C], tl.float32)
    read_parts = (nothing, tl.zeros([BLOCK_C, BLOCK_C], tl.float32), nothing)
    if at_y is not None:
        z, z_recalled, z_scores = read_layer(
            q, first_state, first_velocity, k, first_written, spreads, MOMENTUM, PRECISION
        )
        if anchor_first is not None:
            z += matmul(q, tl.trans(take(anchor_first, first_at, h, HIDDEN, d, WIDTH)), PRECISION)
        probe, slope, _, scale = activated(z, ACTIVATION, NORMALIZED)
        _, y_recalled, y_scores = read_layer(
            probe, last_state, last_velocity, keys[0], last_written, spreads, MOMENTUM, PRECISION
        )
        found, after = read_layer_adjoint(
            at_y, probe, last_state, last_velocity, keys[0], last_written, y_recalled, y_scores, spreads,
            MOMENTUM, PRECISION,
        )  # fmt: skip
        at_probe, read_last_state, read_last_velocity, at_hidden, by_last_written = found
        if anchor_last is not None:
            at_probe += matmul(at_y, take(anchor_last, last_at, rows, ROWS, h, HIDDEN), PRECISION)
            by_anchor = matmul(tl.trans(at_y), probe, PRECISION)
            increase(grad_anchor_last, last_at, True, rows, ROWS, h, HIDDEN, by_anchor)
        at_z = hidden_adjoint(at_probe, probe, slope, scale, None, NORMALIZED)
        found, more = read_layer_adjoint(
            at_z, q, first_state, first_velocity, k, first_written, z_recalled, z_scores, spreads,
            MOMENTUM, PRECISION,
        )  # fmt: skip
        at_q, read_first_state, read_first_velocity, at_k, by_first_written = found
        if anchor_first is not None:
            at_q += matmul(at_z, take(anchor_first, first_at, h, HIDDEN, d, WIDTH), PRECISION)
            by_anchor = matmul(tl.trans(at_z), q, PRECISION)
            increase(grad_anchor_first, first_at, True, h, HIDDEN, d, WIDTH, by_anchor)
        read_parts = (after[0] + more[0], after[1] + more[1], after[2] + more[2])
        tl.debug_barrier()

    # The writes of both layers.
    found, parts = write_layer_adjoint(
        last_grad, last_velocity_grad, by_last_written, last_state, last_velocity, keys[0], error,
        last_surprise, last_written, last_recalled, last_rate, spreads, last_gram, last_inverse,
        ERASES_LAST, MOMENTUM, PRECISION,
    )  # fmt: skip
    at_last_state, at_last_velocity, by_write, at_error, at_rate, at_last_gram = found
    at_hidden += by_write
    if ERASES_LAST:
        at_hidden += gram_adjoint(at_last_gram * spreads[0][2], keys[0], PRECISION)
        if PROXIMAL:
            at_rate, by_rate = proximal_adjoint(at_rate, rate, keys[0], last_rate)
            at_hidden += by_rate
    found, more = write_layer_adjoint(
        first_grad, first_velocity_grad, by_first_written, first_state, first_velocity, k, signal[0],
        first_surprise, first_written, first_recalled, key_rate, spreads, gram, inverse,
        ERASES, MOMENTUM, PRECISION,
    )  # fmt: skip
    at_first_state, at_first_velocity, by_write, at_signal, at_key_rate, at_gram = found
    at_k += by_write
    parts = (
        parts[0] + more[0], parts[1] + more[1], parts[2] + more[2], parts[3] + more[3], parts[4] + more[4],
        parts[5] + more[5], parts[6] + more[6],
    )  # fmt: skip
    if at_y is not None:
        at_first_state += read_first_state
        at_last_state += read_last_state
        if MOMENTUM:
            at_first_velocity += read_first_velocity
            at_last_velocity += read_last_velocity
    if MOMENTUM:
        put(grad_velocity_first, first_at, True, h, HIDDEN, d, WIDTH, at_first_velocity)
        put(grad_velocity_last, last_at, True, rows, ROWS, h, HIDDEN, at_last_velocity)

    # The error signal, the error, and the hidden layers at k and v.
    at_back, by_signal, at_slope, radial = signal_adjoint(
        at_signal, signal[0], signal[1], signal[2], signal[3], back, keys[0], keys[1], keys[2], keys[3],
        NORMALIZED, BOUND,
    )  # fmt: skip
    at_error += matmul(at_back, tl.trans(last), PRECISION)
    at_base = matmul(tl.trans(error), at_back, PRECISION)
    at_error = bound_adjoint(at_error, error, factor, BOUND)
    at_base += matmul(tl.trans(at_error), difference, PRECISION)
    settle(
        at_last_state, at_base, at_base, 0.0, 0.0, grad_last, grad_snapshot_last, grad_anchor_last, last_at,
        fresh, leaves, True, rows, ROWS, h, HIDDEN, SNAPSHOTS, False,
    )  # fmt: skip
    at_values = -matmul(at_error, last, PRECISION)
    at_hidden += by_signal - at_values
    at_z = hidden_adjoint(at_hidden, keys[0], keys[1], keys[3], radial, NORMALIZED) + at_slope
    at_k += matmul(at_z, first, PRECISION)
    at_base = matmul(tl.trans(at_z), k, PRECISION)
    at_z = hidden_adjoint(at_values, values[0], values[1], values[3], None, NORMALIZED)
    at_v = matmul(at_z, first, PRECISION)
    at_base += matmul(tl.trans(at_z), v, PRECISION)
    settle(
        at_first_state, at_base, at_base, 0.0, 0.0, grad_first, grad_snapshot_first, grad_anchor_first,
        first_at, fresh, leaves, True, h, HIDDEN, d, WIDTH, SNAPSHOTS, False,
    )  # fmt: skip
    return (at_k, at_v, at_q, at_error, at_rate, at_key_rate, at_gram), parts, read_parts


@triton.jit
def _serve_adjoint(
    at_made, x, kept_first, kept_last, resumed_first, resumed_last, anchor_first, anchor_last,
    grad_first, grad_last, grad_snapshot_first, grad_snapshot_last, grad_anchor_first, grad_anchor_last,
    base_first_at, base_last_at, first_at, last_at, inside, fresh,
    rows, ROWS: tl.constexpr, d, WIDTH: tl.constexpr, h, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr, SNAPSHOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The adjoint of x from that of f(x) [C, out]; those of the layers that served are updated in memory."""
    first = base_again(
        kept_first, resumed_first, anchor_first, base_first_at, first_at, inside, h, HIDDEN, d, WIDTH
    )
    last = base_again(
        kept_last, resumed_last, anchor_last, base_last_at, last_at, inside, rows, ROWS, h, HIDDEN
    )
    value, slope, _, scale = activated(matmul(x, tl.trans(first), PRECISION), ACTIVATION, NORMALIZED)
    at_base = matmul(tl.trans(at_made), value, PRECISION)
    settle(
        None, at_base, at_base, 0.0, 0.0, grad_last, grad_snapshot_last, grad_anchor_last, last_at,
        fresh, False, False, rows, ROWS, h, HIDDEN, SNAPSHOTS, False,
    )  # fmt: skip
    at_z = hidden_adjoint(matmul(at_made, last, PRECISION), value, slope, scale, None, NORMALIZED)
    at_base = matmul(tl.trans(at_z), x, PRECISION)
    settle(
        None, at_base, at_base, 0.0, 0.0, grad_first, grad_snapshot_first, grad_anchor_first, first_at,
        fresh, False, False, h, HIDDEN, d, WIDTH, SNAPSHOTS, False,
    )  # fmt: skip
    return matmul(at_z, first, PRECISION)


@triton.jit(
    do_not_specialize=[
        "T", "H", "offset", "first_chunk", "stop_chunk", "kept_first_slot", "kept_slots", "is_last"
    ]
)  # fmt: skip
def two_layer_backward_kernel(
    query,
    key_input,
    value_input,
    gate_input,
    momentum,
    spans,
    rate_max,
    rate_bias,
    retention_bias,
    anchor_first,
    anchor_last,
    anchor_gate,
    resumed_first,
    resumed_last,
    resumed_gate,
    kept_first,
    kept_last,
    kept_gate,
    kept_velocity_first,
    kept_velocity_last,
    kept_velocity_gate,
    grad_o,
    grad_query,
    grad_key_input,
    grad_value_input,
    grad_gate_input,
    grad_momentum,
    grad_rates,
    grad_first,
    grad_last,
    grad_gate,
    grad_velocity_first,
    grad_velocity_last,
    grad_velocity_gate,
    grad_snapshot_first,
    grad_snapshot_last,
    grad_snapshot_gate,
    grad_anchor_first,
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
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    MEMORY_CLOCK: tl.constexpr,
    OTHERS_CLOCK: tl.constexpr,
    RUNNING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ERASES: tl.constexpr,
    ERASES_LAST: tl.constexpr,
    PROXIMAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PROJECTION: tl.constexpr,
    TARGET: tl.constexpr,
    BOUND: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As :func:`~nl_kernels.ops.self_modifying.triton_linear.linear_backward_kernel`."""
    MOMENTUM: tl.constexpr = momentum is not None
    RESUMED: tl.constexpr = resumed_last is not None
    SNAPSHOTS: tl.constexpr = RESUMED or MEMORY_CLOCK != OTHERS_CLOCK
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    program = tl.program_id(0).to(tl.int64)
    sequence = program // H
    head = program % H
    origin, begin, stop = locate_row(spans, sequence, offset, T)
    d = tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    g = tl.arange(0, BLOCK_G)
    largest_rate = tl.load(rate_max + head)
    bias, retention = tl.load(rate_bias + head), tl.load(retention_bias + head)
    firsts_at, lasts_at, gates_at = program * 5 * MATRIX, program * 3 * MATRIX, program * 2 * HIDDEN

    # What the final snapshot shares with the final running state.
    arrives = (is_last != 0) & ((stop > begin) | (not RESUMED))
    others = arrives & (stop % OTHERS_CLOCK == 0)
    own = arrives & (stop % MEMORY_CLOCK == 0)
    for m in range(5):
        flag = (others & (m != 2)) | (own & (m == 2))
        merge(grad_first, grad_snapshot_first, firsts_at + m * MATRIX, flag, h, HIDDEN, d, WIDTH)
    for m in range(3):
        flag = (others & (m != 2)) | (own & (m == 2))
        merge(grad_last, grad_snapshot_last, lasts_at + m * MATRIX, flag, d, WIDTH, h, HIDDEN)
    merge(grad_gate, grad_snapshot_gate, gates_at, others, g, 2, h, HIDDEN)
    tl.debug_barrier()
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
        period = slot - (start % OTHERS_CLOCK) // CHUNK
        own_period = slot - (start % MEMORY_CLOCK) // CHUNK
        inside = (start - start % OTHERS_CLOCK > begin) | (not RESUMED)
        own_inside = (start - start % MEMORY_CLOCK > begin) | (not RESUMED)
        mu = tl.full([BLOCK_C], 1.0, tl.float32)
        if MOMENTUM:
            mu = tl.load(momentum + token, mask=valid, other=1.0)
        reaches = 1.0
        if TRUNCATE > 0:
            cut = ((start + CHUNK) % TRUNCATE == 0) & (stop >= start + CHUNK)
            reaches = tl.where(cut, 0.0, 1.0)
            for m in range(5):
                clear(grad_snapshot_first, firsts_at + m * MATRIX, cut, h, HIDDEN, d, WIDTH)
            for m in range(3):
                clear(grad_snapshot_last, lasts_at + m * MATRIX, cut, d, WIDTH, h, HIDDEN)
            clear(grad_snapshot_gate, gates_at, cut, g, 2, h, HIDDEN)
            tl.debug_barrier()

        # k, v and the gates again.
        xk = load_tile(key_input, token, valid, d, WIDTH)
        at = period * 5 * MATRIX
        first = base_again(
            kept_first, resumed_first, anchor_first, at, firsts_at, inside, h, HIDDEN, d, WIDTH
        )
        last = base_again(
            kept_last, resumed_last, anchor_last, period * 3 * MATRIX, lasts_at, inside, d, WIDTH, h, HIDDEN
        )
        made, _, _, _ = serve_rows(xk, first, last, ACTIVATION, NORMALIZED, PRECISION)
        if PROJECTION:
            made += xk
        k, key_scale = unit(made)
        xv = load_tile(value_input, token, valid, d, WIDTH)
        first = base_again(
            kept_first, resumed_first, anchor_first, at + MATRIX, firsts_at + MATRIX, inside, h, HIDDEN, d,
            WIDTH,
        )  # fmt: skip
        last = base_again(
            kept_last, resumed_last, anchor_last, period * 3 * MATRIX + MATRIX, lasts_at + MATRIX, inside, d,
            WIDTH, h, HIDDEN,
        )  # fmt: skip
        v, _, _, _ = serve_rows(xv, first, last, ACTIVATION, NORMALIZED, PRECISION)
        if PROJECTION:
            v += xv
        xg = load_tile(gate_input, token, valid, d, WIDTH)
        first = base_again(
            kept_first, resumed_first, anchor_first, at + 3 * MATRIX, firsts_at + 3 * MATRIX, inside, h,
            HIDDEN, d, WIDTH,
        )  # fmt: skip
        last = base_again(
            kept_gate, resumed_gate, anchor_gate, period * 2 * HIDDEN, gates_at, inside, g, 1, h, HIDDEN
        )
        made, _, _, _ = serve_rows(xg, first, last, ACTIVATION, NORMALIZED, PRECISION)
        z_rate = tl.sum(made, 1) + bias
        first = base_again(
            kept_first, resumed_first, anchor_first, at + 4 * MATRIX, firsts_at + 4 * MATRIX, inside, h,
            HIDDEN, d, WIDTH,
        )  # fmt: skip
        last = base_again(
            kept_gate, resumed_gate, anchor_gate, period * 2 * HIDDEN + HIDDEN, gates_at + HIDDEN, inside, g,
            1, h, HIDDEN,
        )  # fmt: skip
        made, _, _, _ = serve_rows(xg, first, last, ACTIVATION, NORMALIZED, PRECISION)
        z_retention = tl.sum(made, 1) + retention
        rate = tl.where(valid, largest_rate * tl.sigmoid(z_rate), 0.0)
        log_decay = tl.where(valid, log_sigmoid(z_retention), 0.0)
        spreads = coefficients(log_decay, mu, valid, MOMENTUM, BLOCK_C, PRECISION)
        key_rate, gram, inverse = share_keys(k, rate, spreads[0][2], ERASES, PROXIMAL, BLOCK_C, PRECISION)

        # M_memory, with its read.
        q, query_scale = unit(load_tile(query, token, valid, d, WIDTH))
        at_y = load_tile(grad_o, token, valid, d, WIDTH)
        by_read = at_y
        if not RUNNING:
            by_read = None
        found, parts, read_parts = _give_back(
            k, v, residual(k, v, RESIDUAL, TARGET), q, by_read, rate, key_rate, gram, inverse, spreads,
            reaches, kept_first, kept_last, kept_velocity_first, kept_velocity_last,
            resumed_first, resumed_last, anchor_first, anchor_last, grad_first, grad_last,
            grad_velocity_first, grad_velocity_last,
            grad_snapshot_first, grad_snapshot_last, grad_anchor_first, grad_anchor_last,
            slot * 5 * MATRIX + 2 * MATRIX, slot * 3 * MATRIX + 2 * MATRIX,
            own_period * 5 * MATRIX + 2 * MATRIX, own_period * 3 * MATRIX + 2 * MATRIX,
            firsts_at + 2 * MATRIX, lasts_at + 2 * MATRIX, own_inside, own_fresh, own_leaves,
            d, WIDTH, d, WIDTH, h, HIDDEN, ACTIVATION, NORMALIZED, ERASES, ERASES_LAST, PROXIMAL, BOUND,
            SNAPSHOTS, MOMENTUM, BLOCK_C, PRECISION,
        )  # fmt: skip
        at_k, at_v, at_q, at_error, at_rate, at_key_rate, at_gram = found
        if RESIDUAL:
            at_k += at_error
            at_q += at_y
        if TARGET:
            at_v -= at_error
        strict, before, to_end, final, m_final, c_to_end, c_final = parts

        # M_key and M_value, then the gates.
        remainder = residual(k, v, PROJECTION, TARGET)
        for m in range(2):
            shares, pieces, _unread = _give_back(
                k, v, remainder, None, None, rate, key_rate, gram, inverse, spreads, reaches,
                kept_first, kept_last, kept_velocity_first, kept_velocity_last, resumed_first, resumed_last,
                anchor_first, anchor_last, grad_first, grad_last, grad_velocity_first, grad_velocity_last,
                grad_snapshot_first, grad_snapshot_last, grad_anchor_first, grad_anchor_last,
                slot * 5 * MATRIX + m * MATRIX, slot * 3 * MATRIX + m * MATRIX,
                period * 5 * MATRIX + m * MATRIX, period * 3 * MATRIX + m * MATRIX,
                firsts_at + m * MATRIX, lasts_at + m * MATRIX, inside, fresh, leaves,
                d, WIDTH, d, WIDTH, h, HIDDEN, ACTIVATION, NORMALIZED, ERASES, ERASES_LAST, PROXIMAL, BOUND,
                SNAPSHOTS, MOMENTUM, BLOCK_C, PRECISION,
            )  # fmt: skip
            at_k += shares[0]
            at_v += shares[1]
            if PROJECTION:
                at_k += shares[3]
            if TARGET:
                at_v -= shares[3]
            at_rate += shares[4]
            at_key_rate += shares[5]
            at_gram += shares[6]
            strict += pieces[0]
            before += pieces[1]
            to_end += pieces[2]
            final += pieces[3]
            m_final += pieces[4]
            c_to_end += pieces[5]
            c_final += pieces[6]
        for i in range(2):
            shares, pieces, _unread = _give_back(
                k, v, None, None, None, rate, key_rate, gram, inverse, spreads, reaches,
                kept_first, kept_gate, kept_velocity_first, kept_velocity_gate, resumed_first, resumed_gate,
                anchor_first, anchor_gate, grad_first, grad_gate, grad_velocity_first, grad_velocity_gate,
                grad_snapshot_first, grad_snapshot_gate, grad_anchor_first, grad_anchor_gate,
                slot * 5 * MATRIX + (3 + i) * MATRIX, slot * 2 * HIDDEN + i * HIDDEN,
                period * 5 * MATRIX + (3 + i) * MATRIX, period * 2 * HIDDEN + i * HIDDEN,
                firsts_at + (3 + i) * MATRIX, gates_at + i * HIDDEN, inside, fresh, leaves,
                g, 1, d, WIDTH, h, HIDDEN, ACTIVATION, NORMALIZED, ERASES, ERASES_LAST, PROXIMAL, BOUND,
                SNAPSHOTS, MOMENTUM, BLOCK_C, PRECISION,
            )  # fmt: skip
            at_k += shares[0]
            at_v += shares[1]
            at_rate += shares[4]
            at_key_rate += shares[5]
            at_gram += shares[6]
            strict += pieces[0]
            before += pieces[1]
            to_end += pieces[2]
            final += pieces[3]
            m_final += pieces[4]
            c_to_end += pieces[5]
            c_final += pieces[6]

        # The keys and rates that all share.
        if ERASES:
            at_k += gram_adjoint(at_gram * spreads[0][2], k, PRECISION)
            if PROXIMAL:
                at_key_rate, by_k = proximal_adjoint(at_key_rate, rate, k, key_rate)
                at_k += by_k
        parts = (strict, before, to_end, final, m_final, c_to_end, c_final)
        at_log, at_mu = rates_adjoint(parts, read_parts, mu, valid, spreads, MOMENTUM, BLOCK_C, PRECISION)
        if MOMENTUM:
            tl.store(grad_momentum + token, at_mu, mask=valid)
        at_rate = tl.where(valid, at_rate + at_key_rate, 0.0)
        fraction = tl.sigmoid(z_rate)
        at_z_rate = at_rate * largest_rate * fraction * (1 - fraction)
        at_z_retention = at_log * tl.sigmoid(-z_retention)
        largest_sum += tl.sum(at_rate * fraction, 0)
        bias_sum += tl.sum(at_z_rate, 0)
        retention_sum += tl.sum(at_z_retention, 0)

        # The memories that made them.
        if not RUNNING:
            at_q += _serve_adjoint(
                at_y, q, kept_first, kept_last, resumed_first, resumed_last, anchor_first, anchor_last,
                grad_first, grad_last, grad_snapshot_first, grad_snapshot_last, grad_anchor_first,
                grad_anchor_last, own_period * 5 * MATRIX + 2 * MATRIX, own_period * 3 * MATRIX + 2 * MATRIX,
                firsts_at + 2 * MATRIX, lasts_at + 2 * MATRIX, own_inside, own_fresh, d, WIDTH, d, WIDTH,
                h, HIDDEN, ACTIVATION, NORMALIZED, SNAPSHOTS, PRECISION,
            )  # fmt: skip
        store_tile(grad_query, token, valid, d, WIDTH, unit_adjoint(at_q, q, query_scale))
        at_made = unit_adjoint(at_k, k, key_scale)
        at_x = _serve_adjoint(
            at_made, xk, kept_first, kept_last, resumed_first, resumed_last, anchor_first, anchor_last,
            grad_first, grad_last, grad_snapshot_first, grad_snapshot_last, grad_anchor_first,
            grad_anchor_last, period * 5 * MATRIX, period * 3 * MATRIX, firsts_at, lasts_at, inside, fresh,
            d, WIDTH, d, WIDTH, h, HIDDEN, ACTIVATION, NORMALIZED, SNAPSHOTS, PRECISION,
        )  # fmt: skip
        if PROJECTION:
            at_x += at_made
        store_tile(grad_key_input, token, valid, d, WIDTH, at_x)
        at_x = _serve_adjoint(
            at_v, xv, kept_first, kept_last, resumed_first, resumed_last, anchor_first, anchor_last,
            grad_first, grad_last, grad_snapshot_first, grad_snapshot_last, grad_anchor_first,
            grad_anchor_last, period * 5 * MATRIX + MATRIX, period * 3 * MATRIX + MATRIX, firsts_at + MATRIX,
            lasts_at + MATRIX, inside, fresh, d, WIDTH, d, WIDTH, h, HIDDEN, ACTIVATION, NORMALIZED,
            SNAPSHOTS, PRECISION,
        )  # fmt: skip
        if PROJECTION:
            at_x += at_v
        store_tile(grad_value_input, token, valid, d, WIDTH, at_x)
        at_x = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for i in range(2):
            at_z = tl.where(i == 0, at_z_rate, at_z_retention)
            at_x += _serve_adjoint(
                tl.where((g == 0)[None, :], at_z[:, None], 0.0), xg, kept_first, kept_gate, resumed_first,
                resumed_gate, anchor_first, anchor_gate, grad_first, grad_gate, grad_snapshot_first,
                grad_snapshot_gate, grad_anchor_first, grad_anchor_gate,
                period * 5 * MATRIX + (3 + i) * MATRIX, period * 2 * HIDDEN + i * HIDDEN,
                firsts_at + (3 + i) * MATRIX, gates_at + i * HIDDEN, inside, fresh, g, 1, d, WIDTH, h, HIDDEN,
                ACTIVATION, NORMALIZED, SNAPSHOTS, PRECISION,
            )  # fmt: skip
        store_tile(grad_gate_input, token, valid, d, WIDTH, at_x)
        tl.debug_barrier()

    rates_at = grad_rates + 3 * program
    largest_sum += tl.load(rates_at)
    bias_sum += tl.load(rates_at + 1)
    retention_sum += tl.load(rates_at + 2)
    finish_loads(1)
    tl.store(rates_at, largest_sum)
    tl.store(rates_at + 1, bias_sum)
    tl.store(rates_at + 2, retention_sum)
