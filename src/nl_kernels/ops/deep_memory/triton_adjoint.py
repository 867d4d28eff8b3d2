"""The adjoint of a chunk, layer by layer, from those in :mod:`nl_kernels.chunk_kernels.adjoint`."""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import (
    bound_adjoint,
    decay_adjoint,
    gram_adjoint,
    hidden_adjoint,
    mixed_adjoint,
    momentum_adjoint,
    momentum_gradient,
    proximal_adjoint,
    read_adjoint,
    signal_adjoint,
    velocity_read_adjoint,
    write_adjoint,
)
from nl_kernels.chunk_kernels.forward import activated, error_signal, read_forward
from nl_kernels.chunk_kernels.scratch import hand_on, take_back
from nl_kernels.ops.deep_memory.triton_chunk import (
    add_to_weight,
    chunk_coefficients,
    load_base,
    load_weight,
    read_layer,
    store_weight,
)
from nl_kernels.ops.deep_memory.triton_rerun import (
    AT_ERROR,
    AT_KEY,
    AT_SIGNAL,
    AT_VALUE,
    AT_WRITTEN,
    BACK,
    ERROR,
    INNER,
    INVERSE,
    OUTER,
    PROBE,
    RECALLED,
    Z,
    rerun_chunk,
    written_again,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile


@triton.jit
def layer_read_adjoint(
    grad,
    queries,
    x,
    written,
    states,
    velocities,
    index,
    anchors,
    row,
    decay,
    mixed,
    pending,
    pending_velocities,
    grad_anchors,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adjoints of a layer's running reads: of queries, x, u, log decays [C], and the mixed after and full.

    Those of the states go to ``pending``, since the ones after the chunk are still needed.
    """
    state = load_weight(states, index, OUT, IN, grad.shape[1], x.shape[1])
    _, recalled, scores = read_forward(queries, state, x, written, decay[1], mixed[1], PRECISION)
    at_queries, at_state, at_x, at_written, at_after, at_full = read_adjoint(
        grad, queries, state, x, written, recalled, scores, decay[1], mixed[1], PRECISION
    )
    store_weight(pending, row, at_state, OUT, IN)
    at_mixed_after = at_after
    if velocities is not None:
        velocity = load_weight(velocities, index, OUT, IN, grad.shape[1], x.shape[1])
        more, at_velocity, at_mixed_after, at_full = velocity_read_adjoint(
            grad, queries, velocity, x, written, mixed[0], PRECISION
        )
        at_queries += more
        store_weight(pending_velocities, row, at_velocity, OUT, IN)
        at_log = decay_adjoint(None, at_after, None, None, None, None, BLOCK_C, PRECISION)
    else:
        at_log = decay_adjoint(None, at_after, None, at_full, None, None, BLOCK_C, PRECISION)
    if anchors is not None:
        anchor = load_weight(anchors, row, OUT, IN, grad.shape[1], x.shape[1])
        at_queries += matmul(grad, anchor, PRECISION)
        add_to_weight(grad_anchors, row, matmul(tl.trans(grad), queries, PRECISION), OUT, IN)
    return at_queries, at_x, at_written, at_log, at_mixed_after, at_full


@triton.jit
def layer_write_adjoint(
    states,
    velocities,
    index,
    grads,
    grad_velocities,
    pending,
    pending_velocities,
    row,
    x,
    signal,
    eta,
    at_written,
    place,
    inverse_place,
    decay,
    carried,
    mixed,
    SLOT: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ERASES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    RUNNING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradient of a layer's state after the chunk to the one before it, in ``grads``.

    Returns adjoints of x, signal, η [C] and the log decays [C], and with momentum those of the mixed and the
    carried ``to_end`` and ``final``.
    """
    surprise, written, used = written_again(place, x, eta, SLOT, signal.shape[1], ERASES, PROXIMAL)
    state = load_weight(states, index, OUT, IN, signal.shape[1], x.shape[1])
    grad = load_weight(grads, row, OUT, IN, signal.shape[1], x.shape[1])
    parts = (eta, 0.0, eta, 0.0)
    if velocities is None:
        gram = decay[2]
        inverse = decay[2]
        recalled = signal
        if ERASES:
            gram = decay[2] * matmul(x, tl.trans(x), PRECISION)
            inverse = take_back(inverse_place, decay[2])
            recalled = take_back(place + RECALLED * SLOT, signal)
        at_state, at_x, at_signal, at_eta, at_strict, at_gram, at_before, at_to_end, at_final = write_adjoint(
            grad,
            at_written,
            state,
            x,
            surprise,
            written,
            recalled,
            used,
            decay[0],
            decay[4],
            decay[5],
            gram,
            inverse,
            ERASES,
            PRECISION,
        )
        if ERASES:
            at_x += gram_adjoint(at_gram * decay[2], x, PRECISION)
            at_log = decay_adjoint(at_before, None, at_strict, None, at_to_end, at_final, BLOCK_C, PRECISION)
            if PROXIMAL:
                at_eta, more = proximal_adjoint(at_eta, eta, x, used)
                at_x += more
        else:
            at_log = decay_adjoint(None, None, None, None, at_to_end, at_final, BLOCK_C, PRECISION)
    else:
        velocity = load_weight(velocities, index, OUT, IN, signal.shape[1], x.shape[1])
        grad_velocity = load_weight(grad_velocities, row, OUT, IN, signal.shape[1], x.shape[1])
        found = momentum_adjoint(
            grad,
            grad_velocity,
            at_written,
            state,
            velocity,
            x,
            signal,
            written,
            used,
            decay[5],
            mixed[2],
            mixed[3],
            carried[4],
            carried[5],
            PRECISION,
        )
        at_state, at_velocity, at_x, at_signal, at_eta, at_final = (
            found[0],
            found[1],
            found[2],
            found[3],
            found[4],
            found[5],
        )
        parts = (found[6], found[7], found[8], found[9])
        at_log = decay_adjoint(None, None, None, None, None, at_final, BLOCK_C, PRECISION)
        if RUNNING:
            at_velocity += load_weight(pending_velocities, row, OUT, IN, signal.shape[1], x.shape[1])
        tl.debug_barrier()
        store_weight(grad_velocities, row, at_velocity, OUT, IN)
    if RUNNING:
        at_state += load_weight(pending, row, OUT, IN, signal.shape[1], x.shape[1])
    tl.debug_barrier()
    store_weight(grads, row, at_state, OUT, IN)
    return at_x, at_signal, at_eta, at_log, parts


@triton.jit
def add_to_base(
    grads, grad_snapshots, grad_anchors, row, is_first, value, OUT: tl.constexpr, IN: tl.constexpr
):
    """Add to the gradients of what :func:`~nl_kernels.ops.deep_memory.triton_forward.load_base` loaded."""
    add_to_weight(grad_anchors, row, value, OUT, IN)
    if grad_snapshots is None:
        add_to_weight(grads, row, value, OUT, IN)
    elif is_first:
        add_to_weight(grad_snapshots, row, value, OUT, IN)
    else:
        add_to_weight(grads, row, value, OUT, IN)


@triton.jit
def chunk_adjoint(
    do,
    q,
    k,
    v,
    rate,
    log_decay,
    momentum,
    inner_snapshot,
    outer_snapshot,
    inner_anchor,
    outer_anchor,
    inner_states,
    outer_states,
    inner_velocities,
    outer_velocities,
    dq,
    dk,
    dv,
    d_rate,
    d_log_decay,
    d_momentum,
    d_inner,
    d_outer,
    d_inner_velocity,
    d_outer_velocity,
    d_inner_snapshot,
    d_outer_snapshot,
    d_inner_anchor,
    d_outer_anchor,
    pending_inner,
    pending_outer,
    pending_inner_velocity,
    pending_outer_velocity,
    inverse_place,
    scratch,
    index,
    row,
    is_first,
    token,
    valid,
    SLOT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TWO_LAYER: tl.constexpr,
    RUNNING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk, which starts at matrix ``index`` of the states: its gradients, and its start state's."""
    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.arange(0, BLOCK_V)
    like_hidden = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    like_value = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    like_key = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    factor = rerun_chunk(
        k,
        v,
        rate,
        log_decay,
        token,
        valid,
        inner_states,
        outer_states,
        index,
        inner_snapshot,
        outer_snapshot,
        inner_anchor,
        outer_anchor,
        row,
        is_first,
        inverse_place,
        scratch,
        SLOT,
        KEY_DIM,
        VALUE_DIM,
        HIDDEN,
        ACTIVATION,
        NORMALIZED,
        RESIDUAL,
        ERASE_INNER,
        ERASE_OUTER,
        PROXIMAL,
        BOUND,
        BLOCK_C,
        BLOCK_K,
        BLOCK_V,
        BLOCK_H,
        PRECISION,
    )
    at_log = tl.zeros([BLOCK_C], tl.float32)
    at_mixed_after = tl.zeros([BLOCK_C], tl.float32)
    at_mixed_full = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)

    # The running reads.
    if RUNNING:
        decay, carried, mixed = chunk_coefficients(log_decay, momentum, token, valid, BLOCK_C, PRECISION)
        eta = tl.load(rate + token, mask=valid, other=0.0)
        if TWO_LAYER:
            key = load_tile(k, token, valid, key_column, KEY_DIM)
            _, written, _ = written_again(
                scratch + INNER * SLOT, key, eta, SLOT, BLOCK_H, ERASE_INNER, PROXIMAL
            )
            probe = read_layer(
                None,
                inner_states,
                inner_velocities,
                index,
                inner_anchor,
                row,
                load_tile(q, token, valid, key_column, KEY_DIM),
                key,
                written,
                decay,
                mixed,
                HIDDEN,
                KEY_DIM,
                PRECISION,
            )
            hand_on(scratch + PROBE * SLOT, probe)
            tl.debug_barrier()
            value = activated(take_back(scratch + Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)[0]
            _, written, _ = written_again(
                scratch + OUTER * SLOT, value, eta, SLOT, BLOCK_V, ERASE_OUTER, PROXIMAL
            )
            probed = activated(take_back(scratch + PROBE * SLOT, like_hidden), ACTIVATION, NORMALIZED)
            at_probe, at_value, at_written, more_log, more_after, more_full = layer_read_adjoint(
                load_tile(do, token, valid, value_column, VALUE_DIM),
                probed[0],
                value,
                written,
                outer_states,
                outer_velocities,
                index,
                outer_anchor,
                row,
                decay,
                mixed,
                pending_outer,
                pending_outer_velocity,
                d_outer_anchor,
                VALUE_DIM,
                HIDDEN,
                BLOCK_C,
                PRECISION,
            )
            at_log += more_log
            if momentum is not None:
                at_mixed_after += more_after
                at_mixed_full += more_full
            hand_on(scratch + (OUTER + AT_WRITTEN) * SLOT, at_written)
            hand_on(scratch + AT_VALUE * SLOT, at_value)
            at_probe = hidden_adjoint(at_probe, probed[0], probed[1], probed[3], None, NORMALIZED)
            tl.debug_barrier()
            hand_on(scratch + PROBE * SLOT, at_probe)
            tl.debug_barrier()
            grad = take_back(scratch + PROBE * SLOT, at_probe)
        else:
            grad = load_tile(do, token, valid, value_column, VALUE_DIM)
        key = load_tile(k, token, valid, key_column, KEY_DIM)
        _, written, _ = written_again(scratch + INNER * SLOT, key, eta, SLOT, BLOCK_H, ERASE_INNER, PROXIMAL)
        at_query, at_key, at_written, more_log, more_after, more_full = layer_read_adjoint(
            grad,
            load_tile(q, token, valid, key_column, KEY_DIM),
            key,
            written,
            inner_states,
            inner_velocities,
            index,
            inner_anchor,
            row,
            decay,
            mixed,
            pending_inner,
            pending_inner_velocity,
            d_inner_anchor,
            HIDDEN,
            KEY_DIM,
            BLOCK_C,
            PRECISION,
        )
        at_log += more_log
        if momentum is not None:
            at_mixed_after += more_after
            at_mixed_full += more_full
        hand_on(scratch + (INNER + AT_WRITTEN) * SLOT, at_written)
        hand_on(scratch + AT_KEY * SLOT, at_key)
        if RESIDUAL:
            at_query += load_tile(do, token, valid, key_column, KEY_DIM)
        store_tile(dq, token, valid, key_column, KEY_DIM, at_query)
        tl.debug_barrier()

    # The writes.
    decay, carried, mixed = chunk_coefficients(log_decay, momentum, token, valid, BLOCK_C, PRECISION)
    eta = tl.load(rate + token, mask=valid, other=0.0)
    at_eta = tl.zeros([BLOCK_C], tl.float32)
    at_written = None
    if TWO_LAYER:
        if RUNNING:
            at_written = take_back(scratch + (OUTER + AT_WRITTEN) * SLOT, like_value)
        at_value, at_error, at_eta, more_log, outer_parts = layer_write_adjoint(
            outer_states,
            outer_velocities,
            index,
            d_outer,
            d_outer_velocity,
            pending_outer,
            pending_outer_velocity,
            row,
            activated(take_back(scratch + Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)[0],
            take_back(scratch + ERROR * SLOT, like_value),
            eta,
            at_written,
            scratch + OUTER * SLOT,
            scratch + (OUTER + INVERSE) * SLOT,
            decay,
            carried,
            mixed,
            SLOT,
            VALUE_DIM,
            HIDDEN,
            ERASE_OUTER,
            PROXIMAL,
            RUNNING,
            BLOCK_C,
            PRECISION,
        )
        if RUNNING:
            at_value += take_back(scratch + AT_VALUE * SLOT, like_hidden)
        at_log += more_log
        hand_on(scratch + AT_ERROR * SLOT, at_error)
        tl.debug_barrier()
        hand_on(scratch + AT_VALUE * SLOT, at_value)
        tl.debug_barrier()
        hidden = activated(take_back(scratch + Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)
        back = take_back(scratch + BACK * SLOT, like_hidden)
        signal = error_signal(back, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)[0]
    else:
        signal = take_back(scratch + ERROR * SLOT, like_hidden)
    if RUNNING:
        at_written = take_back(scratch + (INNER + AT_WRITTEN) * SLOT, like_hidden)
    at_key, at_signal, more_eta, more_log, parts = layer_write_adjoint(
        inner_states,
        inner_velocities,
        index,
        d_inner,
        d_inner_velocity,
        pending_inner,
        pending_inner_velocity,
        row,
        load_tile(k, token, valid, key_column, KEY_DIM),
        signal,
        eta,
        at_written,
        scratch + INNER * SLOT,
        inverse_place,
        decay,
        carried,
        mixed,
        SLOT,
        HIDDEN,
        KEY_DIM,
        ERASE_INNER,
        PROXIMAL,
        RUNNING,
        BLOCK_C,
        PRECISION,
    )
    at_log += more_log
    at_eta += more_eta
    if RUNNING:
        at_key += take_back(scratch + AT_KEY * SLOT, like_key)
    tl.debug_barrier()
    hand_on(scratch + AT_KEY * SLOT, at_key)
    hand_on(scratch + AT_SIGNAL * SLOT, at_signal)
    if momentum is not None:
        at_mixed_to_end = parts[0]
        at_mixed_final = parts[1]
        at_carried_to_end = parts[2]
        at_carried_final = parts[3]
        if TWO_LAYER:
            at_mixed_to_end += outer_parts[0]
            at_mixed_final += outer_parts[1]
            at_carried_to_end += outer_parts[2]
            at_carried_final += outer_parts[3]
        at_full, at_to_end, at_after, at_carried = mixed_adjoint(
            at_mixed_after,
            at_mixed_full,
            at_mixed_to_end,
            at_mixed_final,
            decay[3],
            decay[4],
            carried[1],
            carried[3],
            valid,
            PRECISION,
        )
        at_log += decay_adjoint(None, None, None, at_full, at_to_end, None, BLOCK_C, PRECISION)
        at_momentum = momentum_gradient(
            at_after,
            at_carried,
            carried[4] * at_carried_to_end,
            carried[5] * at_carried_final,
            tl.load(momentum + token, mask=valid, other=1.0),
            BLOCK_C,
            PRECISION,
        )
        tl.store(d_momentum + token, at_momentum, mask=valid)
    tl.store(d_log_decay + token, at_log, mask=valid)
    tl.store(d_rate + token, at_eta, mask=valid)
    tl.debug_barrier()

    # The error, and the weights that it was taken at.
    at_signal = take_back(scratch + AT_SIGNAL * SLOT, like_hidden)
    base = load_base(
        None,
        inner_states,
        index,
        inner_snapshot,
        inner_anchor,
        row,
        is_first,
        HIDDEN,
        KEY_DIM,
        BLOCK_H,
        BLOCK_K,
    )
    if TWO_LAYER:
        outer_base = load_base(
            None,
            outer_states,
            index,
            outer_snapshot,
            outer_anchor,
            row,
            is_first,
            VALUE_DIM,
            HIDDEN,
            BLOCK_V,
            BLOCK_H,
        )
        hidden = activated(take_back(scratch + Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)
        back = take_back(scratch + BACK * SLOT, like_hidden)
        signals = error_signal(back, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)
        at_back, at_value, at_slope, radial = signal_adjoint(
            at_signal,
            signals[0],
            signals[1],
            signals[2],
            signals[3],
            back,
            hidden[0],
            hidden[1],
            hidden[2],
            hidden[3],
            NORMALIZED,
            BOUND,
        )
        error = take_back(scratch + ERROR * SLOT, like_value)
        at_error = take_back(scratch + AT_ERROR * SLOT, like_value)
        at_error += matmul(at_back, tl.trans(outer_base), PRECISION)
        at_error = bound_adjoint(at_error, error, factor, BOUND)
        at_outer = matmul(tl.trans(error), at_back, PRECISION)
        at_outer += matmul(tl.trans(at_error), hidden[0], PRECISION)
        at_value += take_back(scratch + AT_VALUE * SLOT, like_hidden)
        at_value += matmul(at_error, outer_base, PRECISION)
        at_z = hidden_adjoint(at_value, hidden[0], hidden[1], hidden[3], radial, NORMALIZED) + at_slope
        add_to_base(d_outer, d_outer_snapshot, d_outer_anchor, row, is_first, at_outer, VALUE_DIM, HIDDEN)
    else:
        error = take_back(scratch + ERROR * SLOT, like_value)
        at_error = bound_adjoint(at_signal, error, factor, BOUND)
        at_z = at_error
    store_tile(dv, token, valid, value_column, VALUE_DIM, -at_error)
    at_key = take_back(scratch + AT_KEY * SLOT, like_key)
    if RESIDUAL:
        at_key += at_error
    tl.debug_barrier()
    at_key += matmul(at_z, base, PRECISION)
    store_tile(dk, token, valid, key_column, KEY_DIM, at_key)
    key = load_tile(k, token, valid, key_column, KEY_DIM)
    add_to_base(
        d_inner,
        d_inner_snapshot,
        d_inner_anchor,
        row,
        is_first,
        matmul(tl.trans(at_z), key, PRECISION),
        HIDDEN,
        KEY_DIM,
    )
    tl.debug_barrier()

    # The reads at the snapshot.
    if not RUNNING:
        query = load_tile(q, token, valid, key_column, KEY_DIM)
        grad = load_tile(do, token, valid, value_column, VALUE_DIM)
        base = load_base(
            None,
            inner_states,
            index,
            inner_snapshot,
            inner_anchor,
            row,
            is_first,
            HIDDEN,
            KEY_DIM,
            BLOCK_H,
            BLOCK_K,
        )
        if TWO_LAYER:
            outer_base = load_base(
                None,
                outer_states,
                index,
                outer_snapshot,
                outer_anchor,
                row,
                is_first,
                VALUE_DIM,
                HIDDEN,
                BLOCK_V,
                BLOCK_H,
            )
            probed = activated(matmul(query, tl.trans(base), PRECISION), ACTIVATION, NORMALIZED)
            at_outer = matmul(tl.trans(grad), probed[0], PRECISION)
            at_probe = matmul(grad, outer_base, PRECISION)
            at_probe = hidden_adjoint(at_probe, probed[0], probed[1], probed[3], None, NORMALIZED)
            add_to_base(d_outer, d_outer_snapshot, d_outer_anchor, row, is_first, at_outer, VALUE_DIM, HIDDEN)
        else:
            at_probe = grad
        at_query = matmul(at_probe, base, PRECISION)
        if RESIDUAL:
            at_query += load_tile(do, token, valid, key_column, KEY_DIM)
        store_tile(dq, token, valid, key_column, KEY_DIM, at_query)
        at_inner = matmul(tl.trans(at_probe), query, PRECISION)
        add_to_base(d_inner, d_inner_snapshot, d_inner_anchor, row, is_first, at_inner, HIDDEN, KEY_DIM)
        tl.debug_barrier()
