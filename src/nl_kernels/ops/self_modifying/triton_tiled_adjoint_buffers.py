"""The buffers of one chunk's adjoint in the tiled kernels; an adjoint is called ``at_…``.

What a chunk computed is in :class:`~.triton_tiled_buffers.ChunkBuffers`, whose layout this one follows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.chunk_kernels import tiled_call
from nl_kernels.chunk_kernels.tiled_launch import Operand, Place
from nl_kernels.chunk_kernels.tiled_layer_adjoint import LayerAdjoint, pair_tile
from nl_kernels.ops.self_modifying.rows import GATE_ROWS
from nl_kernels.ops.self_modifying.triton_tiled_buffers import MEMORIES, WIDE, ChunkBuffers

GATES = MEMORIES - WIDE


class TiledGradients(NamedTuple):
    """What the backward pass fills, by row.

    Attributes:
        query, key_input, value_input, gate_input: [N, S, D].
        momentum: [N, S], or ``None``.
        parameters: [N, 3], of the largest rate and of both biases.
        running, velocity, snapshot, anchor: by layer; those of states hold the cotangents of the final ones
            first. ``None`` where there are none.
    """

    query: torch.Tensor
    key_input: torch.Tensor
    value_input: torch.Tensor
    gate_input: torch.Tensor
    momentum: torch.Tensor | None
    parameters: torch.Tensor
    running: list[torch.Tensor]
    velocity: list[torch.Tensor]
    snapshot: list[torch.Tensor]
    anchor: list[torch.Tensor | None]


class ReadAdjoint(NamedTuple):
    """Of one layer's running read: the parts of its adjoint that other steps take.

    Attributes:
        weighted: adjoint of the read [N, c, out] times the decay, as an operand.
        pairs: of q xᵀ, as an operand [N, c, c]; full_rows, full_columns: sums by tile [N, tiles, c].
        after: of the decay, by token, times itself [N, c].
        written: of u [N, c, out].
        velocity_weighted, mixed_after, at_query: with momentum, as of
            :class:`~nl_kernels.chunk_kernels.tiled_velocity.Velocity`.
    """

    weighted: torch.Tensor
    pairs: torch.Tensor
    full_rows: torch.Tensor
    full_columns: torch.Tensor
    after: torch.Tensor
    written: torch.Tensor
    velocity_weighted: torch.Tensor | None
    mixed_after: torch.Tensor | None
    at_query: torch.Tensor | None


class VelocitySums(NamedTuple):
    """Of all layers as of one, what the adjoint of momenta takes; of a further one its ``mixed_after`` alone.

    The names are those of :class:`~nl_kernels.chunk_kernels.tiled_velocity.Velocity`.
    """

    mixed_to_end: torch.Tensor | None
    carried_to_end: torch.Tensor | None
    mixed_inner: torch.Tensor | None
    carried_inner: torch.Tensor | None
    mixed_after: torch.Tensor | None = None


class AdjointBuffers:
    """What one chunk's adjoint is; the chunks take these buffers in turn, last one first."""

    def __init__(self, chunks: ChunkBuffers, grad_o: torch.Tensor, gradients: TiledGradients) -> None:
        self.chunks, self.gradients, self.given = chunks, gradients, grad_o
        self.schedule = s = chunks.schedule
        self._grad_o, _ = tiled_call.place_tokens(s, grad_o)
        n, c, width, h = chunks.grid.batches, chunks.grid.length, chunks.width, chunks.hidden_width
        new, operands = chunks.new, chunks.operands
        rounds = chunks.operand != torch.float32
        options = chunks.options
        self.layers = [
            LayerAdjoint.of(s, layer, grad, running=False, proximal=chunks.proximal)
            for layer, grad in zip(chunks.layers, gradients.running)
        ]
        self._weights = [operands(*x.shape) if rounds else None for x in gradients.running]
        self.at_rates = [new(layer.groups * n, c) for layer in chunks.layers]
        self.layers[0].before = new((WIDE if chunks.linear else MEMORIES) * n, c)
        if not chunks.layers[0].erases:
            self.layers[0].before = None
        self.reads = [self._read_buffers(i, n, c) for i in range(len(chunks.reads))]
        self._velocity_weights, self.velocity_sums = [], None
        if chunks.velocities:
            self._velocity_weights = [operands(*x.shape) if rounds else None for x in gradients.velocity]
            for layer, velocity, grad in zip(chunks.layers, chunks.velocities, gradients.velocity):
                velocity.prepare_adjoint(s, layer, grad, running=False)
            finals = (new(n, chunks.grid.chunks, 1) for _ in range(2))
            self.velocity_sums = VelocitySums(new(n, c), new(n, c), *finals)
        self.at_query = new(n, c, width) if chunks.running else None
        # What goes past the memories of keys and values, and what residuals take of the errors.
        residual = options.projection_residual or options.residual or options.target_residual
        out = WIDE * width + GATE_ROWS if chunks.linear else width
        shape = (n, c, out) if chunks.linear else (WIDE * n, c, out)
        self.at_error = operands(*shape)
        self.error_plain = new(*shape) if rounds and residual else self.at_error
        self.at_pair = new((1 if chunks.linear else 2) * n, c, width)
        self.at_made = operands(WIDE * n, c, width)
        self.made_plain = self.at_made
        if rounds:
            self.made_plain = new(2 * n, c, width) if options.projection_residual else None
        self.at_logits = new(GATES * n, c, 1)
        self.at_gates = self.at_gate_inputs = None
        if chunks.linear:
            self.at_gates, self.at_gate_inputs = operands(n, c, GATE_ROWS), new(n, c, width)
            self.at_inputs = new((2 if chunks.running else WIDE) * n, c, width)
        else:
            self._make_hidden(n, c, h)
            self.at_inputs = new(MEMORIES * n, c, width)

    def _read_buffers(self, i: int, n: int, c: int) -> ReadAdjoint:
        chunks, new, operands = self.chunks, self.chunks.new, self.chunks.operands
        out, into, tiles = chunks.read_rows()[i], chunks.layers[i].into, -(-c // pair_tile(c))
        moves = chunks.momentum is not None
        return ReadAdjoint(
            operands(n, c, out),
            operands(n, c, c),
            *(None if moves else new(n, tiles, c) for _ in range(2)),
            new(n, c),
            new(n, c, out),
            operands(n, c, out) if moves else None,
            new(n, c) if moves else None,
            new(n, c, into) if moves else None,
        )

    def _make_hidden(self, n: int, c: int, h: int) -> None:
        """What there is of two-layer memories alone; the last layers' inputs lie in one buffer."""
        chunks = self.chunks
        new, operands = chunks.new, chunks.operands
        _, last, gate = self.layers
        self.at_hidden = new(MEMORIES * n, c, h)
        last.at_x, gate.at_x = self.at_hidden[: WIDE * n], self.at_hidden[WIDE * n :]
        self.coefficient = None
        if last.coefficient is not None:
            self.coefficient = new(MEMORIES * n, c)
            last.coefficient, gate.coefficient = self.coefficient[: WIDE * n], self.coefficient[WIDE * n :]
        self.at_back = operands(MEMORIES * n, c, h)
        self.at_value, self.at_slope = (new(MEMORIES * n, c, h) for _ in range(2))
        self.radial = new(MEMORIES * n, c)
        self.at_gate_error = new(GATES * n, c, 1)
        self.at_raw_error = new(WIDE * n, c, chunks.width)
        self.at_difference = new(WIDE * n, c, h)
        self.at_z = operands(2 * n, c, MEMORIES * h)
        self.served = 2 if chunks.running else WIDE
        self.at_served = new(self.served * n, c, h)
        self.at_served_z = operands(MEMORIES * n, c, h)
        if chunks.running:
            self.at_query_value, self.at_query_z = new(n, c, h), operands(n, c, h)

    @property
    def grad_o(self) -> Operand:
        """Of the present chunk's reads."""
        return Operand(self._grad_o, self.chunks.grid.pitch, self.schedule.start)


def memory_part(tensor: torch.Tensor, first: int, count: int) -> Place:
    """Rows of a memory's weights, and of the memories below it."""
    return Place(tensor, tensor.shape[1], first, count, count)
