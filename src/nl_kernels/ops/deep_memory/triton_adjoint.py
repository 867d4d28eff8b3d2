"""The adjoint of a chunk: of its reads, its writes, and the errors that they are made of."""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import (
    bound_adjoint,
    decay_adjoint,
    hidden_adjoint,
    mixed_adjoint,
    momentum_gradient,
    signal_adjoint,
)
from nl_kernels.chunk_kernels.forward import activated, error_signal
from nl_kernels.chunk_kernels.scratch import hand_on, take_back
from nl_kernels.ops.deep_memory.triton_chunk import chunk_coefficients, load_base
from nl_kernels.ops.deep_memory.triton_layer_adjoint import add_to_base, layer_write_adjoint
from nl_kernels.ops.deep_memory.triton_read_adjoint import running_reads_adjoint, snapshot_reads_adjoint
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
    Z,
    rerun_chunk,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile


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

    if RUNNING:
        at_log, at_mixed_after, at_mixed_full = running_reads_adjoint(
            do,
            q,
            k,
            rate,
            log_decay,
            momentum,
            inner_anchor,
            outer_anchor,
            inner_states,
            outer_states,
            inner_velocities,
            outer_velocities,
            dq,
            d_inner_anchor,
            d_outer_anchor,
            pending_inner,
            pending_outer,
            pending_inner_velocity,
            pending_outer_velocity,
            scratch,
            index,
            row,
            token,
            valid,
            SLOT,
            KEY_DIM,
            VALUE_DIM,
            HIDDEN,
            TWO_LAYER,
            ACTIVATION,
            NORMALIZED,
            RESIDUAL,
            ERASE_INNER,
            ERASE_OUTER,
            PROXIMAL,
            BLOCK_C,
            BLOCK_K,
            BLOCK_V,
            BLOCK_H,
            PRECISION,
        )

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

    if not RUNNING:
        snapshot_reads_adjoint(
            do,
            q,
            inner_snapshot,
            outer_snapshot,
            inner_anchor,
            outer_anchor,
            inner_states,
            outer_states,
            dq,
            d_inner,
            d_outer,
            d_inner_snapshot,
            d_outer_snapshot,
            d_inner_anchor,
            d_outer_anchor,
            index,
            row,
            is_first,
            token,
            valid,
            KEY_DIM,
            VALUE_DIM,
            HIDDEN,
            TWO_LAYER,
            ACTIVATION,
            NORMALIZED,
            RESIDUAL,
            BLOCK_K,
            BLOCK_V,
            BLOCK_H,
            PRECISION,
        )
