"""The kernels for two-layer memories, ``f(x) = W1 n(σ(W2 x))``: one program a row.

First layers are [h, D]; last layers [D, h], and of the gates [1, h], padded to 16 rows. The five memories
take turns, each with whole matrices from memory, which the L2 cache holds. The keys of all first layers are
the same, and so are their gram matrix and inverse; each last layer has its own.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated, error_signal, length_factor, unit
from nl_kernels.chunk_kernels.scratch import hand_on, take_back
from nl_kernels.ops.self_modifying.triton_chunk import (
    base_of,
    clock,
    coefficients,
    locate_row,
    locate_tokens,
    log_sigmoid,
    put,
    read_layer,
    residual,
    share_keys,
    take,
    write_layer,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile

BLOCK_G: tl.constexpr = tl.constexpr(16)  # rows of a gate's last layer, of which one is used


@triton.jit
def serve_rows(x, first, last, ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr, PRECISION: tl.constexpr):
    """f(x) [C, out], and the hidden layer with its slope and scale."""
    value, slope, _, scale = activated(matmul(x, tl.trans(first), PRECISION), ACTIVATION, NORMALIZED)
    return matmul(value, tl.trans(last), PRECISION), value, slope, scale


@triton.jit
def errors_of(
    k, v, first, last, remainder, ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr, BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A memory's errors: its hidden layers at k and v, the bounded error, its factor, and the signal.

    ``remainder`` [C, out] is what residuals add to f(k) − f(v), or ``None``.
    """
    at_k = activated(matmul(k, tl.trans(first), PRECISION), ACTIVATION, NORMALIZED)
    at_v = activated(matmul(v, tl.trans(first), PRECISION), ACTIVATION, NORMALIZED)
    error = matmul(at_k[0] - at_v[0], tl.trans(last), PRECISION)
    if remainder is not None:
        error += remainder
    factor = length_factor(error, BOUND)
    error *= factor[:, None]
    back = matmul(error, last, PRECISION)
    signal = error_signal(back, at_k[0], at_k[1], at_k[3], NORMALIZED, BOUND)
    return at_k, at_v, error, factor, back, signal


