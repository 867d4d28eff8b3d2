"""What a chunk's tokens write to a bank of memories, and read from it."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_width,
    load_tile,
    operands_at,
    pairs_at,
    product,
    put_pairs,
    put_rows,
    rounded,
    weights_at,
)
from nl_kernels.memory.kernels.generate import DECAYS, RATE, SCALE, exact_rows, vectors_at
from nl_kernels.memory.kernels.layer import (
    activated,
    decays_at,
    error_signal,
    invert,
    length_factor,
    memory_of,
    pairs,
    zeros_of,
)

# Copies of a layer's weights in scratch: operands of products, and in fp32. The last ones are of the backward
# pass, which has gradients in place of the state and of the snapshot.
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
def operands_of(place, SIZE: tl.constexpr, BANK: tl.constexpr):
    """A layer's running weights, those that it is applied at, and its anchor, as operands in scratch."""
    return (
        operands_at(place + STATE_OPERAND * SIZE, BANK), operands_at(place + BASE_OPERAND * SIZE, BANK),
        operands_at(place + ANCHOR_OPERAND * SIZE, BANK),
    )  # fmt: skip


@triton.jit
def apply_layer(
    weights, key, value, query, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """The products of a layer with the chunk's tokens of memories up to ``LAST``, each [B, rows, C].

    ``weights`` are of :func:`operands_of`. Returns S x of the running state and the keys; W̄ x and W̄ v of the
    weights it is applied at (``AT_ANCHOR``: W_0 x); and, of the queries, S q and W_0 q, or W̄ q where reads
    are of the snapshot. ``value`` and ``query`` may be absent.
    """
    state, base, anchor = weights
    zeros = zeros_of(ROWS, BANK)
    recalled, at_key, at_value, read, fixed = zeros, zeros, zeros, zeros, zeros
    for start in range(0, BLOCK, BANK.SLICE):
        applied = weights_at(base, start, ROWS, BLOCK, BANK)
        x = by_width(key, start, LAST, BLOCK, BANK)
        if BANK.AT_ANCHOR:
            at_key += product(weights_at(anchor, start, ROWS, BLOCK, BANK), x, BANK)
        else:
            at_key += product(applied, x, BANK)
        if BANK.ERASES or (BANK.RUNNING and query is not None):
            running = weights_at(state, start, ROWS, BLOCK, BANK)
        if BANK.ERASES:
            recalled += product(running, x, BANK)
        if value is not None:
            at_value += product(applied, by_width(value, start, LAST, BLOCK, BANK), BANK)
        if query is not None:
            q = by_width(query, start, LAST, BLOCK, BANK)
            if BANK.RUNNING:
                read += product(running, q, BANK)
                if BANK.ANCHORED:
                    fixed += product(weights_at(anchor, start, ROWS, BLOCK, BANK), q, BANK)
            else:
                read += product(applied, q, BANK)
    return recalled, at_key, at_value, read, fixed


@triton.jit
def probe_layer(weights, query, ROWS: tl.constexpr, BLOCK: tl.constexpr, BANK: tl.constexpr):
    """``S q`` and ``W_0 q`` [B, rows, C] of a layer, for a running read."""
    read = zeros_of(ROWS, BANK)
    fixed = read
    for start in range(0, BLOCK, BANK.SLICE):
        q = by_width(query, start, BANK.BLOCKS, BLOCK, BANK)
        read += product(weights_at(weights[0], start, ROWS, BLOCK, BANK), q, BANK)
        if BANK.ANCHORED:
            fixed += product(weights_at(weights[2], start, ROWS, BLOCK, BANK), q, BANK)
    return read, fixed


@triton.jit
def outputs_of(weights, start, BANK: tl.constexpr):
    """Outputs ``start`` … of last layers turned, for the block's hidden units [B, h, SLICE]."""
    UNITS: tl.constexpr = BANK.BLOCK_H // BANK.PER
    MEMORY: tl.constexpr = BANK.BLOCK_V * BANK.BLOCK_H // 256
    place = weights + start * BANK.BLOCK_H
    x = load_tile(place, BANK.SLICE, UNITS, BANK.BLOCK_H, BANK.BLOCKS, MEMORY, UNITS // 16, BANK)
    return tl.trans(x, 0, 2, 1)


@triton.jit
def send_back(base, error, BANK: tl.constexpr):
    """``W̄1ᵀ e`` [B, h, C] of last layers, for errors [outputs, C] of each memory in scratch."""
    back = zeros_of(BANK.BLOCK_H // BANK.PER, BANK)
    for start in range(0, BANK.BLOCK_V, BANK.SLICE):
        e = by_width(error, start, BANK.BLOCKS, BANK.BLOCK_V, BANK)
        back += product(outputs_of(base, start, BANK), e, BANK)
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
def write(signal, recalled, rate, decays, inverse, BANK: tl.constexpr):
    """ω and u [B, rows, C] of errors ``signal`` and the recall S x: the chunk adds Σ u xᵀ to what decays."""
    if BANK.ERASES:
        turned = pairs_at(inverse, True, BANK)
        signal = product(rounded(signal + decays[2] * recalled, BANK), tl.trans(turned, 0, 2, 1), BANK)
    return signal, signal * -rate


@triton.jit
def put_solution(
    key, query, decays, rate, inverse_at, scores_at, LAST: tl.constexpr, WIDTH: tl.constexpr,
    BANK: tl.constexpr,
):  # fmt: skip
    """``(I + diag(η) K)⁻¹`` and, for a ``query``, the scores ``full ∘ x qᵀ`` of running reads to scratch.

    Returns ``K = strict ∘ x xᵀ`` and the scores [B, j, t], or ``()``.
    """
    gram, scores = (), ()
    if BANK.ERASES:
        gram = pairs(key, key, LAST, WIDTH, BANK) * decays[0]
        inverse = invert(gram * tl.trans(rate, 0, 2, 1), BANK.BLOCK_C, BANK)
        put_pairs(inverse_at, rounded(inverse, BANK), BANK)
    if BANK.RUNNING and query is not None:
        scores = pairs(key, query, LAST, WIDTH, BANK) * decays[1]
        put_pairs(scores_at, rounded(scores, BANK), BANK)
    return gram, scores


@triton.jit
def read_running(read, fixed, written, decays, scores, BANK: tl.constexpr):
    """f(q) [B, rows, C] of a layer's running weights; ``scores`` are in scratch."""
    turned = pairs_at(scores, True, BANK)
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
    ROWS: tl.constexpr = BANK.BLOCK_V // BANK.PER
    decays = decays_at(scratch + BANK.DECAYS, scratch + BANK.VECTORS + DECAYS * C, C)
    rate = tl.load(vectors_at(scratch, RATE, BANK)[None, None, :])
    key = operands_at(scratch + BANK.KEY, BANK)
    value = None
    if BANK.GENERATES:
        value = operands_at(scratch + BANK.VALUE, BANK)
    query = None
    if READS:
        query = operands_at(scratch + BANK.QUERY, BANK)
    narrow = None
    if BANK.NARROW > 0:
        narrow = memory_of(BANK)[:, None, None] >= BANK.WIDE
    weights = operands_of(scratch + BANK.LAST, BANK.LAST_KEPT, BANK)
    inverse = operands_at(scratch + BANK.INVERSE, BANK)
    scores = operands_at(scratch + BANK.SCORES, BANK)

    if BANK.HIDDEN > 0:
        UNITS: tl.constexpr = BANK.BLOCK_H // BANK.PER
        first_weights = operands_of(scratch + BANK.FIRST, BANK.FIRST_KEPT, BANK)
        first_inverse = operands_at(scratch + BANK.INVERSE_FIRST, BANK)
        first_scores = operands_at(scratch + BANK.SCORES_FIRST, BANK)
        first_gram, first_full = put_solution(
            key, query, decays, rate, first_inverse, first_scores, 0, BANK.BLOCK_K, BANK
        )
        first_recalled, z, at_value, at_query, fixed = apply_layer(
            first_weights, key, value, query, 0, UNITS, BANK.BLOCK_K, BANK
        )
        hidden = activated(z, BANK, BANK.PER)
        x = operands_at(scratch + BANK.HIDDEN_KEY, BANK)
        put_rows(x, rounded(hidden[0], BANK), BANK.BLOCK_H, BANK)
        last_value = None
        probe = None
        hidden_value, hidden_query = (), ()
        if BANK.GENERATES:
            hidden_value = activated(at_value, BANK, BANK.PER)
            last_value = operands_at(scratch + BANK.HIDDEN_VALUE, BANK)
            put_rows(last_value, rounded(hidden_value[0], BANK), BANK.BLOCK_H, BANK)
        if READS and not BANK.RUNNING:
            hidden_query = activated(at_query, BANK, BANK.PER)
            probe = operands_at(scratch + BANK.HIDDEN_QUERY, BANK)
            put_rows(probe, rounded(hidden_query[0], BANK), BANK.BLOCK_H, BANK)
        tl.debug_barrier()
        recalled, error, at_value, read, fixed_read = apply_layer(
            weights, x, last_value, probe, BANK.BLOCKS, ROWS, BANK.BLOCK_H, BANK
        )
    else:
        gram, full = put_solution(key, query, decays, rate, inverse, scores, 0, BANK.BLOCK_K, BANK)
        recalled, error, at_value, read, fixed_read = apply_layer(
            weights, key, value, query, 0, ROWS, BANK.BLOCK_K, BANK
        )
    error += residuals(scratch, BANK)
    if BANK.GENERATES:
        error -= at_value
    factor = length_factor(error, narrow, BANK.BOUND, BANK.PER)
    error *= factor

    if BANK.HIDDEN > 0:
        put_rows(operands_at(scratch + BANK.ERROR, BANK), rounded(error, BANK), BANK.BLOCK_V, BANK)
        tl.debug_barrier()
        back = send_back(weights[1], operands_at(scratch + BANK.ERROR, BANK), BANK)
        signal = error_signal(back, hidden, BANK, BANK.PER)
        surprise, written = write(signal[0], first_recalled, rate, decays, first_inverse, BANK)
        first = (signal[0], first_recalled, first_gram, surprise, written, at_query, first_full)
        if READS and BANK.RUNNING:
            z = read_running(at_query, fixed, written, decays, first_scores, BANK)
            hidden_query = activated(z, BANK, BANK.PER)
            probe = operands_at(scratch + BANK.HIDDEN_QUERY, BANK)
            put_rows(probe, rounded(hidden_query[0], BANK), BANK.BLOCK_H, BANK)
            tl.debug_barrier()
            read, fixed_read = probe_layer(weights, probe, ROWS, BANK.BLOCK_H, BANK)
        gram, full = put_solution(x, probe, decays, rate, inverse, scores, BANK.BLOCKS, BANK.BLOCK_H, BANK)
        hiddens = (hidden, hidden_value, hidden_query, back, signal)
    else:
        first, hiddens = (), ()
    tl.debug_barrier()
    signal = error
    if BANK.SCALED:
        signal = error * own_scale(scratch, BANK)
    surprise, written = write(signal, recalled, rate, decays, inverse, BANK)
    last = (error, recalled, gram, surprise, written, read, full)
    y = read
    if READS and BANK.RUNNING:
        y = read_running(read, fixed_read, written, decays, scores, BANK)
    return decays, first, last, hiddens, factor, y
