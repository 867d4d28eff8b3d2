"""One chunk of a row on chip: its tokens, its weights, and the steps that forward and backward share.

Formulas of a layer are in :mod:`nl_kernels.chunk_kernels`.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import (
    activated,
    carry_state,
    erase_matrices,
    length_factor,
    mixed_spread,
    momentum_forward,
    proximal_rate,
    read_forward,
    spread,
    write_forward,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile

_TINY: tl.constexpr = tl.constexpr(1e-30)  # delta_chunk.TINY


@triton.jit
def locate_row(row, begin, stop, origin, tokens, offset):
    """First slot of a row, the slot after its last token, and the slot of its first number."""
    if begin is None:
        first = offset + 0 * row
        last = first + tokens
        zero = first
    else:
        first = tl.load(begin + row)
        last = tl.load(stop + row)
        zero = 0 * row
        if origin is not None:
            zero = tl.load(origin + row)
    return first, last, zero


@triton.jit
def chunk_tokens(index, first, last, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Slots of the tokens of a row's chunk number ``index``, and which of the tile's rows hold one."""
    start = (first // CHUNK + index) * CHUNK
    slot = tl.maximum(start, first) + tl.arange(0, BLOCK_C)
    return slot, slot < tl.minimum(start + CHUNK, last)


@triton.jit
def load_weight(
    base, index, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Matrix number ``index`` of [.., out, in], as a padded tile."""
    row = tl.arange(0, BLOCK_O)
    return load_tile(base + index * (OUT * IN), row, row < OUT, tl.arange(0, BLOCK_I), IN)


@triton.jit
def store_weight(base, index, value, OUT: tl.constexpr, IN: tl.constexpr):
    """The inverse of :func:`load_weight`."""
    row = tl.arange(0, value.shape[0])
    store_tile(base + index * (OUT * IN), row, row < OUT, tl.arange(0, value.shape[1]), IN, value)


@triton.jit
def copy_weight(
    source, at, target, to, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Matrix ``to`` of ``target`` becomes matrix ``at`` of ``source``; absent ones are left alone."""
    if target is not None:
        store_weight(target, to, load_weight(source, at, OUT, IN, BLOCK_O, BLOCK_I), OUT, IN)


@triton.jit
def save_weight(
    held,
    source,
    at,
    target,
    to,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """As :func:`copy_weight`, of the tile ``held`` in registers, if there is one."""
    if held is None:
        copy_weight(source, at, target, to, OUT, IN, BLOCK_O, BLOCK_I)
    elif target is not None:
        store_weight(target, to, held, OUT, IN)


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
def weight_of(
    held, states, index, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """The tile ``held`` in registers, or, if there is none, matrix ``index`` of ``states``."""
    if held is None:
        return load_weight(states, index, OUT, IN, BLOCK_O, BLOCK_I)
    else:
        return held


@triton.jit
def chunk_coefficients(log_decay, momentum, token, valid, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """Spreads of decay, of momentum, and of their mixture (after, full, to_end, final) for a chunk."""
    log = tl.load(log_decay + token, mask=valid, other=0.0)
    mu = None
    if momentum is not None:
        mu = tl.load(momentum + token, mask=valid, other=1.0)
    return coefficients_of(log, mu, valid, BLOCK_C, PRECISION)


@triton.jit
def coefficients_of(log, mu, valid, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """As :func:`chunk_coefficients`, from log decays and momenta [C] (or ``None``)."""
    decay = spread(log, BLOCK_C)
    carried = decay
    mixed = (decay[1], decay[3], decay[4], decay[5])
    if mu is not None:
        carried = spread(tl.log(mu + _TINY), BLOCK_C)
        mixed = mixed_spread(decay[3], decay[4], carried[1], carried[3], valid, PRECISION)
    return decay, carried, mixed


@triton.jit
def serve(
    key,
    target,
    inner,
    outer,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """At the snapshot's weights: z = W̄2 k and ``back`` = W̄1ᵀ e [C, h], the bounded error e [C, Dv].

    The last result is what bounds it. Of a linear memory the first two are the error once more.
    """
    if outer is None:
        made = matmul(key, tl.trans(inner), PRECISION)
        error, factor = bounded_error(made, key, target, RESIDUAL, BOUND)
        return error, error, error, factor
    else:
        z = matmul(key, tl.trans(inner), PRECISION)
        value = activated(z, ACTIVATION, NORMALIZED)[0]
        error, factor = bounded_error(matmul(value, tl.trans(outer), PRECISION), key, target, RESIDUAL, BOUND)
        return z, matmul(error, outer, PRECISION), error, factor


@triton.jit
def bounded_error(made, key, target, RESIDUAL: tl.constexpr, BOUND: tl.constexpr):
    """The error of what the memory made of the keys, bounded, and what bounds it."""
    error = made - target
    if RESIDUAL:
        error += key
    factor = length_factor(error, BOUND)
    return error * factor[:, None], factor


@triton.jit
def erasing(
    x,
    rate,
    strict,
    ERASES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a layer with inputs ``x`` erases with: effective rate [C], K and its inverse [C, C]."""
    gram = strict
    inverse = strict
    if ERASES:
        if PROXIMAL:
            rate = proximal_rate(rate, x)
        gram, inverse = erase_matrices(matmul(x, tl.trans(x), PRECISION), rate, strict, BLOCK_C, PRECISION)
    return rate, gram, inverse


@triton.jit
def write_layer(
    held,
    states,
    index,
    x,
    signal,
    rate,
    before,
    inverse,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ERASES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ω, u and the recall [C, out] of a layer: :func:`weight_of` ``held``, ``states`` and ``index``."""
    state = x
    if ERASES:
        state = weight_of(held, states, index, OUT, IN, signal.shape[1], x.shape[1])
    return write_forward(state, x, signal, rate, before, inverse, ERASES, PRECISION)


@triton.jit
def read_layer(
    held,
    states,
    velocities,
    index,
    anchors,
    row,
    queries,
    x,
    written,
    decay,
    mixed,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running reads [C, out] of a layer: :func:`weight_of` ``held``, ``states`` and ``index``."""
    state = weight_of(held, states, index, OUT, IN, written.shape[1], x.shape[1])
    y, _, _ = read_forward(queries, state, x, written, decay[1], mixed[1], PRECISION)
    if velocities is not None:
        velocity = load_weight(velocities, index, OUT, IN, written.shape[1], x.shape[1])
        y += mixed[0][:, None] * matmul(queries, tl.trans(velocity), PRECISION)
    if anchors is not None:
        anchor = load_weight(anchors, row, OUT, IN, written.shape[1], x.shape[1])
        y += matmul(queries, tl.trans(anchor), PRECISION)
    return y


@triton.jit
def carry_layer(
    held,
    states,
    velocities,
    index,
    next_states,
    next_velocities,
    next_index,
    x,
    written,
    signal,
    rate,
    decay,
    carried,
    mixed,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A layer after a chunk; one that is not ``held`` becomes matrix ``next_index`` of ``next_states``."""
    state = weight_of(held, states, index, OUT, IN, written.shape[1], x.shape[1])
    if velocities is None:
        after = carry_state(state, written, x, decay[4], decay[5], PRECISION)
    else:
        velocity = load_weight(velocities, index, OUT, IN, written.shape[1], x.shape[1])
        after, velocity_after, _ = momentum_forward(
            state, velocity, x, signal, rate, decay[5], mixed[2], mixed[3], carried[4], carried[5], PRECISION
        )
    if held is None:
        # The state may be overwritten only when every thread has read it.
        tl.debug_barrier()
        store_weight(next_states, next_index, after, OUT, IN)
    if velocities is not None:
        store_weight(next_velocities, next_index, velocity_after, OUT, IN)
    return after


@triton.jit
def load_base(
    held,
    running,
    index,
    snapshot,
    anchors,
    row,
    is_first,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The weights that a chunk takes its gradients at, with the anchor: at a boundary the running ones, but
    for the first chunk the snapshot, if one is given."""
    base = weight_of(held, running, index, OUT, IN, BLOCK_O, BLOCK_I)
    if snapshot is not None and is_first:
        base = load_weight(snapshot, row, OUT, IN, BLOCK_O, BLOCK_I)
    if anchors is not None:
        base += load_weight(anchors, row, OUT, IN, BLOCK_O, BLOCK_I)
    return base
