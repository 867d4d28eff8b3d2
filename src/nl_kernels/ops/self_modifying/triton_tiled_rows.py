"""Element-wise work on a chunk's tokens between the tiled products: what the memories make, and their errors.

A program takes ROWS whole rows of matrices [batches, LENGTH, ·], as in
:mod:`nl_kernels.chunk_kernels.tiled_rows`. N is ``batches``, the rows of the call. What is by memory is
memory first, [m · N, LENGTH, ·], but for the first layers, which are one of width 5h: token after token has
the five memories in turn. Coefficients are those of the present chunk, repeated for every memory.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels import forward
from nl_kernels.chunk_kernels.tiled_momentum import store_momenta
from nl_kernels.chunk_kernels.tiled_rows import (
    coefficient_of,
    load_rows,
    locate_rows,
    store_rows,
    store_written,
)
from nl_kernels.chunk_kernels.tiled_tokens import (
    AFTER,
    BEFORE,
    CARRIED_TO_END,
    MIXED_TO_END,
    RATE,
    TO_END,
    locate_chunk_tokens,
)
from nl_kernels.ops.self_modifying.triton_chunk import log_sigmoid
from nl_kernels.triton_support.language import cumulate_log, decay_between, decay_from_start, total_log

MEMORIES: tl.constexpr = tl.constexpr(5)
WIDE: tl.constexpr = tl.constexpr(3)  # memories as wide as their input; the two gates follow


@triton.jit
def _load_tokens(x, token, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(x + token[:, None] * WIDTH + column[None, :], mask=mask, other=0.0).to(tl.float32)


_PLACES = [f"{x}_{kind}" for x in ("query", "gate_x", "gates") for kind in ("rows", "start")]


@triton.jit(do_not_specialize=["tokens", "offset", "batches", "chunk", *_PLACES])
def generate_rows_kernel(
    made,
    key_input,
    value_input,
    query,
    gate_x,
    gates,
    rate_bias,
    retention_bias,
    begin,
    stop,
    origin,
    kv,
    difference,
    key_scale,
    key_square,
    logits,
    o,
    tokens,
    offset,
    batches,
    chunk,
    query_rows,
    query_start,
    gate_x_rows,
    gate_x_start,
    gates_rows,
    gates_start,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    TWO_LAYER: tl.constexpr,
    PROJECTION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """k and v in place of what the memories of keys and values made, the gates' logits, and snapshot reads.

    ``made`` [3N or 2N, LENGTH, WIDTH]; ``kv`` is another rounding of k and v, ``difference`` k − v. The gates
    are two rows of ``gates`` [N, gates_rows, GATE_WIDTH] from ``gates_start`` on, applied to their hidden
    layers in ``gate_x``, memory first, or to the same input. ``o`` are the call's tokens, or NOTHING.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    later = row + tl.cast(batches, tl.int64) * LENGTH
    key = load_rows(made, row, WIDTH, BLOCK)
    value = load_rows(made, later, WIDTH, BLOCK)
    if PROJECTION:
        key += _load_tokens(key_input, token, valid, WIDTH, BLOCK)
        value += _load_tokens(value_input, token, valid, WIDTH, BLOCK)
    key, scale = forward.unit(key)
    tl.store(key_scale + row, scale)
    if key_square is not None:
        tl.store(key_square + row, forward.row_dot(key, key))
    store_rows(made, row, key, WIDTH, BLOCK)
    store_rows(made, later, value, WIDTH, BLOCK)
    if kv is not None:
        store_rows(kv, row, key, WIDTH, BLOCK)
        store_rows(kv, later, value, WIDTH, BLOCK)
    store_rows(difference, row, key - value, WIDTH, BLOCK)
    if o is not None:
        read = load_rows(made, later + tl.cast(batches, tl.int64) * LENGTH, WIDTH, BLOCK)
        if RESIDUAL:
            read += load_rows(query, batch * query_rows + query_start + t, WIDTH, BLOCK)
        column = tl.arange(0, BLOCK)
        mask = valid[:, None] & (column < WIDTH)[None, :]
        tl.store(o + token[:, None] * WIDTH + column[None, :], read, mask=mask)

    column = tl.arange(0, GATE_BLOCK)
    for gate in tl.static_range(2):
        source = batch + batches * (WIDE + gate if TWO_LAYER else WIDE)
        x = load_rows(gate_x, source * gate_x_rows + gate_x_start + t, GATE_WIDTH, GATE_BLOCK)
        place = gates + (batch * gates_rows + gates_start + gate) * GATE_WIDTH + column
        weight = tl.load(place, mask=column < GATE_WIDTH, other=0.0).to(tl.float32)
        bias = rate_bias if gate == 0 else retention_bias
        z = tl.sum(x * weight[None, :], 1) + tl.load(bias + batch)
        tl.store(logits + (gate * tl.cast(batches, tl.int64) + batch) * LENGTH + t, z)


