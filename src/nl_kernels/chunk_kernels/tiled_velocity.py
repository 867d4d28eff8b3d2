"""What momentum adds to :mod:`.tiled_layer`, for layers that do not erase: a velocity U beside S.

The formulas of :func:`nl_kernels.delta_adjoint.momentum_forward` and its adjoint; of running reads as in
:mod:`.adjoint`. The mixture of decay and momentum is a matrix of pairs of tokens only where a read needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nl_kernels.chunk_kernels.tiled_launch import (
    Operand,
    Place,
    Schedule,
    Term,
    every_row,
    operand_dtype,
    whole,
)
from nl_kernels.chunk_kernels.tiled_layer import AFTER, LayerBuffers
from nl_kernels.chunk_kernels.tiled_layer_adjoint import LayerAdjoint, pair_tile, pairs, written_blocks
from nl_kernels.triton_support.tiles import power_of_two

MIXED_AFTER = 2  # of the momenta


@dataclass
class Momentum:
    """What all layers of a call share.

    Attributes:
        mixed_final, carried_final: [batches, chunks], the weights of U in S and in U at the chunk's end.
        decays, entering, mixed: matrices of one chunk, for running reads; the product of two is the third.
        at_mixed, at_entering: their adjoints. full_rows, full_columns, sums: by tile.
        to_end, log: of the decays.
    """

    mixed_final: torch.Tensor
    carried_final: torch.Tensor
    decays: torch.Tensor | None
    entering: torch.Tensor | None
    mixed: torch.Tensor | None
    at_mixed: torch.Tensor | None
    at_entering: torch.Tensor | None
    full_rows: torch.Tensor | None
    full_columns: torch.Tensor | None
    sums: torch.Tensor | None
    to_end: torch.Tensor | None
    log: torch.Tensor | None

    @classmethod
    def of(
        cls, s: Schedule, momentum: torch.Tensor, log_decay: torch.Tensor, *, running: bool, keeps: bool
    ) -> Momentum:
        """Fresh buffers; sets ``s.momenta``."""
        from nl_kernels.chunk_kernels.tiled_momentum import momentum_coefficients_kernel

        grid = s.grid
        made = cls.buffers(s, momentum, running=running, keeps=keeps)
        s.momenta = momentum.new_empty((grid.batches, 8, grid.pitch))
        s.add(
            "momentum",
            momentum_coefficients_kernel,
            grid.batches * grid.chunks,
            {
                "momentum": momentum,
                "log_decay": log_decay,
                "mixed_final": made.mixed_final,
                "carried_final": made.carried_final,
            },
            {"BLOCK": power_of_two(grid.length)},
        )
        return made

    @classmethod
    def buffers(
        cls, s: Schedule, like: torch.Tensor, *, running: bool, keeps: bool, copies: int = 1
    ) -> Momentum:
        """Without what sets them; ``copies``: memories for which the finals are repeated."""
        grid = s.grid
        length, tiles = grid.length, grid.length // pair_tile(grid.length)

        def new(*shape: int, when: bool = True) -> torch.Tensor | None:
            return like.new_empty((grid.batches, *shape)) if when else None

        both = running and keeps
        finals = copies * grid.batches, grid.chunks
        return cls(
            like.new_empty(finals),
            like.new_empty(finals),
            *(new(length, length, when=running) for _ in range(3)),
            *(new(length, length, when=both) for _ in range(2)),
            *(new(tiles, length, when=both) for _ in range(3)),
            new(length, when=keeps),
            new(length, when=both),
        )

    def make_matrices(self, s: Schedule) -> None:
        """Those of the present chunk, where reads need them."""
        from nl_kernels.chunk_kernels.tiled_momentum import decay_matrices_kernel

        if self.mixed is None:
            return
        length = s.grid.length
        block = pair_tile(length)
        s.add(
            "decay matrices",
            decay_matrices_kernel,
            s.grid.batches * (length // block) ** 2,
            {"decays": self.decays, "entering": self.entering},
            {"BLOCK": block},
        )
        terms = [Term(whole(self.decays), whole(self.entering), length, "l")]
        s.product("mixture", length, length, terms, out=every_row(self.mixed))

    def adjoint(
        self,
        s: Schedule,
        velocities: list[Velocity],
        d_momentum: torch.Tensor,
    ) -> None:
        """Gradients of the present chunk's momenta, and what decays get through the mixture."""
        from nl_kernels.chunk_kernels.tiled_momentum import momentum_adjoint_kernel, momentum_pairs_kernel

        length = s.grid.length
        tile = pair_tile(length)
        tiles = length // tile
        if self.mixed is not None:
            given = (whole(self.at_mixed), whole(self.entering), length, self.decays, "full")
            sums = {"row_sums": self.full_rows, "column_sums": self.full_columns}
            pairs(s, "mixture to decays", *given, rate=None, out=None, **sums)
            terms = [Term(whole(self.decays).t, whole(self.at_mixed), length, "u")]
            s.product("mixture to momenta", length, length, terms, out=every_row(self.at_entering))
            s.add(
                "momentum pairs",
                momentum_pairs_kernel,
                s.grid.batches * tiles,
                {"at_entering": self.at_entering, "sums": self.sums},
                {"BLOCK": tile},
            )
        given = {
            "to_end": self.to_end,
            "at_log": self.log,
            "pair_sums": self.sums,
            "d_momentum": d_momentum,
        }
        constants = {"TILES": tiles, "BLOCK": power_of_two(length)}
        for i in range(2):
            constants |= {f"WEIGHT_TILES{i}": 0, f"WEIGHT_BLOCK{i}": 0}
        names = ("mixed_to_end", "carried_to_end", "mixed_after", "mixed_inner", "carried_inner")
        for i, velocity in enumerate(velocities):
            given |= {f"{name}{i}": getattr(velocity, name) for name in names}
            weight_tiles = 0 if velocity.mixed_inner is None else velocity.mixed_inner.shape[2]
            constants |= {
                f"WEIGHT_TILES{i}": weight_tiles,
                f"WEIGHT_BLOCK{i}": power_of_two(max(1, weight_tiles)),
            }
        s.add("momentum adjoint", momentum_adjoint_kernel, s.grid.batches, given, constants)


