"""The sums of a chunk's step from its tokens, and the gradient of what is read between two steps.

The error ``f(k) − value u`` is made in one kernel with the way down, in fp32: both of its terms are rounded
nowhere, and where the keys are what is read, the outputs come from the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nl_kernels.ops.continuum import launch
from nl_kernels.ops.continuum.state import ContinuumLevel, Weights
from nl_kernels.ops.continuum.triton_backward import Signals, signal_call, sum_calls
from nl_kernels.ops.continuum.triton_forward import (
    Hidden,
    add_rows,
    hidden_call,
    mlp,
    product_call,
    store_rows,
    store_squares,
    tile_of,
)
from nl_kernels.ops.continuum.triton_update import update_in_place  # noqa: F401  one of a chunk's products
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.targets import architecture_of

IMPL = "triton"


@triton.jit(do_not_specialize=["rows"])
def error_kernel(
    hidden,
    down,
    inputs,
    value,
    out,
    error,
    squares,
    rows,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = hidden downᵀ`` (None: not stored) and ``error = hidden downᵀ − inputs valueᵀ``.

    One ``value`` for all batches. ``squares`` [batches, rows, tiles]: the parts of the errors' squared
    lengths, or None.
    """
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    batch, row, column = tile_of(rows, WIDTH, BLOCK_M, BLOCK_N)
    down += batch * (HIDDEN * WIDTH)
    hidden += batch * rows * HIDDEN
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = add_rows(acc, hidden, down, row, column, rows, WIDTH, HIDDEN, True, BLOCK_K, PRECISION)
    if out is not None:
        store_rows(out, batch, row, column, rows, acc, WIDTH)
    inputs += batch * rows * WIDTH
    acc = -add_rows(-acc, inputs, value, row, column, rows, WIDTH, WIDTH, True, BLOCK_K, PRECISION)
    store_rows(error, batch, row, column, rows, acc, WIDTH)
    if squares is not None:
        store_squares(squares, batch, row, rows, tl.min(column, 0), acc, TILES, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def back_kernel(
    error,
    down,
    up_slope,
    gate_slope,
    up_signal,
    gate_signal,
    up_squares,
    gate_squares,
    error_squares,
    longest,
    rows,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ERROR_TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(s error down) ∘ slope``, the gradient at the outputs of up and gate, with the squares of its rows.

    s takes an error longer than ``longest`` down to it: ``error_squares`` [batches, rows, ERROR_TILES] add up
    to its squared length; None: no bound.
    """
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    batch, row, column = tile_of(rows, HIDDEN, BLOCK_M, BLOCK_N)
    error += batch * rows * WIDTH
    down += batch * (HIDDEN * WIDTH)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    back = add_rows(zero, error, down, row, column, rows, HIDDEN, WIDTH, False, BLOCK_K, PRECISION)
    if error_squares is not None:
        tile = tl.arange(0, BLOCK_TILES)
        at = (batch * rows + row)[:, None] * ERROR_TILES + tile[None, :]
        inside = (row < rows)[:, None] & (tile < ERROR_TILES)[None, :]
        length = tl.sqrt(tl.sum(tl.load(error_squares + at, mask=inside, other=0.0), 1))
        back *= (longest / tl.maximum(length, longest))[:, None]
    first = tl.min(column, 0)
    at = batch * rows * HIDDEN + row[:, None] * HIDDEN + column[None, :]
    inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    signal = back * tl.load(up_slope + at, mask=inside, other=0.0).to(tl.float32)
    store_rows(up_signal, batch, row, column, rows, signal, HIDDEN)
    if up_squares is not None:
        store_squares(up_squares, batch, row, rows, first, signal, TILES, BLOCK_N)
    if gate_slope is not None:
        signal = back * tl.load(gate_slope + at, mask=inside, other=0.0).to(tl.float32)
        store_rows(gate_signal, batch, row, column, rows, signal, HIDDEN)
        if gate_squares is not None:
            store_squares(gate_squares, batch, row, rows, first, signal, TILES, BLOCK_N)


def plan_chunk(
    keys: torch.Tensor,
    inputs: torch.Tensor,
    value: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    rates: torch.Tensor,
    error_bound: float | None,
    output: bool,
    *,
    architecture: str,
) -> tuple[list[KernelCall], list[torch.Tensor | None]]:
    """The calls, and what they fill: the MLP's outputs (or None), and the sums of up, down and gate."""
    batches, tokens, width = keys.shape
    precision = launch.product_precision(keys.dtype, architecture)
    weights = (up, down, gate)
    sums = [None if w is None else w.new_empty(batches, *w.shape[-2:], dtype=torch.float32) for w in weights]
    # weights of all sequences: their tokens are one matrix
    x, inputs, up, down, gate = _of_all(keys, inputs, *weights)
    hidden_one, hidden = hidden_call(x, up, gate, True, precision, architecture)
    out = torch.empty_like(x) if output else None
    error_one, error, squares = _error_call(
        hidden.out, down, inputs, value, out, error_bound is not None, precision, architecture
    )
    back_one, signals = _back_call(error, squares, error_bound, down, hidden, precision, architecture)
    error = error.view(batches, tokens, width)
    squares = None if squares is None else squares.view(batches, tokens, -1)
    calls = [hidden_one, error_one, back_one]
    calls += sum_calls(
        error, keys, signals.of(batches), rates, error_bound, squares, sums, False, precision, architecture
    )
    return calls, [None if out is None else out.view_as(keys), *sums]


def plan_read_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    owners: Sequence[tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]],
    *,
    architecture: str,
) -> tuple[list[KernelCall], torch.Tensor]:
    """The calls that fill the gradient of x and add to each owner's totals, see :func:`read_backward`."""
    batches, _, width = x.shape
    precision = launch.product_precision(x.dtype, architecture)
    rows, error, up, down, gate = _of_all(x, grad, up, down, gate)
    first, signals = signal_call(error, rows, up, down, gate, False, precision, architecture)
    grad_x = torch.empty_like(rows)
    calls = [
        first,
        product_call(signals.up, up, signals.gate, gate, grad_x, False, precision, architecture),
    ]
    for share, totals in owners:
        shared = totals[0].ndim == 2
        parts = 1 if shared else batches
        totals = [t if t is None or not shared else t[None] for t in totals]
        share = None if share is None else share.view(parts, -1)
        calls += sum_calls(
            grad.view(parts, -1, width),
            x.view(parts, -1, width),
            signals.of(parts),
            share,
            None,
            None,
            totals,
            True,
            precision,
            architecture,
        )
    return calls, grad_x.view_as(x)


