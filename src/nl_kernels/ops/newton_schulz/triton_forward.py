"""Newton–Schulz on a GPU: two kernels, three launches a step.

``symmetric_product_kernel`` makes ``A = XXᵀ`` and then ``B = bA + cAAᵀ``: tiles on and below the diagonal
only, each stored twice. ``update_kernel`` makes ``aX + BX``. Products accumulate in fp32; X, A and B are
stored in the dtype of the operands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nl_kernels.ops.newton_schulz import launch
from nl_kernels.ops.newton_schulz.stack import normalised, restored, wide_stack
from nl_kernels.triton_support.kernel_call import Argument, KernelCall, run_calls
from nl_kernels.triton_support.language import matmul
from nl_kernels.triton_support.targets import architecture_of


@triton.jit
def _triangle(index):
    """Row and column ≤ row of entry ``index`` of a lower triangle counted row by row."""
    row = ((tl.sqrt(8.0 * tl.cast(index, tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: at most one off.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _tile(base, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers and mask of ``[rows, columns]`` of a row-major matrix [HEIGHT, WIDTH]."""
    pointers = base + rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    return pointers, (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def symmetric_product_kernel(
    factor,
    addend,
    out,
    product_scale,
    addend_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = product_scale · F Fᵀ + addend_scale · addend``, the addend symmetric, or absent (None).

    F [N, ROWS, COLUMNS]; addend and out [N, ROWS, ROWS]. Grid: tiles of the lower triangle × matrices.
    """
    tile_row, tile_column = _triangle(tl.program_id(0))
    matrix = tl.program_id(1).to(tl.int64)
    factor += matrix * ROWS * COLUMNS
    out += matrix * ROWS * ROWS
    rows = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_column * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start in range(0, COLUMNS, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        pointers, mask = _tile(factor, rows, depth, ROWS, COLUMNS)
        left = tl.load(pointers, mask=mask, other=0.0)
        pointers, mask = _tile(factor, columns, depth, ROWS, COLUMNS)
        right = tl.load(pointers, mask=mask, other=0.0)
        total += matmul(left, tl.trans(right), PRECISION)
    total *= product_scale
    pointers, mask = _tile(out, rows, columns, ROWS, ROWS)
    if addend is not None:
        addends, _ = _tile(addend + matrix * ROWS * ROWS, rows, columns, ROWS, ROWS)
        total += addend_scale * tl.load(addends, mask=mask, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(pointers, result, mask=mask)
    if tile_row != tile_column:
        pointers, mask = _tile(out, columns, rows, ROWS, ROWS)
        tl.store(pointers, tl.trans(result), mask=mask)


@triton.jit
def update_kernel(
    x,
    polynomial,
    out,
    x_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = x_scale · x + polynomial @ x``; x, out [N, ROWS, COLUMNS], polynomial [N, ROWS, ROWS].

    Grid: tiles × matrices. Tiles of one column strip come one after the other: they read the same part of x.
    """
    tiles_down: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    x += matrix * ROWS * COLUMNS
    polynomial += matrix * ROWS * ROWS
    rows = (tile % tiles_down) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile // tiles_down) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, ROWS, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        pointers, mask = _tile(polynomial, rows, depth, ROWS, ROWS)
        left = tl.load(pointers, mask=mask, other=0.0)
        pointers, mask = _tile(x, depth, columns, ROWS, COLUMNS)
        right = tl.load(pointers, mask=mask, other=0.0)
        total += matmul(left, right, PRECISION)
    pointers, mask = _tile(x, rows, columns, ROWS, COLUMNS)
    total += x_scale * tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers, mask = _tile(out + matrix * ROWS * COLUMNS, rows, columns, ROWS, COLUMNS)
    tl.store(pointers, total.to(out.dtype.element_ty), mask=mask)


def plan_forward(
    x: torch.Tensor, schedule: Sequence[tuple[float, float, float]], *, architecture: str
) -> tuple[list[KernelCall], torch.Tensor]:
    """The calls of all steps on x [N, m ≤ n, n], and the tensor that the last fills; runs nothing."""
    count, rows, _ = x.shape
    gram, polynomial = (x.new_empty(count, rows, rows) for _ in range(2))
    # Two buffers in turn; x itself is left as it is.
    targets = [torch.empty_like(x) for _ in range(min(2, len(schedule)))]
    calls = []
    for step, (a, b, c) in enumerate(schedule):
        target = targets[step % 2]
        square = {"factor": x, "addend": None, "out": gram, "product_scale": 1.0, "addend_scale": 0.0}
        calls.append(_call(symmetric_product_kernel, x, square, architecture))
        scales = {"product_scale": float(c), "addend_scale": float(b)}
        sums = {"factor": gram, "addend": gram, "out": polynomial, **scales}
        calls.append(_call(symmetric_product_kernel, gram, sums, architecture))
        arguments = {"x": x, "polynomial": polynomial, "out": target, "x_scale": float(a)}
        calls.append(_call(update_kernel, x, arguments, architecture))
        x = target
    return calls, x


def _call(kernel: Any, x: torch.Tensor, arguments: dict[str, Argument], architecture: str) -> KernelCall:
    """The call of ``kernel`` whose products have the operand ``x`` [N, rows, columns]."""
    grid, *launch_options = _launch(kernel, *x.shape, x.dtype, architecture)
    return KernelCall(kernel, grid, arguments, *launch_options)


@functools.lru_cache(maxsize=512)
def _launch(
    kernel: Any, count: int, rows: int, columns: int, dtype: torch.dtype, architecture: str
) -> tuple[tuple[int, int], dict[str, int | str], int, int]:
    """Grid, constants, warps and stages."""
    name = kernel.__name__.removesuffix("_kernel")
    config = launch.config_of(name, count, rows, columns, dtype, architecture)
    down, across = -(-rows // config.block_m), -(-columns // config.block_n)
    constants = {
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": launch.precision_of(dtype, architecture),
    }
    return (
        (down * (down + 1) // 2 if name == "symmetric_product" else down * across, count),
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        config.num_warps,
        config.num_stages,
    )


def newton_schulz(
    x: torch.Tensor,
    schedule: Sequence[tuple[float, float, float]],
    eps: float,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """All steps on x [..., m, n]; nothing is read on the host, so a CUDA graph can capture it.

    Sizes are padded with zeros, which stay zero, to multiples of :data:`launch.PADDING`; stacks of more than
    :data:`launch.MAX_MATRICES` matrices are cut.
    """
    stack = normalised(wide_stack(x), eps, compute_dtype)
    rows, columns = stack.shape[1:]
    padded = F.pad(stack, (0, -columns % launch.PADDING, 0, -rows % launch.PADDING))
    parts = []
    for part in padded.split(launch.MAX_MATRICES):
        calls, result = plan_forward(part, schedule, architecture=architecture_of(x.device))
        run_calls(calls, x.device)
        parts.append(result)
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return restored(result[:, :rows, :columns], x)
