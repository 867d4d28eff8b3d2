"""The element-wise work of the tiled backward pass: signals, errors, keys and values, inputs.

N rows, LENGTH tokens of a chunk. Activations by memory are memory first, [m · N, LENGTH, ·], in the order
key, value, memory, rate, retention; what belongs to the first layers together has them side by side,
[N, LENGTH, 5 · WIDTH]. A program takes ROWS tokens of one memory. A gate's last layer is one row, so that its
products are of rank one, and made where they are needed. The formulas are those of ``eager_backward.py``.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels import adjoint, forward
from nl_kernels.chunk_kernels.tiled_rows import load_rows, locate_rows, store_rows, store_signal_adjoint
from nl_kernels.ops.self_modifying.triton_chunk import unit_adjoint

WIDE: tl.constexpr = tl.constexpr(3)  # memories whose output is as wide as their input; the gates follow


@triton.jit
def _load_gate(gates, n, which, gates_rows, gates_start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A gate's last layer."""
    column = tl.arange(0, BLOCK)
    place = gates + (n * gates_rows + gates_start + which) * WIDTH + column
    return tl.load(place, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batches", "gates_rows", "gates_start"])
def signal_adjoint_kernel(
    at_signal,
    z,
    back,
    right,
    at_value,
    coefficient,
    gates,
    gate_error,
    gate_right,
    at_gate_signal,
    at_back,
    at_value_after,
    at_slope,
    radial,
    before,
    at_gate_error,
    gate_before,
    batches,
    gates_rows,
    gates_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`~nl_kernels.chunk_kernels.tiled_rows.signal_adjoint_rows_kernel`, of the five memories.

    ``at_signal``, ``z`` at the keys and ``right`` are of all of them side by side, the others memory first.
    The gates' errors, numbers [2N, LENGTH], get their adjoint here, as only they have it in one row.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    memory = batch // batches
    n = batch % batches
    own = (n * LENGTH + t) * 5 + memory
    to_back = store_signal_adjoint(
        row,
        own,
        at_signal,
        z,
        back,
        right,
        at_value,
        coefficient,
        at_back,
        at_value_after,
        at_slope,
        radial,
        before,
        WIDTH,
        ACTIVATION,
        NORMALIZED,
        BOUND,
        BLOCK,
    )
    if memory >= WIDE:
        last = _load_gate(gates, n, memory - WIDE, gates_rows, gates_start, WIDTH, BLOCK)
        number = row - batches * (WIDE * LENGTH)
        solved = tl.load(at_gate_signal + number)
        bounded = tl.load(gate_error + number)
        if gate_right is not None:
            tl.store(gate_before + number, solved * (tl.load(gate_right + number) - bounded))
        found = solved + tl.sum(to_back * last[None, :], 1)
        if BOUND > 0:
            found = tl.where(tl.abs(bounded) >= BOUND, 0.0, found)
        tl.store(at_gate_error + number, found)


@triton.jit
def error_adjoint_kernel(
    at_error,
    error,
    factor,
    right,
    solved,
    operand,
    plain,
    before,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of the error before its bound [3N, LENGTH, WIDTH], as an operand and not rounded.

    ``factor`` [3N, LENGTH] is that of the bound. ``right`` and ``solved``, the adjoint that the solve gave,
    are of the last layer, where it erases.
    """
    row, _, _ = locate_rows(LENGTH, ROWS)
    bounded = load_rows(error, row, WIDTH, BLOCK)
    grad = load_rows(at_error, row, WIDTH, BLOCK)
    if right is not None:
        recalled = load_rows(right, row, WIDTH, BLOCK) - bounded
        tl.store(before + row, forward.row_dot(load_rows(solved, row, WIDTH, BLOCK), recalled))
    if BOUND > 0:
        grad = adjoint.bound_adjoint(grad, bounded, tl.load(factor + row), BOUND)
    store_rows(operand, row, grad, WIDTH, BLOCK)
    store_rows(plain, row, grad, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["batches"])
def linear_error_adjoint_kernel(
    at_error,
    error,
    factor,
    right,
    operand,
    plain,
    before,
    batches,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    GATES: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`error_adjoint_kernel`, of linear memories: [N, LENGTH, 3 · WIDTH + GATES].

    One program a memory that is wide; that of keys takes the gates' columns too, each bounded by itself.
    """
    TOTAL: tl.constexpr = 3 * WIDTH + GATES
    row, batch, t = locate_rows(LENGTH, ROWS)
    memory = batch // batches
    own = batch % batches * LENGTH + t
    column = tl.arange(0, BLOCK)
    mask = (column < WIDTH)[None, :]
    place = own[:, None] * TOTAL + memory * WIDTH + column[None, :]
    bounded = tl.load(error + place, mask=mask, other=0.0)
    given = tl.load(at_error + place, mask=mask, other=0.0)
    grad = given
    if BOUND > 0:
        grad = adjoint.bound_adjoint(given, bounded, tl.load(factor + row), BOUND)
    tl.store(operand + place, grad.to(operand.dtype.element_ty), mask=mask)
    if plain is not None:
        tl.store(plain + place, grad, mask=mask)
    column = tl.arange(0, GATES)
    at_gates = own[:, None] * TOTAL + 3 * WIDTH + column[None, :]
    mask_gates = (column >= 0)[None, :] & (memory == 0)
    bounded_gates = tl.load(error + at_gates, mask=mask_gates, other=0.0)
    given_gates = tl.load(at_error + at_gates, mask=mask_gates, other=0.0)
    grad_gates = given_gates
    if BOUND > 0:
        grad_gates = tl.where(tl.abs(bounded_gates) >= BOUND, 0.0, given_gates)
    tl.store(operand + at_gates, grad_gates.to(operand.dtype.element_ty), mask=mask_gates)
    if plain is not None:
        tl.store(plain + at_gates, grad_gates, mask=mask_gates)
    if right is not None:
        found = forward.row_dot(given, tl.load(right + place, mask=mask, other=0.0) - bounded)
        recalled = tl.load(right + at_gates, mask=mask_gates, other=0.0) - bounded_gates
        tl.store(before + row, found + forward.row_dot(given_gates, recalled))


@triton.jit(do_not_specialize=["batches", "gates_rows", "gates_start"])
def pair_adjoint_kernel(
    at_value,
    at_difference,
    at_gate_error,
    gates,
    z,
    radial,
    at_slope,
    operand,
    batches,
    gates_rows,
    gates_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of z at keys and then values [2N, LENGTH, 5 · WIDTH], as an operand.

    ``at_difference`` [3N, LENGTH, WIDTH] is that of n(σ(z)) at the keys less at the values, of the gates
    ``at_gate_error`` times their last layer; ``at_value`` [5N, ..] is what else those at the keys get.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    memory = batch // batches
    n = batch % batches
    if memory < WIDE:
        both = load_rows(at_difference, row, WIDTH, BLOCK)
    else:
        last = _load_gate(gates, n, memory - WIDE, gates_rows, gates_start, WIDTH, BLOCK)
        both = tl.load(at_gate_error + row - batches * (WIDE * LENGTH))[:, None] * last[None, :]
    at_keys = (n * LENGTH + t) * 5 + memory
    tile = load_rows(z, at_keys, WIDTH, BLOCK)
    value, slope, _, scale = forward.activated(tile, ACTIVATION, NORMALIZED)
    grad = load_rows(at_value, row, WIDTH, BLOCK) + both
    grad = adjoint.hidden_adjoint(grad, value, slope, scale, tl.load(radial + row), NORMALIZED)
    grad += load_rows(at_slope, row, WIDTH, BLOCK)
    store_rows(operand, at_keys, grad, WIDTH, BLOCK)
    at_values = at_keys + batches * (5 * LENGTH)
    tile = load_rows(z, at_values, WIDTH, BLOCK)
    value, slope, _, scale = forward.activated(tile, ACTIVATION, NORMALIZED)
    grad = adjoint.hidden_adjoint(-both, value, slope, scale, None, NORMALIZED)
    store_rows(operand, at_values, grad, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["batches", "gates_rows", "gates_start"])
def served_adjoint_kernel(
    at_value,
    at_gate,
    gates,
    z,
    operand,
    batches,
    gates_rows,
    gates_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SERVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of z at the inputs [5N, LENGTH, WIDTH], as an operand.

    ``at_value`` is that of n(σ(z)) of the first ``SERVED`` memories; of the gates it is ``at_gate``
    [2N, LENGTH], that of their logits, times their last layer; a memory in between was not read.
    """
    row, batch, _ = locate_rows(LENGTH, ROWS)
    memory = batch // batches
    if memory < SERVED:
        grad = load_rows(at_value, row, WIDTH, BLOCK)
    elif memory < WIDE:
        grad = tl.zeros([ROWS, BLOCK], tl.float32)
    else:
        last = _load_gate(gates, batch % batches, memory - WIDE, gates_rows, gates_start, WIDTH, BLOCK)
        grad = tl.load(at_gate + row - batches * (WIDE * LENGTH))[:, None] * last[None, :]
    value, slope, _, scale = forward.activated(load_rows(z, row, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    grad = adjoint.hidden_adjoint(grad, value, slope, scale, None, NORMALIZED)
    store_rows(operand, row, grad, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["batches", "error_pitch", "error_apart", "at_output_rows", "at_output_start"])
def key_value_adjoint_kernel(
    at_pair,
    at_x,
    coefficient,
    at_error,
    made,
    key_scale,
    at_output,
    operand,
    plain,
    batches,
    error_pitch,
    error_apart,
    at_output_rows,
    at_output_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRED: tl.constexpr,
    PROJECTION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adjoints of what the memories of keys, before their norm, and of values made [2N, LENGTH, WIDTH].

    ``at_pair`` is what k and then v get [2N, ..], or if not ``PAIRED`` what k − v gets [N, ..]; ``at_x``
    [N, ..] what was written along k gets, with the ``coefficient`` of k in it [N, LENGTH]; residuals give
    that of the errors, of which rows lie ``error_pitch`` numbers apart and memories ``error_apart``. ``made``
    has the unit keys. The result goes to ``operand`` and, not rounded, to ``plain``; ``at_output``, that of
    snapshot reads [N, at_output_rows, WIDTH], follows in the operand, or zeros.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    apart = batches * LENGTH
    column = tl.arange(0, BLOCK)
    within = (column < WIDTH)[None, :]
    at_k = load_rows(at_pair, row, WIDTH, BLOCK)
    at_v = load_rows(at_pair, row + apart, WIDTH, BLOCK) if PAIRED else -at_k
    at_k += load_rows(at_x, row, WIDTH, BLOCK)
    if PROJECTION or TARGET:
        place = at_error + row[:, None] * error_pitch + column[None, :]
        error = tl.load(place, mask=within, other=0.0)
        error += tl.load(place + error_apart, mask=within, other=0.0)
        if PROJECTION:
            at_k += error
        if TARGET:
            at_v -= error
    if RESIDUAL or TARGET:
        place = at_error + 2 * error_apart + row[:, None] * error_pitch + column[None, :]
        error = tl.load(place, mask=within, other=0.0)
        if RESIDUAL:
            at_k += error
        if TARGET:
            at_v -= error
    k = load_rows(made, row, WIDTH, BLOCK)
    if coefficient is not None:
        at_k += k * tl.load(coefficient + row)[:, None]
    at_k = unit_adjoint(at_k, k, tl.load(key_scale + row))
    store_rows(operand, row, at_k, WIDTH, BLOCK)
    store_rows(plain, row, at_k, WIDTH, BLOCK)
    store_rows(operand, row + apart, at_v, WIDTH, BLOCK)
    store_rows(plain, row + apart, at_v, WIDTH, BLOCK)
    given = tl.zeros([ROWS, BLOCK], tl.float32)
    if at_output is not None:
        given = load_rows(at_output, batch * at_output_rows + at_output_start + t, WIDTH, BLOCK)
    store_rows(operand, row + 2 * apart, given, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["batches", "out_rows", "out_start", "out_limit"])
def input_adjoint_kernel(
    at_inputs,
    at_gates,
    at_made,
    at_read,
    at_output,
    query,
    d_query,
    d_key_input,
    d_value_input,
    d_gate_input,
    batches,
    out_rows,
    out_start,
    out_limit,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a chunk's inputs: ``out_limit`` tokens from ``out_start`` on of [N, out_rows, WIDTH].

    ``at_inputs`` [m · N, LENGTH, WIDTH] is what the served layers give their inputs; what both gates give
    together is in ``at_gates`` [N, ..], if that is there, and what a running read gives the unit queries in
    ``at_read`` [N, ..]. ``at_made`` [2N, ..] goes past the memories of keys and values, and
    ``at_output`` [N, out_rows, WIDTH] past that which is read.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    apart = batches * LENGTH
    column = tl.arange(0, BLOCK)
    mask = (t < out_limit)[:, None] & (column < WIDTH)[None, :]
    place = (batch * out_rows + out_start + t)[:, None] * WIDTH + column[None, :]
    at_key = load_rows(at_inputs, row, WIDTH, BLOCK)
    at_value = load_rows(at_inputs, row + apart, WIDTH, BLOCK)
    if at_made is not None:
        at_key += load_rows(at_made, row, WIDTH, BLOCK)
        at_value += load_rows(at_made, row + apart, WIDTH, BLOCK)
    tl.store(d_key_input + place, at_key, mask=mask)
    tl.store(d_value_input + place, at_value, mask=mask)
    if at_gates is not None:
        at_gate = load_rows(at_gates, row, WIDTH, BLOCK)
    else:
        at_gate = load_rows(at_inputs, row + 3 * apart, WIDTH, BLOCK)
        at_gate += load_rows(at_inputs, row + 4 * apart, WIDTH, BLOCK)
    tl.store(d_gate_input + place, at_gate, mask=mask)
    if at_read is not None:
        at_query = load_rows(at_read, row, WIDTH, BLOCK)
    else:
        at_query = load_rows(at_inputs, row + 2 * apart, WIDTH, BLOCK)
    if at_output is not None:
        at_query += tl.load(at_output + place, mask=mask, other=0.0)
    q, scale = forward.unit(tl.load(query + place, mask=mask, other=0.0).to(tl.float32))
    tl.store(d_query + place, unit_adjoint(at_query, q, scale), mask=mask)
