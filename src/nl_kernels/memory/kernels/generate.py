"""Where a chunk's keys, values, rates and decays come from: the caller, or the memories themselves."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.layer import (
    activated,
    columns_at,
    columns_of,
    first_rows,
    last_rows,
    load_weights,
    memory_sum,
    product,
    rows_at,
    zeros_of,
)

_NORM_EPS: tl.constexpr = tl.constexpr(1e-6)  # memory_rule.NORM_EPS

# Numbers a token in scratch, [C] each.
RATE: tl.constexpr = tl.constexpr(0)  # η; of memories that make their own before the sigmoid
DECAY: tl.constexpr = tl.constexpr(1)  # log α, likewise
KEY_SCALE: tl.constexpr = tl.constexpr(2)  # 1/‖·‖ of what was made a key
QUERY_SCALE: tl.constexpr = tl.constexpr(3)
AFTER: tl.constexpr = tl.constexpr(4)  # of :func:`~.layer.decays_of`


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
def locate_tokens(start, row, T, H, SHAPE: tl.constexpr):
    """The tokens [C] of a chunk from slot ``start`` as rows of [B · T · H, ·], and which of them there
    are."""
    sequence, head, origin, begin, stop = row
    number = tl.arange(0, SHAPE.BLOCK_C)
    slot = start + number
    exists = (number < SHAPE.CHUNK) & (slot >= begin) & (slot < stop)
    return (sequence * T + slot - origin) * H + head, exists


@triton.jit
def load_tokens(base, place, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of a chunk as columns [BLOCK, C]."""
    token, exists = place
    number = tl.arange(0, BLOCK)[:, None]
    inside = exists[None, :] & (number < WIDTH)
    return tl.load(base + token[None, :] * WIDTH + number, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_columns(place, x, BLOCK_C: tl.constexpr):
    """Tokens [BLOCK, C] to a region of scratch."""
    number = tl.arange(0, x.shape[0])[:, None]
    tl.store(place + number * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], x)


@triton.jit
def store_vector(place, x, BLOCK_C: tl.constexpr):
    """A number a token [C] to scratch."""
    tl.store(place + tl.arange(0, BLOCK_C), x)


@triton.jit
def given_tokens(tokens, place, scratch, SHAPE: tl.constexpr, PLACES: tl.constexpr):
    """Keys, values, queries, rates and decays of the caller go to scratch."""
    token, exists = place
    C: tl.constexpr = SHAPE.BLOCK_C
    store_columns(scratch + PLACES.KEY, load_tokens(tokens.key, place, SHAPE.KEY_DIM, SHAPE.BLOCK_K), C)
    store_columns(scratch + PLACES.VALUE, load_tokens(tokens.value, place, SHAPE.VALUE_DIM, SHAPE.BLOCK_V), C)
    store_columns(scratch + PLACES.QUERY, load_tokens(tokens.query, place, SHAPE.KEY_DIM, SHAPE.BLOCK_K), C)
    vectors = scratch + PLACES.VECTORS
    store_vector(vectors + RATE * C, tl.load(tokens.rate + token, mask=exists, other=0.0).to(tl.float32), C)
    log = tl.load(tokens.log_decay + token, mask=exists, other=0.0).to(tl.float32)
    store_vector(vectors + DECAY * C, log, C)


@triton.jit
def unit_queries(tokens, place, scratch, SHAPE: tl.constexpr, PLACES: tl.constexpr):
    """Queries of unit length, and the scales that made them so, go to scratch."""
    C: tl.constexpr = SHAPE.BLOCK_C
    query = load_tokens(tokens.query, place, SHAPE.KEY_DIM, SHAPE.BLOCK_K)
    scale = tl.rsqrt(tl.sum(query * query, 0) + _NORM_EPS)
    store_columns(scratch + PLACES.QUERY, query * scale[None, :], C)
    store_vector(scratch + PLACES.VECTORS + QUERY_SCALE * C, scale, C)


@triton.jit
def memory_inputs(tokens, memory, place, number, SHAPE: tl.constexpr):
    """What the memories that make keys, values and gates are applied to: numbers ``number`` of it.

    ``memory``, ``number`` and the tokens of ``place`` broadcast to the tile.
    """
    token, exists = place
    at = token * SHAPE.KEY_DIM + number
    base = tl.where(memory == 0, tokens.key + at, tl.where(memory == 1, tokens.value + at, tokens.gate + at))
    made = (memory < SHAPE.MEMORIES) & (memory != SHAPE.OWN)
    return tl.load(base, mask=exists & made & (number < SHAPE.KEY_DIM), other=0.0).to(tl.float32)


