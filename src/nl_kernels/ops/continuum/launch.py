"""Launch parameters of the continuum's kernels: pure functions of shapes.

The numbers come from ahead-of-time compilation (registers, spills), not from timings.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nl_kernels.triton_support.kernel_call import Argument, KernelCall
from nl_kernels.triton_support.targets import precision_of
from nl_kernels.triton_support.tiles import padded, power_of_two

MAX_WIDTH = 16_384
"""The widest row that one program holds: 32 elements of each tensor a thread."""

MAX_MATRICES = 12
"""Matrices of one launch, four gated levels: each is code of its own in the kernel."""

# Elements of each tensor that a program of 4 warps holds: 16 a thread, four vector loads.
_TILE = 2048


def update_tile(width: int) -> tuple[int, int, int]:
    """Rows and columns (all ``width`` of them) that one program has, and its warps."""
    block_n = power_of_two(width)
    return max(1, _TILE // block_n), block_n, max(4, min(16, block_n // 512))


@lru_cache
def product_precision(dtype: torch.dtype, architecture: str) -> str:
    """How products compute for callers of ``dtype``: bf16 ones round operands to bf16, fp16 ones to tf32."""
    found = "bf16" if dtype == torch.bfloat16 else precision_of(dtype, architecture)
    return "rounded tf32" if found == "tf32" else found


def operand_dtype(precision: str) -> torch.dtype:
    """How what products alone read is stored."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Tiles(NamedTuple):
    """Tiles of a product, and how it runs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@lru_cache(4096)
def product_tiles(m: int, n: int, k: int, held: int, precision: str, architecture: str) -> Tiles:
    """Tiles of a program that holds ``held`` products [m, n], each a sum over k, at once.

    They are of 128 where both extents fill several, else of 64; a step takes 128 bytes of the contracted
    one. Products in more than 16 bits, and several at once, take more registers a number: their tiles are
    smaller.
    """
    side = 128 if min(m, n) >= 256 else 64
    widest, deepest = (128, 64) if precision == "bf16" else (64, 32)
    m, n = min(side, padded(m), widest), min(side, padded(n), widest if held == 1 else widest // 2)
    stages = 2 if architecture.startswith("gfx") else 3
    return Tiles(m, n, min(deepest, padded(k)), 8 if m * n > 64 * 64 else 4, stages)


class Plan:
    """The calls of one function in their order; runs nothing.

    Products round their operands as the dtype of ``x`` says, and accumulate in fp32.
    """

    def __init__(self, x: torch.Tensor, architecture: str) -> None:
        self.x, self.architecture = x, architecture
        self.precision = product_precision(x.dtype, architecture)
        self.calls: list[KernelCall] = []

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What a call fills, by default in the dtype of operands."""
        return self.x.new_empty(shape, dtype=operand_dtype(self.precision) if dtype is None else dtype)

    def tiles(self, m: int, n: int, k: int, *, held: int = 1) -> Tiles:
        """:func:`product_tiles` of this function's products."""
        return product_tiles(m, n, k, held, self.precision, self.architecture)

    def add(
        self,
        kernel: Any,
        tiles: Tiles,
        shape: tuple[int, int, int],
        constants: dict[str, Any],
        **arguments: Argument,
    ) -> None:
        """A call of which each program makes a tile of ``shape`` [batches, m, n]."""
        batches, m, n = shape
        programs = batches * -(-m // tiles.m) * -(-n // tiles.n)
        blocks = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "PRECISION": self.precision}
        constants = {**constants, **blocks}
        self.calls.append(KernelCall(kernel, (programs,), arguments, constants, tiles.warps, tiles.stages))
