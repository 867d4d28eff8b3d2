"""A bank of memories learns a row of tokens, chunk by chunk: one program a head."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_token,
    by_width,
    load_tile,
    operands_at,
    pairs_at,
    product,
    put_pairs,
    put_rows,
    put_weights,
    rounded,
    rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import (
    DECAYS,
    RATE,
    exact_rows,
    given_tokens,
    locate_row,
    locate_tokens,
    make_tokens,
    vectors_at,
)
from nl_kernels.memory.kernels.layer import (
    activated,
    columns_of,
    decays_at,
    error_signal,
    first_rows,
    invert,
    last_rows,
    length_factor,
    memory_of,
    pairs,
    take_layer,
    zeros_of,
)

# Copies of a layer's weights in scratch: operands of products, and in fp32. The last ones are of the backward pass,
# which has the gradient in place of the state and of the snapshot.
STATE_OPERAND: tl.constexpr = tl.constexpr(0)
BASE_OPERAND: tl.constexpr = tl.constexpr(1)  # what the layer is applied at: snapshot and anchor
ANCHOR_OPERAND: tl.constexpr = tl.constexpr(2)
ANCHOR: tl.constexpr = tl.constexpr(3)
STATE: tl.constexpr = tl.constexpr(4)
SNAPSHOT: tl.constexpr = tl.constexpr(5)
RESUMED: tl.constexpr = tl.constexpr(6)
D_ANCHOR: tl.constexpr = tl.constexpr(7)
D_STATE_OPERAND: tl.constexpr = tl.constexpr(8)


@triton.jit
def operands_of(place, SIZE: tl.constexpr, RULE: tl.constexpr):
    """A layer's running weights, those that it is applied at, and its anchor, as operands in scratch."""
    return (
        operands_at(place + STATE_OPERAND * SIZE, RULE),
        operands_at(place + BASE_OPERAND * SIZE, RULE),
        operands_at(place + ANCHOR_OPERAND * SIZE, RULE),
    )


