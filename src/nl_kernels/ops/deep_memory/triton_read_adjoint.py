"""The adjoint of a chunk's reads: of the running weights after every token, or of those that serve."""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import hidden_adjoint
from nl_kernels.chunk_kernels.forward import activated
from nl_kernels.chunk_kernels.scratch import hand_on, take_back
from nl_kernels.ops.deep_memory.triton_chunk import chunk_coefficients, load_base, read_layer
from nl_kernels.ops.deep_memory.triton_layer_adjoint import add_to_base, layer_read_adjoint
from nl_kernels.ops.deep_memory.triton_rerun import (
    AT_KEY,
    AT_VALUE,
    AT_WRITTEN,
    INNER,
    OUTER,
    PROBE,
    Z,
    written_again,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile


@triton.jit
def running_reads_adjoint(
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
    SLOT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TWO_LAYER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the queries; what writes get of the reads goes to ``scratch``, states to ``pending_…``.

    Returns the adjoints of the log decays [C], and with momentum of the mixed ``after`` and ``full``.
    """
    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.arange(0, BLOCK_V)
    like_hidden = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    at_log = tl.zeros([BLOCK_C], tl.float32)
    at_mixed_after = tl.zeros([BLOCK_C], tl.float32)
    at_mixed_full = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    decay, _, mixed = chunk_coefficients(log_decay, momentum, token, valid, BLOCK_C, PRECISION)
    eta = tl.load(rate + token, mask=valid, other=0.0)
    if TWO_LAYER:
        key = load_tile(k, token, valid, key_column, KEY_DIM)
        _, written, _ = written_again(scratch + INNER * SLOT, key, eta, SLOT, BLOCK_H, ERASE_INNER, PROXIMAL)
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
    return at_log, at_mixed_after, at_mixed_full


@triton.jit
def snapshot_reads_adjoint(
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
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TWO_LAYER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the queries, and of the weights that served, added to theirs."""
    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.arange(0, BLOCK_V)
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
