"""The gradient of the MLP with weights of each sequence, from its input: the hidden layer is computed again.

Three kinds of kernels: the hidden layer with its error signals; the sums over tokens, each weighted by its
rate and bound; and the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nl_kernels.ops.continuum.launch import Plan
from nl_kernels.ops.continuum.state import Weights
from nl_kernels.ops.continuum.triton_forward import (
    add_product_call,
    add_rows,
    store_rows,
    tile_of,
)
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import activation, add_product, load_operand
from nl_kernels.triton_support.targets import TARGETS, architecture_of
from nl_kernels.triton_support.tiles import power_of_two


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
    rows,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The hidden layer, and the gradient at the outputs of up and gate from that at the MLP's output."""
    batch, row, column = tile_of(rows, HIDDEN, BLOCK_M, BLOCK_N)
    x += batch * rows * WIDTH
    error += batch * rows * WIDTH
    weight = batch * (HIDDEN * WIDTH)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value = add_rows(zero, x, up + weight, row, column, rows, HIDDEN, WIDTH, True, BLOCK_K, PRECISION)
    back = add_rows(zero, error, down + weight, row, column, rows, HIDDEN, WIDTH, False, BLOCK_K, PRECISION)
    if gate is not None:
        z = add_rows(zero, x, gate + weight, row, column, rows, HIDDEN, WIDTH, True, BLOCK_K, PRECISION)
        opened, slope, _ = activation(z, "silu")
        closing = back * value * slope
        value *= opened
        back *= opened
        store_rows(gate_signal, batch, row, column, rows, closing, HIDDEN)
    else:
        value, slope, _ = activation(value, "gelu")
        back *= slope
    store_rows(hidden, batch, row, column, rows, value, HIDDEN)
    store_rows(up_signal, batch, row, column, rows, back, HIDDEN)


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
        # The left operand is read as it lies. Weighted it would be one in registers, and compilers for Hopper
        # write those of a loop's next round while the products of this one run.
        left = load_operand(signal, row, token, OUT, rows, OUT, True)
        right = load_operand(inputs, token, column, rows, IN, IN, False)
        if rates is not None:
            weight = tl.load(rates + batch * rows + token, mask=token < rows, other=0.0).to(tl.float32)
            if squares is not None:
                tile = tl.arange(0, BLOCK_TILES)
                part = (batch * rows + token)[None, :] * TILES + tile[:, None]
                there = (tile < TILES)[:, None] & (token < rows)[None, :]
                length = tl.sqrt(tl.sum(tl.load(squares + part, mask=there, other=0.0), 0))
                weight *= longest / tl.maximum(length, longest)
            right = right.to(tl.float32) * weight[:, None]
        acc = add_product(acc, left, right, PRECISION)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


class Signals(NamedTuple):
    """The hidden layer [batches, rows, H], and gradients at the outputs of up and gate.

    With a bound on these also the parts of their squared lengths, [batches, rows, tiles].
    """

    hidden: torch.Tensor
    up_signal: torch.Tensor
    gate_signal: torch.Tensor | None
    up_squares: torch.Tensor | None = None
    gate_squares: torch.Tensor | None = None

    def of(self, batches: int) -> Signals:
        """The same rows in another number of batches."""
        return Signals(*(None if t is None else t.view(batches, -1, t.shape[2]) for t in self))


def add_signal_call(plan: Plan, error: torch.Tensor, x: torch.Tensor, weights: Weights) -> Signals:
    """Plan :func:`signal_kernel`."""
    (batches, rows, width), hidden_width, gated = x.shape, weights.up.shape[1], weights.gate is not None
    shape = batches, rows, hidden_width
    tiles = plan.tiles(rows, hidden_width, width, held=3)
    filled = [plan.empty(*shape) if there else None for there in (True, True, gated)]
    arguments = {"x": x, "error": error, **weights._asdict(), "rows": rows}
    arguments |= zip(Signals._fields, filled)
    plan.add(signal_kernel, tiles, shape, {"WIDTH": width, "HIDDEN": hidden_width}, **arguments)
    return Signals(*filled)


def add_sum_calls(
    plan: Plan,
    error: torch.Tensor,
    x: torch.Tensor,
    signals: Signals,
    rates: torch.Tensor | None,
    error_bound: float | None,
    error_squares: torch.Tensor | None,
    totals: Sequence[torch.Tensor | None],
    adds: bool,
) -> None:
    """Plan the calls of :func:`token_sum_kernel` that fill the totals [batches, ..] of up, down and gate.

    ``adds``: they add to what the totals hold.
    """
    for signal, inputs, squares, total in (
        (signals.up_signal, x, signals.up_squares, totals[0]),
        (error, signals.hidden, error_squares, totals[1]),
        (signals.gate_signal, x, signals.gate_squares, totals[2]),
    ):
        if total is None:
            continue
        (batches, rows, into), out = inputs.shape, signal.shape[2]
        # AMD spills turned tiles of 128 × 128
        tiles = plan.tiles(out, into, rows, held=2 if plan.architecture.startswith("gfx") else 1)
        constants = {"OUT": out, "IN": into, **square_tiles(squares, "TILES"), "ADDS": adds}
        # What weighs the tokens is in the pipeline too: three steps take 113 KiB of hidden layers of 8,192,
        # and of 16,384 more than sm_80 has.
        if TARGETS[plan.architecture].shared_memory < 128 * 1024 or constants["BLOCK_TILES"] > 64:
            tiles = tiles._replace(stages=2)
        arguments = {"signal": signal, "inputs": inputs, "rates": rates, "squares": squares, "out": total}
        longest = (error_bound or 0.0) * out**0.5
        shape = batches, out, into
        plan.add(token_sum_kernel, tiles, shape, constants, longest=longest, rows=rows, **arguments)


def square_tiles(squares: torch.Tensor | None, name: str) -> dict[str, int]:
    """How many parts a row's squared length has, and the block that holds them."""
    parts = 0 if squares is None else squares.shape[2]
    return {name: parts, "BLOCK_TILES": power_of_two(max(1, parts))}


def plan_backward(
    error: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    input_gradient: bool,
    *,
    architecture: str,
) -> tuple[list[KernelCall], list[torch.Tensor | None]]:
    """The calls, and what they fill: the gradients of x, up, down and gate; runs nothing."""
    plan, weights = Plan(x, architecture), Weights(up, down, gate)
    signals = add_signal_call(plan, error, x, weights)
    sums = [None if w is None else torch.empty_like(w, dtype=torch.float32) for w in weights]
    add_sum_calls(plan, error, x, signals, None, None, None, sums, False)
    d_x = torch.empty_like(x) if input_gradient else None
    if input_gradient:
        add_product_call(plan, signals.up_signal, up, signals.gate_signal, gate, d_x, False)
    return plan.calls, [d_x, *sums]


def mlp_backward(error: torch.Tensor, x: torch.Tensor, *rest: Any) -> list[torch.Tensor | None]:
    """Gradients of x, up, down, gate: the operator ``continuum_mlp_backward``."""
    calls, made = plan_backward(error, x, *rest, architecture=architecture_of(x.device))
    run_calls(calls, x.device)
    return made
