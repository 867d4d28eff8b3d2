"""The gradient of the MLP with weights of each sequence, from its input: the hidden layer is computed again.

Three kinds of kernels: the hidden layer with its error signals; the sums over tokens, each weighted by its
rate and bound; and the gradient of the input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated
from nl_kernels.chunk_kernels.tiled_launch import operand_dtype, tiled_precision
from nl_kernels.chunk_kernels.tiled_products import add_product, load_operand
from nl_kernels.ops.continuum import launch
from nl_kernels.ops.continuum.triton_forward import add_rows, product_call, tile_of
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.targets import architecture_of


@triton.jit
def _store(out, batch, row, column, rows, tile, COLUMNS: tl.constexpr):
    at = batch * rows * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(out + at, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_squares(out, batch, row, rows, first, signal, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """This tile's part of the squared length of each row of a signal, [batches, rows, TILES]."""
    at = (batch * rows + row) * TILES + first // BLOCK_N
    tl.store(out + at, tl.sum(signal * signal, 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def signal_kernel(
    x,
    error,
    up,
    down,
    gate,
    hidden,
    up_signal,
    gate_signal,
    up_squares,
    gate_squares,
    rows,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The hidden layer, and the gradient at the outputs of up and gate from that at the MLP's output."""
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    batch, row, column = tile_of(rows, HIDDEN, BLOCK_M, BLOCK_N)
    x += batch * rows * WIDTH
    error += batch * rows * WIDTH
    weight = batch * (HIDDEN * WIDTH)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value = add_rows(zero, x, up + weight, row, column, rows, HIDDEN, WIDTH, True, BLOCK_K, PRECISION)
    back = add_rows(zero, error, down + weight, row, column, rows, HIDDEN, WIDTH, False, BLOCK_K, PRECISION)
    first = tl.min(column, 0)
    if gate is not None:
        z = add_rows(zero, x, gate + weight, row, column, rows, HIDDEN, WIDTH, True, BLOCK_K, PRECISION)
        opened, slope, _, _ = activated(z, "silu", False)
        closing = back * value * slope
        value *= opened
        back *= opened
        _store(gate_signal, batch, row, column, rows, closing, HIDDEN)
        if gate_squares is not None:
            _store_squares(gate_squares, batch, row, rows, first, closing, TILES, BLOCK_N)
    else:
        value, slope, _, _ = activated(value, "gelu", False)
        back *= slope
    _store(hidden, batch, row, column, rows, value, HIDDEN)
    _store(up_signal, batch, row, column, rows, back, HIDDEN)
    if up_squares is not None:
        _store_squares(up_squares, batch, row, rows, first, back, TILES, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def token_sum_kernel(
    signal,
    inputs,
    rates,
    squares,
    out,
    longest,
    rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``Σ_t η_t s_t signal_t inputs_tᵀ``, with s_t taking a signal longer than ``longest`` down to it.

    ``rates`` [batches, rows], or None: 1. ``squares`` [batches, rows, TILES], whose sum is a signal's squared
    length, or None: no bound.
    """
    batch, row, column = tile_of(OUT, IN, BLOCK_M, BLOCK_N)
    signal += batch * rows * OUT
    inputs += batch * rows * IN
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K).to(tl.int64)
        left = load_operand(signal, row, token, OUT, rows, OUT, True)
        if rates is not None:
            weight = tl.load(rates + batch * rows + token, mask=token < rows, other=0.0).to(tl.float32)
            if squares is not None:
                tile = tl.arange(0, BLOCK_TILES)
                at = (batch * rows + token)[None, :] * TILES + tile[:, None]
                inside = (tile < TILES)[:, None] & (token < rows)[None, :]
                length = tl.sqrt(tl.sum(tl.load(squares + at, mask=inside, other=0.0), 0))
                weight *= longest / tl.maximum(length, longest)
            left = left.to(tl.float32) * weight[None, :]
        right = load_operand(inputs, token, column, rows, IN, IN, False)
        acc = add_product(acc, left, right, PRECISION)
    at = row[:, None] * IN + column[None, :]
    inside = (row < OUT)[:, None] & (column < IN)[None, :]
    tl.store(out + batch * (OUT * IN) + at, acc.to(out.dtype.element_ty), mask=inside)


def plan_backward(
    error: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    rates: torch.Tensor | None,
    error_bound: float | None,
    input_gradient: bool,
    *,
    architecture: str,
) -> tuple[list[KernelCall], list[torch.Tensor | None]]:
    """The calls, and what they fill: the gradients of x, up, down and gate; runs nothing."""
    batches, rows, width = x.shape
    hidden_width = up.shape[1]
    precision = tiled_precision(x.dtype, architecture)
    kind = operand_dtype(precision)
    tiles = launch.product_tiles(rows, hidden_width, width, precision, architecture, held=3)
    parts = triton.cdiv(hidden_width, tiles.n)

    def made(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty(batches, rows, *shape, dtype=dtype)

    hidden, up_signal = made(hidden_width, dtype=kind), made(hidden_width, dtype=kind)
    gate_signal = None if gate is None else made(hidden_width, dtype=kind)
    bounded = error_bound is not None
    up_squares = made(parts, dtype=torch.float32) if bounded else None
    gate_squares = made(parts, dtype=torch.float32) if bounded and gate is not None else None
    calls = [
        KernelCall(
            signal_kernel,
            (batches * triton.cdiv(rows, tiles.m) * parts,),
            {
                "x": x,
                "error": error,
                "up": up,
                "down": down,
                "gate": gate,
                "hidden": hidden,
                "up_signal": up_signal,
                "gate_signal": gate_signal,
                "up_squares": up_squares,
                "gate_squares": gate_squares,
                "rows": rows,
            },
            {
                "WIDTH": width,
                "HIDDEN": hidden_width,
                "BLOCK_M": tiles.m,
                "BLOCK_N": tiles.n,
                "BLOCK_K": tiles.k,
                "PRECISION": precision,
            },
            tiles.warps,
            tiles.stages,
        )
    ]
    longest = 0.0 if error_bound is None else error_bound * hidden_width**0.5
    sums = []
    for signal, inputs, weight, squares in (
        (up_signal, x, up, up_squares),
        (error, hidden, down, None),
        (gate_signal, x, gate, gate_squares),
    ):
        total = None if weight is None else torch.empty_like(weight, dtype=torch.float32)
        sums.append(total)
        if total is not None:
            calls.append(_token_sum(signal, inputs, rates, squares, longest, total, precision, architecture))
    grad_x = None
    if input_gradient:
        grad_x = torch.empty_like(x)
        calls.append(product_call(up_signal, up, gate_signal, gate, grad_x, False, precision, architecture))
    return calls, [grad_x, *sums]


def _token_sum(
    signal: torch.Tensor,
    inputs: torch.Tensor,
    rates: torch.Tensor | None,
    squares: torch.Tensor | None,
    longest: float,
    out: torch.Tensor,
    precision: str,
    architecture: str,
) -> KernelCall:
    batches, rows, into = inputs.shape
    outer = signal.shape[2]
    # AMD spills turned tiles of 128 × 128
    held = 2 if architecture.startswith("gfx") else 1
    tiles = launch.product_tiles(outer, into, rows, precision, architecture, held=held)
    parts = 0 if squares is None else squares.shape[2]
    return KernelCall(
        token_sum_kernel,
        (batches * triton.cdiv(outer, tiles.m) * triton.cdiv(into, tiles.n),),
        {
            "signal": signal,
            "inputs": inputs,
            "rates": rates,
            "squares": squares,
            "out": out,
            "longest": float(longest),
            "rows": rows,
        },
        {
            "OUT": outer,
            "IN": into,
            "TILES": parts,
            "BLOCK_TILES": triton.next_power_of_2(max(1, parts)),
            "BLOCK_M": tiles.m,
            "BLOCK_N": tiles.n,
            "BLOCK_K": tiles.k,
            "PRECISION": precision,
        },
        tiles.warps,
        tiles.stages,
    )


def mlp_backward(
    error: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    rates: torch.Tensor | None,
    error_bound: float | None,
    input_gradient: bool,
) -> list[torch.Tensor | None]:
    """Gradients of x, up, down, gate; see :func:`.registration.mlp_backward`."""
    calls, made = plan_backward(
        error,
        x,
        up,
        down,
        gate,
        rates,
        error_bound,
        input_gradient,
        architecture=architecture_of(x.device),
    )
    run_calls(calls, x.device)
    return made