@triton.jit
def serve(
    tokens,
    first_base,
    last_base,
    place,
    scratch,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """f(x) [B, rows, C] of the memories that make keys, values and gates, and their hidden layer or
    ``()``."""
    C: tl.constexpr = SHAPE.BLOCK_C
    token, exists = place
    columns = (token[None, None, :], exists[None, None, :])
    block = tl.arange(0, SHAPE.BLOCKS)[:, None, None] // SHAPE.PER
    if SHAPE.HIDDEN > 0:
        rows = first_rows(SHAPE)
        z = zeros_of(SHAPE.BLOCK_H // SHAPE.PER, SHAPE)
        for start in range(0, SHAPE.BLOCK_K, SHAPE.SLICE):
            number = start + tl.arange(0, SHAPE.SLICE)[None, :, None]
            x = memory_inputs(tokens, block, columns, number, SHAPE)
            weights = load_weights(first_base, columns_of(rows, start, SHAPE.KEY_DIM, SHAPE.SLICE))
            z += product(weights, x, RULE)
        hidden = activated(z, RULE, SHAPE.PER)
        tl.store(rows_at(scratch + PLACES.HIDDEN_MADE, rows, SHAPE.BLOCK_H, C, True), hidden[0])
        tl.debug_barrier()
    else:
        hidden = ()
    rows = last_rows(SHAPE)
    made = zeros_of(SHAPE.BLOCK_V // SHAPE.PER, SHAPE)
    if SHAPE.HIDDEN > 0:
        for start in range(0, SHAPE.BLOCK_H, SHAPE.SLICE):
            x = columns_at(scratch + PLACES.HIDDEN_MADE, block, start, SHAPE.BLOCK_H, C, SHAPE.SLICE)
            weights = load_weights(last_base, columns_of(rows, start, SHAPE.HIDDEN, SHAPE.SLICE))
            made += product(weights, x, RULE)
    else:
        for start in range(0, SHAPE.BLOCK_K, SHAPE.SLICE):
            number = start + tl.arange(0, SHAPE.SLICE)[None, :, None]
            x = memory_inputs(tokens, block, columns, number, SHAPE)
            weights = load_weights(last_base, columns_of(rows, start, SHAPE.KEY_DIM, SHAPE.SLICE))
            made += product(weights, x, RULE)
    return made, hidden


@triton.jit
def make_tokens(
    tokens,
    first_base,
    last_base,
    place,
    gates,
    scratch,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The memories make keys, values and gates, which go to scratch; ``gates`` are both biases.

    Returns the hidden layer of the memories that made them, or ``()``.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    token, exists = place
    memory, row, _, _ = last_rows(SHAPE)
    unit_queries(tokens, place, scratch, SHAPE, PLACES)
    made, hidden = serve(tokens, first_base, last_base, place, scratch, SHAPE, RULE, PLACES)
    # Keys and values are x + f(x), and keys have unit length.
    made += memory_inputs(
        tokens,
        tl.where(memory < 2, memory, SHAPE.OWN),
        (token[None, None, :], exists[None, None, :]),
        row,
        SHAPE,
    )
    scale = tl.rsqrt(memory_sum(made * made, SHAPE.PER) + _NORM_EPS)
    made = tl.where(memory == 0, made * scale, made)
    tl.store(rows_at(scratch + PLACES.MADE, last_rows(SHAPE), SHAPE.BLOCK_V, C, True), made)
    vectors = scratch + PLACES.VECTORS + tl.arange(0, C)[None, None, :]
    rate_bias, retention_bias = gates
    is_rate = (memory == SHAPE.WIDE) & (row == 0)
    is_retention = (memory == SHAPE.MEMORIES - 1) & (row == SHAPE.NARROW - 1)
    block = tl.arange(0, SHAPE.BLOCKS)[:, None, None]
    tl.store(vectors + KEY_SCALE * C + 0 * block, scale, mask=block == 0)
    tl.store(vectors + RATE * C + 0 * row, made + rate_bias, mask=is_rate)
    tl.store(vectors + DECAY * C + 0 * row, made + retention_bias, mask=is_retention)
    return hidden


@triton.jit
def log_sigmoid(z):
    """``log(sigmoid(z))`` without overflow."""
    return tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))


@triton.jit
def rates_of(rate_max, exists, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """η and log α [C] of the chunk, from scratch; ``rate_max`` is the largest rate that memories can make."""
    vectors = scratch + PLACES.VECTORS + tl.arange(0, SHAPE.BLOCK_C)
    rate = tl.load(vectors + RATE * SHAPE.BLOCK_C)
    log = tl.load(vectors + DECAY * SHAPE.BLOCK_C)
    if RULE.GENERATES:
        rate = tl.where(exists, tl.minimum(rate_max, 1 + tl.sigmoid(log)) * tl.sigmoid(rate), 0.0)
        log = tl.where(exists, log_sigmoid(log), 0.0)
    return rate, log
