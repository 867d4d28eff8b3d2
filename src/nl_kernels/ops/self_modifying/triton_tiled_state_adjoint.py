"""What one chunk of the tiled kernels leaves for the weights before it, their snapshots and their anchors."""

from __future__ import annotations

import torch

from nl_kernels.chunk_kernels import tiled_layer_adjoint, tiled_velocity
from nl_kernels.chunk_kernels.tiled_launch import Operand, Term, whole
from nl_kernels.ops.self_modifying.rows import GATE_ROWS
from nl_kernels.ops.self_modifying.triton_tiled_adjoint_buffers import GATES, AdjointBuffers, memory_part
from nl_kernels.ops.self_modifying.triton_tiled_buffers import MEMORIES, READ, WIDE


def _at_base(adjoint: AdjointBuffers) -> list[torch.Tensor]:
    """By layer, what the adjoint of the weights that served the present chunk is added to."""
    chunks = adjoint.chunks
    fresh = adjoint.schedule.chunk > 0 or chunks.inputs.snapshot_last is None
    return adjoint.gradients.running if fresh and chunks.ratio == 1 else adjoint.gradients.snapshot


def state_adjoint(adjoint: AdjointBuffers, before: list[Operand]) -> None:
    """Running weights before the chunk in the place of those after it, anchors and snapshots."""
    chunks, s, c = adjoint.chunks, adjoint.schedule, adjoint.chunks.grid.length
    xs, at_base = chunks.xs(), _at_base(adjoint)
    for i, velocity in enumerate(chunks.velocities):
        old = before[len(adjoint.layers) + i]
        given = (adjoint.layers[i], velocity, chunks.momentum, None, old)
        tiled_velocity.state_adjoint(s, chunks.layers[i], *given)
    layers = zip(chunks.layers, adjoint.layers, _base_terms(adjoint))
    for i, (layer, layer_adjoint, terms) in enumerate(layers):
        at_snapshot = None if at_base[i] is layer_adjoint.grad else at_base[i]
        at_anchor = adjoint.gradients.anchor[i]
        given = (xs[i], None, before[i], terms, at_anchor, at_snapshot)
        tiled_layer_adjoint.state_adjoint(s, layer, layer_adjoint, *given, adds=True)
    for i, read in enumerate(adjoint.reads):
        rows = chunks.read_rows()[i]
        place = memory_part(adjoint.gradients.running[i], READ * rows, rows)
        queries = whole(chunks.query_value) if i else chunks.queries
        terms = [Term(whole(read.weighted).t, queries, c)]
        s.product("read to state", rows, chunks.layers[i].into, terms, add0=place, out=place)
        if chunks.velocities:
            place = memory_part(adjoint.gradients.velocity[i], READ * rows, rows)
            terms = [Term(whole(read.velocity_weighted).t, queries, c)]
            s.product("read to velocity", rows, chunks.layers[i].into, terms, add0=place, out=place)


def _base_terms(adjoint: AdjointBuffers) -> list[list[Term]]:
    """By layer the products that are the adjoint of what serves, but for what the gates give."""
    chunks, c = adjoint.chunks, adjoint.chunks.grid.length
    if chunks.linear:
        return [[Term(whole(adjoint.at_error).t, whole(chunks.difference), c)]]
    of = chunks.memory_of
    pair = [Term(of(adjoint.at_z, i).t, of(chunks.kv, i), c) for i in range(2)]
    last = [
        Term(whole(adjoint.at_error).t, whole(chunks.difference), c),
        Term(whole(chunks.error_operand).t, whole(adjoint.at_back), c),
        Term(whole(adjoint.at_made).t, whole(chunks.served_value), c),
    ]
    gate = [
        Term(whole(adjoint.at_gate_error).t, of(chunks.difference, WIDE), c),
        Term(whole(chunks.gate_error).t, of(adjoint.at_back, WIDE), c),
    ]
    return [pair, last, gate]


def served_state_adjoint(adjoint: AdjointBuffers) -> None:
    """What the memories' own inputs give the weights that they met, and the gates' logits theirs."""
    chunks, c = adjoint.chunks, adjoint.chunks.grid.length
    inputs, width = chunks.inputs_of(0), chunks.width
    if chunks.linear:
        groups = len(adjoint.at_inputs) // chunks.grid.batches
        _add_served(adjoint, 0, 0, width, Term(whole(adjoint.at_made).t, inputs, c), groups)
        term = Term(whole(adjoint.at_gates).t, chunks.inputs_of(WIDE), c)
        _add_served(adjoint, 0, WIDE * width, GATE_ROWS, term, 1)
    else:
        term = Term(whole(adjoint.at_served_z).t, inputs, c)
        _add_served(adjoint, 0, 0, chunks.hidden_width, term, MEMORIES)
        term = Term(whole(adjoint.at_logits).t, chunks.memory_of(chunks.served_value, WIDE), c)
        _add_served(adjoint, 2, 0, 1, term, GATES)


def _add_served(adjoint: AdjointBuffers, i: int, first: int, out: int, term: Term, groups: int) -> None:
    """Add to the adjoint of the i-th layer's base, and anchor; memories lie below ``first``."""
    place = memory_part(_at_base(adjoint)[i], first, out)
    at_anchor = adjoint.gradients.anchor[i]
    aside = None if at_anchor is None else Operand(at_anchor, at_anchor.shape[1], first, step=out)
    adjoint.schedule.product(
        "served to base",
        out,
        adjoint.chunks.layers[i].into,
        [term],
        aside=aside,
        aside_adds=True,
        add0=place,
        out=place,
        groups=groups,
    )
