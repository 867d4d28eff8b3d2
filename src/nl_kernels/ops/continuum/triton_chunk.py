"""The sums of a chunk's step from its tokens, and the gradient of what is read between two steps.

The error ``f(k) − value u`` is made in one kernel with the way down, in fp32: both of its terms are rounded
nowhere, and where the keys are what is read, the outputs come from the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nl_kernels.ops.continuum.launch import Plan
from nl_kernels.ops.continuum.state import ContinuumLevel, Weights
from nl_kernels.ops.continuum.triton_backward import (
    Signals,
    add_signal_call,
    add_sum_calls,
    mlp_backward,  # noqa: F401
    square_tiles,
)
from nl_kernels.ops.continuum.triton_forward import (
    Hidden,
    add_hidden_call,
    add_product_call,
    add_rows,
    mlp,
    store_rows,
    store_squares,
    tile_of,
)
from nl_kernels.ops.continuum.triton_update import update_in_place  # noqa: F401  one of a chunk's products
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.targets import architecture_of

IMPL, IN_PLACE = "triton", True


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
    plan, bounded = Plan(keys, architecture), error_bound is not None
    sums = [
        None if w is None else plan.empty(batches, *w.shape[-2:], dtype=torch.float32)
        for w in (up, down, gate)
    ]
    # weights of all sequences: their tokens are one matrix
    x, inputs, weights = _of_all(keys, inputs, Weights(up, down, gate))
    hidden = add_hidden_call(plan, x, weights.up, weights.gate, True)
    out = torch.empty_like(x) if output else None
    error, squares = _add_error_call(plan, hidden.out, weights.down, inputs, value, out, bounded)
    signals = _add_back_call(plan, error, squares, error_bound, weights.down, hidden)
    error = error.view(batches, tokens, width)
    squares = None if squares is None else squares.view(batches, tokens, -1)
    add_sum_calls(plan, error, keys, signals.of(batches), rates, error_bound, squares, sums, False)
    return plan.calls, [None if out is None else out.view_as(keys), *sums]


def plan_read_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    owners: Sequence[tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]],
    *,
    architecture: str,
) -> tuple[list[KernelCall], torch.Tensor]:
    """The calls that fill the gradient of x and add to the owners' totals; :func:`.eager.read_backward`."""
    batches, tokens, width = x.shape
    plan = Plan(x, architecture)
    x_of_all, d_of_all, weights = _of_all(x, d_y, Weights(up, down, gate))
    signals = add_signal_call(plan, d_of_all, x_of_all, weights)
    d_x = torch.empty_like(x_of_all)
    add_product_call(plan, signals.up_signal, weights.up, signals.gate_signal, weights.gate, d_x, False)
    for share, totals in owners:
        shared = totals[0].ndim == 2
        parts = 1 if shared else batches
        totals = [t if t is None or not shared else t[None] for t in totals]
        if share is not None:
            share = share[:, None].expand(batches, tokens).contiguous().view(parts, -1)
        d_part, x_part = (t.view(parts, -1, width) for t in (d_y, x))
        add_sum_calls(plan, d_part, x_part, signals.of(parts), share, None, None, totals, True)
    return plan.calls, d_x.view_as(x)


def _of_all(
    x: torch.Tensor, other: torch.Tensor, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor, Weights]:
    """Rows and weights in one batch where the weights are those of all sequences."""
    if weights.up.ndim == 3:
        return x, other, weights
    x, other = (t.view(1, -1, t.shape[2]) for t in (x, other))
    return x, other, Weights(*(None if w is None else w[None] for w in weights))


def _add_error_call(
    plan: Plan,
    hidden: torch.Tensor,
    down: torch.Tensor,
    inputs: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor | None,
    bounded: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    (batches, rows, width), hidden_width = inputs.shape, hidden.shape[2]
    tiles = plan.tiles(rows, width, hidden_width)
    error = plan.empty(*inputs.shape)
    squares = plan.empty(batches, rows, -(-width // tiles.n), dtype=torch.float32) if bounded else None
    given = {"hidden": hidden, "down": down, "inputs": inputs, "value": value, "rows": rows}
    constants = {"WIDTH": width, "HIDDEN": hidden_width}
    plan.add(error_kernel, tiles, inputs.shape, constants, **given, out=out, error=error, squares=squares)
    return error, squares


def _add_back_call(
    plan: Plan,
    error: torch.Tensor,
    squares: torch.Tensor | None,
    error_bound: float | None,
    down: torch.Tensor,
    hidden: Hidden,
) -> Signals:
    (batches, rows, width), hidden_width = error.shape, hidden.out.shape[2]
    tiles, shape = plan.tiles(rows, hidden_width, width), (batches, rows, hidden_width)
    parts = batches, rows, -(-hidden_width // tiles.n)
    bounded, slopes = error_bound is not None, hidden[1:]
    signals = Signals(
        hidden.out,
        *(None if slope is None else torch.empty_like(slope) for slope in slopes),
        *(
            plan.empty(*parts, dtype=torch.float32) if bounded and slope is not None else None
            for slope in slopes
        ),
    )
    given = {"error": error, "down": down, "up_slope": slopes[0], "gate_slope": slopes[1], "rows": rows}
    filled = {name: tensor for name, tensor in signals._asdict().items() if name != "hidden"}
    longest = (error_bound or 0.0) * width**0.5
    constants = {"WIDTH": width, "HIDDEN": hidden_width, **square_tiles(squares, "ERROR_TILES")}
    plan.add(back_kernel, tiles, shape, constants, **given, **filled, error_squares=squares, longest=longest)
    return signals


def read(x: torch.Tensor, weights: Weights, records: bool) -> tuple[torch.Tensor, tuple[()]]:
    """See :func:`.eager.read`; nothing is recorded, as the backward computes the hidden layer again."""
    x_of_all, _, weights = _of_all(x, x, weights)
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
    calls, d_x = plan_read_backward(d_y, x, *weights, owners, architecture=architecture_of(x.device))
    run_calls(calls, x.device)
    return d_x
