"""The adjoint of one layer over a chunk: its reads, its writes, and the weights that serve it.

The formulas are those of :mod:`nl_kernels.chunk_kernels.adjoint`; here states and gradients are in memory.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import (
    decay_adjoint,
    gram_adjoint,
    momentum_adjoint,
    proximal_adjoint,
    read_adjoint,
    velocity_read_adjoint,
    write_adjoint,
)
from nl_kernels.chunk_kernels.forward import read_forward
from nl_kernels.chunk_kernels.scratch import take_back
from nl_kernels.ops.deep_memory.triton_chunk import add_to_weight, load_weight, store_weight
from nl_kernels.ops.deep_memory.triton_rerun import RECALLED, written_again
from nl_kernels.triton_support.language import matmul


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
