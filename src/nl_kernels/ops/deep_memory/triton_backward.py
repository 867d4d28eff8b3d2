"""Triton backward of ``deep_memory`` for small chunks: one program a row walks back over the row's chunks.

From a state that the forward kernel kept, the chunks up to the next one are run again, each chunk's start
state going to a stack; then each of them is differentiated, last one first. Gradients of the weights
accumulate in the buffers of their results. What one step of a chunk hands to the next goes by way of memory
that stays in the caches: together it would not fit the registers. The derivatives are those of
:mod:`nl_kernels.chunk_kernels.adjoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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
from nl_kernels.chunk_kernels.forward import activated, error_signal, proximal_rate, read_forward
from nl_kernels.ops.deep_memory import launch
from nl_kernels.ops.deep_memory.triton_forward import (
    carry_layer,
    chunk_coefficients,
    chunk_tokens,
    copy_weight,
    erasing,
    load_base,
    load_weight,
    locate_row,
    plan_erase,
    put,
    read_layer,
    serve,
    store_weight,
    take,
    write_layer,
)
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import load_tile, matmul, store_tile

# Tiles of tokens in a program's scratch memory.
_Z: tl.constexpr = tl.constexpr(0)
_BACK: tl.constexpr = tl.constexpr(1)
_ERROR: tl.constexpr = tl.constexpr(2)
_PROBE: tl.constexpr = tl.constexpr(3)
_INNER: tl.constexpr = tl.constexpr(4)  # of a layer: ω, the recall, the inverse, and the adjoint of u
_OUTER: tl.constexpr = tl.constexpr(8)
_SURPRISE: tl.constexpr = tl.constexpr(0)
_RECALLED: tl.constexpr = tl.constexpr(1)
_INVERSE: tl.constexpr = tl.constexpr(2)
_AT_WRITTEN: tl.constexpr = tl.constexpr(3)
_AT_KEY: tl.constexpr = tl.constexpr(12)
_AT_VALUE: tl.constexpr = tl.constexpr(13)
_AT_SIGNAL: tl.constexpr = tl.constexpr(14)  # then that of z
_AT_ERROR: tl.constexpr = tl.constexpr(15)
SCRATCH_TILES = 16


@triton.jit
def fill_weight(
    target, index, value, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Matrix ``index`` of ``target``, if there is one, becomes ``value`` everywhere."""
    if target is not None:
        store_weight(target, index, tl.full([BLOCK_O, BLOCK_I], value, tl.float32), OUT, IN)


@triton.jit
def add_to_weight(target, index, value, OUT: tl.constexpr, IN: tl.constexpr):
    """Matrix ``index`` of ``target``, if there is one, grows by ``value``."""
    if target is not None:
        held = load_weight(target, index, OUT, IN, value.shape[0], value.shape[1])
        tl.debug_barrier()  # whoever loads a number need not be the one who stores it
        store_weight(target, index, held + value, OUT, IN)


