"""The adjoints of :mod:`.tiled_layer`, with the formulas of :mod:`nl_kernels.delta_adjoint`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nl_kernels.chunk_kernels.tiled_launch import (
    ROW_NUMBERS,
    Operand,
    Place,
    Schedule,
    Term,
    every_row,
    operand_dtype,
    token_warps,
    whole,
)
from nl_kernels.chunk_kernels.tiled_layer import AFTER, TO_END, LayerBuffers, solve
from nl_kernels.triton_support.tiles import padded, power_of_two

if TYPE_CHECKING:
    from nl_kernels.chunk_kernels.tiled_velocity import Momentum


@dataclass
class LayerAdjoint:
    """What the adjoint of a layer makes of one chunk; ``None`` where an option leaves it out.

    Attributes:
        grad: adjoint of the running weights [batches, groups · out, into], carried from chunk to chunk. All
            else is memory first, as in :class:`.tiled_layer.LayerBuffers`.
        weights: it, as an operand.
        at_written, at_end: that of u, and its part from the state after the chunk.
        at_surprise: of ω. solved: of the error signal, and as an operand, and times the decay before each
            token.
        pairs: of x xᵀ, plus its transpose. strict_rows, strict_columns: sums by tile.
        at_x: of the layer's input.
        read_weighted: of a running read times the decay. read_pairs: of q xᵀ. full_rows, full_columns: sums
            by tile.
        before, to_end, after: of the decays, by token, times themselves. inner: of those over the chunk.
        at_rate: of the rate, but for the sums over columns. coefficient: what a proximal rate gives its
            input.
    """

    grad: torch.Tensor
    weights: Operand | None
    at_written: torch.Tensor
    at_end: torch.Tensor
    at_surprise: torch.Tensor
    solved: torch.Tensor | None
    solved_operand: torch.Tensor | None
    solved_weighted: torch.Tensor | None
    pairs: torch.Tensor | None
    strict_rows: torch.Tensor | None
    strict_columns: torch.Tensor | None
    at_x: torch.Tensor
    read_weighted: torch.Tensor | None
    read_pairs: torch.Tensor | None
    full_rows: torch.Tensor | None
    full_columns: torch.Tensor | None
    before: torch.Tensor | None
    to_end: torch.Tensor
    after: torch.Tensor | None
    inner: torch.Tensor
    at_rate: torch.Tensor
    coefficient: torch.Tensor | None

    @classmethod
    def of(
        cls, s: Schedule, layer: LayerBuffers, grad: torch.Tensor, *, running: bool, proximal: bool
    ) -> LayerAdjoint:
        grid = s.grid
        operand = operand_dtype(s.precision)
        tiles = -(-grid.length // pair_tile(grid.length))

        def new(*shape: int, dtype: torch.dtype = torch.float32, when: bool = True) -> torch.Tensor | None:
            return grad.new_empty((layer.groups * grid.batches, *shape), dtype=dtype) if when else None

        tokens, wide, square = grid.length, (grid.length, layer.out), (grid.length, grid.length)
        erases = layer.erases
        at_written = new(*wide)
        return cls(
            grad=grad,
            weights=None,
            at_written=at_written,
            at_end=new(*wide) if running else at_written,
            at_surprise=new(*wide),
            solved=new(*wide, when=erases),
            solved_operand=new(*wide, dtype=operand, when=erases),
            solved_weighted=new(*wide, dtype=operand, when=erases),
            pairs=new(*square, dtype=operand, when=erases),
            strict_rows=new(tiles, tokens, when=erases),
            strict_columns=new(tiles, tokens, when=erases),
            at_x=new(grid.length, layer.into),
            read_weighted=new(*wide, dtype=operand, when=running),
            read_pairs=new(*square, dtype=operand, when=running),
            full_rows=new(tiles, tokens, when=running),
            full_columns=new(tiles, tokens, when=running),
            before=new(tokens, when=erases),
            to_end=new(tokens),
            after=new(tokens, when=running),
            inner=new(grid.chunks, s.weight_tiles(layer.out, layer.into)),
            at_rate=new(tokens),
            coefficient=new(tokens, when=proximal and erases),
        )

    @property
    def at_signal(self) -> torch.Tensor:
        """The adjoint of the error signal."""
        return self.at_surprise if self.solved is None else self.solved


def pair_tile(length: int) -> int:
    """Rows and columns of the tiles of a matrix of pairs of tokens, in its adjoint."""
    return min(64, length)


def read_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    grad: Operand,
    queries: Operand,
    x: Operand,
    out: Place,
    residual: Place | None,
    at_anchor: torch.Tensor | None,
    more: torch.Tensor | None = None,
) -> None:
    """The adjoint of the read's queries, from that of the read; adds to that of the anchor.

    ``adjoint.read_weighted`` is already there; with momentum so are ``adjoint.read_pairs`` and ``more``, what
    the read of the velocity gives the queries.
    """
    length = s.grid.length
    if more is None:
        sums = {"row_sums": adjoint.full_rows, "column_sums": adjoint.full_columns}
        given = (grad, whole(layer.written), layer.out, layer.scores, "full")
        pairs(s, "read pairs", *given, rate=None, out=adjoint.read_pairs, **sums)
    terms = [Term(grad, layer.weights, layer.out)]
    if layer.anchor is not None:
        terms.append(Term(grad, layer.anchor, layer.out))
    terms.append(Term(whole(adjoint.read_pairs), x, length, "l"))
    s.product(
        "read to queries",
        length,
        layer.into,
        terms,
        factor=AFTER,
        add0=residual,
        add1=every_row(more),
        out=out,
    )
    if at_anchor is not None:
        place = every_row(at_anchor)
        s.product(
            "read to anchor", layer.out, layer.into, [Term(grad.t, queries, length)], add0=place, out=place
        )


def pairs(
    s: Schedule,
    name: str,
    a: Operand,
    b: Operand,
    extent: int,
    weights: torch.Tensor,
    decay: str,
    *,
    rate: torch.Tensor | None,
    out: torch.Tensor | None,
    row_sums: torch.Tensor,
    column_sums: torch.Tensor,
    groups: int = 1,
) -> None:
    """See :func:`.tiled_products.pair_adjoint_kernel`; a and b contract ``extent`` columns."""
    from nl_kernels.chunk_kernels.tiled_products import pair_adjoint_kernel

    length = s.grid.length
    tile = pair_tile(length)
    tiles = -(-length // tile)
    s.add(
        name,
        pair_adjoint_kernel,
        groups * s.grid.batches * tiles * tiles,
        {
            "a": a.tensor,
            "extent": extent,
            "a_rows": a.rows,
            "a_start": a.start,
            "b": b.tensor,
            "b_rows": b.rows,
            "b_start": b.start,
            "weights": weights,
            "rate": rate,
            "out": out,
            "row_sums": row_sums,
            "column_sums": column_sums,
        },
        {
            "K": extent,
            "B_WIDTH": b.width or extent,
            "B_COLUMN": b.column,
            "DECAY": decay,
            "BLOCK_M": tile,
            "BLOCK_K": min(32, padded(extent)),
        },
        4,
        2,
    )


def write_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    x: Operand,
    read_grad: Operand | None,
    queries: Operand | None,
    at_rate: torch.Tensor,
    *,
    proximal: bool,
    adds: bool,
    more: Operand | None = None,
    more_terms: Sequence[Term] = (),
) -> None:
    """Adjoints of the error signal, the input and the given rate, from that of the state after the chunk.

    Args:
        read_grad, queries: adjoint of the running read, and what it was read with; ``None`` without.
        at_rate: [batches, length] of the given rate, added to with ``adds``.
        more: [batches, length, ·], what one memory of several gets for u: of the rows that ``start`` and the
            column that ``column`` names. more_terms: what else the input gets.
    """
    from nl_kernels.chunk_kernels.tiled_rows import written_adjoint_rows_kernel

    length = s.grid.length
    terms = [Term(x, adjoint.weights.t, layer.into)]
    if read_grad is not None:
        terms.append(Term(whole(layer.scores).t, read_grad, length, "u"))
    s.product(
        "state to written",
        length,
        layer.out,
        terms,
        factor=TO_END,
        aside=adjoint.at_end if read_grad is not None else None,
        out=every_row(adjoint.at_written),
        groups=layer.groups,
    )
    s.rows(
        "written adjoint",
        written_adjoint_rows_kernel,
        layer.out,
        {
            "at_written": adjoint.at_written,
            "at_end": adjoint.at_end,
            "surprise": layer.surprise,
            "rate": layer.rate,
            "at_surprise": adjoint.at_surprise,
            "at_rate": adjoint.at_rate,
            "to_end": adjoint.to_end,
            "more": None if more is None else more.tensor,
            "more_start": 0 if more is None else more.start,
        },
        groups=layer.groups,
        **written_blocks(layer, more),
    )
    terms = [Term(whole(layer.weighted), adjoint.weights, layer.out)]
    if layer.erases:
        solve(
            s,
            "solve adjoint",
            layer,
            adjoint.at_surprise,
            adjoint.solved,
            adjoint.solved_operand,
            adjoint.solved_weighted,
            transposed=True,
        )
        given = (whole(adjoint.solved_operand), whole(layer.surprise), layer.out, layer.gram, "strict")
        sums = {"row_sums": adjoint.strict_rows, "column_sums": adjoint.strict_columns}
        groups = layer.groups
        pairs(s, "gram pairs", *given, rate=layer.rate, out=adjoint.pairs, groups=groups, **sums)
        terms += [
            Term(whole(adjoint.solved_weighted), layer.weights, layer.out),
            Term(whole(adjoint.pairs), x, length),
        ]
    if read_grad is not None:
        terms.append(Term(whole(adjoint.read_pairs).t, queries, length, "u"))
    terms += more_terms
    s.product("write to input", length, layer.into, terms, out=every_row(adjoint.at_x), groups=layer.groups)
    rate_adjoint(s, layer, adjoint, at_rate, proximal=proximal, adds=adds)


def written_blocks(layer: LayerBuffers, more: Operand | None) -> dict[str, int]:
    """Constants of the kernels that take the adjoint of u block by block of columns."""
    return {
        "BLOCK": min(ROW_NUMBERS, padded(layer.out)),
        "MORE_WIDTH": 0 if more is None else more.tensor.shape[-1],
        "MORE_COLUMN": 0 if more is None else more.column,
    }


def rate_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    at_rate: torch.Tensor,
    *,
    proximal: bool,
    adds: bool,
) -> None:
    """That of the rate as given, into ``at_rate``, added with ``adds``."""
    from nl_kernels.chunk_kernels.tiled_tokens import rate_adjoint_kernel

    length = s.grid.length
    s.add(
        "rate adjoint",
        rate_adjoint_kernel,
        layer.groups * s.grid.batches,
        {
            "given": s.coefficients,
            "effective": layer.rate,
            "direct": adjoint.at_rate,
            "column_sums": adjoint.strict_columns,
            "total": at_rate,
            "coefficient": adjoint.coefficient,
        },
        {
            "TILES": -(-length // pair_tile(length)),
            "PROXIMAL": proximal and layer.erases,
            "ADDS": adds,
            "BLOCK": power_of_two(length),
        },
    )


def state_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    x: Operand,
    queries: Operand | None,
    before: Operand,
    base_terms: list[Term],
    at_anchor: torch.Tensor | None,
    at_snapshot: torch.Tensor | None,
    *,
    adds: bool = False,
) -> None:
    """The adjoint of the running weights before the chunk, in the place of that after it.

    Args:
        queries: of the running read, or ``None``.
        before: the running weights, fp32.
        base_terms: the adjoint of the snapshot. It is added to ``at_anchor``, and goes to ``at_snapshot``,
            added with ``adds``, or, where that is ``None``, as the running weights were the snapshot, to
            theirs.
    """
    length, rows = s.grid.length, adjoint.grad.shape[1]
    place = Place(adjoint.grad, rows, 0, layer.out, layer.out)
    aside = None if at_anchor is None else Operand(at_anchor, rows, step=layer.out)
    terms = []
    if layer.erases:
        terms.append(Term(whole(adjoint.solved_weighted).t, x, length))
    if queries is not None:
        terms.append(Term(whole(adjoint.read_weighted).t, queries, length))
    if at_snapshot is not None:
        to = Place(at_snapshot, rows, 0, layer.out, layer.out)
        s.product(
            "snapshot adjoint",
            layer.out,
            layer.into,
            base_terms,
            aside=aside,
            aside_terms=len(base_terms),
            aside_adds=True,
            add0=to if adds else None,
            out=to,
            groups=layer.groups,
        )
        aside = None
    else:
        terms = base_terms + terms
    s.product(
        "state adjoint",
        layer.out,
        layer.into,
        terms,
        aside=aside,
        aside_terms=len(base_terms),
        aside_adds=True,
        add0=place,
        scaled=s.final,
        against=dataclasses.replace(before, step=layer.out),
        inner=adjoint.inner,
        out=place,
        groups=layer.groups,
    )


def decay_adjoint(
    s: Schedule,
    layers: list[LayerBuffers],
    adjoints: list[LayerAdjoint],
    at_rate: torch.Tensor,
    d_log_decay: torch.Tensor,
    d_rate: torch.Tensor,
    momentum: Momentum | None = None,
) -> None:
    """Gradients of the present chunk's log decays and rates, of one or two layers."""
    from nl_kernels.chunk_kernels.tiled_tokens import decay_adjoint_kernel

    length = s.grid.length
    given = {"rate_total": at_rate, "final": s.final, "d_log_decay": d_log_decay, "d_rate": d_rate}
    constants = {"TILES": -(-length // pair_tile(length)), "BLOCK": power_of_two(length)}
    for i in range(2):
        constants |= {f"WEIGHT_TILES{i}": 0, f"WEIGHT_BLOCK{i}": 0}
    names = (
        "before",
        "to_end",
        "after",
        "strict_rows",
        "strict_columns",
        "full_rows",
        "full_columns",
        "inner",
    )
    for i, (layer, adjoint) in enumerate(zip(layers, adjoints)):
        given |= {f"{name}{i}": getattr(adjoint, name) for name in names}
        given[f"rate{i}"] = layer.rate
        if momentum is not None:  # spans of the mixture are shared
            given |= {f"to_end{i}": None, f"full_rows{i}": None, f"full_columns{i}": None}
        tiles = s.weight_tiles(layer.out, layer.into)
        constants |= {f"WEIGHT_TILES{i}": tiles, f"WEIGHT_BLOCK{i}": power_of_two(tiles)}
    if momentum is not None:
        given |= {"full_rows0": momentum.full_rows, "full_columns0": momentum.full_columns}
        given |= {"shared_to_end": momentum.to_end, "shared_log": momentum.log}
    s.add(
        "decay adjoint",
        decay_adjoint_kernel,
        s.grid.batches,
        given,
        constants,
        token_warps(length, s.architecture),
    )
