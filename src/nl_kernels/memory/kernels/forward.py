"""A bank of memories learns a row of tokens, chunk by chunk: one program a head."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_token,
    operands_at,
    product,
    put_weights,
    rounded,
    rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import gates_of, given_tokens, locate_row, locate_tokens, make_tokens
from nl_kernels.memory.kernels.layer import columns_of, first_rows, last_rows, memory_of, take_layer
from nl_kernels.memory.kernels.learn import (
    ANCHOR,
    BASE_OPERAND,
    SNAPSHOT,
    STATE,
    learn_chunk,
    operands_of,
)


@triton.jit
def carry(
    place, kept, keep, boundary, is_last, key, written, decays, LAST: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BANK: tl.constexpr,
):  # fmt: skip
    """A layer's running weights after the chunk, in scratch; those before to ``kept`` if ``keep``.

    Where its memory is at a ``boundary`` [B, 1, 1] the next chunk's layer is applied at them; if it
    ``is_last``, no other boundary comes, and they are the snapshot.
    """
    ROWS: tl.constexpr = written.shape[1]
    written = rounded(written * decays[4], BANK)
    state, base, _ = operands_of(place, SIZE, BANK)
    for start in range(0, BLOCK, BANK.SLICE):
        weights = weights_at(place + STATE * SIZE, start, ROWS, BLOCK, BANK)
        if kept is not None:  # noqa: SIM102 - known when compiled, the other when it runs
            if keep:
                put_weights(kept, start, weights, BLOCK, BANK)
        weights *= decays[5]
        weights += product(written, by_token(key, start, LAST, BLOCK, BANK), BANK)
        put_weights(place + STATE * SIZE, start, weights, BLOCK, BANK)
        put_weights(state, start, rounded(weights, BANK), BLOCK, BANK)
        if is_last:
            before = weights_at(place + SNAPSHOT * SIZE, start, ROWS, BLOCK, BANK)
            put_weights(place + SNAPSHOT * SIZE, start, tl.where(boundary, weights, before), BLOCK, BANK)
        if BANK.ANCHORED:
            weights += weights_at(place + ANCHOR * SIZE, start, ROWS, BLOCK, BANK)
        weights = rounded(weights, BANK)
        if BANK.MEMORY_CLOCK != BANK.CHUNK or BANK.OTHERS_CLOCK != BANK.CHUNK:
            weights = tl.where(boundary, weights, weights_at(base, start, ROWS, BLOCK, BANK))
        put_weights(base, start, weights, BLOCK, BANK)


@triton.jit
def at_row(bank, row, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Both layers, of so many numbers, of a row of a bank; ``()`` where there is none."""
    first = () if bank.first is None else bank.first + row * FIRST
    last = () if bank.last is None else bank.last + row * LAST
    return first, last


@triton.jit
def own_clock(BANK: tl.constexpr):
    """Tokens between snapshots of each block's memory [B]."""
    return tl.where(memory_of(BANK) == BANK.OWN, BANK.MEMORY_CLOCK, BANK.OTHERS_CLOCK)