@triton.jit
def add_weight(
    target, to, source, at, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Matrix ``to`` of ``target`` grows by matrix ``at`` of ``source``, if there are both."""
    if target is not None and source is not None:
        add_to_weight(target, to, load_weight(source, at, OUT, IN, BLOCK_O, BLOCK_I), OUT, IN)


@triton.jit
def rerun_layer(
    states,
    index,
    x,
    signal,
    eta,
    decay,
    place,
    inverse_place,
    READY: tl.constexpr,
    SLOT: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ERASES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The writes of a layer again: ω and the recall go to the tiles at ``place``.

    The inverse is at ``inverse_place``, where it has to be put first if it is not ``READY``.
    """
    if READY:
        inverse = decay[2]
        used = eta
        if ERASES:
            inverse = take(inverse_place, inverse)
            if PROXIMAL:
                used = proximal_rate(eta, x)
    else:
        used, _, inverse = erasing(x, eta, decay[2], ERASES, PROXIMAL, x.shape[0], PRECISION)
        if ERASES:
            put(inverse_place, inverse)
    surprise, _, recalled = write_layer(
        None, states, index, x, signal, used, decay[0], inverse, OUT, IN, ERASES, PRECISION
    )
    put(place + _SURPRISE * SLOT, surprise)
    if ERASES:
        put(place + _RECALLED * SLOT, recalled)


@triton.jit
def written_again(
    place, x, eta, SLOT: tl.constexpr, WIDTH: tl.constexpr, ERASES: tl.constexpr, PROXIMAL: tl.constexpr
):
    """ω and u [C, WIDTH] of :func:`rerun_layer`, and the effective rate [C]."""
    surprise = take(place + _SURPRISE * SLOT, tl.zeros([x.shape[0], WIDTH], tl.float32))
    used = eta
    if ERASES and PROXIMAL:
        used = proximal_rate(eta, x)
    return surprise, surprise * -used[:, None], used


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
            inverse = take(inverse_place, decay[2])
            recalled = take(place + _RECALLED * SLOT, signal)
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
def rerun_chunk(
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
    SLOT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
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
    """A chunk's errors and writes again, into ``scratch``; what bounds the errors [C]."""
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
    outer_base = None
    if outer_states is not None:
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
    key = load_tile(k, token, valid, tl.arange(0, BLOCK_K), KEY_DIM)
    target = load_tile(v, token, valid, tl.arange(0, BLOCK_V), VALUE_DIM)
    z, back, error, factor = serve(
        key, target, base, outer_base, ACTIVATION, NORMALIZED, RESIDUAL, BOUND, PRECISION
    )
    put(scratch + _Z * SLOT, z)
    put(scratch + _BACK * SLOT, back)
    put(scratch + _ERROR * SLOT, error)
    tl.debug_barrier()
    decay, _, _ = chunk_coefficients(log_decay, None, token, valid, BLOCK_C, PRECISION)
    eta = tl.load(rate + token, mask=valid, other=0.0)
    key = load_tile(k, token, valid, tl.arange(0, BLOCK_K), KEY_DIM)
    signal = take(scratch + _Z * SLOT, z)
    if outer_states is not None:
        hidden = activated(signal, ACTIVATION, NORMALIZED)
        back = take(scratch + _BACK * SLOT, back)
        signal = error_signal(back, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)[0]
    rerun_layer(
        inner_states,
        index,
        key,
        signal,
        eta,
        decay,
        scratch + _INNER * SLOT,
        inverse_place,
        True,
        SLOT,
        HIDDEN,
        KEY_DIM,
        ERASE_INNER,
        PROXIMAL,
        PRECISION,
    )
    tl.debug_barrier()
    if outer_states is not None:
        decay, _, _ = chunk_coefficients(log_decay, None, token, valid, BLOCK_C, PRECISION)
        rerun_layer(
            outer_states,
            index,
            activated(take(scratch + _Z * SLOT, z), ACTIVATION, NORMALIZED)[0],
            take(scratch + _ERROR * SLOT, error),
            eta,
            decay,
            scratch + _OUTER * SLOT,
            scratch + (_OUTER + _INVERSE) * SLOT,
            False,
            SLOT,
            VALUE_DIM,
            HIDDEN,
            ERASE_OUTER,
            PROXIMAL,
            PRECISION,
        )
        tl.debug_barrier()
    return factor


@triton.jit
def carry_again(
    states,
    velocities,
    index,
    x,
    log_decay,
    momentum,
    eta,
    token,
    valid,
    place,
    SLOT: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ERASES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Matrix ``index + 1`` of a layer's stack of states, from :func:`rerun_layer` of matrix ``index``."""
    decay, carried, mixed = chunk_coefficients(log_decay, momentum, token, valid, x.shape[0], PRECISION)
    surprise, written, used = written_again(place, x, eta, SLOT, BLOCK_O, ERASES, PROXIMAL)
    carry_layer(
        None,
        states,
        velocities,
        index,
        states,
        velocities,
        index + 1,
        x,
        written,
        surprise,
        used,
        decay,
        carried,
        mixed,
        OUT,
        IN,
        PRECISION,
    )


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
                scratch + _INNER * SLOT, key, eta, SLOT, BLOCK_H, ERASE_INNER, PROXIMAL
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
            put(scratch + _PROBE * SLOT, probe)
            tl.debug_barrier()
            value = activated(take(scratch + _Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)[0]
            _, written, _ = written_again(
                scratch + _OUTER * SLOT, value, eta, SLOT, BLOCK_V, ERASE_OUTER, PROXIMAL
            )
            probed = activated(take(scratch + _PROBE * SLOT, like_hidden), ACTIVATION, NORMALIZED)
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
            put(scratch + (_OUTER + _AT_WRITTEN) * SLOT, at_written)
            put(scratch + _AT_VALUE * SLOT, at_value)
            at_probe = hidden_adjoint(at_probe, probed[0], probed[1], probed[3], None, NORMALIZED)
            tl.debug_barrier()
            put(scratch + _PROBE * SLOT, at_probe)
            tl.debug_barrier()
            grad = take(scratch + _PROBE * SLOT, at_probe)
        else:
            grad = load_tile(do, token, valid, value_column, VALUE_DIM)
        key = load_tile(k, token, valid, key_column, KEY_DIM)
        _, written, _ = written_again(scratch + _INNER * SLOT, key, eta, SLOT, BLOCK_H, ERASE_INNER, PROXIMAL)
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
        put(scratch + (_INNER + _AT_WRITTEN) * SLOT, at_written)
        put(scratch + _AT_KEY * SLOT, at_key)
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
            at_written = take(scratch + (_OUTER + _AT_WRITTEN) * SLOT, like_value)
        at_value, at_error, at_eta, more_log, outer_parts = layer_write_adjoint(
            outer_states,
            outer_velocities,
            index,
            d_outer,
            d_outer_velocity,
            pending_outer,
            pending_outer_velocity,
            row,
            activated(take(scratch + _Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)[0],
            take(scratch + _ERROR * SLOT, like_value),
            eta,
            at_written,
            scratch + _OUTER * SLOT,
            scratch + (_OUTER + _INVERSE) * SLOT,
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
            at_value += take(scratch + _AT_VALUE * SLOT, like_hidden)
        at_log += more_log
        put(scratch + _AT_ERROR * SLOT, at_error)
        tl.debug_barrier()
        put(scratch + _AT_VALUE * SLOT, at_value)
        tl.debug_barrier()
        hidden = activated(take(scratch + _Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)
        back = take(scratch + _BACK * SLOT, like_hidden)
        signal = error_signal(back, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)[0]
    else:
        signal = take(scratch + _ERROR * SLOT, like_hidden)
    if RUNNING:
        at_written = take(scratch + (_INNER + _AT_WRITTEN) * SLOT, like_hidden)
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
        scratch + _INNER * SLOT,
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
        at_key += take(scratch + _AT_KEY * SLOT, like_key)
    tl.debug_barrier()
    put(scratch + _AT_KEY * SLOT, at_key)
    put(scratch + _AT_SIGNAL * SLOT, at_signal)
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
    at_signal = take(scratch + _AT_SIGNAL * SLOT, like_hidden)
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
        hidden = activated(take(scratch + _Z * SLOT, like_hidden), ACTIVATION, NORMALIZED)
        back = take(scratch + _BACK * SLOT, like_hidden)
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
        error = take(scratch + _ERROR * SLOT, like_value)
        at_error = take(scratch + _AT_ERROR * SLOT, like_value)
        at_error += matmul(at_back, tl.trans(outer_base), PRECISION)
        at_error = bound_adjoint(at_error, error, factor, BOUND)
        at_outer = matmul(tl.trans(error), at_back, PRECISION)
        at_outer += matmul(tl.trans(at_error), hidden[0], PRECISION)
        at_value += take(scratch + _AT_VALUE * SLOT, like_hidden)
        at_value += matmul(at_error, outer_base, PRECISION)
        at_z = hidden_adjoint(at_value, hidden[0], hidden[1], hidden[3], radial, NORMALIZED) + at_slope
        add_to_base(d_outer, d_outer_snapshot, d_outer_anchor, row, is_first, at_outer, VALUE_DIM, HIDDEN)
    else:
        error = take(scratch + _ERROR * SLOT, like_value)
        at_error = bound_adjoint(at_signal, error, factor, BOUND)
        at_z = at_error
    store_tile(dv, token, valid, value_column, VALUE_DIM, -at_error)
    at_key = take(scratch + _AT_KEY * SLOT, like_key)
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


@triton.jit(do_not_specialize=["tokens", "offset", "kept", "checkpoint", "chunk_places"])
def deep_memory_backward_kernel(
    do,
    d_inner_snapshot_after,
    d_outer_snapshot_after,
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
    begin,
    stop,
    origin,
    kept_inner,
    kept_outer,
    kept_inner_velocity,
    kept_outer_velocity,
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
    inner_stack,
    outer_stack,
    inner_velocity_stack,
    outer_velocity_stack,
    pending_inner,
    pending_outer,
    pending_inner_velocity,
    pending_outer_velocity,
    inverses,
    scratch,
    tokens,
    offset,
    kept,
    checkpoint,
    chunk_places,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TWO_LAYER: tl.constexpr,
    CHUNK: tl.constexpr,
    RECOMPUTES: tl.constexpr,
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
    """One program a row. ``d_inner`` … ``d_outer_velocity`` come holding the gradients of the final state."""
    SLOT: tl.constexpr = BLOCK_C * max(BLOCK_C, BLOCK_K, BLOCK_V, BLOCK_H)
    row = tl.program_id(0).to(tl.int64)
    first, last, zero = locate_row(row, begin, stop, origin, tokens, offset)
    scratch += row * (16 * SLOT)
    chunks = tl.cdiv(last, CHUNK) - first // CHUNK
    ends_at_boundary = (last % CHUNK == 0) & (last > first)

    fill_weight(d_inner_snapshot, row, 0.0, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
    fill_weight(d_inner_anchor, row, 0.0, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
    if TWO_LAYER:
        fill_weight(d_outer_snapshot, row, 0.0, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
        fill_weight(d_outer_anchor, row, 0.0, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    tl.debug_barrier()
    # The snapshot after the call: the last state, the one at the last chunk's start, or the snapshot before.
    if ends_at_boundary:
        add_weight(d_inner, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if TWO_LAYER:
            add_weight(d_outer, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    elif chunks <= 1:
        add_weight(d_inner_snapshot, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if TWO_LAYER:
            add_weight(
                d_outer_snapshot, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
            )
    tl.debug_barrier()

    for back_index in range(0, chunks):
        index = chunks - 1 - back_index
        number = index % checkpoint
        if RECOMPUTES:
            place = row * checkpoint + number
            inner_states = inner_stack
            outer_states = outer_stack
            inner_velocities = inner_velocity_stack
            outer_velocities = outer_velocity_stack
            if (back_index == 0) | (number == checkpoint - 1):
                bottom = row * checkpoint
                source = row * kept + index // checkpoint
                copy_weight(kept_inner, source, inner_stack, bottom, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
                copy_weight(
                    kept_inner_velocity,
                    source,
                    inner_velocity_stack,
                    bottom,
                    HIDDEN,
                    KEY_DIM,
                    BLOCK_H,
                    BLOCK_K,
                )
                if TWO_LAYER:
                    copy_weight(kept_outer, source, outer_stack, bottom, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
                    copy_weight(
                        kept_outer_velocity,
                        source,
                        outer_velocity_stack,
                        bottom,
                        VALUE_DIM,
                        HIDDEN,
                        BLOCK_V,
                        BLOCK_H,
                    )
                tl.debug_barrier()
                for below in range(0, number):
                    again = index - number + below
                    slot, valid = chunk_tokens(again, first, last, CHUNK, BLOCK_C)
                    token = row * tokens + slot - zero
                    again_inverse = None
                    if ERASE_INNER:
                        again_inverse = inverses + (row * chunk_places + again) * (BLOCK_C * BLOCK_C)
                    rerun_chunk(
                        k,
                        v,
                        rate,
                        log_decay,
                        token,
                        valid,
                        inner_stack,
                        outer_stack,
                        bottom + below,
                        inner_snapshot,
                        outer_snapshot,
                        inner_anchor,
                        outer_anchor,
                        row,
                        again == 0,
                        again_inverse,
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
                    eta = tl.load(rate + token, mask=valid, other=0.0)
                    carry_again(
                        inner_stack,
                        inner_velocity_stack,
                        bottom + below,
                        load_tile(k, token, valid, tl.arange(0, BLOCK_K), KEY_DIM),
                        log_decay,
                        momentum,
                        eta,
                        token,
                        valid,
                        scratch + _INNER * SLOT,
                        SLOT,
                        HIDDEN,
                        KEY_DIM,
                        BLOCK_H,
                        ERASE_INNER,
                        PROXIMAL,
                        PRECISION,
                    )
                    if TWO_LAYER:
                        z = take(scratch + _Z * SLOT, tl.zeros([BLOCK_C, BLOCK_H], tl.float32))
                        carry_again(
                            outer_stack,
                            outer_velocity_stack,
                            bottom + below,
                            activated(z, ACTIVATION, NORMALIZED)[0],
                            log_decay,
                            momentum,
                            eta,
                            token,
                            valid,
                            scratch + _OUTER * SLOT,
                            SLOT,
                            VALUE_DIM,
                            HIDDEN,
                            BLOCK_V,
                            ERASE_OUTER,
                            PROXIMAL,
                            PRECISION,
                        )
                    tl.debug_barrier()
        else:
            place = row * kept + index
            inner_states = kept_inner
            outer_states = kept_outer
            inner_velocities = kept_inner_velocity
            outer_velocities = kept_outer_velocity
        slot, valid = chunk_tokens(index, first, last, CHUNK, BLOCK_C)
        token = row * tokens + slot - zero
        inverse_place = None
        if ERASE_INNER:
            inverse_place = inverses + (row * chunk_places + index) * (BLOCK_C * BLOCK_C)
        chunk_adjoint(
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
            place,
            row,
            index == 0,
            token,
            valid,
            SLOT,
            KEY_DIM,
            VALUE_DIM,
            HIDDEN,
            TWO_LAYER,
            RUNNING,
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
        is_snapshot = (back_index == 0) & (index > 0) & (last % CHUNK != 0)
        if is_snapshot:
            add_weight(d_inner, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
            if TWO_LAYER:
                add_weight(d_outer, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
        tl.debug_barrier()

    # With a single chunk and no snapshot given, that after the call is the state before it.
    if inner_snapshot is None and (chunks <= 1) & ((last % CHUNK != 0) | (last == first)):
        add_weight(d_inner, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if TWO_LAYER:
            add_weight(d_outer, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)


class Gradients(NamedTuple):
    """What the backward kernel fills: the gradients of :class:`~launch.Inputs`' tensors, but for slots."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    d_rate: torch.Tensor
    d_log_decay: torch.Tensor
    d_momentum: torch.Tensor | None
    d_inner: torch.Tensor
    d_outer: torch.Tensor | None
    d_inner_velocity: torch.Tensor | None
    d_outer_velocity: torch.Tensor | None
    d_inner_snapshot: torch.Tensor | None
    d_outer_snapshot: torch.Tensor | None
    d_inner_anchor: torch.Tensor | None
    d_outer_anchor: torch.Tensor | None


def plan_backward(
    do: torch.Tensor,
    final: Sequence[torch.Tensor | None],
    snapshot: Sequence[torch.Tensor | None],
    inputs: launch.Inputs,
    kept: Sequence[torch.Tensor | None],
    options: launch.Options,
) -> tuple[list[KernelCall], Gradients]:
    """The kernels' calls, and what they fill.

    Args:
        do: gradient of the reads. final, snapshot: of the final running weights and velocities (four) and the
            final snapshot (two); ``None``: zero.
        kept: of :class:`~launch.Results`.
    """
    plan = launch.plan_rows(inputs, options)
    new = inputs.q.new_empty
    make = torch.empty_like if inputs.begin is None else torch.zeros_like  # slots without a token
    tokens = [None if x is None else make(x) for x in inputs[:6]]
    running = [
        None if x is None else torch.zeros_like(x) if g is None else g.clone()
        for x, g in zip(inputs[6:10], final)
    ]
    others = [None if x is None else torch.empty_like(x) for x in inputs[10:14]]
    gradients = Gradients(*tokens, *running, *others)

    weights = inputs[6:10]
    stack = [
        None if x is None or plan.checkpoint == 1 else new((plan.rows, plan.checkpoint, *x.shape[1:]))
        for x in weights
    ]
    pending = [None if x is None or options.read != "running" else torch.empty_like(x) for x in weights]
    calls, inverses = plan_erase(inputs, plan)
    block_c, *widths = plan.blocks
    scratch = new((plan.rows, SCRATCH_TILES, block_c * max(block_c, *widths)))
    names = ("inner", "outer", "inner_velocity", "outer_velocity")
    arguments = {
        **inputs._asdict(),
        **gradients._asdict(),
        "do": do,
        "d_inner_snapshot_after": snapshot[0],
        "d_outer_snapshot_after": snapshot[1],
        **{f"kept_{name}": x for name, x in zip(names, kept)},
        **{f"{name}_stack": x for name, x in zip(names, stack)},
        **{f"pending_{name}": x for name, x in zip(names, pending)},
        "inverses": inverses,
        "scratch": scratch,
    }
    return [*calls, plan.call(deep_memory_backward_kernel, arguments)], gradients


def deep_memory_backward(
    do: torch.Tensor,
    final: Sequence[torch.Tensor | None],
    snapshot: Sequence[torch.Tensor | None],
    inputs: launch.Inputs,
    kept: Sequence[torch.Tensor | None],
    options: launch.Options,
) -> Gradients:
    """Run what :func:`plan_backward` plans."""
    inputs = launch.Inputs(*launch.contiguous(inputs))
    cotangents = list(launch.contiguous((do, *final, *snapshot)))
    calls, gradients = plan_backward(cotangents[0], cotangents[1:5], cotangents[5:], inputs, kept, options)
    run_calls(calls, inputs.q.device)
    return gradients
