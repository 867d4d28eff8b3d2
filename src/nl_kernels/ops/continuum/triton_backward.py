"""The gradient of the MLP with weights of each sequence, from its input: the hidden layer is computed again.

Three kinds of kernels: the hidden layer with its error signals; the sums over tokens, each weighted by its
rate and bound; and the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated
from nl_kernels.ops.continuum import launch
from nl_kernels.ops.continuum.triton_forward import (
    add_rows,
    product_call,
    store_rows,
    store_squares,
    tile_of,
)
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import add_product, load_operand
from nl_kernels.triton_support.targets import TARGETS, architecture_of


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
        store_rows(gate_signal, batch, row, column, rows, closing, HIDDEN)
        if gate_squares is not None:
            store_squares(gate_squares, batch, row, rows, first, closing, TILES, BLOCK_N)
    else:
        value, slope, _, _ = activated(value, "gelu", False)
        back *= slope
    store_rows(hidden, batch, row, column, rows, value, HIDDEN)
    store_rows(up_signal, batch, row, column, rows, back, HIDDEN)
    if up_squares is not None:
        store_squares(up_squares, batch, row, rows, first, back, TILES, BLOCK_N)


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
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``Σ_t η_t s_t signal_t inputs_tᵀ``, with s_t taking a signal longer than ``longest`` down to it.

    ``rates`` [batches, rows], or None: 1. ``squares`` [batches, rows, TILES], whose sum is a signal's squared
    length, or None: no bound. ``ADDS``: to what ``out`` holds.
    """
    batch, row, column = tile_of(OUT, IN, BLOCK_M, BLOCK_N)
    signal += batch * rows * OUT
    inputs += batch * rows * IN
    at = batch * (OUT * IN) + row[:, None] * IN + column[None, :]
    inside = (row < OUT)[:, None] & (column < IN)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ADDS:
        acc += tl.load(out + at, mask=inside, other=0.0)
    for start in range(0, rows, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K).to(tl.int64)
        left = load_operand(signal, row, token, OUT, rows, OUT, True)
        if rates is not None:
            weight = tl.load(rates + batch * rows + token, mask=token < rows, other=0.0).to(tl.float32)
            if squares is not None:
                tile = tl.arange(0, BLOCK_TILES)
                part = (batch * rows + token)[None, :] * TILES + tile[:, None]
                there = (tile < TILES)[:, None] & (token < rows)[None, :]
                length = tl.sqrt(tl.sum(tl.load(squares + part, mask=there, other=0.0), 0))
                weight *= longest / tl.maximum(length, longest)
            left = left.to(tl.float32) * weight[None, :]
        right = load_operand(inputs, token, column, rows, IN, IN, False)
        acc = add_product(acc, left, right, PRECISION)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


class Signals(NamedTuple):
    """What the hidden layer and its error signals are on the way back, [batches, rows, H]."""

    hidden: torch.Tensor
    up: torch.Tensor
    gate: torch.Tensor | None
    up_squares: torch.Tensor | None  # [batches, rows, tiles]
    gate_squares: torch.Tensor | None

    def of(self, batches: int) -> Signals:
        """The same rows in another number of batches."""
        return Signals(*(None if t is None else t.view(batches, -1, t.shape[2]) for t in self))


def signal_call(
    error: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    bounded: bool,
    precision: str,
    architecture: str,
) -> tuple[KernelCall, Signals]:
    """The call of :func:`signal_kernel`, and what it fills; squared lengths where ``bounded``."""
    batches, rows, width = x.shape
    hidden_width = up.shape[1]
    kind = launch.operand_dtype(precision)
    tiles = launch.product_tiles(rows, hidden_width, width, precision, architecture, held=3)
    parts = triton.cdiv(hidden_width, tiles.n)

    def made(width: int, dtype: torch.dtype, there: bool = True) -> torch.Tensor | None:
        return x.new_empty(batches, rows, width, dtype=dtype) if there else None

    gated = gate is not None
    signals = Signals(
        made(hidden_width, kind),
        made(hidden_width, kind),
        made(hidden_width, kind, gated),
        made(parts, torch.float32, bounded),
        made(parts, torch.float32, bounded and gated),
    )
    call = launch.call_of(
        signal_kernel,
        tiles,
        (batches, rows, hidden_width),
        precision,
        {
            "x": x,
            "error": error,
            "up": up,
            "down": down,
            "gate": gate,
            "hidden": signals.hidden,
            "up_signal": signals.up,
            "gate_signal": signals.gate,
            "up_squares": signals.up_squares,
            "gate_squares": signals.gate_squares,
            "rows": rows,
        },
        {"WIDTH": width, "HIDDEN": hidden_width},
    )
    return call, signals


def sum_calls(
    error: torch.Tensor,
    x: torch.Tensor,
    signals: Signals,
    rates: torch.Tensor | None,
    error_bound: float | None,
    error_squares: torch.Tensor | None,
    totals: Sequence[torch.Tensor | None],
    adds: bool,
    precision: str,
    architecture: str,
) -> list[KernelCall]:
    """The calls that fill the totals [batches, ..] of up, down and gate, or add to them."""
    bound = error_bound or 0.0
    return [
        _token_sum(
            signal,
            inputs,
            rates,
            squares,
            bound * signal.shape[2] ** 0.5,
            total,
            adds,
            precision,
            architecture,
        )
        for signal, inputs, squares, total in (
            (signals.up, x, signals.up_squares, totals[0]),
            (error, signals.hidden, error_squares, totals[1]),
            (signals.gate, x, signals.gate_squares, totals[2]),
        )
        if total is not None
    ]


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
    precision = launch.product_precision(x.dtype, architecture)
    bounded = error_bound is not None
    first, signals = signal_call(error, x, up, down, gate, bounded, precision, architecture)
    sums = [None if w is None else torch.empty_like(w, dtype=torch.float32) for w in (up, down, gate)]
    calls = [
        first,
        *sum_calls(error, x, signals, rates, error_bound, None, sums, False, precision, architecture),
    ]
    grad_x = None
    if input_gradient:
        grad_x = torch.empty_like(x)
        calls.append(product_call(signals.up, up, signals.gate, gate, grad_x, False, precision, architecture))
    return calls, [grad_x, *sums]


def _token_sum(
    signal: torch.Tensor,
    inputs: torch.Tensor,
    rates: torch.Tensor | None,
    squares: torch.Tensor | None,
    longest: float,
    out: torch.Tensor,
    adds: bool,
    precision: str,
    architecture: str,
) -> KernelCall:
    batches, rows, into = inputs.shape
    outer = signal.shape[2]
    # AMD spills turned tiles of 128 × 128
    held = 2 if architecture.startswith("gfx") else 1
    tiles = launch.product_tiles(outer, into, rows, precision, architecture, held=held)
    # What weighs the tokens is in the pipeline too: with three steps 113 KiB.
    if TARGETS[architecture].shared_memory < 128 * 1024:
        tiles = tiles._replace(stages=2)
    parts = 0 if squares is None else squares.shape[2]
    return launch.call_of(
        token_sum_kernel,
        tiles,
        (batches, outer, into),
        precision,
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
            "ADDS": adds,
        },
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
