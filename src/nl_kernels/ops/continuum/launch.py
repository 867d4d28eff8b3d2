"""Launch parameters of the continuum's kernels: pure functions of shapes.

The numbers come from ahead-of-time compilation (registers, spills), not from timings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nl_kernels.chunk_kernels.tiled_launch import Tiles, tiles_of
from nl_kernels.triton_support.kernel_call import Argument, KernelCall
from nl_kernels.triton_support.tiles import power_of_two

MAX_WIDTH = 16_384
"""The widest row that one program holds: 32 elements of each tensor a thread."""

MAX_MATRICES = 12
"""Matrices of one launch, four gated levels: each is code of its own in the kernel."""

# Elements of each tensor that a program of 4 warps holds: 16 a thread, four vector loads.
_TILE = 2048


@dataclass(frozen=True)
class UpdateTile:
    """Rows and columns (all of them) that one program has."""

    block_m: int
    block_n: int
    num_warps: int


def update_tile(width: int) -> UpdateTile:
    """The tile of rows of ``width`` elements."""
    block_n = power_of_two(width)
    return UpdateTile(max(1, _TILE // block_n), block_n, max(4, min(16, block_n // 512)))


def product_tiles(m: int, n: int, k: int, precision: str, architecture: str, *, held: int = 1) -> Tiles:
    """Tiles of a program that holds ``held`` products [m, n], each a sum over k, at once.

    Products in more than 16 bits, and several at once, take more registers a number: their tiles are smaller.
    """
    tiles = tiles_of(m, n, k, precision, architecture)
    widest = 128 if precision == "bf16" else 64
    m, n = min(tiles.m, widest), min(tiles.n, widest if held == 1 else widest // 2)
    return tiles._replace(m=m, n=n, warps=8 if m * n > 64 * 64 else 4)


def call_of(
    kernel: Any,
    tiles: Tiles,
    shape: tuple[int, int, int],
    precision: str,
    arguments: dict[str, Argument],
    constants: dict[str, Any],
) -> KernelCall:
    """The call of a kernel of which each program makes a tile of ``shape`` [batches, m, n]."""
    batches, m, n = shape
    programs = batches * -(-m // tiles.m) * -(-n // tiles.n)
    blocks = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "PRECISION": precision}
    return KernelCall(kernel, (programs,), arguments, {**constants, **blocks}, tiles.warps, tiles.stages)
