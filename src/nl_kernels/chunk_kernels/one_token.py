"""One memory over one token, as Triton functions: plain vector arithmetic on whole matrices, in place.

A token is a row [1, width] in fp32. A memory's matrices are whole tiles [out, in] of one program, the
``index``-th of a contiguous buffer; an anchor, ``None`` in a rule without, has an index of its own. A linear
memory has its one matrix in place of the inner one.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated, error_signal, length_factor
from nl_kernels.triton_support.language import finish_loads

_NORM_EPS: tl.constexpr = tl.constexpr(1e-6)  # memory_rule.NORM_EPS


@triton.jit
def load_row(base, index, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Row ``index`` of [.., WIDTH] as [1, BLOCK] in fp32."""
    column = tl.arange(0, BLOCK)
    row = tl.load(base + index * WIDTH + column, mask=column < WIDTH, other=0.0)
    return row.to(tl.float32)[None, :]


@triton.jit
def store_row(base, index, WIDTH: tl.constexpr, BLOCK: tl.constexpr, row):
    """The inverse of :func:`load_row`; rounds to the buffer's dtype."""
    column = tl.arange(0, BLOCK)
    tl.store(base + index * WIDTH + column, tl.sum(row, 0).to(base.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def normalized(row):
    """``row`` at unit length."""
    return row * tl.rsqrt(tl.sum(row * row, 1) + _NORM_EPS)[:, None]


@triton.jit
def applied(matrix, row):
    """``row · matrixᵀ`` [1, out]."""
    return tl.sum(matrix * row, 1)[None, :]


@triton.jit
def load_matrix(
    base, index, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
):
    """The ``index``-th matrix [OUT, IN] as a tile in fp32, zero outside."""
    row = tl.arange(0, BLOCK_OUT)[:, None]
    column = tl.arange(0, BLOCK_IN)[None, :]
    # One 64-bit offset for all, and no mask where the tile is full: both cost registers for every number.
    pointers = base + index * (OUT * IN) + (row * IN + column)
    if OUT == BLOCK_OUT and IN == BLOCK_IN:
        matrix = tl.load(pointers)
    else:
        matrix = tl.load(pointers, mask=(row < OUT) & (column < IN), other=0.0)
    return matrix.to(tl.float32)


@triton.jit
def store_matrix(
    base, index, matrix, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr
):
    """The inverse of :func:`load_matrix`."""
    row = tl.arange(0, BLOCK_OUT)[:, None]
    column = tl.arange(0, BLOCK_IN)[None, :]
    pointers = base + index * (OUT * IN) + (row * IN + column)
    if OUT == BLOCK_OUT and IN == BLOCK_IN:
        tl.store(pointers, matrix)
    else:
        tl.store(pointers, matrix, mask=(row < OUT) & (column < IN))


@triton.jit
def load_base(
    anchor,
    change,
    anchor_index,
    index,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The weights [OUT, IN] that ``change`` stands for."""
    matrix = load_matrix(change, index, OUT, IN, BLOCK_OUT, BLOCK_IN)
    if anchor is not None:
        matrix += load_matrix(anchor, anchor_index, OUT, IN, BLOCK_OUT, BLOCK_IN)
    return matrix


@triton.jit
def serve(
    inner_anchor,
    outer_anchor,
    inner_snapshot,
    outer_snapshot,
    anchor_index,
    inner_index,
    outer_index,
    x,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """f(x) at the snapshot, without any residual [1, BLOCK_V]."""
    if outer_snapshot is None:
        matrix = load_base(
            inner_anchor, inner_snapshot, anchor_index, inner_index, VALUE_DIM, KEY_DIM, BLOCK_V, BLOCK_K
        )
        y = applied(matrix, x)
    else:
        matrix = load_base(
            inner_anchor, inner_snapshot, anchor_index, inner_index, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K
        )
        hidden, _, _, _ = activated(applied(matrix, x), ACTIVATION, NORMALIZED)
        matrix = load_base(
            outer_anchor, outer_snapshot, anchor_index, outer_index, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
        )
        y = applied(matrix, hidden)
    return y


@triton.jit
def write_in_place(
    state,
    velocity,
    snapshot,
    anchor,
    anchor_index,
    index,
    x,
    signal,
    query,
    rate,
    decay,
    momentum,
    met,
    ERASES: tl.constexpr,
    PROXIMAL: tl.constexpr,
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``U ← μU − η δxᵀ``, ``S ← αS − η (Sx)xᵀ + U``; the new S is the snapshot where ``met``.

    Returns the running read W q [1, OUT] of ``query`` if ``RUNNING``, else the signal.
    """
    matrix = load_matrix(state, index, OUT, IN, BLOCK_OUT, BLOCK_IN)
    if ERASES:
        if PROXIMAL:
            rate = rate / (1 + rate * tl.sum(x * x))
        recalled = tl.sum(matrix * x, 1)
    delta = tl.sum(signal, 0)
    new = decay * matrix
    if velocity is not None:
        moved = momentum * load_matrix(velocity, index, OUT, IN, BLOCK_OUT, BLOCK_IN)
        moved -= (rate * delta)[:, None] * x
    finish_loads(BLOCK_OUT * BLOCK_IN)
    if velocity is not None:
        store_matrix(velocity, index, moved, OUT, IN, BLOCK_OUT, BLOCK_IN)
        new += moved
        if ERASES:
            new -= (rate * recalled)[:, None] * x
    else:
        if ERASES:
            delta += recalled
        new -= (rate * delta)[:, None] * x
    store_matrix(state, index, new, OUT, IN, BLOCK_OUT, BLOCK_IN)
    if met:
        store_matrix(snapshot, index, new, OUT, IN, BLOCK_OUT, BLOCK_IN)
    y = signal
    if RUNNING:
        if anchor is not None:
            new += load_matrix(anchor, anchor_index, OUT, IN, BLOCK_OUT, BLOCK_IN)
        y = applied(new, query)
    return y


@triton.jit
def learn(
    inner_anchor,
    outer_anchor,
    inner_snapshot,
    outer_snapshot,
    inner,
    outer,
    inner_velocity,
    outer_velocity,
    anchor_index,
    inner_index,
    outer_index,
    key,
    target,
    query,
    rate,
    decay,
    momentum,
    met,
    SELF_MADE: tl.constexpr,
    TARGET_RESIDUAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    READ: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One memory learns ``key → target`` and, unless ``READ`` is "none", is read with ``query``.

    With ``SELF_MADE`` the memory makes its target from ``target``: f(target), plus target itself with
    ``TARGET_RESIDUAL``. ``READ`` is "snapshot" or "running". Returns the read without its residual.
    """
    if outer is None:
        matrix = load_base(
            inner_anchor, inner_snapshot, anchor_index, inner_index, VALUE_DIM, KEY_DIM, BLOCK_V, BLOCK_K
        )
        error = applied(matrix, key - target) if SELF_MADE else applied(matrix, key)
        y = applied(matrix, query) if READ == "snapshot" else error
    else:
        matrix = load_base(
            inner_anchor, inner_snapshot, anchor_index, inner_index, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K
        )
        value, slope, _, scale = activated(applied(matrix, key), ACTIVATION, NORMALIZED)
        apart = value
        if SELF_MADE:
            at_target, _, _, _ = activated(applied(matrix, target), ACTIVATION, NORMALIZED)
            apart = value - at_target
        at_query = value
        if READ == "snapshot":
            at_query, _, _, _ = activated(applied(matrix, query), ACTIVATION, NORMALIZED)
        matrix = load_base(
            outer_anchor, outer_snapshot, anchor_index, outer_index, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
        )
        error = applied(matrix, apart)
        y = applied(matrix, at_query) if READ == "snapshot" else error
    if not SELF_MADE or TARGET_RESIDUAL:
        error -= target
    if RESIDUAL:
        error += key
    error = error * length_factor(error, BOUND)[:, None]

    if outer is None:
        tl.debug_barrier()  # every thread has read the snapshot that may be overwritten now
        running = write_in_place(
            inner, inner_velocity, inner_snapshot, inner_anchor, anchor_index, inner_index,
            key, error, query, rate, decay, momentum, met,
            ERASE_INNER, PROXIMAL, READ == "running", VALUE_DIM, KEY_DIM, BLOCK_V, BLOCK_K,
        )  # fmt: skip
    else:
        back = tl.sum(matrix * tl.sum(error, 0)[:, None], 0)[None, :]
        signal, _, _, _ = error_signal(back, value, slope, scale, NORMALIZED, BOUND)
        tl.debug_barrier()  # every thread has read the snapshots that may be overwritten now
        running = write_in_place(
            inner, inner_velocity, inner_snapshot, inner_anchor, anchor_index, inner_index,
            key, signal, query, rate, decay, momentum, met,
            ERASE_INNER, PROXIMAL, READ == "running", HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K,
        )  # fmt: skip
        at_query = running
        if READ == "running":
            at_query, _, _, _ = activated(running, ACTIVATION, NORMALIZED)
        running = write_in_place(
            outer, outer_velocity, outer_snapshot, outer_anchor, anchor_index, outer_index,
            value, error, at_query, rate, decay, momentum, met,
            ERASE_OUTER, PROXIMAL, READ == "running", VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H,
        )  # fmt: skip
    return running if READ == "running" else y


@triton.jit(do_not_specialize=["B"])
def advance_kernel(position, mask, B, PERIOD: tl.constexpr, BLOCK: tl.constexpr):
    """Positions [B] after one token; a launch of its own: every head of a sequence reads them first."""
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sequence < B
    place = tl.load(position + sequence, mask=inside, other=0)
    moved = inside
    if mask is not None:
        moved = tl.load(mask + sequence, mask=inside, other=0) != 0
    tl.store(position + sequence, tl.where(moved, (place + 1) % PERIOD, place), mask=inside)
