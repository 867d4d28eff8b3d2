"""The MLP with weights of each sequence on a GPU: the hidden layer with its activation, then the way down.

Matrices are [batches, rows, width], weights [batches, out, in], all contiguous. Products round their operands
as their precision says and accumulate in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nl_kernels.ops.continuum.launch import Plan
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import activation, add_product, load_operand
from nl_kernels.triton_support.targets import architecture_of


@triton.jit
def add_rows(
    acc,
    a,
    b,
    row,
    column,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    B_TURNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + a b`` of a tile: a [rows, DEPTH], and b [DEPTH, COLUMNS] or, turned, [COLUMNS, DEPTH]."""
    B_WIDTH: tl.constexpr = DEPTH if B_TURNED else COLUMNS
    for first in range(0, DEPTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = load_operand(a, row, k, rows, DEPTH, DEPTH, False)
        right = load_operand(b, k, column, DEPTH, COLUMNS, B_WIDTH, B_TURNED)
        acc = add_product(acc, left, right, PRECISION)
    return acc


@triton.jit
def tile_of(rows, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of this program: its batch, and the rows and columns of its tile of [rows, COLUMNS].

    Tiles of one row strip come one after the other.
    """
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    batch = (program // (tiles_m * TILES_N)).to(tl.int64)
    tile = program % (tiles_m * TILES_N)
    row = (tile // TILES_N).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return batch, row, (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def store_rows(out, batch, row, column, rows, tile, COLUMNS: tl.constexpr):
    """A tile of ``out`` [batches, rows, COLUMNS]."""
    at = batch * rows * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(out + at, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_squares(out, batch, row, rows, first, tile, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """This tile's part of the squared length of each row, [batches, rows, TILES]."""
    at = (batch * rows + row) * TILES + first // BLOCK_N
    tl.store(out + at, tl.sum(tl.fma(tile, tile, 0.0), 1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def hidden_kernel(
    x,
    up,
    gate,
    out,
    up_slope,
    gate_slope,
    rows,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``GELU(x upᵀ)``, or with a gate ``SiLU(x gateᵀ) ∘ x upᵀ``.

    ``up_slope``, ``gate_slope``: the derivatives of it by the outputs of up and gate, or None.
    """
    batch, row, column = tile_of(rows, HIDDEN, BLOCK_M, BLOCK_N)
    x += batch * rows * WIDTH
    weight = batch * (HIDDEN * WIDTH)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = add_rows(zero, x, up + weight, row, column, rows, HIDDEN, WIDTH, True, BLOCK_K, PRECISION)
    if gate is not None:
        z = add_rows(zero, x, gate + weight, row, column, rows, HIDDEN, WIDTH, True, BLOCK_K, PRECISION)
        opened, slope, _ = activation(z, "silu")
        if gate_slope is not None:
            store_rows(up_slope, batch, row, column, rows, opened, HIDDEN)
            store_rows(gate_slope, batch, row, column, rows, hidden * slope, HIDDEN)
        hidden *= opened
    else:
        hidden, slope, _ = activation(hidden, "gelu")
        if up_slope is not None:
            store_rows(up_slope, batch, row, column, rows, slope, HIDDEN)
    store_rows(out, batch, row, column, rows, hidden, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    a0,
    b0,
    a1,
    b1,
    out,
    rows,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    B_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``a0 b0 (+ a1 b1)``: the way down, and back to the input."""
    batch, row, column = tile_of(rows, COLUMNS, BLOCK_M, BLOCK_N)
    weight = batch * (DEPTH * COLUMNS)
    a0 += batch * rows * DEPTH
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = add_rows(acc, a0, b0 + weight, row, column, rows, COLUMNS, DEPTH, B_TURNED, BLOCK_K, PRECISION)
    if a1 is not None:
        a1 += batch * rows * DEPTH
        acc = add_rows(acc, a1, b1 + weight, row, column, rows, COLUMNS, DEPTH, B_TURNED, BLOCK_K, PRECISION)
    store_rows(out, batch, row, column, rows, acc, COLUMNS)


def add_product_call(
    plan: Plan,
    a0: torch.Tensor,
    b0: torch.Tensor,
    a1: torch.Tensor | None,
    b1: torch.Tensor | None,
    out: torch.Tensor,
    turned: bool,
) -> None:
    """Plan :func:`rows_kernel`."""
    batches, rows, depth = a0.shape
    columns = out.shape[2]
    constants = {"DEPTH": depth, "COLUMNS": columns, "B_TURNED": turned}
    tiles, shape = plan.tiles(rows, columns, depth), (batches, rows, columns)
    plan.add(rows_kernel, tiles, shape, constants, a0=a0, b0=b0, a1=a1, b1=b1, out=out, rows=rows)


class Hidden(NamedTuple):
    """What :func:`hidden_kernel` fills, [batches, rows, H]."""

    out: torch.Tensor
    up_slope: torch.Tensor | None
    gate_slope: torch.Tensor | None


def add_hidden_call(
    plan: Plan, x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None, slopes: bool
) -> Hidden:
    """Plan :func:`hidden_kernel`; with ``slopes`` it fills these, too."""
    (batches, rows, width), hidden_width = x.shape, up.shape[1]
    shape = batches, rows, hidden_width
    present = (True, slopes, slopes and gate is not None)
    hidden = Hidden(*(plan.empty(*shape) if there else None for there in present))
    tiles = plan.tiles(rows, hidden_width, width, held=1 if gate is None else 2)
    constants = {"WIDTH": width, "HIDDEN": hidden_width}
    plan.add(hidden_kernel, tiles, shape, constants, x=x, up=up, gate=gate, rows=rows, **hidden._asdict())
    return hidden


def plan_forward(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None, *, architecture: str
) -> tuple[list[KernelCall], torch.Tensor]:
    """The calls, and the tensor that the last one fills; runs nothing."""
    plan, out = Plan(x, architecture), torch.empty_like(x)
    hidden = add_hidden_call(plan, x, up, gate, False)
    add_product_call(plan, hidden.out, down, None, None, out, True)
    return plan.calls, out


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """See :func:`nl_kernels.continuum_mlp`."""
    calls, out = plan_forward(x, up, down, gate, architecture=architecture_of(x.device))
    run_calls(calls, x.device)
    return out