@triton.jit
def _take_in(
    query, token, valid, handed, rate, key_rate, inverse, spreads,
    anchor_first, anchor_last, final_first, final_last, final_velocity_first, final_velocity_last,
    snapshot_first, snapshot_last, kept_first_, kept_last_, kept_velocity_first, kept_velocity_last,
    first_at, last_at, kept_first_at, kept_last_at, keep, fresh, leaves,
    rows, ROWS: tl.constexpr, d, WIDTH: tl.constexpr, h, HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr, ERASES: tl.constexpr, ERASES_LAST: tl.constexpr,
    PROXIMAL: tl.constexpr, BOUND: tl.constexpr, SNAPSHOTS: tl.constexpr, MOMENTUM: tl.constexpr,
    KEY: tl.constexpr, TARGET: tl.constexpr, READS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One memory over the chunk: its states are updated in memory, with copies of those before where wanted.

    ``handed`` are k and then v; ``KEY`` and ``TARGET`` say what of them residuals add to f(k) − f(v). Returns
    the running reads of the unit queries if it ``READS``, else the errors. Steps are parted by barriers, so
    that nothing is loaded and held before its step.
    """
    tile = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    k = take_back(handed, tile)
    v = take_back(handed + BLOCK_C * BLOCK_D, tile)
    remainder = None
    if KEY or TARGET:
        remainder = residual(k, v, KEY, TARGET)
    first = base_of(
        final_first, snapshot_first, anchor_first, first_at, fresh, h, HIDDEN, d, WIDTH, SNAPSHOTS
    )
    hidden = activated(matmul(k, tl.trans(first), PRECISION), ACTIVATION, NORMALIZED)
    other, _, _, _ = activated(matmul(v, tl.trans(first), PRECISION), ACTIVATION, NORMALIZED)
    tl.debug_barrier()
    last = base_of(final_last, snapshot_last, anchor_last, last_at, fresh, rows, ROWS, h, HIDDEN, SNAPSHOTS)
    x = hidden[0]
    error = matmul(x - other, tl.trans(last), PRECISION)
    if remainder is not None:
        error += remainder
    error *= length_factor(error, BOUND)[:, None]
    signal = error_signal(matmul(error, last, PRECISION), x, hidden[1], hidden[3], NORMALIZED, BOUND)
    tl.debug_barrier()
    k = take_back(handed, tile)
    state = take(final_first, first_at, h, HIDDEN, d, WIDTH)
    velocity = state
    put(snapshot_first, first_at, leaves, h, HIDDEN, d, WIDTH, state)
    if kept_first_ is not None:
        put(kept_first_, kept_first_at, keep, h, HIDDEN, d, WIDTH, state)
    if MOMENTUM:
        velocity = take(final_velocity_first, first_at, h, HIDDEN, d, WIDTH)
        if kept_first_ is not None:
            put(kept_velocity_first, kept_first_at, keep, h, HIDDEN, d, WIDTH, velocity)
    after, velocity_after, _, written, _ = write_layer(
        state, velocity, k, signal[0], key_rate, spreads, inverse, ERASES, MOMENTUM, PRECISION
    )
    y = error
    if READS:
        q, _ = unit(load_tile(query, token, valid, d, WIDTH))
        y, _, _ = read_layer(q, state, velocity, k, written, spreads, MOMENTUM, PRECISION)
    tl.debug_barrier()
    put(final_first, first_at, True, h, HIDDEN, d, WIDTH, after)
    if MOMENTUM:
        put(final_velocity_first, first_at, True, h, HIDDEN, d, WIDTH, velocity_after)
    if READS:
        if anchor_first is not None:
            y += matmul(q, tl.trans(take(anchor_first, first_at, h, HIDDEN, d, WIDTH)), PRECISION)
        y, _, _, _ = activated(y, ACTIVATION, NORMALIZED)
    tl.debug_barrier()

    last_rate, _, last_inverse = share_keys(x, rate, spreads[0][2], ERASES_LAST, PROXIMAL, BLOCK_C, PRECISION)
    state = take(final_last, last_at, rows, ROWS, h, HIDDEN)
    velocity = state
    put(snapshot_last, last_at, leaves, rows, ROWS, h, HIDDEN, state)
    if kept_first_ is not None:
        put(kept_last_, kept_last_at, keep, rows, ROWS, h, HIDDEN, state)
    if MOMENTUM:
        velocity = take(final_velocity_last, last_at, rows, ROWS, h, HIDDEN)
        if kept_first_ is not None:
            put(kept_velocity_last, kept_last_at, keep, rows, ROWS, h, HIDDEN, velocity)
    after, velocity_after, _, written, _ = write_layer(
        state, velocity, x, error, last_rate, spreads, last_inverse, ERASES_LAST, MOMENTUM, PRECISION
    )
    if READS:
        probe = y
        y, _, _ = read_layer(probe, state, velocity, x, written, spreads, MOMENTUM, PRECISION)
    tl.debug_barrier()
    put(final_last, last_at, True, rows, ROWS, h, HIDDEN, after)
    if MOMENTUM:
        put(final_velocity_last, last_at, True, rows, ROWS, h, HIDDEN, velocity_after)
    if READS and anchor_last is not None:
        y += matmul(probe, tl.trans(take(anchor_last, last_at, rows, ROWS, h, HIDDEN)), PRECISION)
    tl.debug_barrier()
    return y


@triton.jit(
    do_not_specialize=[
        "T", "H", "offset", "first_chunk", "stop_chunk", "initial_slots", "initial_slot",
        "kept_every", "kept_first_slot", "kept_slots",
    ]
)  # fmt: skip
def two_layer_forward_kernel(
    query,
    key_input,
    value_input,
    gate_input,
    momentum,
    spans,
    rate_max,
    rate_bias,
    retention_bias,
    anchor_first,
    anchor_last,
    anchor_gate,
    initial_first,
    initial_last,
    initial_gate,
    initial_velocity_first,
    initial_velocity_last,
    initial_velocity_gate,
    resumed_first,
    resumed_last,
    resumed_gate,
    o,
    final_first,
    final_last,
    final_gate,
    final_velocity_first,
    final_velocity_last,
    final_velocity_gate,
    snapshot_first,
    snapshot_last,
    snapshot_gate,
    kept_first,
    kept_last,
    kept_gate,
    kept_velocity_first,
    kept_velocity_last,
    kept_velocity_gate,
    scratch,
    T,
    H,
    offset,
    first_chunk,
    stop_chunk,
    initial_slots,
    initial_slot,
    kept_every,
    kept_first_slot,
    kept_slots,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    MEMORY_CLOCK: tl.constexpr,
    OTHERS_CLOCK: tl.constexpr,
    RUNNING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ERASES: tl.constexpr,
    ERASES_LAST: tl.constexpr,
    PROXIMAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PROJECTION: tl.constexpr,
    TARGET: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As :func:`~nl_kernels.ops.self_modifying.triton_linear.linear_forward_kernel`."""
    MOMENTUM: tl.constexpr = momentum is not None
    RESUMED: tl.constexpr = resumed_last is not None
    SNAPSHOTS: tl.constexpr = RESUMED or MEMORY_CLOCK != OTHERS_CLOCK
    MATRIX: tl.constexpr = WIDTH * HIDDEN
    program = tl.program_id(0).to(tl.int64)
    sequence = program // H
    head = program % H
    origin, begin, stop = locate_row(spans, sequence, offset, T)
    d = tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    g = tl.arange(0, BLOCK_G)
    largest_rate = tl.load(rate_max + head)
    bias, retention = tl.load(rate_bias + head), tl.load(retention_bias + head)
    firsts_at, lasts_at, gates_at = program * 5 * MATRIX, program * 3 * MATRIX, program * 2 * HIDDEN
    source = program * initial_slots + initial_slot

    # The states live in the buffers of the final ones.
    for m in range(5):
        from_, to = source * 5 * MATRIX + m * MATRIX, firsts_at + m * MATRIX
        put(final_first, to, True, h, HIDDEN, d, WIDTH, take(initial_first, from_, h, HIDDEN, d, WIDTH))
        if MOMENTUM:
            tile = take(initial_velocity_first, from_, h, HIDDEN, d, WIDTH)
            put(final_velocity_first, to, True, h, HIDDEN, d, WIDTH, tile)
        if RESUMED:
            put(snapshot_first, to, True, h, HIDDEN, d, WIDTH, take(resumed_first, to, h, HIDDEN, d, WIDTH))
    for m in range(3):
        from_, to = source * 3 * MATRIX + m * MATRIX, lasts_at + m * MATRIX
        put(final_last, to, True, d, WIDTH, h, HIDDEN, take(initial_last, from_, d, WIDTH, h, HIDDEN))
        if MOMENTUM:
            tile = take(initial_velocity_last, from_, d, WIDTH, h, HIDDEN)
            put(final_velocity_last, to, True, d, WIDTH, h, HIDDEN, tile)
        if RESUMED:
            put(snapshot_last, to, True, d, WIDTH, h, HIDDEN, take(resumed_last, to, d, WIDTH, h, HIDDEN))
    from_ = source * 2 * HIDDEN
    put(final_gate, gates_at, True, g, 2, h, HIDDEN, take(initial_gate, from_, g, 2, h, HIDDEN))
    if MOMENTUM:
        tile = take(initial_velocity_gate, from_, g, 2, h, HIDDEN)
        put(final_velocity_gate, gates_at, True, g, 2, h, HIDDEN, tile)
    if RESUMED:
        put(snapshot_gate, gates_at, True, g, 2, h, HIDDEN, take(resumed_gate, gates_at, g, 2, h, HIDDEN))
    tl.debug_barrier()

    row_first = tl.maximum(first_chunk, begin // CHUNK)
    row_stop = tl.minimum(stop_chunk, (stop + CHUNK - 1) // CHUNK)
    for chunk in range(row_first, row_stop):
        start = chunk * CHUNK
        fresh, leaves = clock(start, begin, stop, OTHERS_CLOCK, CHUNK, RESUMED)
        own_fresh, own_leaves = clock(start, begin, stop, MEMORY_CLOCK, CHUNK, RESUMED)
        token, valid = locate_tokens(start, origin, begin, stop, sequence, head, T, H, CHUNK, BLOCK_C)
        keep = False
        kept = 0 * program
        if kept_last is not None:
            keep = chunk % kept_every == 0
            kept = program * kept_slots + (chunk // kept_every - kept_first_slot)
        mu = tl.full([BLOCK_C], 1.0, tl.float32)
        if MOMENTUM:
            mu = tl.load(momentum + token, mask=valid, other=1.0)

        # The memories make k, v and the gates.
        x = load_tile(key_input, token, valid, d, WIDTH)
        first = base_of(
            final_first, snapshot_first, anchor_first, firsts_at, fresh, h, HIDDEN, d, WIDTH, SNAPSHOTS
        )
        last = base_of(
            final_last, snapshot_last, anchor_last, lasts_at, fresh, d, WIDTH, h, HIDDEN, SNAPSHOTS
        )
        made, _, _, _ = serve_rows(x, first, last, ACTIVATION, NORMALIZED, PRECISION)
        if PROJECTION:
            made += x
        k, _ = unit(made)
        x = load_tile(value_input, token, valid, d, WIDTH)
        at = firsts_at + MATRIX
        first = base_of(final_first, snapshot_first, anchor_first, at, fresh, h, HIDDEN, d, WIDTH, SNAPSHOTS)
        at = lasts_at + MATRIX
        last = base_of(final_last, snapshot_last, anchor_last, at, fresh, d, WIDTH, h, HIDDEN, SNAPSHOTS)
        v, _, _, _ = serve_rows(x, first, last, ACTIVATION, NORMALIZED, PRECISION)
        if PROJECTION:
            v += x
        x = load_tile(gate_input, token, valid, d, WIDTH)
        at = firsts_at + 3 * MATRIX
        first = base_of(final_first, snapshot_first, anchor_first, at, fresh, h, HIDDEN, d, WIDTH, SNAPSHOTS)
        last = base_of(final_gate, snapshot_gate, anchor_gate, gates_at, fresh, g, 1, h, HIDDEN, SNAPSHOTS)
        made, _, _, _ = serve_rows(x, first, last, ACTIVATION, NORMALIZED, PRECISION)
        rate = tl.where(valid, largest_rate * tl.sigmoid(tl.sum(made, 1) + bias), 0.0)
        at = firsts_at + 4 * MATRIX
        first = base_of(final_first, snapshot_first, anchor_first, at, fresh, h, HIDDEN, d, WIDTH, SNAPSHOTS)
        at = gates_at + HIDDEN
        last = base_of(final_gate, snapshot_gate, anchor_gate, at, fresh, g, 1, h, HIDDEN, SNAPSHOTS)
        made, _, _, _ = serve_rows(x, first, last, ACTIVATION, NORMALIZED, PRECISION)
        log_decay = tl.where(valid, log_sigmoid(tl.sum(made, 1) + retention), 0.0)
        spreads = coefficients(log_decay, mu, valid, MOMENTUM, BLOCK_C, PRECISION)
        tl.debug_barrier()
        key_rate, _, inverse = share_keys(k, rate, spreads[0][2], ERASES, PROXIMAL, BLOCK_C, PRECISION)
        if o is not None:
            q, _ = unit(load_tile(query, token, valid, d, WIDTH))
            if not RUNNING:
                at = firsts_at + 2 * MATRIX
                first = base_of(
                    final_first, snapshot_first, anchor_first, at, own_fresh, h, HIDDEN, d, WIDTH, SNAPSHOTS
                )
                at = lasts_at + 2 * MATRIX
                last = base_of(
                    final_last, snapshot_last, anchor_last, at, own_fresh, d, WIDTH, h, HIDDEN, SNAPSHOTS
                )
                y, _, _, _ = serve_rows(q, first, last, ACTIVATION, NORMALIZED, PRECISION)

        # Every memory takes its errors in.
        handed = scratch + program * (2 * BLOCK_C * BLOCK_D)
        hand_on(handed, k)
        hand_on(handed + BLOCK_C * BLOCK_D, v)
        tl.debug_barrier()
        for m in range(2):
            _take_in(
                query, token, valid, handed, rate, key_rate, inverse, spreads,
                anchor_first, anchor_last, final_first, final_last, final_velocity_first, final_velocity_last,
                snapshot_first, snapshot_last, kept_first, kept_last, kept_velocity_first, kept_velocity_last,
                firsts_at + m * MATRIX, lasts_at + m * MATRIX, kept * 5 * MATRIX + m * MATRIX,
                kept * 3 * MATRIX + m * MATRIX, keep, fresh, leaves, d, WIDTH, d, WIDTH, h, HIDDEN,
                ACTIVATION, NORMALIZED, ERASES, ERASES_LAST, PROXIMAL, BOUND, SNAPSHOTS, MOMENTUM,
                PROJECTION, TARGET, False, BLOCK_C, BLOCK_D, PRECISION,
            )  # fmt: skip
        found = _take_in(
            query, token, valid, handed, rate, key_rate, inverse, spreads,
            anchor_first, anchor_last, final_first, final_last, final_velocity_first, final_velocity_last,
            snapshot_first, snapshot_last, kept_first, kept_last, kept_velocity_first, kept_velocity_last,
            firsts_at + 2 * MATRIX, lasts_at + 2 * MATRIX, kept * 5 * MATRIX + 2 * MATRIX,
            kept * 3 * MATRIX + 2 * MATRIX, keep, own_fresh, own_leaves, d, WIDTH, d, WIDTH, h, HIDDEN,
            ACTIVATION, NORMALIZED, ERASES, ERASES_LAST, PROXIMAL, BOUND, SNAPSHOTS, MOMENTUM,
            RESIDUAL, TARGET, RUNNING and o is not None, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
        if o is not None:
            if RUNNING:
                y = found
            if RESIDUAL:
                q, _ = unit(load_tile(query, token, valid, d, WIDTH))
                y += q
            store_tile(o, token, valid, d, WIDTH, y)
        for i in range(2):
            _take_in(
                query, token, valid, handed, rate, key_rate, inverse, spreads,
                anchor_first, anchor_gate, final_first, final_gate, final_velocity_first, final_velocity_gate,
                snapshot_first, snapshot_gate, kept_first, kept_gate, kept_velocity_first, kept_velocity_gate,
                firsts_at + (3 + i) * MATRIX, gates_at + i * HIDDEN, kept * 5 * MATRIX + (3 + i) * MATRIX,
                kept * 2 * HIDDEN + i * HIDDEN, keep, fresh, leaves, g, 1, d, WIDTH, h, HIDDEN,
                ACTIVATION, NORMALIZED, ERASES, ERASES_LAST, PROXIMAL, BOUND, SNAPSHOTS, MOMENTUM,
                False, False, False, BLOCK_C, BLOCK_D, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads of the program have stored

    if o is not None:
        arrives = (stop > begin) | (not RESUMED)
        others = arrives & (stop % OTHERS_CLOCK == 0)
        own = arrives & (stop % MEMORY_CLOCK == 0)
        for m in range(5):
            at = firsts_at + m * MATRIX
            flag = (others & (m != 2)) | (own & (m == 2))
            put(snapshot_first, at, flag, h, HIDDEN, d, WIDTH, take(final_first, at, h, HIDDEN, d, WIDTH))
        for m in range(3):
            at = lasts_at + m * MATRIX
            flag = (others & (m != 2)) | (own & (m == 2))
            put(snapshot_last, at, flag, d, WIDTH, h, HIDDEN, take(final_last, at, d, WIDTH, h, HIDDEN))
        tile = take(final_gate, gates_at, g, 2, h, HIDDEN)
        put(snapshot_gate, gates_at, others, g, 2, h, HIDDEN, tile)
