"""A bank of memories learns a row of tokens, chunk by chunk: one program a head."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.generate import (
    given_tokens,
    locate_row,
    locate_tokens,
    make_tokens,
    rates_of,
)
from nl_kernels.memory.kernels.layer import (
    activated,
    columns_at,
    columns_of,
    decays_of,
    erase,
    error_signal,
    first_rows,
    last_rows,
    length_factor,
    load_weights,
    outputs_of,
    pairs,
    product,
    put_base,
    rows_at,
    tokens_at,
    write,
    zeros_of,
)


@triton.jit
def apply_layer(
    weights, rows, key, value, query, memory,
    SUBTRACTS: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The products of a layer [.., in] with the chunk's tokens, each [B, rows, C].

    ``weights`` are the running ones, those that the layer is applied at, and the anchor, if there is one.

    Returns S x of the running state and the keys; W̄ x and W̄ v of the weights it is applied at, or W̄ (x − v)
    for the first if it ``SUBTRACTS``; and, of the queries, S q and W_0 q, or W̄ q where reads are of the
    snapshot. ``value`` and ``query`` may be absent.
    """
    state, base, anchor = weights
    ROWS: tl.constexpr = rows[1].shape[1]
    zeros = zeros_of(ROWS, SHAPE)
    recalled, at_key, at_value, read, fixed = zeros, zeros, zeros, zeros, zeros
    for start in range(0, BLOCK, SHAPE.SLICE):
        places = columns_of(rows, start, IN, SHAPE.SLICE)
        running = load_weights(state, places)
        applied = load_weights(base, places)
        x = columns_at(key, memory, start, BLOCK, SHAPE.BLOCK_C, SHAPE.SLICE)
        if RULE.ERASES:
            recalled += product(running, x, RULE)
        if value is not None:
            v = columns_at(value, memory, start, BLOCK, SHAPE.BLOCK_C, SHAPE.SLICE)
            if SUBTRACTS:
                x -= v
            else:
                at_value += product(applied, v, RULE)
        at_key += product(applied, x, RULE)
        if query is not None:
            q = columns_at(query, memory, start, BLOCK, SHAPE.BLOCK_C, SHAPE.SLICE)
            if RULE.RUNNING:
                read += product(running, q, RULE)
                if RULE.ANCHORED:
                    fixed += product(load_weights(anchor, places), q, RULE)
            else:
                read += product(applied, q, RULE)
    return recalled, at_key, at_value, read, fixed