@triton.jit
def begin_layer(
    place, running, snapshot, anchor, rows, IN: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """The caller's weights of a layer to scratch."""
    state, base, anchor_operand = operands_of(place, SIZE, BANK)
    take_layer(place + STATE * SIZE, state, running, None, rows, IN, BLOCK, BANK)
    take_layer(place + SNAPSHOT * SIZE, None, snapshot, None, rows, IN, BLOCK, BANK)
    if BANK.ANCHORED:
        take_layer(place + ANCHOR * SIZE, anchor_operand, anchor, None, rows, IN, BLOCK, BANK)
        take_layer(None, base, snapshot, anchor, rows, IN, BLOCK, BANK)
    else:
        take_layer(None, base, snapshot, None, rows, IN, BLOCK, BANK)


@triton.jit
def give_layer(place, layer, rows, IN: tl.constexpr, BLOCK: tl.constexpr, BANK: tl.constexpr):
    """The inverse of :func:`take_layer`."""
    for start in range(0, BLOCK, BANK.SLICE):
        offsets, exists = columns_of(rows, start, IN, BANK)
        tl.store(layer + offsets, weights_at(place, start, rows[1].shape[1], BLOCK, BANK), mask=exists)


@triton.jit(
    do_not_specialize=[
        "T", "H", "offset", "first_chunk", "stop_chunk", "kept_every", "kept_first", "kept_slots"
    ]
)  # fmt: skip
def learn_kernel(
    tokens, running, snapshot, anchor, kept, o, scratch, T, H, offset, first_chunk, stop_chunk, kept_every,
    kept_first, kept_slots, BANK: tl.constexpr,
):  # fmt: skip
    """Chunks ``first_chunk`` … ``stop_chunk`` − 1 of each head: reads to ``o``, weights in place.

    ``kept`` [N, slots, ..] gets the running weights before every ``kept_every``-th chunk, the first of them
    number ``kept_first``. ``o`` or ``kept`` may be absent.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * BANK.SIZE
    first_running, last_running = at_row(running, program, BANK.FIRST_SIZE, BANK.LAST_SIZE)
    first_snapshot, last_snapshot = at_row(snapshot, program, BANK.FIRST_SIZE, BANK.LAST_SIZE)
    first_anchor, last_anchor = at_row(anchor, program, BANK.FIRST_SIZE, BANK.LAST_SIZE)
    first, last = scratch + BANK.FIRST, scratch + BANK.LAST
    gates = gates_of(tokens, head, BANK)
    rows = last_rows(BANK)
    begin_layer(
        last, last_running, last_snapshot, last_anchor, rows, BANK.LAST_IN, BANK.LAST_BLOCK, BANK.LAST_KEPT,
        BANK,
    )  # fmt: skip
    if BANK.HIDDEN > 0:
        begin_layer(
            first, first_running, first_snapshot, first_anchor, first_rows(BANK), BANK.KEY_DIM, BANK.BLOCK_K,
            BANK.FIRST_KEPT, BANK,
        )  # fmt: skip
    begun = tl.maximum(first_chunk, begin // BANK.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + BANK.CHUNK - 1) // BANK.CHUNK)
    SLOWER: tl.constexpr = max(BANK.MEMORY_CLOCK, BANK.OTHERS_CLOCK)
    # Addresses kept for the whole loop would be spilled.
    for chunk in tl.range(begun, ended, disable_licm=True):
        start = chunk * BANK.CHUNK
        place = locate_tokens(start, (sequence, head, origin, begin, stop), T, H, BANK)
        token, exists = place
        if BANK.GENERATES:
            first_base = operands_at(first + BASE_OPERAND * BANK.FIRST_KEPT, BANK)
            last_base = operands_at(last + BASE_OPERAND * BANK.LAST_KEPT, BANK)
            make_tokens(tokens, first_base, last_base, place, gates, scratch, BANK)
        else:
            given_tokens(tokens, place, scratch, BANK)
        tl.debug_barrier()
        decays, first_chunk_of, last_chunk_of, _, _, y = learn_chunk(scratch, o is not None, BANK)
        if o is not None:
            memory, number, _, exists_row = rows
            if BANK.RESIDUAL:
                q = operands_at(scratch + BANK.QUERY, BANK)
                y += rows_of(q, 0, BANK.BLOCK_K, BANK).to(tl.float32)
            at = token[None, None, :] * BANK.VALUE_DIM + number
            reads = exists[None, None, :] & exists_row & (memory == BANK.OWN)
            tl.store(o + at, y.to(o.dtype.element_ty), mask=reads)

        end = start + BANK.CHUNK
        keep, first_kept, last_kept = False, None, None
        if kept.last is not None:
            keep = chunk % kept_every == 0
            slot = program * kept_slots + (chunk // kept_every - kept_first)
            first_kept, last_kept = at_row(kept, slot, BANK.FIRST_KEPT, BANK.LAST_KEPT)
        boundary = (end % own_clock(BANK)[:, None, None] == 0) & (end <= stop)
        is_last = end + SLOWER > tl.minimum(ended * BANK.CHUNK, stop)
        last_key = operands_at(scratch + BANK.KEY, BANK)
        if BANK.HIDDEN > 0:
            carry(
                first, first_kept, keep, boundary, is_last, last_key, first_chunk_of[4], decays, 0,
                BANK.FIRST_KEPT, BANK.BLOCK_K, BANK,
            )  # fmt: skip
            last_key = operands_at(scratch + BANK.HIDDEN_KEY, BANK)
        carry(
            last, last_kept, keep, boundary, is_last, last_key, last_chunk_of[4], decays,
            BANK.BLOCKS if BANK.HIDDEN > 0 else 0, BANK.LAST_KEPT, BANK.LAST_BLOCK, BANK,
        )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads of the program have stored

    tl.debug_barrier()
    give_layer(last + STATE * BANK.LAST_KEPT, last_running, rows, BANK.LAST_IN, BANK.LAST_BLOCK, BANK)
    give_layer(last + SNAPSHOT * BANK.LAST_KEPT, last_snapshot, rows, BANK.LAST_IN, BANK.LAST_BLOCK, BANK)
    if BANK.HIDDEN > 0:
        rows = first_rows(BANK)
        give_layer(first + STATE * BANK.FIRST_KEPT, first_running, rows, BANK.KEY_DIM, BANK.BLOCK_K, BANK)
        give_layer(first + SNAPSHOT * BANK.FIRST_KEPT, first_snapshot, rows, BANK.KEY_DIM, BANK.BLOCK_K, BANK)
