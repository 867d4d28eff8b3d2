"""One layer of a memory over one chunk as a handful of tiled kernels: writes, running reads, their adjoints.

The formulas of :mod:`nl_kernels.delta_adjoint`, planned into a :class:`~.tiled_launch.Schedule`; one layer a
batch. The buffers of a layer hold one chunk and serve every chunk in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nl_kernels.chunk_kernels.tiled_launch import (
    SOLVE_BLOCK,
    SOLVE_COLUMNS,
    Operand,
    Place,
    Schedule,
    Term,
    every_row,
    operand_dtype,
    solve_precision,
    stages_of,
    whole,
)
from nl_kernels.triton_support.tiles import padded

if TYPE_CHECKING:
    pass

BEFORE, AFTER, TO_END = 4, 5, 6  # of the coefficients


@dataclass
class LayerBuffers:
    """What a layer [out, into] makes of one chunk; ``None`` where an option leaves it out.

    Attributes:
        rate: [batches, pitch], of its erase and its writes.
        gram: decays times x xᵀ. inverses: of its diagonal blocks. right: what the solve is given.
        surprise: ω, or the error signal itself where nothing is erased.
        written, weighted: u, and u times the decay to the chunk's end, as operands.
        scores, recalled: of the running read.
        weights, base: the running weights, and those of the snapshot with the anchor, as operands.
        anchor: as an operand.
        groups: memories a row of the call; all else is then memory first, [groups · batches, ..].
    """

    out: int
    into: int
    erases: bool
    rate: torch.Tensor
    gram: torch.Tensor | None
    inverses: torch.Tensor | None
    right: torch.Tensor | None
    surprise: torch.Tensor
    written: torch.Tensor
    weighted: torch.Tensor
    scores: torch.Tensor | None
    recalled: torch.Tensor | None
    weights: Operand | None = None
    base: Operand | None = None
    anchor: Operand | None = None
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of its weights."""
        return self.out, self.into

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        like: torch.Tensor,
        out: int,
        into: int,
        *,
        erases: bool,
        running: bool,
        keeps: bool,
        rate: torch.Tensor,
        signal: torch.Tensor,
        groups: int = 1,
    ) -> LayerBuffers:
        """Fresh buffers; ``signal`` is where the error signal goes. ``keeps``: also for the adjoint."""
        batches, length = groups * schedule.grid.batches, schedule.grid.length
        operand = operand_dtype(schedule.precision)
        block = min(SOLVE_BLOCK, length)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return like.new_empty((batches, *shape), dtype=dtype)

        square = (length, length)
        return cls(
            out,
            into,
            erases,
            rate,
            new(*square, dtype=operand) if erases else None,
            new(length // block, block, block) if erases else None,
            new(length, out) if erases else None,
            new(length, out) if erases else signal,
            new(length, out, dtype=operand),
            new(length, out, dtype=operand),
            new(*square, dtype=operand) if running else None,
            new(length, out) if running and keeps else None,
            groups=groups,
        )


def erase_and_write(s: Schedule, layer: LayerBuffers, x: Operand, signal: torch.Tensor) -> None:
    """ω and u of a layer that erases, from its input and its error signal."""
    length = s.grid.length
    s.product(
        "gram",
        length,
        length,
        [Term(x, x.t, layer.into, "d")],
        decay="strict",
        out=every_row(layer.gram),
    )
    invert_blocks(s, layer.gram, layer.rate, layer.inverses)
    recall_and_solve(s, layer, x, signal)


def invert_blocks(s: Schedule, gram: torch.Tensor, rate: torch.Tensor, inverses: torch.Tensor) -> None:
    """The diagonal blocks of the systems of all the batches that ``gram`` has."""
    from nl_kernels.chunk_kernels.tiled_solve import invert_blocks_kernel

    block = min(SOLVE_BLOCK, s.grid.length)
    s.add(
        "invert blocks",
        invert_blocks_kernel,
        len(gram) * (s.grid.length // block),
        {"gram": gram, "rate": rate, "inverses": inverses},
        {"BLOCK": block, "PRECISION": solve_precision(s.precision, s.architecture)},
    )


def recall_and_solve(s: Schedule, layer: LayerBuffers, x: Operand, signal: torch.Tensor) -> None:
    """ω and u of a layer that erases, ``gram`` and ``inverses`` being there."""
    length = s.grid.length
    s.product(
        "recall",
        length,
        layer.out,
        [Term(x, layer.weights.t, layer.into)],
        factor=BEFORE,
        add0=every_row(signal),
        out=every_row(layer.right),
        groups=layer.groups,
    )
    solve(s, "solve", layer, layer.right, layer.surprise, layer.written, layer.weighted, transposed=False)


def solve(
    s: Schedule,
    name: str,
    layer: LayerBuffers,
    right: torch.Tensor,
    solution: torch.Tensor,
    scaled: torch.Tensor,
    weighted: torch.Tensor,
    *,
    transposed: bool,
) -> None:
    """The system of a layer's erases, or its transpose; see :func:`.tiled_solve.solve_kernel`."""
    from nl_kernels.chunk_kernels.tiled_solve import solve_kernel

    columns = min(SOLVE_COLUMNS, padded(layer.out))
    s.add(
        name,
        solve_kernel,
        layer.groups * s.grid.batches * -(-layer.out // columns),
        {
            "gram": layer.gram,
            "inverses": layer.inverses,
            "right": right,
            "rate": layer.rate,
            "solution": solution,
            "scaled": scaled,
            "weighted": weighted,
        },
        {
            "WIDTH": layer.out,
            "TRANSPOSED": transposed,
            "FACTOR": BEFORE if transposed else TO_END,
            "BLOCK": min(SOLVE_BLOCK, s.grid.length),
            "BLOCK_N": columns,
            "SOLVE_PRECISION": solve_precision(s.precision, s.architecture),
        },
        4,
        stages_of(s.architecture),
    )


def carry(s: Schedule, layer: LayerBuffers, x: Operand, before: Operand, after: Operand) -> None:
    """The state after the chunk from that before it, both fp32 [out, into], one memory below the other."""
    s.product(
        "carry",
        layer.out,
        layer.into,
        [Term(whole(layer.weighted).t, x, s.grid.length)],
        add0=Place(before.tensor, before.rows, before.start, layer.out, layer.out),
        scaled=s.final,
        out=Place(after.tensor, after.rows, after.start, layer.out, layer.out),
        groups=layer.groups,
    )


def read(
    s: Schedule, layer: LayerBuffers, queries: Operand, x: Operand, out: Place | None, residual: Place | None
) -> None:
    """The read after each token, ahead of :func:`carry`; without ``out`` what its adjoint needs of it."""
    length = s.grid.length
    s.product(
        "scores",
        length,
        length,
        [Term(queries, x.t, layer.into, "d")],
        decay="full",
        out=every_row(layer.scores),
    )
    terms = [Term(queries, layer.weights.t, layer.into)]
    if layer.anchor is not None:
        terms.append(Term(queries, layer.anchor.t, layer.into))
    terms.append(Term(whole(layer.scores), whole(layer.written), length, "l"))
    if out is None:
        terms = terms[:1]
    s.product("read", length, layer.out, terms, factor=AFTER, aside=layer.recalled, add1=residual, out=out)
