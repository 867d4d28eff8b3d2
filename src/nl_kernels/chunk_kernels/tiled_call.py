"""What surrounds the chunks of a call of tiled kernels: tokens by chunk, weights as operands, moves."""

from __future__ import annotations

import torch

from nl_kernels.chunk_kernels.tiled_launch import (
    MOVED_NUMBERS,
    Operand,
    Schedule,
    operand_dtype,
    row_tiles,
    whole,
)
from nl_kernels.triton_support.tiles import power_of_two


def operands_of(
    s: Schedule,
    shape: tuple[int, int],
    running: Operand,
    snapshot: torch.Tensor | None,
    anchor: torch.Tensor | None,
    operand: torch.Tensor | None,
    base: torch.Tensor | None,
) -> tuple[Operand, Operand]:
    """Running weights of ``shape``, and the snapshot's, in the buffers; without one, fp32 where they lie."""
    from nl_kernels.chunk_kernels.tiled_weights import operands_kernel

    size = shape[0] * shape[1]
    if operand is not None or base is not None:
        s.add(
            "weights",
            operands_kernel,
            s.grid.batches * -(-size // MOVED_NUMBERS),
            {
                "running": running.tensor,
                "snapshot": snapshot,
                "anchor": anchor,
                "operand": operand,
                "base": base,
                "running_pitch": running.rows * shape[1],
                "running_start": running.start * shape[1],
            },
            {"SIZE": size, "BLOCK": min(MOVED_NUMBERS, power_of_two(size))},
            8,
        )
    weights = whole(operand) or running
    return weights, whole(base) or weights


def move(
    s: Schedule,
    source: Operand,
    target: Operand,
    shape: tuple[int, int],
    *,
    when: str = "always",
    adds: bool = False,
    index: int = 0,
) -> None:
    """Copy, or add, a weight of each batch that is at some place; see :func:`.tiled_weights.move_kernel`."""
    from nl_kernels.chunk_kernels.tiled_weights import move_kernel

    size = shape[0] * shape[1]
    block = min(MOVED_NUMBERS, power_of_two(size))
    s.add(
        f"move {when}",
        move_kernel,
        s.grid.batches * -(-size // block),
        {
            "source": source.tensor,
            "target": target.tensor,
            "source_pitch": source.rows * shape[1],
            "source_start": source.start * shape[1],
            "target_pitch": target.rows * shape[1],
            "target_start": target.start * shape[1],
            "index": index,
        },
        {"WHEN": when, "ADDS": adds, "SIZE": size, "BLOCK": block},
        8,
    )


def coefficients_of(s: Schedule, rate: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """Set what the decays and rates give every chunk; the rate as given [batches, pitch]."""
    from nl_kernels.chunk_kernels.tiled_tokens import coefficients_kernel

    grid = s.grid
    s.coefficients = rate.new_empty((grid.batches, 8, grid.pitch))
    s.final = rate.new_empty((grid.batches, grid.chunks))
    placed = rate.new_empty((grid.batches, grid.pitch))
    s.add(
        "coefficients",
        coefficients_kernel,
        grid.batches * grid.chunks,
        {"rate": rate, "log_decay": log_decay, "plain_rate": placed, "final": s.final},
        {"BLOCK": power_of_two(grid.length)},
    )
    return placed


def place_tokens(s: Schedule, x: torch.Tensor, *, proximal: bool = False):
    """Tokens [batches, tokens, width] by chunk, as operands; proximal rates [batches, pitch] or ``None``."""
    from nl_kernels.chunk_kernels.tiled_tokens import place_tokens_kernel

    grid, width = s.grid, x.shape[-1]
    placed = x.new_empty((grid.batches, grid.pitch, width), dtype=operand_dtype(s.precision))
    effective = x.new_empty((grid.batches, grid.pitch)) if proximal else None
    block, rows, warps = row_tiles(width, grid.length)
    s.add(
        "place tokens",
        place_tokens_kernel,
        grid.batches * grid.pitch // rows,
        {"x": x, "placed": placed, "effective": effective},
        {"WIDTH": width, "ROWS": rows, "BLOCK": block},
        warps,
    )
    return placed, effective