@dataclass
class Velocity:
    """What a layer's velocity needs of one chunk; ``None`` where an option leaves it out.

    Attributes:
        carried: the writes times the momentum to the chunk's end, an operand.
        recalled, read: the read of U, and it times the mixture's ``after``. products: q xᵀ.
        rounded, weights: room for U as an operand where reads need it, and U as one.
        grad, grad_weights: adjoint of U, carried from chunk to chunk, and as an operand.
        at_end, at_velocity_end, at_read: of the writes, by where they come from.
        read_weighted: adjoint of the read times the mixture's ``after``.
        at_query: what the read of U gives queries.
        mixed_to_end … carried_inner: plain adjoints of the coefficients.
    """

    carried: torch.Tensor
    recalled: torch.Tensor | None
    read: torch.Tensor | None
    products: torch.Tensor | None
    rounded: torch.Tensor | None = None
    weights: Operand | None = None
    grad: torch.Tensor | None = None
    grad_weights: Operand | None = None
    at_end: torch.Tensor | None = None
    at_velocity_end: torch.Tensor | None = None
    at_read: torch.Tensor | None = None
    read_weighted: torch.Tensor | None = None
    at_query: torch.Tensor | None = None
    mixed_to_end: torch.Tensor | None = None
    carried_to_end: torch.Tensor | None = None
    mixed_after: torch.Tensor | None = None
    mixed_inner: torch.Tensor | None = None
    carried_inner: torch.Tensor | None = None

    @classmethod
    def of(cls, s: Schedule, layer: LayerBuffers, *, running: bool, keeps: bool) -> Velocity:
        length, batches = s.grid.length, layer.groups * s.grid.batches
        new = layer.rate.new_empty
        wide = (batches, length, layer.out)
        return cls(
            new(wide, dtype=operand_dtype(s.precision)),
            new(wide) if running and keeps else None,
            new(wide) if running else None,
            new((batches, length, length)) if running and keeps else None,
        )

    def prepare_adjoint(self, s: Schedule, layer: LayerBuffers, grad: torch.Tensor, *, running: bool) -> None:
        """Room for the adjoint."""
        length, batches = s.grid.length, layer.groups * s.grid.batches
        new, wide, tokens = grad.new_empty, (batches, length, layer.out), (batches, length)
        inner = (batches, s.grid.chunks, s.weight_tiles(layer.out, layer.into))
        self.grad = grad
        self.at_end, self.at_velocity_end = new(wide), new(wide)
        self.mixed_to_end, self.carried_to_end = new(tokens), new(tokens)
        self.mixed_inner, self.carried_inner = new(inner), new(inner)
        if running:
            self.at_read, self.mixed_after = new(wide), new(tokens)
            self.read_weighted = new(wide, dtype=operand_dtype(s.precision))
            self.at_query = new((batches, length, layer.into))