@triton.jit
def apply_layer(
    weights, key, value, query,
    LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The products of a layer with the chunk's tokens of memories up to ``LAST``, each [B, rows, C].

    ``weights`` are of :func:`operands_of`. Returns S x of the running state and the keys; W̄ x and W̄ v of the
    weights it is applied at; and, of the queries, S q and W_0 q, or W̄ q where reads are of the snapshot.
    ``value`` and ``query`` may be absent.
    """
    state, base, anchor = weights
    zeros = zeros_of(ROWS, SHAPE)
    recalled, at_key, at_value, read, fixed = zeros, zeros, zeros, zeros, zeros
    for start in range(0, BLOCK, SHAPE.SLICE):
        applied = weights_at(base, start, ROWS, BLOCK, SHAPE)
        x = by_width(key, start, LAST, BLOCK, SHAPE)
        at_key += product(applied, x, RULE)
        if RULE.ERASES or (RULE.RUNNING and query is not None):
            running = weights_at(state, start, ROWS, BLOCK, SHAPE)
        if RULE.ERASES:
            recalled += product(running, x, RULE)
        if value is not None:
            at_value += product(applied, by_width(value, start, LAST, BLOCK, SHAPE), RULE)
        if query is not None:
            q = by_width(query, start, LAST, BLOCK, SHAPE)
            if RULE.RUNNING:
                read += product(running, q, RULE)
                if RULE.ANCHORED:
                    fixed += product(weights_at(anchor, start, ROWS, BLOCK, SHAPE), q, RULE)
            else:
                read += product(applied, q, RULE)
    return recalled, at_key, at_value, read, fixed


@triton.jit
def probe_layer(
    weights, query,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """``S q`` and ``W_0 q`` [B, rows, C] of a layer, for a running read."""
    read = zeros_of(ROWS, SHAPE)
    fixed = read
    for start in range(0, BLOCK, SHAPE.SLICE):
        q = by_width(query, start, SHAPE.BLOCKS, BLOCK, SHAPE)
        read += product(weights_at(weights[0], start, ROWS, BLOCK, SHAPE), q, RULE)
        if RULE.ANCHORED:
            fixed += product(weights_at(weights[2], start, ROWS, BLOCK, SHAPE), q, RULE)
    return read, fixed


@triton.jit
def outputs_of(weights, start, SHAPE: tl.constexpr):
    """Outputs ``start`` … of last layers turned, for the block's hidden units [B, h, SLICE]."""
    UNITS: tl.constexpr = SHAPE.BLOCK_H // SHAPE.PER
    MEMORY: tl.constexpr = SHAPE.BLOCK_V * SHAPE.BLOCK_H // 256
    place = weights + start * SHAPE.BLOCK_H
    x = load_tile(place, SHAPE.SLICE, UNITS, SHAPE.BLOCK_H, SHAPE.BLOCKS, MEMORY, UNITS // 16, SHAPE)
    return tl.trans(x, 0, 2, 1)


@triton.jit
def send_back(base, error, SHAPE: tl.constexpr, RULE: tl.constexpr):
    """``W̄1ᵀ e`` [B, h, C] of last layers, for errors [outputs, C] of each memory in scratch."""
    back = zeros_of(SHAPE.BLOCK_H // SHAPE.PER, SHAPE)
    for start in range(0, SHAPE.BLOCK_V, SHAPE.SLICE):
        e = by_width(error, start, SHAPE.BLOCKS, SHAPE.BLOCK_V, SHAPE)
        back += product(outputs_of(base, start, SHAPE), e, RULE)
    return back


@triton.jit
def residuals(scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """What is added to f(k) − f(v), or to f(k): [B, outputs, C]."""
    memory = memory_of(SHAPE)[:, None, None]
    value = exact_rows(scratch, 1, SHAPE, RULE, PLACES)
    if RULE.RESIDUAL:
        value -= tl.where(memory < SHAPE.WIDE, exact_rows(scratch, 0, SHAPE, RULE, PLACES), 0.0)
    elif RULE.GENERATES:
        value -= tl.where(memory != SHAPE.OWN, exact_rows(scratch, 0, SHAPE, RULE, PLACES), 0.0)
    return tl.where(memory < SHAPE.WIDE, -value, 0.0)


@triton.jit
def write(signal, recalled, rate, decays, inverse, SHAPE: tl.constexpr, RULE: tl.constexpr):
    """ω and u [B, rows, C] of errors ``signal`` and the recall S x: the chunk adds Σ u xᵀ to what decays."""
    if RULE.ERASES:
        turned = pairs_at(inverse, True, SHAPE)
        signal = product(rounded(signal + decays[2] * recalled, RULE), tl.trans(turned, 0, 2, 1), RULE)
    return signal, signal * -rate


@triton.jit
def put_solution(
    key, query, decays, rate, inverse_at, scores_at,
    LAST: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """``(I + diag(η) K)⁻¹`` and the scores ``full ∘ x qᵀ`` of running reads to scratch, if there is a ``query``.

    Returns ``K = strict ∘ x xᵀ`` and the scores [B, j, t], or ``()``.
    """
    gram, scores = (), ()
    if RULE.ERASES:
        gram = pairs(key, key, LAST, WIDTH, SHAPE, RULE) * decays[0]
        inverse = invert(gram * tl.trans(rate, 0, 2, 1), SHAPE.BLOCK_C, RULE)
        put_pairs(inverse_at, rounded(inverse, RULE), SHAPE)
    if RULE.RUNNING and query is not None:
        scores = pairs(key, query, LAST, WIDTH, SHAPE, RULE) * decays[1]
        put_pairs(scores_at, rounded(scores, RULE), SHAPE)
    return gram, scores


@triton.jit
def read_running(read, fixed, written, decays, scores, SHAPE: tl.constexpr, RULE: tl.constexpr):
    """f(q) [B, rows, C] of a layer's running weights; ``scores`` are in scratch."""
    turned = pairs_at(scores, True, SHAPE)
    return decays[3] * read + product(rounded(written, RULE), tl.trans(turned, 0, 2, 1), RULE) + fixed


@triton.jit
def learn_chunk(
    scratch, READS: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr
):
    """What a chunk's tokens write, and read if it ``READS``; weights stay as they are.

    Returns decays of :func:`decays_at`; ``(signal, recalled, gram, ω, u, read, scores)`` of the first layers, and of
    the last ones with the error in place of the signal; the hidden layers at keys, values and queries, what came
    back to them and :func:`error_signal` of it; the errors' factor; and f(q) [B, outputs, C]. What there is none of
    is an empty tuple: Triton 3.6 can return no ``None`` in a tuple.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    ROWS: tl.constexpr = SHAPE.BLOCK_V // SHAPE.PER
    decays = decays_at(scratch + PLACES.DECAYS, scratch + PLACES.VECTORS + DECAYS * C, C)
    rate = tl.load(vectors_at(scratch, RATE, SHAPE, PLACES)[None, None, :])
    key = operands_at(scratch + PLACES.KEY, RULE)
    value = None
    if RULE.GENERATES:
        value = operands_at(scratch + PLACES.VALUE, RULE)
    query = None
    if READS:
        query = operands_at(scratch + PLACES.QUERY, RULE)
    narrow = None
    if SHAPE.NARROW > 0:
        narrow = memory_of(SHAPE)[:, None, None] >= SHAPE.WIDE
    weights = operands_of(scratch + PLACES.LAST, SHAPE.LAST_KEPT, RULE)
    inverse = operands_at(scratch + PLACES.INVERSE, RULE)
    scores = operands_at(scratch + PLACES.SCORES, RULE)

    if SHAPE.HIDDEN > 0:
        UNITS: tl.constexpr = SHAPE.BLOCK_H // SHAPE.PER
        first_weights = operands_of(scratch + PLACES.FIRST, SHAPE.FIRST_KEPT, RULE)
        first_inverse = operands_at(scratch + PLACES.INVERSE_FIRST, RULE)
        first_scores = operands_at(scratch + PLACES.SCORES_FIRST, RULE)
        first_gram, first_full = put_solution(
            key, query, decays, rate, first_inverse, first_scores, 0, SHAPE.BLOCK_K, SHAPE, RULE
        )
        first_recalled, z, at_value, at_query, fixed = apply_layer(
            first_weights, key, value, query, 0, UNITS, SHAPE.BLOCK_K, SHAPE, RULE
        )
        hidden = activated(z, RULE, SHAPE.PER)
        x = operands_at(scratch + PLACES.HIDDEN_KEY, RULE)
        put_rows(x, rounded(hidden[0], RULE), SHAPE.BLOCK_H, SHAPE)
        last_value = None
        probe = None
        hidden_value, hidden_query = (), ()
        if RULE.GENERATES:
            hidden_value = activated(at_value, RULE, SHAPE.PER)
            last_value = operands_at(scratch + PLACES.HIDDEN_VALUE, RULE)
            put_rows(last_value, rounded(hidden_value[0], RULE), SHAPE.BLOCK_H, SHAPE)
        if READS and not RULE.RUNNING:
            hidden_query = activated(at_query, RULE, SHAPE.PER)
            probe = operands_at(scratch + PLACES.HIDDEN_QUERY, RULE)
            put_rows(probe, rounded(hidden_query[0], RULE), SHAPE.BLOCK_H, SHAPE)
        tl.debug_barrier()
        recalled, error, at_value, read, fixed_read = apply_layer(
            weights, x, last_value, probe, SHAPE.BLOCKS, ROWS, SHAPE.BLOCK_H, SHAPE, RULE
        )
    else:
        gram, full = put_solution(key, query, decays, rate, inverse, scores, 0, SHAPE.BLOCK_K, SHAPE, RULE)
        recalled, error, at_value, read, fixed_read = apply_layer(
            weights, key, value, query, 0, ROWS, SHAPE.BLOCK_K, SHAPE, RULE
        )
    error += residuals(scratch, SHAPE, RULE, PLACES)
    if RULE.GENERATES:
        error -= at_value
    factor = length_factor(error, narrow, RULE.BOUND, SHAPE.PER)
    error *= factor

    if SHAPE.HIDDEN > 0:
        put_rows(operands_at(scratch + PLACES.ERROR, RULE), rounded(error, RULE), SHAPE.BLOCK_V, SHAPE)
        tl.debug_barrier()
        back = send_back(weights[1], operands_at(scratch + PLACES.ERROR, RULE), SHAPE, RULE)
        signal = error_signal(back, hidden, RULE, SHAPE.PER)
        surprise, written = write(signal[0], first_recalled, rate, decays, first_inverse, SHAPE, RULE)
        first = (signal[0], first_recalled, first_gram, surprise, written, at_query, first_full)
        if READS and RULE.RUNNING:
            z = read_running(at_query, fixed, written, decays, first_scores, SHAPE, RULE)
            hidden_query = activated(z, RULE, SHAPE.PER)
            probe = operands_at(scratch + PLACES.HIDDEN_QUERY, RULE)
            put_rows(probe, rounded(hidden_query[0], RULE), SHAPE.BLOCK_H, SHAPE)
            tl.debug_barrier()
            read, fixed_read = probe_layer(weights, probe, ROWS, SHAPE.BLOCK_H, SHAPE, RULE)
        gram, full = put_solution(x, probe, decays, rate, inverse, scores, SHAPE.BLOCKS, SHAPE.BLOCK_H, SHAPE, RULE)
        hiddens = (hidden, hidden_value, hidden_query, back, signal)
    else:
        first, hiddens = (), ()
    tl.debug_barrier()
    surprise, written = write(error, recalled, rate, decays, inverse, SHAPE, RULE)
    last = (error, recalled, gram, surprise, written, read, full)
    y = read
    if READS and RULE.RUNNING:
        y = read_running(read, fixed_read, written, decays, scores, SHAPE, RULE)
    return decays, first, last, hiddens, factor, y


@triton.jit
def carry(
    place, kept, keep, boundary, is_last, key, written, decays,
    LAST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """A layer's running weights after the chunk, in scratch; those before to ``kept`` if ``keep``.

    Where its memory is at a ``boundary`` [B, 1, 1] the next chunk's layer is applied at them; if it ``is_last``,
    no other boundary comes, and they are the snapshot.
    """
    ROWS: tl.constexpr = written.shape[1]
    written = rounded(written * decays[4], RULE)
    state, base, _ = operands_of(place, SIZE, RULE)
    for start in range(0, BLOCK, SHAPE.SLICE):
        weights = weights_at(place + STATE * SIZE, start, ROWS, BLOCK, SHAPE)
        if kept is not None:
            if keep:
                put_weights(kept, start, weights, BLOCK, SHAPE)
        weights *= decays[5]
        weights += product(written, by_token(key, start, LAST, BLOCK, SHAPE), RULE)
        put_weights(place + STATE * SIZE, start, weights, BLOCK, SHAPE)
        put_weights(state, start, rounded(weights, RULE), BLOCK, SHAPE)
        if is_last:
            before = weights_at(place + SNAPSHOT * SIZE, start, ROWS, BLOCK, SHAPE)
            put_weights(place + SNAPSHOT * SIZE, start, tl.where(boundary, weights, before), BLOCK, SHAPE)
        if RULE.ANCHORED:
            weights += weights_at(place + ANCHOR * SIZE, start, ROWS, BLOCK, SHAPE)
        weights = rounded(weights, RULE)
        if SHAPE.MEMORY_CLOCK != SHAPE.CHUNK or SHAPE.OTHERS_CLOCK != SHAPE.CHUNK:
            weights = tl.where(boundary, weights, weights_at(base, start, ROWS, BLOCK, SHAPE))
        put_weights(base, start, weights, BLOCK, SHAPE)


@triton.jit
def at_row(bank, row, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Both layers, of so many numbers, of a row of a bank; ``()`` where there is none."""
    first = () if bank.first is None else bank.first + row * FIRST
    last = () if bank.last is None else bank.last + row * LAST
    return first, last


@triton.jit
def own_clock(SHAPE: tl.constexpr):
    """Tokens between snapshots of each block's memory [B]."""
    return tl.where(memory_of(SHAPE) == SHAPE.OWN, SHAPE.MEMORY_CLOCK, SHAPE.OTHERS_CLOCK)


@triton.jit
def begin_layer(
    place, running, snapshot, anchor, rows, IN: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The caller's weights of a layer to scratch."""
    ROWS: tl.constexpr = rows[1].shape[1]
    take_layer(place + STATE * SIZE, running, rows, IN, BLOCK, SHAPE)
    take_layer(place + SNAPSHOT * SIZE, snapshot, rows, IN, BLOCK, SHAPE)
    if RULE.ANCHORED:
        take_layer(place + ANCHOR * SIZE, anchor, rows, IN, BLOCK, SHAPE)
    tl.debug_barrier()
    for start in range(0, BLOCK, SHAPE.SLICE):
        x = weights_at(place + STATE * SIZE, start, ROWS, BLOCK, SHAPE)
        put_weights(operands_at(place + STATE_OPERAND * SIZE, RULE), start, rounded(x, RULE), BLOCK, SHAPE)
        x = weights_at(place + SNAPSHOT * SIZE, start, ROWS, BLOCK, SHAPE)
        if RULE.ANCHORED:
            fixed = weights_at(place + ANCHOR * SIZE, start, ROWS, BLOCK, SHAPE)
            put_weights(operands_at(place + ANCHOR_OPERAND * SIZE, RULE), start, rounded(fixed, RULE), BLOCK, SHAPE)
            x += fixed
        put_weights(operands_at(place + BASE_OPERAND * SIZE, RULE), start, rounded(x, RULE), BLOCK, SHAPE)


@triton.jit
def give_layer(place, layer, rows, IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    """The inverse of :func:`take_layer`."""
    for start in range(0, BLOCK, SHAPE.SLICE):
        offsets, exists = columns_of(rows, start, IN, SHAPE)
        tl.store(layer + offsets, weights_at(place, start, rows[1].shape[1], BLOCK, SHAPE), mask=exists)


@triton.jit(
    do_not_specialize=[
        "T",
        "H",
        "offset",
        "first_chunk",
        "stop_chunk",
        "kept_every",
        "kept_first",
        "kept_slots",
    ]
)
def learn_kernel(
    tokens, running, snapshot, anchor, kept, o, scratch,
    T, H, offset, first_chunk, stop_chunk, kept_every, kept_first, kept_slots,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Chunks ``first_chunk`` … ``stop_chunk`` − 1 of each head: reads to ``o``, weights in place.

    ``kept`` [N, slots, ..] gets the running weights before every ``kept_every``-th chunk, the first of them
    number ``kept_first``. ``o`` or ``kept`` may be absent.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * PLACES.SIZE
    first_running, last_running = at_row(running, program, SHAPE.FIRST_SIZE, SHAPE.LAST_SIZE)
    first_snapshot, last_snapshot = at_row(snapshot, program, SHAPE.FIRST_SIZE, SHAPE.LAST_SIZE)
    first_anchor, last_anchor = at_row(anchor, program, SHAPE.FIRST_SIZE, SHAPE.LAST_SIZE)
    first, last = scratch + PLACES.FIRST, scratch + PLACES.LAST
    gates = (1.0, 0.0, 0.0)
    if RULE.GENERATES:
        gates = (
            tl.load(tokens.rate_max + head), tl.load(tokens.rate_bias + head), tl.load(tokens.retention_bias + head)
        )  # fmt: skip
    rows = last_rows(SHAPE)
    begin_layer(
        last, last_running, last_snapshot, last_anchor, rows, SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE.LAST_KEPT,
        SHAPE, RULE,
    )  # fmt: skip
    if SHAPE.HIDDEN > 0:
        begin_layer(
            first, first_running, first_snapshot, first_anchor, first_rows(SHAPE), SHAPE.KEY_DIM, SHAPE.BLOCK_K,
            SHAPE.FIRST_KEPT, SHAPE, RULE,
        )  # fmt: skip
    begun = tl.maximum(first_chunk, begin // SHAPE.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + SHAPE.CHUNK - 1) // SHAPE.CHUNK)
    SLOWER: tl.constexpr = max(SHAPE.MEMORY_CLOCK, SHAPE.OTHERS_CLOCK)
    for chunk in tl.range(begun, ended, disable_licm=True):  # addresses kept for the whole loop would be spilled
        start = chunk * SHAPE.CHUNK
        place = locate_tokens(start, (sequence, head, origin, begin, stop), T, H, SHAPE)
        token, exists = place
        if RULE.GENERATES:
            first_base = operands_at(first + BASE_OPERAND * SHAPE.FIRST_KEPT, RULE)
            last_base = operands_at(last + BASE_OPERAND * SHAPE.LAST_KEPT, RULE)
            make_tokens(tokens, first_base, last_base, place, gates, scratch, SHAPE, RULE, PLACES)
        else:
            given_tokens(tokens, place, scratch, SHAPE, RULE, PLACES)
        tl.debug_barrier()
        decays, first_chunk_of, last_chunk_of, _, _, y = learn_chunk(scratch, o is not None, SHAPE, RULE, PLACES)
        if o is not None:
            memory, number, _, exists_row = rows
            if RULE.RESIDUAL:
                q = operands_at(scratch + PLACES.QUERY, RULE)
                y += rows_of(q, 0, SHAPE.BLOCK_K, SHAPE).to(tl.float32)
            at = token[None, None, :] * SHAPE.VALUE_DIM + number
            reads = exists[None, None, :] & exists_row & (memory == SHAPE.OWN)
            tl.store(o + at, y.to(o.dtype.element_ty), mask=reads)

        end = start + SHAPE.CHUNK
        keep = False
        first_kept = None
        last_kept = None
        if kept.last is not None:
            keep = chunk % kept_every == 0
            slot = program * kept_slots + (chunk // kept_every - kept_first)
            first_kept, last_kept = at_row(kept, slot, SHAPE.FIRST_KEPT, SHAPE.LAST_KEPT)
        boundary = (end % own_clock(SHAPE)[:, None, None] == 0) & (end <= stop)
        is_last = end + SLOWER > tl.minimum(ended * SHAPE.CHUNK, stop)
        last_key = operands_at(scratch + PLACES.KEY, RULE)
        if SHAPE.HIDDEN > 0:
            carry(
                first, first_kept, keep, boundary, is_last, last_key, first_chunk_of[4], decays,
                0, SHAPE.FIRST_KEPT, SHAPE.BLOCK_K, SHAPE, RULE,
            )  # fmt: skip
            last_key = operands_at(scratch + PLACES.HIDDEN_KEY, RULE)
        carry(
            last, last_kept, keep, boundary, is_last, last_key, last_chunk_of[4], decays,
            SHAPE.BLOCKS if SHAPE.HIDDEN > 0 else 0, SHAPE.LAST_KEPT, SHAPE.LAST_BLOCK, SHAPE, RULE,
        )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads of the program have stored

    tl.debug_barrier()
    give_layer(last + STATE * SHAPE.LAST_KEPT, last_running, rows, SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE)
    give_layer(last + SNAPSHOT * SHAPE.LAST_KEPT, last_snapshot, rows, SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE)
    if SHAPE.HIDDEN > 0:
        rows = first_rows(SHAPE)
        give_layer(first + STATE * SHAPE.FIRST_KEPT, first_running, rows, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE)
        give_layer(first + SNAPSHOT * SHAPE.FIRST_KEPT, first_snapshot, rows, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE)
