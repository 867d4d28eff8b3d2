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
    *,
    slow: Operand | None = None,
    slow_rows: tuple[int, int, bool] = (0, 0, False),
) -> tuple[Operand, Operand]:
    """Running weights of ``shape``, and the snapshot's, in the buffers; without one, fp32 where they lie.

    Args:
        slow, slow_rows: the snapshot of a slower clock, and which rows of the weights are of it: those from
            the first to the second, or all others (``False``).
    """
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
                "slow": None if slow is None else slow.tensor,
                "slow_pitch": 0 if slow is None else slow.rows * shape[1],
                "slow_start": 0 if slow is None else slow.start * shape[1],
            },
            {
                "SLOW_FROM": slow_rows[0] * shape[1],
                "SLOW_TO": slow_rows[1] * shape[1],
                "SLOW_INSIDE": slow_rows[2],
                "SIZE": size,
                "BLOCK": min(MOVED_NUMBERS, power_of_two(size)),
            },
            8,
        )
    weights = whole(operand) or running
    return weights, whole(base) or weights


def move(
    s: Schedule,
    source: Operand,
    target: Operand | None,
    shape: tuple[int, int],
    *,
    when: str = "always",
    adds: bool = False,
    clears: bool = False,
    index: int = 0,
    clock: int | None = None,
) -> None:
    """Copy, or add, a weight of each batch that is at some place; see :func:`.tiled_weights.move_kernel`.

    ``target`` may be ``None`` where the source is only cleared. ``clock``: tokens between boundaries, if not
    those of a chunk.
    """
    from nl_kernels.chunk_kernels.tiled_weights import move_kernel

    size = shape[0] * shape[1]
    block = min(MOVED_NUMBERS, power_of_two(size))
    s.add(
        f"move {when}",
        move_kernel,
        s.grid.batches * -(-size // block),
        {
            "source": source.tensor,
            "target": None if target is None else target.tensor,
            "source_pitch": source.rows * shape[1],
            "source_start": source.start * shape[1],
            "target_pitch": 0 if target is None else target.rows * shape[1],
            "target_start": 0 if target is None else target.start * shape[1],
            "index": index,
        },
        {
            "WHEN": when,
            "ADDS": adds,
            "CLEARS": clears,
            "SIZE": size,
            "BLOCK": block,
            "CHUNK": clock or s.grid.chunk_size,
        },
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


def place_tokens(
    s: Schedule,
    x: torch.Tensor,
    *,
    proximal: bool = False,
    unit: bool = False,
    placed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [batches, tokens, width] by chunk, as operands; proximal rates [batches, pitch] or ``None``.

    ``unit``: scaled to unit length. ``placed``: where they go, if not to a buffer of their own.
    """
    from nl_kernels.chunk_kernels.tiled_tokens import place_tokens_kernel

    grid, width = s.grid, x.shape[-1]
    if placed is None:
        placed = x.new_empty((grid.batches, grid.pitch, width), dtype=operand_dtype(s.precision))
    effective = x.new_empty((grid.batches, grid.pitch)) if proximal else None
    block, rows, warps = row_tiles(width, grid.length)
    s.add(
        "place tokens",
        place_tokens_kernel,
        grid.batches * grid.pitch // rows,
        {"x": x, "placed": placed, "effective": effective},
        {"WIDTH": width, "UNIT": unit, "ROWS": rows, "BLOCK": block},
        warps,
    )
    return placed, effective