def carry(
    s: Schedule,
    layer: LayerBuffers,
    velocity: Velocity,
    momentum: Momentum,
    x: Operand,
    before: tuple[Operand, Operand],
    after: tuple[Operand, Operand],
) -> None:
    """S and U after the chunk from those before it."""
    length, shape = s.grid.length, layer.shape
    old, old_velocity = (Place(w.tensor, w.rows, w.start, layer.out, layer.out) for w in before)
    new, new_velocity = (Place(w.tensor, w.rows, w.start, layer.out, layer.out) for w in after)
    s.product(
        "carry",
        *shape,
        [Term(whole(layer.weighted).t, x, length)],
        add0=old,
        scaled=s.final,
        add1=old_velocity,
        scaled1=momentum.mixed_final,
        out=new,
        groups=layer.groups,
    )
    s.product(
        "carry velocity",
        *shape,
        [Term(whole(velocity.carried).t, x, length)],
        add0=old_velocity,
        scaled=momentum.carried_final,
        out=new_velocity,
        groups=layer.groups,
    )


def read(
    s: Schedule,
    layer: LayerBuffers,
    velocity: Velocity,
    momentum: Momentum,
    queries: Operand,
    x: Operand,
    out: Place | None,
    residual: Place | None,
) -> None:
    """As :func:`.tiled_layer.read`."""
    length = s.grid.length
    s.product(
        "read velocity",
        length,
        layer.out,
        [Term(queries, velocity.weights.t, layer.into)],
        factor=MIXED_AFTER,
        coefficients=s.momenta,
        aside=velocity.recalled,
        aside_terms=-1,
        out=every_row(velocity.read),
    )
    s.product(
        "scores",
        length,
        length,
        [Term(queries, x.t, layer.into, "d")],
        aside=velocity.products,
        matrix=momentum.mixed,
        out=every_row(layer.scores),
    )
    terms = [Term(queries, layer.weights.t, layer.into)]
    if layer.anchor is not None:
        terms.append(Term(queries, layer.anchor.t, layer.into))
    terms.append(Term(whole(layer.scores), whole(layer.written), length, "l"))
    if out is None:
        terms = terms[:1]
    s.product(
        "read",
        length,
        layer.out,
        terms,
        factor=AFTER,
        aside=layer.recalled,
        add0=every_row(velocity.read),
        add1=residual,
        out=out,
    )


def read_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    velocity: Velocity,
    momentum: Momentum,
    grad: Operand,
    *,
    adds: bool,
) -> None:
    """Goes before :func:`.tiled_layer_adjoint.read_adjoint`: the adjoints of scores, and of the read of U."""
    velocity_read_adjoint(
        s,
        layer.shape,
        whole(layer.written),
        velocity.weights,
        velocity.recalled,
        velocity.products,
        momentum,
        grad,
        weighted=velocity.read_weighted,
        mixed_after=velocity.mixed_after,
        pairs=adjoint.read_pairs,
        at_query=velocity.at_query,
        adds=adds,
    )


