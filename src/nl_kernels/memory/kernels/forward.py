"""A bank of memories learns a row of tokens, chunk by chunk: one program a head."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_token,
    operands_at,
    product,
    put_operand,
    put_weights,
    rounded,
    rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import gates_of, given_tokens, locate_row, locate_tokens, make_tokens
from nl_kernels.memory.kernels.layer import give_layer, locate_rows, memory_of, take_layer
from nl_kernels.memory.kernels.learn import learn_chunk


@triton.jit
def carry(
    scratch, kept, slot, keep, boundary, is_last, written, decays, LAYER: tl.constexpr, BANK: tl.constexpr
):
    """A layer's running weights after the chunk, in scratch; those before to ``kept`` if ``keep``.

    Where its memory is at a ``boundary`` [B, 1, 1] the next chunk's layer is applied at them; if it
    ``is_last``, no other boundary comes, and they are the snapshot.
    """
    ROWS: tl.constexpr = written.shape[1]
    BLOCK: tl.constexpr = LAYER.BLOCK
    state, base = scratch + LAYER.STATE, operands_at(scratch + LAYER.BASE_OPERAND, BANK)
    written = rounded(written * decays[4], BANK)
    for start in range(0, BLOCK, BANK.SLICE):
        weights = weights_at(state, start, ROWS, BLOCK, BANK)
        if kept.last is not None:  # noqa: SIM102 - known when compiled, the other when it runs
            if keep:
                put_weights(kept[LAYER.INDEX] + slot * LAYER.KEPT, start, weights, BLOCK, BANK)
        weights *= decays[5]
        weights += product(written, by_token(scratch + LAYER.KEY, start, LAYER.UPTO, BLOCK, BANK), BANK)
        put_weights(state, start, weights, BLOCK, BANK)
        put_operand(scratch + LAYER.STATE_OPERAND, start, weights, BLOCK, BANK)
        if is_last:
            before = weights_at(scratch + LAYER.SNAPSHOT, start, ROWS, BLOCK, BANK)
            put_weights(scratch + LAYER.SNAPSHOT, start, tl.where(boundary, weights, before), BLOCK, BANK)
        if BANK.ANCHORED:
            weights += weights_at(scratch + LAYER.ANCHOR, start, ROWS, BLOCK, BANK)
        weights = rounded(weights, BANK)
        if BANK.MEMORY_CLOCK != BANK.CHUNK or BANK.OTHERS_CLOCK != BANK.CHUNK:
            weights = tl.where(boundary, weights, weights_at(base, start, ROWS, BLOCK, BANK))
        put_weights(base, start, weights, BLOCK, BANK)


@triton.jit
def own_clock(BANK: tl.constexpr):
    """Tokens between snapshots of each block's memory [B]."""
    return tl.where(memory_of(BANK) == BANK.OWN, BANK.MEMORY_CLOCK, BANK.OTHERS_CLOCK)


@triton.jit
def begin_layer(scratch, running, snapshot, anchor, program, LAYER: tl.constexpr, BANK: tl.constexpr):
    """The caller's weights of a layer to scratch."""
    take_layer(scratch + LAYER.STATE, scratch + LAYER.STATE_OPERAND, running, None, program, LAYER, BANK)
    take_layer(scratch + LAYER.SNAPSHOT, None, snapshot, None, program, LAYER, BANK)
    more = None
    if BANK.ANCHORED:
        more = anchor[LAYER.INDEX]
        take_layer(scratch + LAYER.ANCHOR, scratch + LAYER.ANCHOR_OPERAND, anchor, None, program, LAYER, BANK)
    take_layer(None, scratch + LAYER.BASE_OPERAND, snapshot, more, program, LAYER, BANK)


@triton.jit
def end_layer(scratch, running, snapshot, d_anchor, program, LAYER: tl.constexpr, BANK: tl.constexpr):
    """A layer's weights, or all their gradients, from scratch to the caller's."""
    give_layer(scratch + LAYER.STATE, running, program, LAYER, BANK)
    give_layer(scratch + LAYER.SNAPSHOT, snapshot, program, LAYER, BANK)
    if BANK.ANCHORED and BANK.BACKWARD:
        give_layer(scratch + LAYER.D_ANCHOR, d_anchor, program, LAYER, BANK)


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
    FIRST: tl.constexpr = BANK.FIRST
    LAST: tl.constexpr = BANK.LAST
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // H, program % H
    origin, begin, stop = locate_row(tokens.spans, sequence, offset, T)
    scratch += program * BANK.SIZE
    gates = gates_of(tokens, head, BANK)
    begin_layer(scratch, running, snapshot, anchor, program, LAST, BANK)
    if BANK.HIDDEN > 0:
        begin_layer(scratch, running, snapshot, anchor, program, FIRST, BANK)
    begun = tl.maximum(first_chunk, begin // BANK.CHUNK)
    ended = tl.minimum(stop_chunk, (stop + BANK.CHUNK - 1) // BANK.CHUNK)
    SLOWER: tl.constexpr = max(BANK.MEMORY_CLOCK, BANK.OTHERS_CLOCK)
    # Addresses kept for the whole loop would be spilled.
    for chunk in tl.range(begun, ended, disable_licm=True):
        start = chunk * BANK.CHUNK
        place = locate_tokens(start, (sequence, head, origin, begin, stop), T, H, BANK)
        token, exists = place
        if BANK.GENERATES:
            make_tokens(tokens, place, gates, scratch, BANK)
        else:
            given_tokens(tokens, place, scratch, BANK)
        tl.debug_barrier()
        decays, first, last, _, _, y = learn_chunk(scratch, o is not None, BANK)
        if o is not None:
            memory, number, _, exists_row = locate_rows(LAST, BANK)
            if BANK.RESIDUAL:
                y += rows_of(scratch + BANK.QUERY, 0, BANK.BLOCK_K, BANK).to(tl.float32)
            at = token[None, None, :] * BANK.VALUE_DIM + number
            reads = exists[None, None, :] & exists_row & (memory == BANK.OWN)
            tl.store(o + at, y.to(o.dtype.element_ty), mask=reads)

        end = start + BANK.CHUNK
        keep, slot = False, None
        if kept.last is not None:
            keep = chunk % kept_every == 0
            slot = program * kept_slots + (chunk // kept_every - kept_first)
        boundary = (end % own_clock(BANK)[:, None, None] == 0) & (end <= stop)
        is_last = end + SLOWER > tl.minimum(ended * BANK.CHUNK, stop)
        if BANK.HIDDEN > 0:
            carry(scratch, kept, slot, keep, boundary, is_last, first[4], decays, FIRST, BANK)
        carry(scratch, kept, slot, keep, boundary, is_last, last[4], decays, LAST, BANK)
        tl.debug_barrier()  # the next chunk reads what other threads of the program have stored

    tl.debug_barrier()
    end_layer(scratch, running, snapshot, None, program, LAST, BANK)
    if BANK.HIDDEN > 0:
        end_layer(scratch, running, snapshot, None, program, FIRST, BANK)