@triton.jit(do_not_specialize=["tokens", "offset", "batches", "chunks", "chunk"])
def gate_coefficients_kernel(
    logits,
    rate_max,
    key_square,
    momentum,
    begin,
    stop,
    origin,
    coefficients,
    rates,
    final,
    momenta,
    mixed_final,
    carried_final,
    tokens,
    offset,
    batches,
    chunks,
    chunk,
    CHUNK: tl.constexpr,
    LENGTH: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What decays and rates give a chunk, for each of COPIES memories; one program a row.

    ``rates`` [N + N · COPIES, LENGTH] has the keys' own rate, the proximal one where there is ``key_square``,
    then the plain one; of a single memory the former alone. With ``momentum``, the call's tokens', also what
    it gives (:mod:`nl_kernels.chunk_kernels.tiled_momentum`).
    """
    batch = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < LENGTH
    token, valid = locate_chunk_tokens(batch, chunk, t, begin, stop, origin, tokens, offset, CHUNK, LENGTH)
    z = tl.load(logits + batch * LENGTH + t, mask=inside, other=0.0)
    eta = tl.where(valid, tl.load(rate_max + batch) * tl.sigmoid(z), 0.0)
    z = tl.load(logits + (batches + batch) * LENGTH + t, mask=inside, other=0.0)
    log = tl.where(valid, log_sigmoid(z), 0.0)
    total, residue, total_before, residue_before = cumulate_log(log)
    all_total, all_residue = total_log(log)
    before = decay_from_start(total_before)
    after = decay_from_start(total)
    to_end = decay_between(all_total, all_residue, total, residue)
    own = eta
    if key_square is not None:
        own = eta / (1 + eta * tl.load(key_square + batch * LENGTH + t, mask=inside, other=0.0))
    tl.store(rates + batch * LENGTH + t, own, mask=inside)
    if momentum is not None:
        later, later_valid = locate_chunk_tokens(
            batch, chunk, t + 1, begin, stop, origin, tokens, offset, CHUNK, LENGTH
        )
        mu = tl.load(momentum + token, mask=valid, other=1.0)
        next_mu = tl.load(momentum + later, mask=later_valid, other=1.0)
        alpha = tl.exp(log)
        counts = tl.where(valid, 1.0, 0.0)
    for memory in range(0, COPIES):
        copy = tl.cast(memory, tl.int64) * batches + batch
        place = coefficients + copy * 8 * LENGTH + t
        tl.store(place, total, mask=inside)
        tl.store(place + LENGTH, residue, mask=inside)
        tl.store(place + 2 * LENGTH, total_before, mask=inside)
        tl.store(place + 3 * LENGTH, residue_before, mask=inside)
        tl.store(place + BEFORE * LENGTH, before, mask=inside)
        tl.store(place + AFTER * LENGTH, after, mask=inside)
        tl.store(place + TO_END * LENGTH, to_end, mask=inside)
        tl.store(place + RATE * LENGTH, eta, mask=inside)
        if COPIES > 1:
            tl.store(rates + (batches + copy) * LENGTH + t, eta, mask=inside)
        tl.store(final + copy * chunks + chunk, decay_from_start(all_total))
        if momentum is not None:
            store_momenta(
                momenta,
                mixed_final,
                carried_final,
                copy * 8 * LENGTH + t,
                LENGTH,
                copy * chunks + chunk,
                t,
                mu,
                next_mu,
                alpha,
                counts,
                to_end,
                LENGTH,
            )


@triton.jit
def _memory_rows(row, batch, t, batches, LENGTH: tl.constexpr):
    """Of rows by memory: the memory, the row's place among the call's, and among [N, LENGTH, 5] of it."""
    memory = batch // batches
    plain = (batch % batches) * LENGTH + t
    return memory, plain, plain * MEMORIES + memory


@triton.jit(do_not_specialize=["pitch", "start", "batches"])
def pair_hidden_rows_kernel(
    pair_z,
    coefficients,
    hidden,
    difference,
    effective,
    pitch,
    start,
    batches,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every memory's hidden layer at k, less that at v, from ``pair_z`` [2N, LENGTH, 5, WIDTH].

    ``effective`` [5N, pitch] gets the proximal rates of the last layers.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    _, _, at = _memory_rows(row, batch, t, batches, LENGTH)
    key, _, _, _ = forward.activated(load_rows(pair_z, at, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    later = tl.cast(batches, tl.int64) * (LENGTH * MEMORIES)
    value, _, _, _ = forward.activated(load_rows(pair_z, at + later, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    store_rows(hidden, row, key, WIDTH, BLOCK)
    store_rows(difference, row, key - value, WIDTH, BLOCK)
    if effective is not None:
        eta = coefficient_of(coefficients, batch, t, pitch, start, RATE)
        tl.store(effective + batch * pitch + start + t, forward.proximal_rate(eta, key))


@triton.jit
def _add_residuals(error, key, value, share, TARGET: tl.constexpr):
    """What residuals add to f(k) − f(v): ``share`` of k, and less the target's v."""
    if TARGET:
        error -= value
    return error + share * key


@triton.jit(do_not_specialize=["pitch", "start", "batches"])
def memory_error_rows_kernel(
    error,
    made,
    coefficients,
    momenta,
    operand,
    factor,
    written,
    weighted,
    carried,
    pitch,
    start,
    batches,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PROJECTION: tl.constexpr,
    TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The errors of key, value and memory [3N, LENGTH, WIDTH] in place of f(k) − f(v): bounded.

    ``made`` holds k and v; ``factor`` [3N, LENGTH] is the bound's.
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    memory, plain, _ = _memory_rows(row, batch, t, batches, LENGTH)
    key = load_rows(made, plain, WIDTH, BLOCK)
    value = load_rows(made, plain + tl.cast(batches, tl.int64) * LENGTH, WIDTH, BLOCK)
    tile = load_rows(error, row, WIDTH, BLOCK)
    share = tl.where(memory == WIDE - 1, 1.0 if RESIDUAL else 0.0, 1.0 if PROJECTION else 0.0)
    tile = _add_residuals(tile, key, value, share, TARGET)
    scale = forward.length_factor(tile, BOUND)
    tile *= scale[:, None]
    tl.store(factor + row, scale)
    store_rows(error, row, tile, WIDTH, BLOCK)
    store_rows(operand, row, tile, WIDTH, BLOCK)
    store_written(
        written, weighted, carried, row, tile, coefficients, momenta, batch, t, pitch, start, WIDTH, BLOCK
    )


@triton.jit(do_not_specialize=["pitch", "start", "batches", *_PLACES])
def memory_signal_rows_kernel(
    pair_z,
    difference,
    gates,
    back,
    coefficients,
    momenta,
    gate_error,
    signal,
    written,
    weighted,
    carried,
    gate_written,
    gate_weighted,
    gate_carried,
    pitch,
    start,
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
    """Every memory's error signal at z [N, LENGTH, 5, WIDTH] from ``back``, the one at its hidden layer.

    Of the gates ``back`` and the error are made here, with their weights, two rows of ``gates`` [N,
    gates_rows, WIDTH]: one number a token, ``gate_error`` [2N, LENGTH].
    """
    row, batch, t = locate_rows(LENGTH, ROWS)
    memory, _, at = _memory_rows(row, batch, t, batches, LENGTH)
    if memory < WIDE:
        given = load_rows(back, row, WIDTH, BLOCK)
    else:
        column = tl.arange(0, BLOCK)
        gate = (batch % batches) * gates_rows + gates_start + memory - WIDE
        weight = tl.load(gates + gate * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        error = tl.sum(load_rows(difference, row, WIDTH, BLOCK) * weight[None, :], 1)
        if BOUND > 0:
            error = tl.minimum(tl.maximum(error, -BOUND), BOUND)
        place = row - tl.cast(batches, tl.int64) * (WIDE * LENGTH)
        tl.store(gate_error + place, error)
        given = error[:, None] * weight[None, :]
        store_rows(back, row, given, WIDTH, BLOCK)
        store_written(
            gate_written, gate_weighted, gate_carried, place, error[:, None], coefficients, momenta,
            batch, t, pitch, start, 1, 1,
        )  # fmt: skip
    value, slope, _, scale = forward.activated(load_rows(pair_z, at, WIDTH, BLOCK), ACTIVATION, NORMALIZED)
    found, _, _, _ = forward.error_signal(given, value, slope, scale, NORMALIZED, BOUND)
    store_rows(signal, at, found, WIDTH, BLOCK)
    store_written(
        written, weighted, carried, at, found, coefficients, momenta, batch, t, pitch, start, WIDTH, BLOCK
    )


@triton.jit
def _store_columns(x, row, first, value, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if x is not None:
        column = tl.arange(0, BLOCK)
        place = x + row[:, None] * STRIDE + first + column[None, :]
        tl.store(place, value.to(x.dtype.element_ty), mask=(column < WIDTH)[None, :])


@triton.jit
def _load_columns(x, row, first, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = x + row[:, None] * STRIDE + first + column[None, :]
    return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["pitch", "start", "batches"])
def linear_error_rows_kernel(
    error,
    made,
    coefficients,
    momenta,
    factor,
    written,
    weighted,
    carried,
    pitch,
    start,
    batches,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    GATES: tl.constexpr,
    PROJECTION: tl.constexpr,
    TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The errors of linear memories [N, LENGTH, 3 WIDTH + GATES] in place of W (k − v): bounded."""
    row, batch, t = locate_rows(LENGTH, ROWS)
    all_rows = tl.cast(batches, tl.int64) * LENGTH
    STRIDE: tl.constexpr = WIDE * WIDTH + GATES
    key = load_rows(made, row, WIDTH, BLOCK)
    value = load_rows(made, row + all_rows, WIDTH, BLOCK)
    eta = coefficient_of(coefficients, batch, t, pitch, start, RATE)
    end = coefficient_of(coefficients, batch, t, pitch, start, TO_END)
    later = end
    if carried is not None:
        end = coefficient_of(momenta, batch, t, pitch, start, MIXED_TO_END)
        later = coefficient_of(momenta, batch, t, pitch, start, CARRIED_TO_END)
    for memory in tl.static_range(WIDE + 1):
        first = memory * WIDTH
        if memory < WIDE:
            tile = _load_columns(error, row, first, STRIDE, WIDTH, BLOCK)
            adds = RESIDUAL if memory == WIDE - 1 else PROJECTION
            tile = _add_residuals(tile, key, value, 1.0 if adds else 0.0, TARGET)
            scale = forward.length_factor(tile, BOUND)
            tile *= scale[:, None]
            tl.store(factor + memory * all_rows + row, scale)
            _store_columns(error, row, first, tile, STRIDE, WIDTH, BLOCK)
            handed = tile * -eta[:, None]
            _store_columns(written, row, first, handed, STRIDE, WIDTH, BLOCK)
            _store_columns(weighted, row, first, handed * end[:, None], STRIDE, WIDTH, BLOCK)
            _store_columns(carried, row, first, handed * later[:, None], STRIDE, WIDTH, BLOCK)
        else:
            gate = _load_columns(error, row, first, STRIDE, GATES, GATES)
            if BOUND > 0:
                gate = tl.minimum(tl.maximum(gate, -BOUND), BOUND)
            _store_columns(error, row, first, gate, STRIDE, GATES, GATES)
            handed_gate = gate * -eta[:, None]
            _store_columns(written, row, first, handed_gate, STRIDE, GATES, GATES)
            _store_columns(weighted, row, first, handed_gate * end[:, None], STRIDE, GATES, GATES)
            _store_columns(carried, row, first, handed_gate * later[:, None], STRIDE, GATES, GATES)
