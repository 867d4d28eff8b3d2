"""The gradients of a chunk's tokens: what all blocks of rows have for them, and how the memories made
them. Tiles of tokens are [C, width]."""

import triton
import triton.language as tl

from nl_kernels.memory.kernels.fragments import (
    operand_at,
    operands_at,
    product,
    put_rows,
    put_tokens,
    rows_of,
    store_tile,
    tokens_at,
    turned_rows_of,
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
from nl_kernels.memory.kernels.layer import locate_rows
from nl_kernels.memory.kernels.layer_adjoint import hidden_adjoint
from nl_kernels.memory.kernels.learn import send_back


@triton.jit
def token_shares(place, FIRST: tl.constexpr, COUNT: tl.constexpr, BANK: tl.constexpr):
    """The sum of the shares of blocks ``FIRST`` … in scratch."""
    SIZE: tl.constexpr = BANK.BLOCK_K * BANK.BLOCK_C
    at = tokens_at(place + FIRST * SIZE, BANK.BLOCK_K, BANK)
    total = tl.load(at)
    for i in tl.static_range(1, COUNT):
        total += tl.load(at + i * SIZE)
    return total


@triton.jit
def tokens_of(place, NUMBER: tl.constexpr, WIDTH: tl.constexpr, BANK: tl.constexpr):
    """Matrix ``NUMBER`` of tokens in scratch."""
    place = operands_at(place, BANK) + NUMBER * 2 * WIDTH * BANK.BLOCK_C
    return tl.load(tokens_at(place, WIDTH, BANK)).to(tl.float32)


@triton.jit
def tokens_adjoint(d_o, place, scratch, BANK: tl.constexpr):
    """Gradients of keys, values and queries as the bank took them, from the blocks' shares."""
    SHARE: tl.constexpr = BANK.BLOCKS * BANK.BLOCK_K * BANK.BLOCK_C
    shares = scratch + BANK.SHARES
    errors = scratch + BANK.LAST.D_KEY
    d_key = token_shares(shares, 0, BANK.BLOCKS, BANK)
    d_query = token_shares(shares + 2 * SHARE, 0, BANK.BLOCKS, BANK)
    error = tokens_of(errors, 0, BANK.BLOCK_V, BANK)
    d_value = -error
    if BANK.GENERATES:
        d_value += token_shares(shares + SHARE, 0, BANK.BLOCKS, BANK)
        d_key += error
        WIDE: tl.constexpr = BANK.WIDE
        for m in tl.static_range(1, WIDE):
            error = tokens_of(errors, m, BANK.BLOCK_V, BANK)
            d_value -= error
            if m != BANK.OWN or BANK.RESIDUAL:
                d_key += error
    elif BANK.RESIDUAL:
        d_key += error
    if BANK.RESIDUAL:
        d_query += load_tokens(d_o, place, BANK.KEY_DIM, BANK.BLOCK_K)
    return d_key, d_value, d_query


@triton.jit
def store_tokens(base, place, x, WIDTH: tl.constexpr):
    """Tokens [C, BLOCK] to the caller."""
    token, exists = place
    number = tl.arange(0, x.shape[1])[None, :]
    inside = exists[:, None] & (number < WIDTH)
    tl.store(base + token[:, None] * WIDTH + number, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_numbers(base, place, x):
    """Gradients [C] of a number a token to the caller."""
    token, exists = place
    tl.store(base + token, x.to(base.dtype.element_ty), mask=exists)


@triton.jit
def gates_adjoint(d_rate, d_log, rate_max, exists, scratch, BANK: tl.constexpr):
    """Gradients [C] of what the gates made, before the sigmoid, go to scratch.

    Returns the gradient of the largest rate, and the sums of both.
    """
    fraction = tl.sigmoid(tl.load(vectors_at(scratch, RATE_GATE, BANK)))
    retention = tl.load(vectors_at(scratch, RETENTION_GATE, BANK))
    decay = tl.sigmoid(retention)
    d_limit = tl.where(exists, d_rate, 0.0) * fraction
    by_decay = tl.where(rate_max > 1 + decay, d_limit, 0.0)
    d_rate_gate = d_limit * tl.minimum(rate_max, 1 + decay) * (1 - fraction)
    d_retention = tl.where(exists, (d_log + decay * by_decay) * tl.sigmoid(-retention), 0.0)
    tl.store(vectors_at(scratch, D_RATE_GATE, BANK), d_rate_gate)
    tl.store(vectors_at(scratch, D_RETENTION_GATE, BANK), d_retention)
    return tl.sum(d_limit - by_decay, 0), tl.sum(d_rate_gate, 0), tl.sum(d_retention, 0)


@triton.jit
def unit_adjoint(grad, x, scale):
    """The gradient of the argument of x = ``scale`` · argument, of unit length, from that of x."""
    return (grad - x * tl.sum(x * grad, 1)[:, None]) * scale[:, None]


@triton.jit
def query_adjoint(d_query, scratch, BANK: tl.constexpr):
    """The gradient of queries before they got unit length."""
    query = tokens_of(scratch + BANK.QUERY, 0, BANK.BLOCK_K, BANK)
    return unit_adjoint(d_query, query, tl.load(vectors_at(scratch, QUERY_SCALE, BANK)))


@triton.jit
def made_adjoint(d_key, d_value, scratch, BANK: tl.constexpr):
    """The gradient of what the memories made, from those of keys, values and gates, goes to scratch.

    Returns those of the inputs of keys and of values as far as they do not go through a memory.
    """
    C: tl.constexpr = BANK.BLOCK_C
    LAST: tl.constexpr = BANK.LAST
    memory, row, _, _ = locate_rows(LAST, BANK)
    made = scratch + BANK.LAST.D_MADE
    key = tokens_of(scratch + BANK.KEY, 0, BANK.BLOCK_K, BANK)
    d_key = unit_adjoint(d_key, key, tl.load(vectors_at(scratch, KEY_SCALE, BANK)))
    put_tokens(made, d_key, BANK.BLOCK_V, BANK)
    put_tokens(operands_at(made, BANK) + 2 * BANK.BLOCK_V * C, d_value, BANK.BLOCK_V, BANK)
    tl.debug_barrier()
    x = rows_of(made, BANK.BLOCKS, BANK.BLOCK_V, BANK).to(tl.float32)
    x = tl.where(memory < 2, x, 0.0)
    d_rate = tl.load(vectors_at(scratch, D_RATE_GATE, BANK)[None, None, :])
    x += tl.where((memory == BANK.WIDE) & (row == 0), d_rate, 0.0)
    d_retention = tl.load(vectors_at(scratch, D_RETENTION_GATE, BANK)[None, None, :])
    x += tl.where((memory == BANK.MEMORIES - 1) & (row == BANK.NARROW - 1), d_retention, 0.0)
    put_rows(made, x, BANK.BLOCK_V, BANK)
    tl.debug_barrier()
    return d_key, d_value


@triton.jit
def inputs_adjoint(d_key, d_value, hidden, d_tokens, place, scratch, BANK: tl.constexpr):
    """Gradients of the inputs of the memories that made keys, values and gates."""
    C: tl.constexpr = BANK.BLOCK_C
    LAYER: tl.constexpr = BANK.FIRST if BANK.HIDDEN > 0 else BANK.LAST
    if BANK.HIDDEN > 0:
        back = send_back(scratch, scratch + BANK.LAST.D_MADE, BANK)
        put_rows(
            scratch + LAYER.D_MADE, hidden_adjoint(back, hidden, None, BANK, BANK.PER), LAYER.WIDTH, BANK
        )
        tl.debug_barrier()
    grad = turned_rows_of(scratch + LAYER.D_MADE, LAYER.WIDTH, BANK)
    PART: tl.constexpr = C * BANK.BLOCK_K // 256
    shares = scratch + BANK.SHARES
    for start in range(0, BANK.BLOCK_K, BANK.SLICE):
        base = scratch + LAYER.BASE_OPERAND
        x = product(grad, operand_at(base, start, LAYER.WIDTH // BANK.PER, BANK.BLOCK_K, BANK), BANK)
        store_tile(shares + start * 16, x, BANK.BLOCK_K, BANK.PER * PART, PART, BANK)
    tl.debug_barrier()
    store_tokens(d_tokens.key, place, d_key + token_shares(shares, 0, BANK.PER, BANK), BANK.KEY_DIM)
    store_tokens(
        d_tokens.value, place, d_value + token_shares(shares, BANK.PER, BANK.PER, BANK), BANK.KEY_DIM
    )
    GATES: tl.constexpr = (BANK.MEMORIES - BANK.WIDE) * BANK.PER
    d_gate = token_shares(shares, BANK.WIDE * BANK.PER, GATES, BANK)
    store_tokens(d_tokens.gate, place, d_gate, BANK.KEY_DIM)
