"""Where a chunk's keys, values, rates and decays come from: the caller, or the memories themselves."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    by_width,
    load_tile,
    operand_at,
    operands_at,
    product,
    put_rows,
    put_tokens,
    rows_of,
    store_tile,
)
from nl_kernels.memory.kernels.layer import (
    locate_rows,
    memory_sum,
    put_decays,
    put_hidden,
    zeros_of,
)

_NORM_EPS: tl.constexpr = tl.constexpr(1e-6)  # memory_rule.NORM_EPS

# The inputs in scratch are those of keys, of values, and of the gates: which the memories from here on take.
GATE_INPUT: tl.constexpr = tl.constexpr(2)
# Numbers a token in scratch, [C] each.
RATE: tl.constexpr = tl.constexpr(0)  # η
RETENTION: tl.constexpr = tl.constexpr(1)  # log α
KEY_SCALE: tl.constexpr = tl.constexpr(2)  # 1/‖·‖ of what was made a key
QUERY_SCALE: tl.constexpr = tl.constexpr(3)
RATE_GATE: tl.constexpr = tl.constexpr(4)  # what memories made of the first two, before the sigmoid
RETENTION_GATE: tl.constexpr = tl.constexpr(5)
DECAYS: tl.constexpr = tl.constexpr(6)  # three, of :func:`~.layer.put_decays`
AFTER: tl.constexpr = tl.constexpr(7)
D_RATE_GATE: tl.constexpr = tl.constexpr(9)  # gradients of the gates
D_RETENTION_GATE: tl.constexpr = tl.constexpr(10)
SCALE: tl.constexpr = tl.constexpr(11)  # of what the memory that is read writes
D_SCALE: tl.constexpr = tl.constexpr(12)


@triton.jit
def locate_row(spans, sequence, offset, T):
    """``origin, begin, stop`` of a sequence: all the same, or from ``spans`` [B, 3] int64."""
    if spans is not None:
        origin = tl.load(spans + 3 * sequence)
        begin = tl.load(spans + 3 * sequence + 1)
        stop = tl.load(spans + 3 * sequence + 2)
    else:
        origin = offset + 0 * sequence
        begin = origin
        stop = origin + T
    return origin, begin, stop


@triton.jit
def gates_of(tokens, head, BANK: tl.constexpr):
    """A head's largest rate, and both biases."""
    rate_max, rate_bias, retention_bias = 1.0, 0.0, 0.0
    if BANK.GENERATES:
        rate_max = tl.load(tokens.rate_max + head)
        rate_bias = tl.load(tokens.rate_bias + head)
        retention_bias = tl.load(tokens.retention_bias + head)
    return rate_max, rate_bias, retention_bias


@triton.jit
def locate_tokens(start, row, T, H, BANK: tl.constexpr):
    """The tokens [C] of a chunk from slot ``start`` as rows of [B · T · H, ·], and which of them there
    are."""
    sequence, head, origin, begin, stop = row
    number = tl.arange(0, BANK.BLOCK_C)
    slot = start + number
    exists = (number < BANK.CHUNK) & (slot >= begin) & (slot < stop)
    return (sequence * T + slot - origin) * H + head, exists


