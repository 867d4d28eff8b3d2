"""The gradients of a chunk's tokens: what all blocks of rows have for them, and how the memories made
them. Tiles of tokens are [C, width]."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    operands_at,
    product,
    put_rows,
    put_tokens,
    rounded,
    rows_of,
    store_tile,
    tokens_at,
    turned_rows_of,
    weights_at,
)
from nl_kernels.memory.kernels.generate import (
    D_RATE_GATE,
    D_RETENTION_GATE,
    KEY_SCALE,
    QUERY_SCALE,
    RATE_GATE,
    RETENTION_GATE,
    load_tokens,
    vectors_at,
)
from nl_kernels.memory.kernels.layer import last_rows
from nl_kernels.memory.kernels.layer_adjoint import hidden_adjoint
from nl_kernels.memory.kernels.learn import send_back


@triton.jit
def token_shares(place, FIRST: tl.constexpr, COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """The sum of the shares of blocks ``FIRST`` … in scratch."""
    SIZE: tl.constexpr = SHAPE.BLOCK_K * SHAPE.BLOCK_C
    at = tokens_at(place + FIRST * SIZE, SHAPE.BLOCK_K, SHAPE)
    total = tl.load(at)
    for i in tl.static_range(1, COUNT):
        total += tl.load(at + i * SIZE)
    return total


@triton.jit
def tokens_of(place, NUMBER: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """Matrix ``NUMBER`` of tokens in scratch."""
    place += NUMBER * 2 * WIDTH * SHAPE.BLOCK_C
    return tl.load(tokens_at(place, WIDTH, SHAPE)).to(tl.float32)


@triton.jit
def tokens_adjoint(d_o, place, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """Gradients of keys, values and queries as the bank took them, from the blocks' shares."""
    SHARE: tl.constexpr = SHAPE.BLOCKS * SHAPE.BLOCK_K * SHAPE.BLOCK_C
    shares = scratch + PLACES.SHARES
    errors = operands_at(scratch + PLACES.D_ERROR, RULE)
    d_key = token_shares(shares, 0, SHAPE.BLOCKS, SHAPE)
    d_query = token_shares(shares + 2 * SHARE, 0, SHAPE.BLOCKS, SHAPE)
    error = tokens_of(errors, 0, SHAPE.BLOCK_V, SHAPE)
    d_value = -error
    if RULE.GENERATES:
        d_value += token_shares(shares + SHARE, 0, SHAPE.BLOCKS, SHAPE)
        d_key += error
        WIDE: tl.constexpr = SHAPE.WIDE
        for m in tl.static_range(1, WIDE):
            error = tokens_of(errors, m, SHAPE.BLOCK_V, SHAPE)
            d_value -= error
            if m != SHAPE.OWN or RULE.RESIDUAL:
                d_key += error
    elif RULE.RESIDUAL:
        d_key += error
    if RULE.RESIDUAL:
        d_query += load_tokens(d_o, place, SHAPE.KEY_DIM, SHAPE.BLOCK_K)
    return d_key, d_value, d_query


