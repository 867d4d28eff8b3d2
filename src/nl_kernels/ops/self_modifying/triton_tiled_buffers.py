"""The buffers of one chunk of the tiled kernels, and where in them each part lies.

The memories of a row share keys, rates and decays, so that all first layers are one layer [5h, D], and so are
linear memories [R, D], with the gates below the three others. What is by memory is memory first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nl_kernels.chunk_kernels import tiled_call
from nl_kernels.chunk_kernels.tiled_launch import (
    Operand,
    Place,
    Schedule,
    TokenGrid,
    operand_dtype,
    part_of,
    whole,
)
from nl_kernels.chunk_kernels.tiled_layer import SOLVE_BLOCK, LayerBuffers
from nl_kernels.chunk_kernels.tiled_velocity import Momentum, Velocity
from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.rows import GATE_ROWS, TiledInputs

MEMORIES, WIDE, READ = 5, 3, 2  # all memories, those as wide as their input, and which of them is read


class ReadBuffers(NamedTuple):
    """Of a layer's running read: the scores [N, c, c], and for the adjoint what was recalled [N, c, out].

    With momentum the read of the velocity, also times the mixture's ``after``, and q xᵀ, as of
    :class:`~nl_kernels.chunk_kernels.tiled_velocity.Velocity`; ``rounded`` is room for it as an operand.
    """

    scores: torch.Tensor
    recalled: torch.Tensor | None
    velocity_recalled: torch.Tensor | None
    velocity_read: torch.Tensor | None
    products: torch.Tensor | None
    rounded: torch.Tensor | None


class ChunkBuffers:
    """What one chunk computes; the chunks take these buffers in turn.

    Args:
        keeps: the buffers also have what the adjoint needs.

    Attributes (N rows, c tokens, h the hidden width; operands of products are in their dtype):
        placed: inputs of the five memories, the query of unit length, [5N, pitch, D]; linear: [4N, pitch, D].
        made: k of unit length, v, and with snapshot reads what M_memory gave, [3N or 2N, c, D].
        kv: k and v as operands. key_scale: 1/‖k‖ before it. logits: of rate and retention [2N, c].
        served_z, served_value: hidden layers at the inputs [5N, c, h].
        pair_z: those at k, then at v, before σ [2N, c, 5h]. hidden: at k. difference: less that at v
            [5N, c, h]; linear: k − v [N, c, D].
        error: bounded [3N, c, D], linear [N, c, R]; factor: of the bound [3N, c]; gate_error [2N, c, 1].
        back: the error at the hidden layers [5N, c, h]. signal: at those before σ [N, c, 5h].
        query_z, query_value: the read memory's hidden layer at the queries [N, c, h]. reads: by layer.
        layers: first, last and gate, or the one of linear memories.
        grams, inverses, rates: of all of them; the keys' [N] come first.
        momentum, velocities: with momentum what layers share, and by layer.
    """

    def __init__(
        self, inputs: TiledInputs, options: launch.Options, architecture: str, *, keeps: bool
    ) -> None:
        batches, tokens, width = inputs.query.shape
        slots = (inputs.begin, inputs.stop, inputs.origin)
        grid = TokenGrid(batches, tokens, options.offset, options.chunk, *slots)
        self.inputs, self.options, self.grid, self.keeps = inputs, options, grid, keeps
        self.schedule = s = Schedule(grid, options.precision, architecture, by_chunk=True)
        self.linear = inputs.running_first is None
        self.running = options.read == "running"
        self.width = width
        self.hidden_width = h = None if self.linear else inputs.running_last.shape[-1]
        self.operand = operand_dtype(options.precision)
        self.copies = 1 if self.linear else MEMORIES
        self.proximal = options.proximal and options.erase != "none"
        n, c = batches, grid.length

        s.coefficients = self.new(self.copies * n, 8, c)
        s.final = self.new(self.copies * n, grid.chunks)
        self.rates = self.new((n if self.linear else 6 * n), c)
        self.placed = self._place_inputs()
        self.made = self.new((2 if self.running else 3) * n, c, width)
        rounds = self.operand != torch.float32
        self.kv = self.operands(2 * n, c, width) if rounds else self.made
        self.key_scale, self.logits = self.new(n, c), self.new(2 * n, c)
        self.key_square = self.new(n, c) if self.proximal else None
        self.factor = self.new(WIDE * n, c)
        if self.linear:
            self.difference = self.operands(n, c, width)
            self.error = self.error_operand = self.signal = self.new(n, c, WIDE * width + GATE_ROWS)
        else:
            self._make_hidden(n, c, width, h, rounds)
        self.layers = self._make_layers(n, c)
        self.query_z = self.query_value = None
        if self.running and not self.linear:
            self.query_z, self.query_value = self.new(n, c, h), self.operands(n, c, h)
        self.momentum, self.velocities = None, []
        if inputs.momentum is not None:
            options = {"running": self.running, "keeps": keeps}
            self.momentum = Momentum.buffers(s, inputs.momentum, copies=self.copies, **options)
            s.momenta = self.new(self.copies * n, 8, c)
            self.velocities = [Velocity.of(s, x, running=False, keeps=keeps) for x in self.layers]
        self.reads = [self._read_buffers(i, n, c) for i in range(len(self.read_rows()))] * self.running
        self._weights = [self._weight_buffers(x) for x in inputs.states("running")]
        self.anchors = self._read_anchors() if self.running else []

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.inputs.query.new_empty(shape, dtype=dtype)

    def operands(self, *shape: int) -> torch.Tensor:
        """A buffer of what products read alone."""
        return self.new(*shape, dtype=self.operand)

    def _place_inputs(self) -> torch.Tensor:
        inputs = [self.inputs.key_input, self.inputs.value_input, self.inputs.query]
        inputs += [self.inputs.gate_input] * (1 if self.linear else 2)
        parts = self.operands(len(inputs), self.grid.batches, self.grid.pitch, self.width)
        for i, (x, part) in enumerate(zip(inputs, parts)):
            tiled_call.place_tokens(self.schedule, x, unit=i == READ, placed=part)
        return parts.flatten(0, 1)

    def _make_hidden(self, n: int, c: int, width: int, h: int, rounds: bool) -> None:
        """What there is of two-layer memories alone."""
        self.served_z, self.served_value = self.new(MEMORIES * n, c, h), self.operands(MEMORIES * n, c, h)
        self.pair_z = self.new(2 * n, c, MEMORIES * h)
        self.hidden, self.difference = (self.operands(MEMORIES * n, c, h) for _ in range(2))
        self.error, self.gate_error = self.new(WIDE * n, c, width), self.new(2 * n, c, 1)
        self.error_operand = self.operands(WIDE * n, c, width) if rounds else self.error
        self.back, self.signal = self.new(MEMORIES * n, c, h), self.new(n, c, MEMORIES * h)

    def _make_layers(self, n: int, c: int) -> list[LayerBuffers]:
        """Layers whose matrices of pairs of tokens lie in one buffer."""
        erases = self.options.erase != "none", self.options.erase == "per_layer" and not self.linear
        systems = n * (erases[0] + MEMORIES * erases[1])
        block = min(SOLVE_BLOCK, c)
        self.grams = self.operands(systems, c, c)
        self.inverses = self.new(systems, c // block, block, block)
        hidden = self.hidden_width

        def layer(out: int, into: int, groups: int, first: int, signal: torch.Tensor, erases: bool):
            rows = slice(first, first + groups * n)
            return LayerBuffers(
                out,
                into,
                erases,
                self.rates[rows],
                self.grams[rows] if erases else None,
                self.inverses[rows] if erases else None,
                self.new(groups * n, c, out) if erases else None,
                self.new(groups * n, c, out) if erases else signal,
                self.operands(groups * n, c, out),
                self.operands(groups * n, c, out),
                None,
                None,
                groups=groups,
            )

        if self.linear:
            return [layer(WIDE * self.width + GATE_ROWS, self.width, 1, 0, self.error, erases[0])]
        return [
            layer(MEMORIES * hidden, self.width, 1, 0, self.signal, erases[0]),
            layer(self.width, hidden, WIDE, n, self.error, erases[1]),
            layer(1, hidden, MEMORIES - WIDE, (1 + WIDE) * n, self.gate_error, erases[1]),
        ]

    def _read_buffers(self, i: int, n: int, c: int) -> ReadBuffers:
        out, moves = self.read_rows()[i], self.momentum is not None
        keeps = self.keeps and moves
        rounds = moves and self.operand != torch.float32
        return ReadBuffers(
            self.operands(n, c, c),
            self.new(n, c, out) if self.keeps else None,
            self.new(n, c, out) if keeps else None,
            self.new(n, c, out) if moves else None,
            self.new(n, c, c) if keeps else None,
            self.operands(n, out, self.layers[i].into) if rounds else None,
        )

    def _weight_buffers(self, state: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room for a running state as an operand, and the snapshot's; none if the fp32 ones serve."""
        rounds = self.operand != torch.float32
        known = self.inputs.snapshot_last, self.inputs.anchor_last
        apart = self.ratio > 1 or any(x is not None for x in known)
        return tuple(self.operands(*state.shape) if there else None for there in (rounds, apart))

    def _read_anchors(self) -> list[Operand | None]:
        """The anchors of the memory that is read, by layer."""
        anchors = []
        for anchor, out in zip(self.inputs.states("anchor"), self.read_rows()):
            part = None if anchor is None else part_of(whole(anchor), READ * out)
            if part is not None and self.operand != torch.float32:
                rounded = self.operands(self.grid.batches, out, anchor.shape[-1])
                part, _ = tiled_call.operands_of(
                    self.schedule, rounded.shape[1:], part, None, None, rounded, None
                )
            anchors.append(part)
        return anchors

    def read_rows(self) -> tuple[int, ...]:
        """Rows of one memory in the layers that a read goes through."""
        return (self.width,) if self.linear else (self.hidden_width, self.width)

    @property
    def keys(self) -> Operand:
        return Operand(self.kv, self.grid.length)

    @property
    def queries(self) -> Operand:
        """The present chunk's, of unit length."""
        return self.inputs_of(READ)

    def inputs_of(self, memory: int) -> Operand:
        """The present chunk's inputs of a memory, and then of those that follow."""
        grid = self.grid
        return Operand(self.placed, grid.pitch, memory * grid.batches * grid.pitch + self.schedule.start)

    def memory_of(self, x: torch.Tensor, memory: int) -> Operand:
        """One memory's part, and then of those that follow, of what is memory first."""
        return Operand(x, x.shape[1], memory * self.grid.batches * x.shape[1])

    def xs(self) -> list[Operand]:
        """The layers' inputs."""
        if self.linear:
            return [self.keys]
        return [self.keys, whole(self.hidden), self.memory_of(self.hidden, WIDE)]

    def tokens(self, tensor: torch.Tensor) -> Place:
        """The present chunk's rows of [N, S, D]."""
        first, count = self.grid.tokens_of(self.schedule.chunk)
        return Place(tensor, self.grid.tokens, first, count)

    def hidden_options(self) -> dict[str, Any]:
        return {"ACTIVATION": self.options.activation, "NORMALIZED": self.options.normalize_hidden}

    def residuals(self) -> dict[str, bool]:
        options = self.options
        return {
            "PROJECTION": options.projection_residual,
            "TARGET": options.target_residual,
            "RESIDUAL": options.residual,
        }

    @property
    def base_gates(self) -> dict[str, Any]:
        """Where the gates' last layers lie that serve, for the row kernels."""
        base = self.layers[-1].base
        start = base.start + (WIDE * self.width if self.linear else 0)
        return {"gates": base.tensor, "gates_rows": base.rows, "gates_start": start}

    @property
    def ratio(self) -> int:
        """Chunks of the slower clock's period."""
        options = self.options
        return max(options.chunk_size, options.generator_chunk_size) // options.chunk

    @property
    def reads_slowly(self) -> bool:
        """Whether M_memory, which is read, has the slower clock."""
        return self.options.chunk_size > self.options.generator_chunk_size

    def memory_rows(self, i: int) -> tuple[int, int]:
        """First and stop of M_memory's rows in the i-th layer's weights: none of the gates'."""
        if i == len(self.read_rows()):
            return 0, 0
        out = self.read_rows()[i]
        return READ * out, (READ + 1) * out

    def clock_rows(self, i: int, *, slow: bool) -> list[tuple[int, int]]:
        """First and stop of the rows of the i-th layer's weights whose snapshots have a clock."""
        rows = self.layers[i].groups * self.layers[i].out
        if self.ratio == 1:
            return [] if slow else [(0, rows)]
        first, stop = self.memory_rows(i)
        parts = [(first, stop)] if slow == self.reads_slowly else [(0, first), (stop, rows)]
        return [(a, b) for a, b in parts if a < b]

    def written_of(self, i: int) -> Operand:
        """What the read memory's i-th layer wrote."""
        layer = self.layers[i]
        if layer.groups > 1:
            return self.memory_of(layer.written, READ)
        rows = self.read_rows()[i]
        return Operand(layer.written, self.grid.length, width=layer.out, column=READ * rows)
