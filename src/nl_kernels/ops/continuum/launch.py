"""Launch parameters of the continuum's kernels: pure functions of shapes.

The numbers come from ahead-of-time compilation (registers, spills), not from timings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nl_kernels.triton_support.ahead_of_time import CatalogueEntry
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


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """The update of one level's matrices, with and without what is optional; wide, narrow and odd rows."""
    from nl_kernels.ops.continuum.triton_update import plan_update

    def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for words, width, hidden in (
        ("1024x4096", 1024, 4096),
        ("256x341", 256, 341),
        ("4096x16384", 4096, 16384),
    ):
        shapes = [(8, hidden, width), (8, width, hidden), (8, hidden, width)]
        weights = [matrix(*shape) for shape in shapes]
        for options in ("plain", "momentum norms bfloat16", "momentum norms float16"):
            dtype = {"plain": None}.get(options, getattr(torch, options.split()[-1], None))
            full = options != "plain"
            calls = plan_update(
                weights,
                [matrix(*shape) for shape in shapes],
                [matrix(*shape) for shape in shapes] if full else None,
                0.9,
                [matrix(shape[1]) for shape in shapes] if full else None,
                [matrix(*shape, dtype=dtype) for shape in shapes] if full else None,
            )
            for call in calls:
                yield CatalogueEntry("continuum", f"{options} {words}", call)
