"""What a chunk's tokens write to a bank of memories, and read from it."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_width,
    load_tile,
    operand_at,
    operands_at,
    pairs_at,
    product,
    put_pairs,
    put_rows,
    rounded,
)
from nl_kernels.memory.kernels.generate import DECAYS, RATE, SCALE, exact_rows, vectors_at
from nl_kernels.memory.kernels.layer import (
    decays_at,
    error_signal,
    invert,
    length_factor,
    memory_of,
    narrow_of,
    pairs,
    put_hidden,
    zeros_of,
)


@triton.jit
def apply_layer(scratch, WRITES: tl.constexpr, READS: tl.constexpr, LAYER: tl.constexpr, BANK: tl.constexpr):
    """The products of a layer with the tokens that it takes in, each [B, rows, C].

    Returns, if it ``WRITES``, S x of the running state and the keys, and W̄ x and W̄ v of the weights it is
    applied at (``AT_ANCHOR``: W_0 x); of queries, if it ``READS``, S q and W_0 q, or W̄ q where reads are of
    the snapshot.
    """
    ROWS: tl.constexpr = LAYER.WIDTH // BANK.PER
    BLOCK: tl.constexpr = LAYER.BLOCK
    UPTO: tl.constexpr = LAYER.UPTO
    zeros = zeros_of(ROWS, BANK)
    recalled, at_key, at_value, read, fixed = zeros, zeros, zeros, zeros, zeros
    for start in range(0, BLOCK, BANK.SLICE):
        base = operand_at(scratch + LAYER.BASE_OPERAND, start, ROWS, BLOCK, BANK)
        state = operand_at(scratch + LAYER.STATE_OPERAND, start, ROWS, BLOCK, BANK)
        anchor = operand_at(scratch + LAYER.ANCHOR_OPERAND, start, ROWS, BLOCK, BANK)
        if WRITES:
            x = by_width(scratch + LAYER.KEY, start, UPTO, BLOCK, BANK)
            at_key += product(anchor if BANK.AT_ANCHOR else base, x, BANK)
            if BANK.ERASES:
                recalled += product(state, x, BANK)
            if BANK.GENERATES:
                at_value += product(base, by_width(scratch + LAYER.VALUE, start, UPTO, BLOCK, BANK), BANK)
        if READS:
            q = by_width(scratch + LAYER.QUERY, start, UPTO, BLOCK, BANK)
            read += product(state if BANK.RUNNING else base, q, BANK)
            if BANK.RUNNING and BANK.ANCHORED:
                fixed += product(anchor, q, BANK)
    return recalled, at_key, at_value, read, fixed


@triton.jit
def outputs_of(weights, start, BANK: tl.constexpr):
    """Outputs ``start`` … of last layers turned, for the block's hidden units [B, h, SLICE]."""
    UNITS: tl.constexpr = BANK.BLOCK_H // BANK.PER
    MEMORY: tl.constexpr = BANK.BLOCK_V * BANK.BLOCK_H // 256
    place = operands_at(weights, BANK) + start * BANK.BLOCK_H
    x = load_tile(place, BANK.SLICE, UNITS, BANK.BLOCK_H, BANK.BLOCKS, MEMORY, UNITS // 16, BANK)
    return tl.trans(x, 0, 2, 1)


@triton.jit
def send_back(scratch, error, BANK: tl.constexpr):
    """``W̄1ᵀ e`` [B, h, C] of last layers, for errors [outputs, C] of each memory in scratch."""
    back = zeros_of(BANK.BLOCK_H // BANK.PER, BANK)
    for start in range(0, BANK.BLOCK_V, BANK.SLICE):
        e = by_width(error, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
        back += product(outputs_of(scratch + BANK.LAST.BASE_OPERAND, start, BANK), e, BANK)
    return back


@triton.jit
def residuals(scratch, BANK: tl.constexpr):
    """What is added to f(k) − f(v), or to f(k): [B, outputs, C]."""
    memory = memory_of(BANK)[:, None, None]
    value = exact_rows(scratch, 1, BANK)
    if BANK.RESIDUAL:
        value -= tl.where(memory < BANK.WIDE, exact_rows(scratch, 0, BANK), 0.0)
    elif BANK.GENERATES:
        value -= tl.where(memory != BANK.OWN, exact_rows(scratch, 0, BANK), 0.0)
    return tl.where(memory < BANK.WIDE, -value, 0.0)


@triton.jit
def own_scale(scratch, BANK: tl.constexpr):
    """What multiplies errors [B, 1, C]: the tokens' scale of the memory that is read, else 1."""
    scale = tl.load(vectors_at(scratch, SCALE, BANK)[None, None, :])
    return tl.where(memory_of(BANK)[:, None, None] == BANK.OWN, scale, 1.0)


@triton.jit
def write(signal, recalled, rate, decays, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """ω and u [B, rows, C] of errors ``signal`` and the recall S x: the chunk adds Σ u xᵀ to what decays."""
    if BANK.ERASES:
        turned = pairs_at(operands_at(scratch + LAYER.INVERSE, BANK), True, BANK)
        signal = product(rounded(signal + decays[2] * recalled, BANK), tl.trans(turned, 0, 2, 1), BANK)
    return signal, signal * -rate


@triton.jit
def put_solution(decays, rate, scratch, READS: tl.constexpr, LAYER: tl.constexpr, BANK: tl.constexpr):
    """``(I + diag(η) K)⁻¹`` and, if it ``READS``, the scores ``full ∘ x qᵀ`` of running reads to scratch.

    Returns ``K = strict ∘ x xᵀ`` and the scores [B, j, t], or ``()``.
    """
    gram, scores, key = (), (), scratch + LAYER.KEY
    if BANK.ERASES:
        gram = pairs(key, key, LAYER.UPTO, LAYER.BLOCK, BANK) * decays[0]
        inverse = invert(gram * tl.trans(rate, 0, 2, 1), BANK.BLOCK_C, BANK)
        put_pairs(operands_at(scratch + LAYER.INVERSE, BANK), rounded(inverse, BANK), BANK)
    if BANK.RUNNING and READS:
        scores = pairs(key, scratch + LAYER.QUERY, LAYER.UPTO, LAYER.BLOCK, BANK) * decays[1]
        put_pairs(operands_at(scratch + LAYER.SCORES, BANK), rounded(scores, BANK), BANK)
    return gram, scores


@triton.jit
def read_running(read, fixed, written, decays, scratch, LAYER: tl.constexpr, BANK: tl.constexpr):
    """f(q) [B, rows, C] of a layer's running weights; the scores are in scratch."""
    turned = pairs_at(operands_at(scratch + LAYER.SCORES, BANK), True, BANK)
    return decays[3] * read + product(rounded(written, BANK), tl.trans(turned, 0, 2, 1), BANK) + fixed


@triton.jit
def learn_chunk(scratch, READS: tl.constexpr, BANK: tl.constexpr):
    """What a chunk's tokens write, and read if it ``READS``; weights stay as they are.

    Returns decays of :func:`decays_at`; ``(signal, recalled, gram, ω, u, read, scores)`` of the first layers,
    and of the last ones with the error in place of the signal; the hidden layers at keys, values and queries,
    what came back to them and :func:`error_signal` of it; the errors' factor; and f(q) [B, outputs, C]. What
    there is none of is an empty tuple: Triton 3.6 can return no ``None`` in a tuple.
    """
    C: tl.constexpr = BANK.BLOCK_C
    FIRST: tl.constexpr = BANK.FIRST
    LAST: tl.constexpr = BANK.LAST
    decays = decays_at(scratch + BANK.DECAYS, scratch + BANK.VECTORS + DECAYS * C, C)
    rate = tl.load(vectors_at(scratch, RATE, BANK)[None, None, :])

    if BANK.HIDDEN > 0:
        first_gram, first_full = put_solution(decays, rate, scratch, READS, FIRST, BANK)
        first_recalled, z, at_value, at_query, fixed = apply_layer(scratch, True, READS, FIRST, BANK)
        hidden = put_hidden(z, scratch + BANK.HIDDEN_KEY, BANK)
        hidden_value, hidden_query = (), ()
        if BANK.GENERATES:
            hidden_value = put_hidden(at_value, scratch + BANK.HIDDEN_VALUE, BANK)
        if READS and not BANK.RUNNING:
            hidden_query = put_hidden(at_query, scratch + BANK.HIDDEN_QUERY, BANK)
        tl.debug_barrier()
        recalled, error, at_value, read, fixed_read = apply_layer(
            scratch, True, READS and not BANK.RUNNING, LAST, BANK
        )
    else:
        gram, full = put_solution(decays, rate, scratch, READS, LAST, BANK)
        recalled, error, at_value, read, fixed_read = apply_layer(scratch, True, READS, LAST, BANK)
    error += residuals(scratch, BANK)
    if BANK.GENERATES:
        error -= at_value
    factor = length_factor(error, narrow_of(BANK), BANK.BOUND, BANK.PER)
    error *= factor

    if BANK.HIDDEN > 0:
        put_rows(scratch + BANK.ERROR, error, BANK.BLOCK_V, BANK)
        tl.debug_barrier()
        back = send_back(scratch, scratch + BANK.ERROR, BANK)
        signal = error_signal(back, hidden, BANK, BANK.PER)
        surprise, written = write(signal[0], first_recalled, rate, decays, scratch, FIRST, BANK)
        first = (signal[0], first_recalled, first_gram, surprise, written, at_query, first_full)
        if READS and BANK.RUNNING:
            z = read_running(at_query, fixed, written, decays, scratch, FIRST, BANK)
            hidden_query = put_hidden(z, scratch + BANK.HIDDEN_QUERY, BANK)
            tl.debug_barrier()
            _, _, _, read, fixed_read = apply_layer(scratch, False, True, LAST, BANK)
        gram, full = put_solution(decays, rate, scratch, READS, LAST, BANK)
        hiddens = (hidden, hidden_value, hidden_query, back, signal)
    else:
        first, hiddens = (), ()
    tl.debug_barrier()
    signal = error
    if BANK.SCALED:
        signal = error * own_scale(scratch, BANK)
    surprise, written = write(signal, recalled, rate, decays, scratch, LAST, BANK)
    last = (error, recalled, gram, surprise, written, read, full)
    y = read
    if READS and BANK.RUNNING:
        y = read_running(read, fixed_read, written, decays, scratch, LAST, BANK)
    return decays, first, last, hiddens, factor, y