def _of_all(
    x: torch.Tensor,
    other: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """Rows and weights in one batch where the weights are those of all sequences."""
    if up.ndim == 3:
        return [x, other, up, down, gate]
    rows = [t.view(1, -1, t.shape[2]) for t in (x, other)]
    return rows + [None if w is None else w[None] for w in (up, down, gate)]


def _error_call(
    hidden: torch.Tensor,
    down: torch.Tensor,
    inputs: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor | None,
    bounded: bool,
    precision: str,
    architecture: str,
) -> tuple[KernelCall, torch.Tensor, torch.Tensor | None]:
    batches, rows, width = inputs.shape
    hidden_width = hidden.shape[2]
    tiles = launch.product_tiles(rows, width, hidden_width, precision, architecture)
    parts = triton.cdiv(width, tiles.n)
    error = torch.empty_like(inputs, dtype=launch.operand_dtype(precision))
    squares = inputs.new_empty(batches, rows, parts, dtype=torch.float32) if bounded else None
    call = launch.call_of(
        error_kernel,
        tiles,
        (batches, rows, width),
        precision,
        {
            "hidden": hidden,
            "down": down,
            "inputs": inputs,
            "value": value,
            "out": out,
            "error": error,
            "squares": squares,
            "rows": rows,
        },
        {"WIDTH": width, "HIDDEN": hidden_width},
    )
    return call, error, squares


def _back_call(
    error: torch.Tensor,
    squares: torch.Tensor | None,
    error_bound: float | None,
    down: torch.Tensor,
    hidden: Hidden,
    precision: str,
    architecture: str,
) -> tuple[KernelCall, Signals]:
    batches, rows, width = error.shape
    hidden_width = hidden.out.shape[2]
    tiles = launch.product_tiles(rows, hidden_width, width, precision, architecture)
    parts = triton.cdiv(hidden_width, tiles.n)
    slopes = hidden.up_slope, hidden.gate_slope
    up, gate = (None if slope is None else torch.empty_like(slope) for slope in slopes)
    up_squares, gate_squares = (
        None
        if slope is None or error_bound is None
        else slope.new_empty(batches, rows, parts, dtype=torch.float32)
        for slope in slopes
    )
    error_tiles = 0 if squares is None else squares.shape[2]
    call = launch.call_of(
        back_kernel,
        tiles,
        (batches, rows, hidden_width),
        precision,
        {
            "error": error,
            "down": down,
            "up_slope": hidden.up_slope,
            "gate_slope": hidden.gate_slope,
            "up_signal": up,
            "gate_signal": gate,
            "up_squares": up_squares,
            "gate_squares": gate_squares,
            "error_squares": squares,
            "longest": (error_bound or 0.0) * width**0.5,
            "rows": rows,
        },
        {
            "WIDTH": width,
            "HIDDEN": hidden_width,
            "ERROR_TILES": error_tiles,
            "BLOCK_TILES": triton.next_power_of_2(max(1, error_tiles)),
        },
    )
    return call, Signals(hidden.out, up, gate, up_squares, gate_squares)


def read(x: torch.Tensor, weights: Weights, records: bool) -> tuple[torch.Tensor, tuple[()]]:
    """See :func:`.eager.read`; nothing is recorded, as the backward computes the hidden layer again."""
    x_of_all, _, *weights = _of_all(x, x, *weights)
    return mlp(x_of_all, *weights).view_as(x), ()


def chunk_sums(
    level: ContinuumLevel,
    keys: torch.Tensor,
    inputs: torch.Tensor,
    weights: Weights,
    rates: torch.Tensor,
    reads: bool,
) -> tuple[torch.Tensor | None, Weights]:
    """What a chunk's step subtracts from weights or adds to momenta: Σ_t η_t δ_t x_tᵀ of each, fp32.

    Args:
        keys, inputs: [B, C, D]; the targets are ``level.value`` times the inputs.
        weights: of all sequences or of each.
        rates: [B, C], 0 where there is no token.
        reads: also return the MLP's outputs for the keys, otherwise None.
    """
    value, architecture = level.value.contiguous(), architecture_of(keys.device)
    calls, (y, *sums) = plan_chunk(
        keys, inputs, value, *weights, rates, level.error_bound, reads, architecture=architecture
    )
    run_calls(calls, keys.device)
    return y, Weights(*sums)


def read_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    activations: tuple[()],
    owners: Sequence[tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]],
) -> torch.Tensor:
    """See :func:`.eager.read_backward`."""
    shares = [
        None if share is None else share[:, None].expand(x.shape[:2]).contiguous() for share, _ in owners
    ]
    owners = [(share, totals) for share, (_, totals) in zip(shares, owners)]
    calls, d_x = plan_read_backward(d_y, x, *weights, owners, architecture=architecture_of(x.device))
    run_calls(calls, x.device)
    return d_x
