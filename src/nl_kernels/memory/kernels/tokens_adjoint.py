"""The gradients of a chunk's tokens: what all blocks of rows have for them, and how the memories made
them."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.generate import DECAY, KEY_SCALE, RATE
from nl_kernels.memory.kernels.layer import (
    columns_at,
    first_rows,
    last_rows,
    load_weights,
    product,
    rows_at,
    turned_columns_of,
    vector_at,
)
from nl_kernels.memory.kernels.layer_adjoint import hidden_adjoint, pair_shares
from nl_kernels.memory.kernels.learn import send_back


@triton.jit
def token_shares(place, first, COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """The sum of the shares [1, BLOCK_K, C] of blocks ``first`` … of :func:`give_back`."""
    C: tl.constexpr = SHAPE.BLOCK_C
    block = first + tl.arange(0, COUNT)[:, None, None]
    number = tl.arange(0, SHAPE.BLOCK_K)[None, :, None]
    at = (block * SHAPE.BLOCK_K + number) * C + tl.arange(0, C)[None, None, :]
    return tl.sum(tl.load(place + at), 0)[None, :, :]


@triton.jit
def tokens_adjoint(d_o, place, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """Gradients of keys, values and queries as the bank took them, [1, width, C], from the blocks' shares."""
    C: tl.constexpr = SHAPE.BLOCK_C
    SHARE: tl.constexpr = SHAPE.BLOCKS * SHAPE.BLOCK_K * C
    shares = scratch + PLACES.SHARES
    gram = scratch + (PLACES.GRAM_FIRST if SHAPE.HIDDEN > 0 else PLACES.GRAM)
    read = scratch + (PLACES.PAIRS_FIRST if SHAPE.HIDDEN > 0 else PLACES.PAIRS)
    key = columns_at(scratch + PLACES.KEY, None, 0, SHAPE.BLOCK_K, C, SHAPE.BLOCK_K)
    d_key = token_shares(shares, 0, SHAPE.BLOCKS, SHAPE)
    d_query = token_shares(shares + 2 * SHARE, 0, SHAPE.BLOCKS, SHAPE)
    if RULE.ERASES:
        pairs = pair_shares(gram, None, False, SHAPE) + pair_shares(gram, None, True, SHAPE)
        d_key += product(key, pairs, RULE)
    if RULE.RUNNING:
        query = columns_at(scratch + PLACES.QUERY, None, 0, SHAPE.BLOCK_K, C, SHAPE.BLOCK_K)
        d_key += product(query, pair_shares(read, None, True, SHAPE), RULE)
        d_query += product(key, pair_shares(read, None, False, SHAPE), RULE)
    error = columns_at(scratch + PLACES.D_ERROR, None, 0, SHAPE.BLOCK_V, C, SHAPE.BLOCK_V)
    d_value = -error
    if RULE.GENERATES:
        d_value += token_shares(shares + SHARE, 0, SHAPE.BLOCKS, SHAPE)
        d_key += error
        WIDE: tl.constexpr = SHAPE.WIDE
        for m in tl.static_range(1, WIDE):
            error = columns_at(
                scratch + PLACES.D_ERROR + m * SHAPE.BLOCK_V * C, None, 0, SHAPE.BLOCK_V, C, SHAPE.BLOCK_V
            )
            d_value -= error
            if m != SHAPE.OWN or RULE.RESIDUAL:
                d_key += error
    elif RULE.RESIDUAL:
        d_key += error
    if RULE.RESIDUAL:
        token, exists = place
        number = tl.arange(0, SHAPE.BLOCK_K)[None, :, None]
        inside = exists[None, None, :] & (number < SHAPE.KEY_DIM)
        at = token[None, None, :] * SHAPE.KEY_DIM + number
        d_query += tl.load(d_o + at, mask=inside, other=0.0).to(tl.float32)
    return d_key, d_value, d_query


