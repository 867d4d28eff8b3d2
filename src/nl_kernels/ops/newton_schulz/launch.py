"""Launch parameters of ``newton_schulz``: pure functions of shapes, dtype and architecture.

The numbers come from ahead-of-time compilation (registers, spills and shared memory against each
architecture's limits) and from counts of tiles, not from timings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nl_kernels.triton_support import targets

MAX_MATRICES = 2**16 - 1
"""Matrices of one launch: the limit of the second grid axis on NVIDIA."""

PADDING = 16
"""Sizes of a call are padded to multiples of this, so that every row starts at a whole vector of a load."""

# Fewer tiles than this leave a large part of a data-centre GPU idle; then tiles are made smaller.
_ENOUGH_TILES = 120


@dataclass(frozen=True)
class Config:
    """Tiles and resources of one kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def precision_of(dtype: torch.dtype, architecture: str) -> str:
    """How products compute (a name of :func:`triton_support.language.matmul`) with operands of ``dtype``."""
    own = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return own.get(dtype) or targets.precision_of(dtype, architecture)


def config_of(
    kernel: str, count: int, rows: int, columns: int, dtype: torch.dtype, architecture: str
) -> Config:
    """Tiles, warps and stages of ``kernel`` (its function's name without ``_kernel``).

    ``count`` matrices [rows, columns]: of the factor ("symmetric_product") or of x ("update").
    """
    wide = dtype == torch.float32
    amd = architecture.startswith("gfx")
    largest = 64 if wide else 128
    sizes = [size for size in (128, 64, 32) if size <= largest]
    for size in sizes:
        down = -(-rows // size)
        tiles = down * (down + 1) // 2 if kernel == "symmetric_product" else down * -(-columns // size)
        # A tile that reaches far beyond a small matrix is mostly padding.
        if size < 2 * rows and count * tiles >= _ENOUGH_TILES:
            break
    else:
        size = 32 if rows <= 32 else 64
    if wide:
        return Config(size, size, 32, 4 if size == 32 else 8, 1 if amd else 2)
    stages = 2 if amd or size < 64 else 3
    return Config(size, size, 64 if size >= 64 else 32, 8 if size == 128 else 4, stages)