@triton.jit
def load_tokens(base, place, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens [C, BLOCK] of a chunk."""
    token, exists = place
    number = tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (number < WIDTH)
    return tl.load(base + token[:, None] * WIDTH + number, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def vectors_at(scratch, number, BANK: tl.constexpr):
    """Pointers to a number a token [C] in scratch: loaded where it is used, not moved between layouts."""
    return scratch + BANK.VECTORS + number * BANK.BLOCK_C + tl.arange(0, BANK.BLOCK_C)


@triton.jit
def given_tokens(tokens, place, scratch, BANK: tl.constexpr):
    """Keys, values, queries, rates and decays of the caller go to scratch."""
    token, exists = place
    C: tl.constexpr = BANK.BLOCK_C
    key = load_tokens(tokens.key, place, BANK.KEY_DIM, BANK.BLOCK_K)
    put_tokens(scratch + BANK.KEY, key, BANK.BLOCK_K, BANK)
    value = load_tokens(tokens.value, place, BANK.VALUE_DIM, BANK.BLOCK_V)
    put_tokens(scratch + BANK.VALUE, value, BANK.BLOCK_V, BANK)
    query = load_tokens(tokens.query, place, BANK.KEY_DIM, BANK.BLOCK_K)
    put_tokens(scratch + BANK.QUERY, query, BANK.BLOCK_K, BANK)
    rate = tl.load(tokens.rate + token, mask=exists, other=0.0).to(tl.float32)
    tl.store(vectors_at(scratch, RATE, BANK), rate)
    log = tl.load(tokens.log_decay + token, mask=exists, other=0.0).to(tl.float32)
    put_decays(scratch + BANK.DECAYS, scratch + BANK.VECTORS + DECAYS * C, log, C)


@triton.jit
def apply_base(scratch, UPTO: tl.constexpr, LAYER: tl.constexpr, BANK: tl.constexpr):
    """``W̄ x`` [B, rows, C] of a layer and its inputs, of memories up to ``UPTO``."""
    ROWS: tl.constexpr = LAYER.WIDTH // BANK.PER
    made = zeros_of(ROWS, BANK)
    for start in range(0, LAYER.BLOCK, BANK.SLICE):
        x = by_width(scratch + LAYER.INPUTS, start, UPTO, LAYER.BLOCK, BANK)
        made += product(operand_at(scratch + LAYER.BASE_OPERAND, start, ROWS, LAYER.BLOCK, BANK), x, BANK)
    return made


@triton.jit
def serve(scratch, BANK: tl.constexpr):
    """f(x) [B, rows, C] of the memories that make keys, values and gates, and their hidden layer or ()."""
    FIRST: tl.constexpr = BANK.FIRST
    LAST: tl.constexpr = BANK.LAST
    if BANK.HIDDEN > 0:
        z = apply_base(scratch, GATE_INPUT, FIRST, BANK)
        hidden = put_hidden(z, scratch + BANK.HIDDEN_INPUTS, BANK)
        tl.debug_barrier()
        made = apply_base(scratch, BANK.BLOCKS, LAST, BANK)
    else:
        hidden = ()
        made = apply_base(scratch, GATE_INPUT, LAST, BANK)
    return made, hidden


@triton.jit
def take_inputs(tokens, place, scratch, BANK: tl.constexpr):
    """What the memories are applied to, and queries of unit length, go to scratch."""
    inputs = operands_at(scratch + BANK.INPUTS, BANK)
    SIZE: tl.constexpr = 2 * BANK.BLOCK_K * BANK.BLOCK_C
    x = load_tokens(tokens.key, place, BANK.KEY_DIM, BANK.BLOCK_K)
    put_tokens(inputs, x, BANK.BLOCK_K, BANK)
    x = load_tokens(tokens.value, place, BANK.KEY_DIM, BANK.BLOCK_K)
    put_tokens(inputs + SIZE, x, BANK.BLOCK_K, BANK)
    x = load_tokens(tokens.gate, place, BANK.KEY_DIM, BANK.BLOCK_K)
    put_tokens(inputs + 2 * SIZE, x, BANK.BLOCK_K, BANK)
    x = load_tokens(tokens.query, place, BANK.KEY_DIM, BANK.BLOCK_K)
    # The condition keeps squares out of fused additions, which would make lanes differ in a last bit.
    scale = tl.rsqrt(tl.sum(tl.where(x != 0, x * x, 0.0), 1) + _NORM_EPS)
    put_tokens(scratch + BANK.QUERY, x * scale[:, None], BANK.BLOCK_K, BANK)
    tl.store(vectors_at(scratch, QUERY_SCALE, BANK), scale)


@triton.jit
def make_tokens(tokens, place, gates, scratch, BANK: tl.constexpr):
    """The memories make keys, values, rates and decays, which go to scratch.

    ``gates`` are the largest rate and both biases.

    Returns the hidden layer of the memories that made them, or ``()``.
    """
    C: tl.constexpr = BANK.BLOCK_C
    LAST: tl.constexpr = BANK.LAST
    _, exists = place
    memory, row, _, _ = locate_rows(LAST, BANK)
    take_inputs(tokens, place, scratch, BANK)
    tl.debug_barrier()
    made, hidden = serve(scratch, BANK)
    # Keys and values are x + f(x), and keys have unit length.
    x = rows_of(scratch + BANK.INPUTS, GATE_INPUT, BANK.BLOCK_K, BANK)
    made += tl.where(memory < 2, x.to(tl.float32), 0.0)
    scale = tl.rsqrt(memory_sum(made * made, BANK.PER) + _NORM_EPS)
    made = tl.where(memory == 0, made * scale, made)
    put_rows(scratch + BANK.KEY, made, BANK.BLOCK_V, BANK)
    PART: tl.constexpr = made.shape[1] * C // 256
    store_tile(scratch + BANK.EXACT, made, C, BANK.PER * PART, PART, BANK)
    rate_max, rate_bias, retention_bias = gates
    block = tl.arange(0, BANK.BLOCKS)[:, None, None]
    at = vectors_at(scratch, 0, BANK)[None, None, :]
    tl.store(at + KEY_SCALE * C + 0 * block, scale, mask=block == 0)
    tl.store(at + RATE_GATE * C + 0 * row, made + rate_bias, mask=(memory == BANK.WIDE) & (row == 0))
    is_retention = (memory == BANK.MEMORIES - 1) & (row == BANK.NARROW - 1)
    tl.store(at + RETENTION_GATE * C + 0 * row, made + retention_bias, mask=is_retention)
    tl.debug_barrier()
    rate = tl.sigmoid(tl.load(vectors_at(scratch, RATE_GATE, BANK)))
    retention = tl.load(vectors_at(scratch, RETENTION_GATE, BANK))
    rate *= tl.minimum(rate_max, 1 + tl.sigmoid(retention))
    tl.store(vectors_at(scratch, RATE, BANK), tl.where(exists, rate, 0.0))
    if BANK.SCALED:
        scale = tl.load(tokens.rate + place[0], mask=exists, other=0.0).to(tl.float32)
        tl.store(vectors_at(scratch, SCALE, BANK), scale)
    log = tl.minimum(retention, 0.0) - tl.log(1 + tl.exp(-tl.abs(retention)))  # of the sigmoid, no overflow
    log = tl.where(exists, log, 0.0)
    put_decays(scratch + BANK.DECAYS, scratch + BANK.VECTORS + DECAYS * C, log, C)
    return hidden


@triton.jit
def exact_rows(scratch, NUMBER: tl.constexpr, BANK: tl.constexpr):
    """Rows [B, rows, C] of keys (``NUMBER`` 0) or values (1) for all memories, before rounding."""
    C: tl.constexpr = BANK.BLOCK_C
    if BANK.GENERATES:
        PART: tl.constexpr = BANK.BLOCK_V // BANK.PER * C // 256
        place = scratch + BANK.EXACT + NUMBER * BANK.BLOCK_V * C
        x = load_tile(place, BANK.BLOCK_V // BANK.PER, C, C, 0, 0, PART, BANK)
    elif NUMBER == 0:
        x = rows_of(scratch + BANK.KEY, 0, BANK.BLOCK_K, BANK)
    else:
        x = rows_of(scratch + BANK.VALUE, 0, BANK.BLOCK_V, BANK)
    return x.to(tl.float32)
