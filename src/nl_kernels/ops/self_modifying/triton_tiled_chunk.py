"""One chunk as tiled products: its buffers, and the kernels that fill them, a fixed number a chunk.

The memories of a row share keys, rates and decays, so that all first layers are one layer [5h, D], and so are
linear memories [R, D], with the gates below the three others. What is by memory is memory first.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from nl_kernels.chunk_kernels import tiled_call, tiled_layer, tiled_velocity
from nl_kernels.chunk_kernels.tiled_launch import (
    Operand,
    Place,
    Schedule,
    Term,
    TokenGrid,
    every_row,
    operand_dtype,
    row_tiles,
    token_warps,
    whole,
)
from nl_kernels.chunk_kernels.tiled_layer import AFTER, SOLVE_BLOCK, LayerBuffers
from nl_kernels.chunk_kernels.tiled_velocity import MIXED_AFTER, Momentum, Velocity
from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.rows import GATE_ROWS, TiledInputs
from nl_kernels.triton_support.tiles import power_of_two

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


class TiledChunks:
    """The buffers of one chunk, and the kernels that fill them; they serve every chunk in turn.

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

    def take_weights(self, before: list[Operand], chunk: int, slow: list[Operand] | None = None) -> None:
        """Make ``chunk`` the present one, and its weights operands.

        Args:
            before: the running states and, with momentum, the velocities.
            slow: the snapshots of the slower clock, where there are two.
        """
        self.schedule.chunk = chunk
        # Rows that lie differently may begin in any chunk of the slower clock's first period.
        early = chunk == 0 or (self.inputs.begin is not None and chunk < self.ratio)
        snapshots, anchors = (self.inputs.states(name) for name in ("snapshot", "anchor"))
        slow = [None] * len(self.layers) if slow is None else slow
        for i, layer in enumerate(self.layers):
            snapshot = snapshots[i] if early else None
            operand, base = self._weights[i]
            if operand is None and snapshot is None and anchors[i] is None and slow[i] is None:
                base = None
            shape = layer.groups * layer.out, layer.into
            weights, base = tiled_call.operands_of(
                self.schedule,
                shape,
                before[i],
                snapshot,
                anchors[i],
                operand,
                base,
                slow=slow[i],
                slow_rows=(*self.memory_rows(i), self.reads_slowly),
            )
            layer.weights, layer.base = (dataclasses.replace(x, step=layer.out) for x in (weights, base))
        for i, (read, velocity) in enumerate(zip(self.reads, before[len(self.layers) :])):
            part, shape = (
                part_of(velocity, self.memory_rows(i)[0]),
                (self.read_rows()[i], self.layers[i].into),
            )
            self.velocities[i].weights, _ = tiled_call.operands_of(
                self.schedule, shape, part, None, None, read.rounded, None
            )

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

    def generate(self, o: torch.Tensor | None) -> None:
        """k, v, rates and decays, from the snapshots, and snapshot reads into ``o`` [N, S, D]."""
        from nl_kernels.chunk_kernels.tiled_rows import hidden_rows_kernel
        from nl_kernels.ops.self_modifying import triton_tiled_rows as rows

        s, inputs, width, h = self.schedule, self.inputs, self.width, self.hidden_width
        length = self.grid.length
        if self.linear:
            x, base = self.inputs_of(0), dataclasses.replace(self.layers[0].base, step=width)
            gates = {"gate_x": self.placed, "gate_x_rows": self.grid.pitch, "gate_x_start": s.start}
        else:
            base = dataclasses.replace(self.layers[0].base, step=h)
            s.product(
                "served",
                length,
                h,
                [Term(self.inputs_of(0), base.t, width)],
                out=every_row(self.served_z),
                groups=MEMORIES,
            )
            given = {"z": self.served_z, "value": self.served_value}
            s.rows(
                "served activation", hidden_rows_kernel, h, given, groups=MEMORIES, **self.hidden_options()
            )
            x, base = whole(self.served_value), self.layers[1].base
            gates = {"gate_x": self.served_value, "gate_x_rows": length, "gate_x_start": 0}
        into = h or width
        terms = [Term(x, base.t, into)]
        groups = 2 if self.running else WIDE
        s.product("made", length, width, terms, out=every_row(self.made), groups=groups)
        given = {
            "made": self.made,
            "key_input": inputs.key_input,
            "value_input": inputs.value_input,
            "query": self.placed,
            "query_rows": self.grid.pitch,
            "query_start": self.queries.start,
            **gates,
            **self.base_gates,
            "rate_bias": inputs.rate_bias,
            "retention_bias": inputs.retention_bias,
            "kv": self.kv if self.kv is not self.made else None,
            "difference": self.difference if self.linear else None,
            "key_scale": self.key_scale,
            "key_square": self.key_square,
            "logits": self.logits,
            "o": None if self.running else o,
        }
        block, count, warps = row_tiles(max(into, width), length)
        s.add(
            "generate",
            rows.generate_rows_kernel,
            self.grid.batches * length // count,
            given,
            {
                "WIDTH": width,
                "BLOCK": block,
                "GATE_WIDTH": into,
                "GATE_BLOCK": block,
                "TWO_LAYER": not self.linear,
                "ROWS": count,
                **self.residuals(),
            },
            warps,
        )
        s.add(
            "coefficients",
            rows.gate_coefficients_kernel,
            self.grid.batches,
            {
                "logits": self.logits,
                "rate_max": inputs.rate_max,
                "key_square": self.key_square,
                "rates": self.rates,
                "final": s.final,
                "momentum": inputs.momentum,
                "mixed_final": self.momentum and self.momentum.mixed_final,
                "carried_final": self.momentum and self.momentum.carried_final,
            },
            {"COPIES": self.copies, "BLOCK": power_of_two(length)},
            token_warps(length, s.architecture),
        )
        if self.momentum is not None:
            self.momentum.make_matrices(s)

    def serve_and_write(self) -> None:
        """Errors at the snapshot, and what they write."""
        length = self.grid.length
        if self.linear:
            self._linear_errors()
        else:
            self._errors()
        s, first = self.schedule, self.layers[0]
        if first.erases:
            terms = [Term(self.keys, self.keys.t, first.into, "d")]
            s.product("gram", length, length, terms, decay="strict", out=every_row(first.gram))
            if not self.linear and self.layers[1].erases:
                hidden = whole(self.hidden)
                s.product(
                    "hidden gram",
                    length,
                    length,
                    [Term(hidden, hidden.t, self.hidden_width, "d")],
                    decay="strict",
                    out=every_row(self.grams[self.grid.batches :]),
                    groups=MEMORIES,
                )
            tiled_layer.invert_blocks(s, self.grams, self.rates, self.inverses)
        signals = [self.signal] if self.linear else [self.signal, self.error, self.gate_error]
        for layer, x, signal in zip(self.layers, self.xs(), signals):
            if layer.erases:
                tiled_layer.recall_and_solve(s, layer, x, signal)

    def _written(self, i: int, prefix: str = "") -> dict[str, torch.Tensor | None]:
        """Where the i-th layer's writes go that wait for no solve."""
        layer = self.layers[i]
        if layer.erases:
            return {}
        carried = self.velocities[i].carried if self.velocities else None
        parts = {"written": layer.written, "weighted": layer.weighted, "carried": carried}
        return {f"{prefix}{name}": part for name, part in parts.items()}

    def _linear_errors(self) -> None:
        from nl_kernels.ops.self_modifying import triton_tiled_rows as rows

        s, layer = self.schedule, self.layers[0]
        terms = [Term(whole(self.difference), layer.base.t, self.width)]
        s.product("error", self.grid.length, layer.out, terms, out=every_row(self.error))
        s.rows(
            "bound",
            rows.linear_error_rows_kernel,
            self.width,
            {"error": self.error, "made": self.made, "factor": self.factor, **self._written(0)},
            GATES=GATE_ROWS,
            BOUND=self.options.error_bound,
            **self.residuals(),
        )

    def _errors(self) -> None:
        from nl_kernels.ops.self_modifying import triton_tiled_rows as rows

        s, length, width, h = self.schedule, self.grid.length, self.width, self.hidden_width
        first, last = self.layers[:2]
        base = dataclasses.replace(first.base, step=0)
        terms = [Term(whole(self.kv), base.t, width)]
        s.product("pair", length, first.out, terms, out=every_row(self.pair_z), groups=2)
        s.rows(
            "pair activation",
            rows.pair_hidden_rows_kernel,
            h,
            {
                "pair_z": self.pair_z,
                "hidden": self.hidden,
                "difference": self.difference,
                "effective": self.rates[self.grid.batches :] if self.proximal and last.erases else None,
            },
            groups=MEMORIES,
            **self.hidden_options(),
        )
        terms = [Term(whole(self.difference), last.base.t, h)]
        s.product("error", length, width, terms, out=every_row(self.error), groups=WIDE)
        s.rows(
            "bound",
            rows.memory_error_rows_kernel,
            width,
            {
                "error": self.error,
                "made": self.made,
                "operand": self.error_operand if self.error_operand is not self.error else None,
                "factor": self.factor,
                **self._written(1),
            },
            groups=WIDE,
            BOUND=self.options.error_bound,
            **self.residuals(),
        )
        terms = [Term(whole(self.error_operand), last.base, width)]
        s.product("error back", length, h, terms, out=every_row(self.back), groups=WIDE)
        s.rows(
            "signal",
            rows.memory_signal_rows_kernel,
            h,
            {
                "pair_z": self.pair_z,
                "difference": self.difference,
                **self.base_gates,
                "back": self.back,
                "gate_error": self.gate_error,
                "signal": self.signal,
                **self._written(0),
                **self._written(2, "gate_"),
            },
            groups=MEMORIES,
            BOUND=self.options.error_bound,
            **self.hidden_options(),
        )

    def read_queries(self, o: torch.Tensor | None) -> None:
        """Running reads, into ``o`` [N, S, D]; without it what the adjoint needs of them alone."""
        from nl_kernels.chunk_kernels.tiled_rows import hidden_rows_kernel

        if not self.running:
            return
        residual = None
        if self.options.residual:
            place = self.queries
            residual = Place(place.tensor, place.rows, place.start, self.grid.length)
        out, queries = None if o is None else self.tokens(o), self.queries
        if not self.linear:
            self._read(0, queries, self.keys, every_row(self.query_z), None)
            given = {"z": self.query_z, "value": self.query_value}
            width = self.hidden_width
            self.schedule.rows("query activation", hidden_rows_kernel, width, given, **self.hidden_options())
            queries = whole(self.query_value)
        x = self.keys if self.linear else self.memory_of(self.hidden, READ)
        self._read(len(self.reads) - 1, queries, x, out, residual)

    def _read(self, i: int, queries: Operand, x: Operand, out: Place | None, residual: Place | None) -> None:
        """M_memory's i-th layer after each token."""
        s, length, layer, read = self.schedule, self.grid.length, self.layers[i], self.reads[i]
        rows = self.read_rows()[i]
        terms = [Term(queries, x.t, layer.into, "d")]
        if self.momentum is None:
            s.product("scores", length, length, terms, decay="full", out=every_row(read.scores))
        else:
            by_velocity = [Term(queries, self.velocities[i].weights.t, layer.into)]
            s.product(
                "read velocity",
                length,
                rows,
                by_velocity,
                factor=MIXED_AFTER,
                coefficients=s.momenta,
                aside=read.velocity_recalled,
                aside_terms=-1,
                out=every_row(read.velocity_read),
            )
            s.product(
                "scores",
                length,
                length,
                terms,
                aside=read.products,
                matrix=self.momentum.mixed,
                out=every_row(read.scores),
            )
        terms = [Term(queries, part_of(layer.weights, READ * rows).t, layer.into)]
        if self.anchors[i] is not None:
            terms.append(Term(queries, self.anchors[i].t, layer.into))
        terms.append(Term(whole(read.scores), self.written_of(i), length, "l"))
        if out is None:
            terms = terms[:1]
        s.product(
            "read",
            length,
            rows,
            terms,
            factor=AFTER,
            aside=read.recalled,
            add0=every_row(read.velocity_read),
            add1=residual,
            out=out,
        )

    def written_of(self, i: int) -> Operand:
        """What the read memory's i-th layer wrote."""
        layer = self.layers[i]
        if layer.groups > 1:
            return self.memory_of(layer.written, READ)
        rows = self.read_rows()[i]
        return Operand(layer.written, self.grid.length, width=layer.out, column=READ * rows)

    def carry(self, before: list[Operand], after: list[Operand]) -> None:
        """The running states, and with momentum the velocities, after the chunk."""
        count = len(self.layers)
        for i, (layer, x) in enumerate(zip(self.layers, self.xs())):
            if self.velocities:
                old, new = ((states[i], states[count + i]) for states in (before, after))
                tiled_velocity.carry(self.schedule, layer, self.velocities[i], self.momentum, x, old, new)
            else:
                tiled_layer.carry(self.schedule, layer, x, before[i], after[i])


def part_of(weights: Operand, first: int) -> Operand:
    """The rows of a matrix from ``first`` on."""
    return dataclasses.replace(weights, start=weights.start + first)


def slot_of(tensor: torch.Tensor, slot: int) -> Operand:
    """State number ``slot`` of [N, slots, rows, width]."""
    return Operand(tensor, tensor.shape[1] * tensor.shape[2], slot * tensor.shape[2])
