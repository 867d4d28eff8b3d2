"""A chunk's errors and writes again, for the backward kernel, and where in its scratch memory they lie."""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated, error_signal, proximal_rate
from nl_kernels.chunk_kernels.scratch import hand_on, take_back
from nl_kernels.ops.deep_memory.triton_chunk import (
    carry_layer,
    chunk_coefficients,
    erasing,
    load_base,
    serve,
    write_layer,
)
from nl_kernels.triton_support.language import load_tile

# Tiles of tokens in a program's scratch memory.
Z: tl.constexpr = tl.constexpr(0)
BACK: tl.constexpr = tl.constexpr(1)
ERROR: tl.constexpr = tl.constexpr(2)
PROBE: tl.constexpr = tl.constexpr(3)
INNER: tl.constexpr = tl.constexpr(4)  # of a layer: ω, the recall, the inverse, and the adjoint of u
OUTER: tl.constexpr = tl.constexpr(8)
SURPRISE: tl.constexpr = tl.constexpr(0)
RECALLED: tl.constexpr = tl.constexpr(1)
INVERSE: tl.constexpr = tl.constexpr(2)
AT_WRITTEN: tl.constexpr = tl.constexpr(3)
AT_KEY: tl.constexpr = tl.constexpr(12)
AT_VALUE: tl.constexpr = tl.constexpr(13)
AT_SIGNAL: tl.constexpr = tl.constexpr(14)  # then that of z
AT_ERROR: tl.constexpr = tl.constexpr(15)
SCRATCH_TILES = 16


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
            inverse = take_back(inverse_place, inverse)
            if PROXIMAL:
                used = proximal_rate(eta, x)
    else:
        used, _, inverse = erasing(x, eta, decay[2], ERASES, PROXIMAL, x.shape[0], PRECISION)
        if ERASES:
            hand_on(inverse_place, inverse)
    surprise, _, recalled = write_layer(
        None, states, index, x, signal, used, decay[0], inverse, OUT, IN, ERASES, PRECISION
    )
    hand_on(place + SURPRISE * SLOT, surprise)
    if ERASES:
        hand_on(place + RECALLED * SLOT, recalled)


@triton.jit
def written_again(
    place, x, eta, SLOT: tl.constexpr, WIDTH: tl.constexpr, ERASES: tl.constexpr, PROXIMAL: tl.constexpr
):
    """ω and u [C, WIDTH] of :func:`rerun_layer`, and the effective rate [C]."""
    surprise = take_back(place + SURPRISE * SLOT, tl.zeros([x.shape[0], WIDTH], tl.float32))
    used = eta
    if ERASES and PROXIMAL:
        used = proximal_rate(eta, x)
    return surprise, surprise * -used[:, None], used


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
    hand_on(scratch + Z * SLOT, z)
    hand_on(scratch + BACK * SLOT, back)
    hand_on(scratch + ERROR * SLOT, error)
    tl.debug_barrier()
    decay, _, _ = chunk_coefficients(log_decay, None, token, valid, BLOCK_C, PRECISION)
    eta = tl.load(rate + token, mask=valid, other=0.0)
    key = load_tile(k, token, valid, tl.arange(0, BLOCK_K), KEY_DIM)
    signal = take_back(scratch + Z * SLOT, z)
    if outer_states is not None:
        hidden = activated(signal, ACTIVATION, NORMALIZED)
        back = take_back(scratch + BACK * SLOT, back)
        signal = error_signal(back, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)[0]
    rerun_layer(
        inner_states,
        index,
        key,
        signal,
        eta,
        decay,
        scratch + INNER * SLOT,
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
            activated(take_back(scratch + Z * SLOT, z), ACTIVATION, NORMALIZED)[0],
            take_back(scratch + ERROR * SLOT, error),
            eta,
            decay,
            scratch + OUTER * SLOT,
            scratch + (OUTER + INVERSE) * SLOT,
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
