"""Element-wise work on the tokens of a chunk between products: the hidden layer, errors, and their adjoints.

A program takes ROWS whole rows of matrices [batches, LENGTH, WIDTH]; what is stored in 16 bits is an operand
of a product. Numbers by token are [batches, LENGTH], coefficients as in :mod:`.tiled_tokens`. ``NOTHING`` is
an absent tensor. The formulas are those of :mod:`.forward` and :mod:`.adjoint`.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels import adjoint, forward
from nl_kernels.chunk_kernels.tiled_tokens import AFTER, CARRIED_TO_END, MIXED_TO_END, RATE, TO_END


@triton.jit
def locate_rows(LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """The program's rows among all, its batch, and their places among the chunk's tokens."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    return first + tl.arange(0, ROWS), first // LENGTH, first % LENGTH + tl.arange(0, ROWS)


@triton.jit
def load_rows(x, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = x + row[:, None] * WIDTH + column[None, :]
    return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, row, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if x is not None:
        column = tl.arange(0, BLOCK)
        place = x + row[:, None] * WIDTH + column[None, :]
        tl.store(place, value.to(x.dtype.element_ty), mask=(column < WIDTH)[None, :])


@triton.jit
def coefficient_of(coefficients, batch, t, pitch, start, KIND: tl.constexpr):
    return tl.load(coefficients + (batch * 8 + KIND) * pitch + start + t)


@triton.jit
def store_written(
    written,
    weighted,
    carried,
    row,
    signal,
    coefficients,
    momenta,
    batch,
    t,
    pitch,
    start,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u = −η δ of a layer that does not erase, and what of it reaches S, and with momentum U, at the end."""
    if written is not None:
        handed = signal * -coefficient_of(coefficients, batch, t, pitch, start, RATE)[:, None]
        store_rows(written, row, handed, WIDTH, BLOCK)
        if carried is None:
            end = coefficient_of(coefficients, batch, t, pitch, start, TO_END)
        else:
            end = coefficient_of(momenta, batch, t, pitch, start, MIXED_TO_END)
            later = coefficient_of(momenta, batch, t, pitch, start, CARRIED_TO_END)
            store_rows(carried, row, handed * later[:, None], WIDTH, BLOCK)
        store_rows(weighted, row, handed * end[:, None], WIDTH, BLOCK)


@triton.jit(do_not_specialize=["pitch", "start"])
def hidden_rows_kernel(
    z,
    coefficients,
    value,
    effective,
    pitch,
    start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``n(σ(z))``, and the proximal rate of a layer with that input."""
    row, batch, t = locate_rows(LENGTH, ROWS)
    hidden, _, _, _ = forward.activated(load_rows(z, row, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    store_rows(value, row, hidden, WIDTH, BLOCK)
    if effective is not None:
        eta = coefficient_of(coefficients, batch, t, pitch, start, RATE)
        tl.store(effective + batch * pitch + start + t, forward.proximal_rate(eta, hidden))


@triton.jit(do_not_specialize=["pitch", "start"])
def error_rows_kernel(
    raw,
    coefficients,
    momenta,
    error,
    operand,
    written,
    weighted,
    carried,
    pitch,
    start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The error bounded; its factor is made anew where needed. ``operand`` is another rounding of it."""
    row, batch, t = locate_rows(LENGTH, ROWS)
    tile = load_rows(raw, row, WIDTH, BLOCK)
    tile *= forward.length_factor(tile, BOUND)[:, None]
    store_rows(error, row, tile, WIDTH, BLOCK)
    store_rows(operand, row, tile, WIDTH, BLOCK)
    store_written(
        written, weighted, carried, row, tile, coefficients, momenta, batch, t, pitch, start, WIDTH, BLOCK
    )


@triton.jit(do_not_specialize=["pitch", "start"])
def signal_rows_kernel(
    z,
    back,
    coefficients,
    momenta,
    signal,
    written,
    weighted,
    carried,
    pitch,
    start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The error signal at z from ``back``, the one at n(σ(z))."""
    row, batch, t = locate_rows(LENGTH, ROWS)
    value, slope, _, scale = forward.activated(load_rows(z, row, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    given = load_rows(back, row, WIDTH, BLOCK)
    found, _, _, _ = forward.error_signal(given, value, slope, scale, NORMALIZED, BOUND)
    store_rows(signal, row, found, WIDTH, BLOCK)
    store_written(
        written, weighted, carried, row, found, coefficients, momenta, batch, t, pitch, start, WIDTH, BLOCK
    )


@triton.jit(do_not_specialize=["grad_rows", "grad_start", "pitch", "start"])
def read_adjoint_rows_kernel(
    grad,
    z,
    recalled,
    coefficients,
    operand,
    weighted,
    after,
    grad_rows,
    grad_start,
    pitch,
    start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the adjoint of a read's input layer, that of the read, ready for products.

    ``z`` NOTHING: ``grad`` is that of the read itself, else of n(σ(z)). ``operand`` gets the adjoint of the
    read, ``weighted`` it times the decay from the chunk's start, ``after`` that of this decay times itself.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    tile = load_rows(grad, batch * grad_rows + grad_start + t, WIDTH, BLOCK)
    if z is not None:
        value, slope, _, scale = forward.activated(load_rows(z, row, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
        tile = adjoint.hidden_adjoint(tile, value, slope, scale, None, NORMALIZED)
    store_rows(operand, row, tile, WIDTH, BLOCK)
    if weighted is not None:
        since = coefficient_of(coefficients, batch, t, pitch, start, AFTER)
        store_rows(weighted, row, tile * since[:, None], WIDTH, BLOCK)
        tl.store(after + row, forward.row_dot(tile, load_rows(recalled, row, WIDTH, BLOCK)))


@triton.jit
def load_more(more, row, column, start, count, WIDTH: tl.constexpr, COLUMN: tl.constexpr):
    """``more`` [count, WIDTH] at the rows from ``start`` and the columns from COLUMN on; 0 elsewhere."""
    found = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    if more is not None:
        own, shifted = row - start, column - COLUMN
        mask = ((own >= 0) & (own < count))[:, None] & ((shifted >= 0) & (shifted < WIDTH))[None, :]
        found = tl.load(more + own[:, None] * WIDTH + shifted[None, :], mask=mask, other=0.0)
    return found


@triton.jit(do_not_specialize=["batches", "pitch", "start", "more_start"])
def written_adjoint_rows_kernel(
    at_written,
    at_end,
    more,
    surprise,
    rate,
    at_surprise,
    at_rate,
    to_end,
    batches,
    pitch,
    start,
    more_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MORE_WIDTH: tl.constexpr,
    MORE_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the adjoint of u = −η ω those of ω, of η but for the erase, and of ``to_end`` times itself.

    ``at_end`` is the part of ``at_written`` that comes from the state after the chunk. What else one memory
    of several gets may come in ``more`` [N, LENGTH, MORE_WIDTH]: in the rows from ``more_start`` on, and in
    the columns from MORE_COLUMN on. ``rate`` [batches, pitch].
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    eta = tl.load(rate + batch * pitch + start + t)
    direct = tl.zeros([ROWS], tl.float32)
    by_end = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        place = row[:, None] * WIDTH + column[None, :]
        mask = (column < WIDTH)[None, :]
        omega = tl.load(surprise + place, mask=mask, other=0.0)
        by_end += forward.row_dot(tl.load(at_end + place, mask=mask, other=0.0), omega)
        grad = tl.load(at_written + place, mask=mask, other=0.0)
        grad += load_more(more, row, column, more_start, batches * LENGTH, MORE_WIDTH, MORE_COLUMN)
        direct += forward.row_dot(grad, omega)
        tl.store(at_surprise + place, grad * -eta[:, None], mask=mask)
    tl.store(at_rate + row, -direct)
    tl.store(to_end + row, -eta * by_end)


@triton.jit
def store_signal_adjoint(
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
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What :func:`signal_adjoint_rows_kernel` stores of its rows; returns the adjoint of ``back``.

    ``at_signal``, ``z`` and ``right`` have them at the places ``own``.
    """
    tile = load_rows(z, own, WIDTH, BLOCK)
    value, slope, curvature, scale = forward.activated(tile, ACTIVATION, NORMALIZED)
    given = load_rows(back, row, WIDTH, BLOCK)
    signal, tangent, along, factor = forward.error_signal(given, value, slope, scale, NORMALIZED, BOUND)
    grad = load_rows(at_signal, own, WIDTH, BLOCK)
    if right is not None:
        tl.store(before + row, forward.row_dot(grad, load_rows(right, own, WIDTH, BLOCK) - signal))
    to_back, to_value, to_slope, to_radial = adjoint.signal_adjoint(
        grad, signal, tangent, along, factor, given, value, slope, curvature, scale, NORMALIZED, BOUND
    )
    store_rows(at_back, row, to_back, WIDTH, BLOCK)
    store_rows(at_slope, row, to_slope, WIDTH, BLOCK)
    to_value += load_rows(at_value, row, WIDTH, BLOCK)
    if coefficient is not None:
        to_value += value * tl.load(coefficient + row)[:, None]
    store_rows(at_value_after, row, to_value, WIDTH, BLOCK)
    tl.store(radial + row, to_radial)
    return to_back


@triton.jit
def signal_adjoint_rows_kernel(
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
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adjoints of ``back``, n(σ(z)) in all, z through σ', and ``radial`` (:func:`.adjoint.signal_adjoint`).

    ``right`` is what the layer's solve was given: the adjoint of the decay from the chunk's start, times
    itself, goes to ``before``. ``coefficient`` times n(σ(z)) is what the second layer's proximal rate adds.
    """
    row, _, _ = locate_rows(LENGTH, ROWS)
    store_signal_adjoint(
        row,
        row,
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


@triton.jit(do_not_specialize=["out_rows", "out_start", "out_limit"])
def error_adjoint_rows_kernel(
    at_error,
    raw,
    error,
    right,
    solved,
    operand,
    plain,
    d_target,
    before,
    out_rows,
    out_start,
    out_limit,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of the error before its bound, for products, plain, and negated as that of the targets.

    ``right`` and ``solved``, the adjoint that the solve gave, are of the last layer, where it erases.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    bounded = load_rows(error, row, WIDTH, BLOCK)
    grad = load_rows(at_error, row, WIDTH, BLOCK)
    if right is not None:
        recalled = load_rows(right, row, WIDTH, BLOCK) - bounded
        tl.store(before + row, forward.row_dot(load_rows(solved, row, WIDTH, BLOCK), recalled))
    if BOUND > 0:
        factor = forward.length_factor(load_rows(raw, row, WIDTH, BLOCK), BOUND)
        grad = adjoint.bound_adjoint(grad, bounded, factor, BOUND)
    store_rows(operand, row, grad, WIDTH, BLOCK)
    store_rows(plain, row, grad, WIDTH, BLOCK)
    column = tl.arange(0, BLOCK)
    place = d_target + (batch * out_rows + out_start + t)[:, None] * WIDTH + column[None, :]
    tl.store(place, -grad, mask=(t < out_limit)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def hidden_adjoint_rows_kernel(
    at_value,
    z,
    radial,
    at_slope,
    operand,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of z from that of n(σ(z)) and what :func:`signal_adjoint_rows_kernel` left."""
    row, _, _ = locate_rows(LENGTH, ROWS)
    value, slope, _, scale = forward.activated(load_rows(z, row, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    grad = load_rows(at_value, row, WIDTH, BLOCK)
    grad = adjoint.hidden_adjoint(grad, value, slope, scale, tl.load(radial + row), NORMALIZED)
    store_rows(operand, row, grad + load_rows(at_slope, row, WIDTH, BLOCK), WIDTH, BLOCK)


@triton.jit(do_not_specialize=["out_rows", "out_start", "out_limit", "x_rows", "x_start"])
def add_scaled_rows_kernel(
    x,
    coefficient,
    out,
    out_rows,
    out_start,
    out_limit,
    x_rows,
    x_start,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add ``coefficient`` times the rows of x to ``out`` [batches, out_rows, WIDTH]."""
    row, batch, t = locate_rows(LENGTH, ROWS)
    tile = load_rows(x, batch * x_rows + x_start + t, WIDTH, BLOCK) * tl.load(coefficient + row)[:, None]
    column = tl.arange(0, BLOCK)
    place = out + (batch * out_rows + out_start + t)[:, None] * WIDTH + column[None, :]
    mask = (t < out_limit)[:, None] & (column < WIDTH)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + tile, mask=mask)