def velocity_read_adjoint(
    s: Schedule,
    shape: tuple[int, int],
    written: Operand,
    weights: Operand,
    recalled: torch.Tensor,
    products: torch.Tensor,
    momentum: Momentum,
    grad: Operand,
    *,
    weighted: torch.Tensor,
    mixed_after: torch.Tensor,
    pairs: torch.Tensor,
    at_query: torch.Tensor,
    adds: bool,
) -> None:
    """Of a running read of a layer of ``shape``: fills the last four, and the adjoint of the mixture."""
    from nl_kernels.chunk_kernels.tiled_momentum import read_momentum_rows_kernel

    length, (out, into) = s.grid.length, shape
    s.rows(
        "weigh velocity read",
        read_momentum_rows_kernel,
        out,
        {
            "grad": grad.tensor,
            "grad_rows": grad.rows,
            "grad_start": grad.start,
            "recalled": recalled,
            "weighted": weighted,
            "mixed_after": mixed_after,
        },
    )
    by_pair = [Term(grad, written.t, out, "d")]
    place = every_row(momentum.at_mixed)
    s.product("read pairs", length, length, by_pair, matrix=momentum.mixed, out=every_row(pairs))
    s.product(
        "read to mixture",
        length,
        length,
        by_pair,
        matrix=products,
        add1=place if adds else None,
        out=place,
    )
    s.product(
        "velocity read to queries",
        length,
        into,
        [Term(grad, weights, out)],
        factor=MIXED_AFTER,
        coefficients=s.momenta,
        out=every_row(at_query),
    )


def write_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    velocity: Velocity,
    x: Operand,
    read_grad: Operand | None,
    queries: Operand | None,
    *,
    more: Operand | None = None,
    more_terms: Sequence[Term] = (),
) -> None:
    """Adjoints of the error signal, the input and the rate, as :func:`.tiled_layer_adjoint.write_adjoint`."""
    from nl_kernels.chunk_kernels.tiled_momentum import written_momentum_rows_kernel

    length = s.grid.length
    sources = [
        ("state to written", [Term(x, adjoint.weights.t, layer.into)], velocity.at_end),
        ("velocity to written", [Term(x, velocity.grad_weights.t, layer.into)], velocity.at_velocity_end),
    ]
    terms = [
        Term(whole(layer.weighted), adjoint.weights, layer.out),
        Term(whole(velocity.carried), velocity.grad_weights, layer.out),
        *more_terms,
    ]
    if read_grad is not None:
        scores = [Term(whole(layer.scores).t, read_grad, length, "u")]
        sources.append(("read to written", scores, velocity.at_read))
        terms.append(Term(whole(adjoint.read_pairs).t, queries, length, "u"))
        more = whole(velocity.at_read)
    for name, products, out in sources:
        s.product(name, length, layer.out, products, out=every_row(out), groups=layer.groups)
    s.rows(
        "written adjoint",
        written_momentum_rows_kernel,
        layer.out,
        {
            "at_end": velocity.at_end,
            "at_velocity_end": velocity.at_velocity_end,
            "more": None if more is None else more.tensor,
            "more_start": 0 if more is None else more.start,
            "signal": layer.surprise,
            "rate": layer.rate,
            "at_surprise": adjoint.at_surprise,
            "at_rate": adjoint.at_rate,
            "to_end": velocity.mixed_to_end,
            "carried_to_end": velocity.carried_to_end,
        },
        groups=layer.groups,
        **written_blocks(layer, more),
    )
    s.product("write to input", length, layer.into, terms, out=every_row(adjoint.at_x), groups=layer.groups)


def state_adjoint(
    s: Schedule,
    layer: LayerBuffers,
    adjoint: LayerAdjoint,
    velocity: Velocity,
    momentum: Momentum,
    queries: Operand | None,
    before: Operand,
) -> None:
    """The adjoint of U before the chunk; ahead of that of S, which takes the place of what this reads."""
    terms = []
    if queries is not None:
        terms.append(Term(whole(velocity.read_weighted).t, queries, s.grid.length))
    place, after = (Place(x, x.shape[1], 0, layer.out, layer.out) for x in (velocity.grad, adjoint.grad))
    s.product(
        "velocity adjoint",
        *layer.shape,
        terms,
        add0=place,
        scaled=momentum.carried_final,
        add1=after,
        scaled1=momentum.mixed_final,
        against=dataclasses.replace(before, step=layer.out),
        inner=velocity.carried_inner,
        inner1=velocity.mixed_inner,
        out=place,
        groups=layer.groups,
    )