@triton.jit
def probe_layer(
    state, anchor, rows, query, memory,
    IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """``S q`` and ``W_0 q`` [B, rows, C] of a layer, for a running read."""
    ROWS: tl.constexpr = rows[1].shape[1]
    read = zeros_of(ROWS, SHAPE)
    fixed = read
    for start in range(0, BLOCK, SHAPE.SLICE):
        places = columns_of(rows, start, IN, SHAPE.SLICE)
        x = columns_at(query, memory, start, BLOCK, SHAPE.BLOCK_C, SHAPE.SLICE)
        read += product(load_weights(state, places), x, RULE)
        if RULE.ANCHORED:
            fixed += product(load_weights(anchor, places), x, RULE)
    return read, fixed


@triton.jit
def send_back(base, error, SHAPE: tl.constexpr, RULE: tl.constexpr):
    """``W̄1ᵀ e`` [B, h, C] of last layers, for errors [memories, outputs, C] in scratch."""
    memory, _, _, _ = first_rows(SHAPE)
    back = zeros_of(SHAPE.BLOCK_H // SHAPE.PER, SHAPE)
    for start in range(0, SHAPE.BLOCK_V, SHAPE.SLICE):
        e = columns_at(error, memory, start, SHAPE.BLOCK_V, SHAPE.BLOCK_C, SHAPE.SLICE)
        back += product(load_weights(base, outputs_of(start, SHAPE)), e, RULE)
    return back


@triton.jit
def residuals(scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """What is added to f(k) − f(v), or to f(k): [B, outputs, C]."""
    rows = last_rows(SHAPE)
    memory = rows[0]
    key = tl.load(rows_at(scratch + PLACES.KEY, rows, SHAPE.BLOCK_K, SHAPE.BLOCK_C, False))
    value = tl.load(rows_at(scratch + PLACES.VALUE, rows, SHAPE.BLOCK_V, SHAPE.BLOCK_C, False))
    has_residual = memory != SHAPE.OWN
    if RULE.RESIDUAL:
        has_residual = memory < SHAPE.WIDE
    if RULE.GENERATES or RULE.RESIDUAL:
        value = value - tl.where(has_residual, key, 0.0)
    return tl.where(memory < SHAPE.WIDE, -value, 0.0)


@triton.jit
def learn_chunk(
    first_weights, last_weights, rate, log, scratch,
    READS: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """What a chunk's tokens write, and read if it ``READS``; weights stay as they are.

    Returns decays as :func:`decays_of` has them; ``(signal, recalled, gram, inverse, ω, u, read, scores)`` of
    the first layers, and of the last ones with the error in place of the signal; the hidden layers at keys,
    values and queries, what came back to them and :func:`error_signal` of it; the errors' factor; and f(q)
    [B, outputs, C]. What there is none of is an empty tuple: Triton 3.6 can return no ``None`` in a tuple.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    decays = decays_of(log, C)
    strict, full, before, after, _, _ = decays
    key = scratch + PLACES.KEY
    value = None
    if RULE.GENERATES:
        value = scratch + PLACES.VALUE
    query = None
    if READS:
        query = scratch + PLACES.QUERY
    rows = last_rows(SHAPE)
    memory, _, _, _ = rows
    narrow = None
    if SHAPE.NARROW > 0:
        narrow = memory >= SHAPE.WIDE

    if SHAPE.HIDDEN > 0:
        units = first_rows(SHAPE)
        first_recalled, z, at_value, at_query, fixed = apply_layer(
            first_weights, units, key, value, query, None, False, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE, RULE
        )
        hidden = activated(z, RULE, SHAPE.PER)
        x = scratch + PLACES.HIDDEN_KEY
        tl.store(rows_at(x, units, SHAPE.BLOCK_H, C, True), hidden[0])
        last_value = None
        probe = None
        hidden_value, hidden_query, last_scores = (), (), ()
        if RULE.GENERATES:
            hidden_value = activated(at_value, RULE, SHAPE.PER)
            last_value = scratch + PLACES.HIDDEN_VALUE
            tl.store(rows_at(last_value, units, SHAPE.BLOCK_H, C, True), hidden_value[0])
        if READS and not RULE.RUNNING:
            hidden_query = activated(at_query, RULE, SHAPE.PER)
            probe = scratch + PLACES.HIDDEN_QUERY
            tl.store(rows_at(probe, units, SHAPE.BLOCK_H, C, True), hidden_query[0])
        tl.debug_barrier()
        recalled, error, _, read, fixed_read = apply_layer(
            last_weights, rows, x, last_value, probe, memory, True, SHAPE.HIDDEN, SHAPE.BLOCK_H, SHAPE, RULE
        )
    else:
        recalled, error, _, read, fixed_read = apply_layer(
            last_weights, rows, key, value, query, None, True, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE, RULE
        )
    error += residuals(scratch, SHAPE, RULE, PLACES)
    factor = length_factor(error, narrow, RULE.BOUND, SHAPE.PER)
    error *= factor

    gram, inverse = erase(key, None, rate, strict, SHAPE.BLOCK_K, C, RULE)
    scores = ()
    if READS and RULE.RUNNING:
        scores = full * pairs(key, query, None, SHAPE.BLOCK_K, C, RULE)
    if SHAPE.HIDDEN > 0:
        tl.store(rows_at(scratch + PLACES.ERROR, rows, SHAPE.BLOCK_V, C, True), error)
        tl.debug_barrier()
        back = send_back(last_weights[1], scratch + PLACES.ERROR, SHAPE, RULE)
        signal = error_signal(back, hidden, RULE, SHAPE.PER)
        surprise, written = write(signal[0], first_recalled, rate, before, inverse, RULE)
        first = (signal[0], first_recalled, gram, inverse, surprise, written, at_query, scores)
        gram, inverse = erase(x, memory, rate, strict, SHAPE.BLOCK_H, C, RULE)
        if READS and RULE.RUNNING:
            z = after * at_query + product(written, scores, RULE) + fixed
            hidden_query = activated(z, RULE, SHAPE.PER)
            probe = scratch + PLACES.HIDDEN_QUERY
            tl.store(rows_at(probe, units, SHAPE.BLOCK_H, C, True), hidden_query[0])
            tl.debug_barrier()
            read, fixed_read = probe_layer(
                last_weights[0],
                last_weights[2],
                rows,
                probe,
                memory,
                SHAPE.HIDDEN,
                SHAPE.BLOCK_H,
                SHAPE,
                RULE,
            )
            last_scores = full * pairs(x, probe, memory, SHAPE.BLOCK_H, C, RULE)
        hiddens = (hidden, hidden_value, hidden_query, back, signal)
    else:
        first, hiddens = (), ()
    surprise, written = write(error, recalled, rate, before, inverse, RULE)
    if SHAPE.HIDDEN > 0:
        last = (error, recalled, gram, inverse, surprise, written, read, last_scores)
    else:
        last = (error, recalled, gram, inverse, surprise, written, read, scores)
    y = read
    if READS and RULE.RUNNING:
        y = after * read + product(written, last[7], RULE) + fixed_read
    return decays, first, last, hiddens, factor, y


@triton.jit
def carry(
    state, snapshot, kept, keep, boundary, rows, key, memory, written, to_end, final,
    IN: tl.constexpr, BLOCK: tl.constexpr, SHAPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """A layer's running weights after the chunk, in place; copies of those before to ``kept`` if ``keep``, of
    those after to the snapshot where its memory is at a ``boundary`` [B, 1, 1]."""
    written = written * to_end
    for start in range(0, BLOCK, SHAPE.SLICE):
        offsets, exists = columns_of(rows, start, IN, SHAPE.SLICE)
        weights = tl.load(state + offsets, mask=exists, other=0.0)
        if kept is not None:
            tl.store(kept + offsets, weights, mask=exists & keep)
        x = tokens_at(key, memory, start, BLOCK, SHAPE.BLOCK_C, SHAPE.SLICE)
        weights = final * weights + product(written, x, RULE)
        tl.store(state + offsets, weights, mask=exists)
        tl.store(snapshot + offsets, weights, mask=exists & boundary)


@triton.jit
def at_row(bank, row, SHAPE: tl.constexpr):
    """Both layers of a row of a bank, ``()`` where there is none."""
    first = () if bank.first is None else bank.first + row * SHAPE.FIRST_SIZE
    last = () if bank.last is None else bank.last + row * SHAPE.LAST_SIZE
    return first, last


@triton.jit
def own_clock(memory, SHAPE: tl.constexpr):
    """Tokens between snapshots of each memory."""
    return tl.where(memory == SHAPE.OWN, SHAPE.MEMORY_CLOCK, SHAPE.OTHERS_CLOCK)


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
    C: tl.constexpr = SHAPE.BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * PLACES.SIZE
    first_state, last_state = at_row(running, program, SHAPE)
    first_snapshot, last_snapshot = at_row(snapshot, program, SHAPE)
    first_anchor, last_anchor = at_row(anchor, program, SHAPE)
    first_base, last_base = scratch + PLACES.FIRST_BASE, scratch + PLACES.LAST_BASE
    rate_max, gates = 1.0, (0.0, 0.0)
    if RULE.GENERATES:
        rate_max = tl.load(tokens.rate_max + head)
        gates = (tl.load(tokens.rate_bias + head), tl.load(tokens.retention_bias + head))
    rows = last_rows(SHAPE)
    memory, number, exists_row = rows[0], rows[1], rows[3]

    for chunk in tl.range(
        tl.maximum(first_chunk, begin // SHAPE.CHUNK),
        tl.minimum(stop_chunk, (stop + SHAPE.CHUNK - 1) // SHAPE.CHUNK),
        disable_licm=True,  # addresses that are kept for the whole loop would be spilled
    ):
        start = chunk * SHAPE.CHUNK
        place = locate_tokens(start, (sequence, head, origin, begin, stop), T, H, SHAPE)
        token, exists = place
        if SHAPE.HIDDEN > 0:
            put_base(
                first_base, first_snapshot, None, None, first_anchor, first_rows(SHAPE), SHAPE.KEY_DIM,
                SHAPE.BLOCK_K, SHAPE, RULE,
            )  # fmt: skip
        put_base(
            last_base,
            last_snapshot,
            None,
            None,
            last_anchor,
            rows,
            SHAPE.LAST_IN,
            SHAPE.LAST_BLOCK,
            SHAPE,
            RULE,
        )
        tl.debug_barrier()
        if RULE.GENERATES:
            make_tokens(tokens, first_base, last_base, place, gates, scratch, SHAPE, RULE, PLACES)
        else:
            given_tokens(tokens, place, scratch, SHAPE, PLACES)
        tl.debug_barrier()
        rate, log = rates_of(rate_max, exists, scratch, SHAPE, RULE, PLACES)
        decays, first, last, _, _, y = learn_chunk(
            (first_state, first_base, first_anchor), (last_state, last_base, last_anchor), rate, log, scratch,
            o is not None, SHAPE, RULE, PLACES,
        )  # fmt: skip
        if o is not None:
            if RULE.RESIDUAL:
                y += tl.load(rows_at(scratch + PLACES.QUERY, rows, SHAPE.BLOCK_K, C, False))
            at = token[None, None, :] * SHAPE.VALUE_DIM + number
            reads = exists[None, None, :] & exists_row & (memory == SHAPE.OWN)
            tl.store(o + at, y.to(o.dtype.element_ty), mask=reads)
        tl.debug_barrier()

        end = start + SHAPE.CHUNK
        keep = False
        first_kept = None
        last_kept = None
        if kept.last is not None:
            keep = chunk % kept_every == 0
            slot = program * kept_slots + (chunk // kept_every - kept_first)
            first_kept, last_kept = at_row(kept, slot, SHAPE)
        to_end, final = decays[4], decays[5]
        if SHAPE.HIDDEN > 0:
            units = first_rows(SHAPE)
            boundary = (end % own_clock(units[0], SHAPE) == 0) & (end <= stop)
            carry(
                first_state, first_snapshot, first_kept, keep, boundary, units, scratch + PLACES.KEY, None,
                first[5], to_end, final, SHAPE.KEY_DIM, SHAPE.BLOCK_K, SHAPE, RULE,
            )  # fmt: skip
            last_key, last_memory = scratch + PLACES.HIDDEN_KEY, memory
        else:
            last_key, last_memory = scratch + PLACES.KEY, None
        boundary = (end % own_clock(memory, SHAPE) == 0) & (end <= stop)
        carry(
            last_state, last_snapshot, last_kept, keep, boundary, rows, last_key, last_memory, last[5],
            to_end, final,
            SHAPE.LAST_IN, SHAPE.LAST_BLOCK, SHAPE, RULE,
        )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads of the program have stored