@triton.jit
def store_tokens(base, place, x, WIDTH: tl.constexpr):
    """Columns [1, BLOCK, C] to tokens of the caller."""
    token, exists = place
    number = tl.arange(0, x.shape[1])[None, :, None]
    inside = exists[None, None, :] & (number < WIDTH)
    tl.store(base + token[None, None, :] * WIDTH + number, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_rates(d_rate, d_log, d_tokens, place):
    """Gradients of rates and log decays [C] of the caller."""
    token, exists = place
    tl.store(d_tokens.rate + token, d_rate.to(d_tokens.rate.dtype.element_ty), mask=exists)
    tl.store(d_tokens.log_decay + token, d_log.to(d_tokens.log_decay.dtype.element_ty), mask=exists)


@triton.jit
def gates_adjoint(d_rate, d_log, rate_max, exists, scratch, SHAPE: tl.constexpr, PLACES: tl.constexpr):
    """Gradients [C] of what the gates made, before the sigmoid: of both, and that of the largest rate."""
    C: tl.constexpr = SHAPE.BLOCK_C
    vectors = scratch + PLACES.VECTORS + tl.arange(0, C)
    fraction = tl.sigmoid(tl.load(vectors + RATE * C))
    decay = tl.sigmoid(tl.load(vectors + DECAY * C))
    d_rate = tl.where(exists, d_rate, 0.0)
    d_limit = d_rate * fraction
    by_decay = tl.where(rate_max > 1 + decay, d_limit, 0.0)
    d_retention = tl.where(exists, (d_log + decay * by_decay) * (1 - decay), 0.0)
    return d_limit * tl.minimum(rate_max, 1 + decay) * (1 - fraction), d_retention, d_limit - by_decay


@triton.jit
def unit_adjoint(grad, x, scale):
    """The gradient of the argument of x = ``scale`` · argument, of unit length, from that of x [1, width,
    C]."""
    return (grad - x * tl.sum(x * grad, 1)[:, None, :]) * scale[None, None, :]


@triton.jit
def made_adjoint(d_key, d_value, d_gates, scratch, SHAPE: tl.constexpr, PLACES: tl.constexpr):
    """The gradient [B, outputs, C] of what the memories made, from those of keys, values and gates."""
    C: tl.constexpr = SHAPE.BLOCK_C
    rows = last_rows(SHAPE)
    memory, row, _, _ = rows
    key = columns_at(scratch + PLACES.KEY, None, 0, SHAPE.BLOCK_K, C, SHAPE.BLOCK_K)
    d_key = unit_adjoint(d_key, key, vector_at(scratch + PLACES.VECTORS + KEY_SCALE * C, C))
    number = tl.arange(0, SHAPE.BLOCK_V)[None, :, None]
    at = scratch + PLACES.D_MADE + number * C + tl.arange(0, C)[None, None, :]
    tl.store(at, d_key)
    tl.store(at + SHAPE.BLOCK_V * C, d_value)
    tl.debug_barrier()
    x = tl.load(rows_at(scratch + PLACES.D_MADE, rows, SHAPE.BLOCK_V, C, True), mask=memory < 2, other=0.0)
    d_rate, d_retention = d_gates
    x += tl.where((memory == SHAPE.WIDE) & (row == 0), d_rate[None, None, :], 0.0)
    is_retention = (memory == SHAPE.MEMORIES - 1) & (row == SHAPE.NARROW - 1)
    return x + tl.where(is_retention, d_retention[None, None, :], 0.0)


@triton.jit
def inputs_adjoint(
    d_made, hidden, first_base, last_base, d_tokens, place, scratch,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of the memories that made keys, values and gates; that of their z, or
    ``()``."""
    C: tl.constexpr = SHAPE.BLOCK_C
    rows = last_rows(SHAPE)
    if SHAPE.HIDDEN > 0:
        # The gates' rows are not in scratch yet, and rows of keys and values only of their memories.
        tl.debug_barrier()
        tl.store(rows_at(scratch + PLACES.D_MADE, rows, SHAPE.BLOCK_V, C, True), d_made)
        tl.debug_barrier()
        d_z = hidden_adjoint(
            send_back(last_base, scratch + PLACES.D_MADE, SHAPE, RULE), hidden, None, RULE, SHAPE.PER
        )
        rows = first_rows(SHAPE)
        base = first_base
        grad = d_z
    else:
        d_z = ()
        base = last_base
        grad = d_made
    block = tl.arange(0, SHAPE.BLOCKS)[:, None, None]
    for start in range(0, SHAPE.BLOCK_K, SHAPE.SLICE):
        weights = load_weights(base, turned_columns_of(rows, start, SHAPE.KEY_DIM, SHAPE.SLICE))
        number = start + tl.arange(0, SHAPE.SLICE)[None, :, None]
        at = (block * SHAPE.BLOCK_K + number) * C + tl.arange(0, C)[None, None, :]
        tl.store(scratch + PLACES.SHARES + at, product(weights, grad, RULE))
    tl.debug_barrier()
    d_made_at = scratch + PLACES.D_MADE
    x = token_shares(scratch + PLACES.SHARES, 0, SHAPE.PER, SHAPE)
    x += columns_at(d_made_at, None, 0, SHAPE.BLOCK_V, C, SHAPE.BLOCK_V)
    store_tokens(d_tokens.key, place, x, SHAPE.KEY_DIM)
    x = token_shares(scratch + PLACES.SHARES, SHAPE.PER, SHAPE.PER, SHAPE)
    x += columns_at(d_made_at + SHAPE.BLOCK_V * C, None, 0, SHAPE.BLOCK_V, C, SHAPE.BLOCK_V)
    store_tokens(d_tokens.value, place, x, SHAPE.KEY_DIM)
    GATES: tl.constexpr = (SHAPE.MEMORIES - SHAPE.WIDE) * SHAPE.PER
    x = token_shares(scratch + PLACES.SHARES, SHAPE.WIDE * SHAPE.PER, GATES, SHAPE)
    store_tokens(d_tokens.gate, place, x, SHAPE.KEY_DIM)
    return d_z