@triton.jit
def store_tokens(base, place, x, WIDTH: tl.constexpr):
    """Tokens [C, BLOCK] to the caller."""
    token, exists = place
    number = tl.arange(0, x.shape[1])[None, :]
    inside = exists[:, None] & (number < WIDTH)
    tl.store(base + token[:, None] * WIDTH + number, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_rates(d_rate, d_log, d_tokens, place):
    """Gradients of rates and log decays [C] of the caller."""
    token, exists = place
    tl.store(d_tokens.rate + token, d_rate.to(d_tokens.rate.dtype.element_ty), mask=exists)
    tl.store(d_tokens.log_decay + token, d_log.to(d_tokens.log_decay.dtype.element_ty), mask=exists)


@triton.jit
def gates_adjoint(d_rate, d_log, rate_max, exists, scratch, SHAPE: tl.constexpr, PLACES: tl.constexpr):
    """Gradients [C] of what the gates made, before the sigmoid, go to scratch; the sums of both are returned, and
    the gradient of the largest rate."""
    fraction = tl.sigmoid(tl.load(vectors_at(scratch, RATE_GATE, SHAPE, PLACES)))
    d_rate = tl.where(exists, d_rate, 0.0) * fraction
    d_rate_gate = d_rate * rate_max * (1 - fraction)
    keeps = tl.sigmoid(-tl.load(vectors_at(scratch, RETENTION_GATE, SHAPE, PLACES)))
    d_retention = tl.where(exists, d_log * keeps, 0.0)
    tl.store(vectors_at(scratch, D_RATE_GATE, SHAPE, PLACES), d_rate_gate)
    tl.store(vectors_at(scratch, D_RETENTION_GATE, SHAPE, PLACES), d_retention)
    return tl.sum(d_rate, 0), tl.sum(d_rate_gate, 0), tl.sum(d_retention, 0)


@triton.jit
def unit_adjoint(grad, x, scale):
    """The gradient of the argument of x = ``scale`` · argument, of unit length, from that of x; scales are [C]."""
    return (grad - x * tl.sum(x * grad, 1)[:, None]) * scale[:, None]


@triton.jit
def query_adjoint(d_query, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """The gradient of queries before they got unit length."""
    query = tokens_of(operands_at(scratch + PLACES.QUERY, RULE), 0, SHAPE.BLOCK_K, SHAPE)
    return unit_adjoint(d_query, query, tl.load(vectors_at(scratch, QUERY_SCALE, SHAPE, PLACES)))


@triton.jit
def made_adjoint(d_key, d_value, scratch, SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr):
    """The gradient of what the memories made, from those of keys, values and gates, goes to scratch.

    Returns those of the inputs of keys and of values as far as they do not go through a memory.
    """
    C: tl.constexpr = SHAPE.BLOCK_C
    memory, row, _, _ = last_rows(SHAPE)
    made = operands_at(scratch + PLACES.D_MADE, RULE)
    key = tokens_of(operands_at(scratch + PLACES.KEY, RULE), 0, SHAPE.BLOCK_K, SHAPE)
    d_key = unit_adjoint(d_key, key, tl.load(vectors_at(scratch, KEY_SCALE, SHAPE, PLACES)))
    put_tokens(made, rounded(d_key, RULE), SHAPE.BLOCK_V, SHAPE)
    put_tokens(made + 2 * SHAPE.BLOCK_V * C, rounded(d_value, RULE), SHAPE.BLOCK_V, SHAPE)
    tl.debug_barrier()
    x = rows_of(made, SHAPE.BLOCKS, SHAPE.BLOCK_V, SHAPE).to(tl.float32)
    x = tl.where(memory < 2, x, 0.0)
    d_rate = tl.load(vectors_at(scratch, D_RATE_GATE, SHAPE, PLACES)[None, None, :])
    x += tl.where((memory == SHAPE.WIDE) & (row == 0), d_rate, 0.0)
    d_retention = tl.load(vectors_at(scratch, D_RETENTION_GATE, SHAPE, PLACES)[None, None, :])
    x += tl.where((memory == SHAPE.MEMORIES - 1) & (row == SHAPE.NARROW - 1), d_retention, 0.0)
    put_rows(made, rounded(x, RULE), SHAPE.BLOCK_V, SHAPE)
    tl.debug_barrier()
    return d_key, d_value


@triton.jit
def inputs_adjoint(
    d_key, d_value, hidden, first_base, last_base, d_tokens, place, scratch,
    SHAPE: tl.constexpr, RULE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs of the memories that made keys, values and gates."""
    C: tl.constexpr = SHAPE.BLOCK_C
    made = operands_at(scratch + PLACES.D_MADE, RULE)
    base = last_base
    WIDTH: tl.constexpr = SHAPE.BLOCK_H if SHAPE.HIDDEN > 0 else SHAPE.BLOCK_V
    if SHAPE.HIDDEN > 0:
        d_z = hidden_adjoint(send_back(last_base, made, SHAPE, RULE), hidden, None, RULE, SHAPE.PER)
        made = operands_at(scratch + PLACES.D_Z, RULE)
        put_rows(made, rounded(d_z, RULE), WIDTH, SHAPE)
        tl.debug_barrier()
        base = first_base
    grad = turned_rows_of(made, WIDTH, SHAPE)
    PART: tl.constexpr = C * SHAPE.BLOCK_K // 256
    shares = scratch + PLACES.SHARES
    for start in range(0, SHAPE.BLOCK_K, SHAPE.SLICE):
        weights = weights_at(base, start, WIDTH // SHAPE.PER, SHAPE.BLOCK_K, SHAPE)
        x = product(grad, weights, RULE)
        store_tile(shares + start * 16, x, SHAPE.BLOCK_K, SHAPE.PER * PART, PART, SHAPE)
    tl.debug_barrier()
    store_tokens(d_tokens.key, place, d_key + token_shares(shares, 0, SHAPE.PER, SHAPE), SHAPE.KEY_DIM)
    store_tokens(
        d_tokens.value, place, d_value + token_shares(shares, SHAPE.PER, SHAPE.PER, SHAPE), SHAPE.KEY_DIM
    )
    GATES: tl.constexpr = (SHAPE.MEMORIES - SHAPE.WIDE) * SHAPE.PER
    d_gate = token_shares(shares, SHAPE.WIDE * SHAPE.PER, GATES, SHAPE)
    store_tokens(d_tokens.gate, place, d_gate, SHAPE.KEY_DIM)
