"""One chunk as tiled products: the kernels that fill its buffers, a fixed number a chunk."""

from __future__ import annotations

import dataclasses

import torch

from nl_kernels.chunk_kernels import tiled_call, tiled_layer, tiled_velocity
from nl_kernels.chunk_kernels.tiled_launch import (
    Operand,
    Place,
    Term,
    every_row,
    part_of,
    row_tiles,
    token_warps,
    whole,
)
from nl_kernels.chunk_kernels.tiled_layer import AFTER
from nl_kernels.chunk_kernels.tiled_velocity import MIXED_AFTER
from nl_kernels.ops.self_modifying.rows import GATE_ROWS
from nl_kernels.ops.self_modifying.triton_tiled_buffers import MEMORIES, READ, WIDE, ChunkBuffers
from nl_kernels.triton_support.tiles import power_of_two


class TiledChunks(ChunkBuffers):
    """The kernels of one chunk, step by step; its buffers serve every chunk in turn."""

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

    def carry(self, before: list[Operand], after: list[Operand]) -> None:
        """The running states, and with momentum the velocities, after the chunk."""
        count = len(self.layers)
        for i, (layer, x) in enumerate(zip(self.layers, self.xs())):
            if self.velocities:
                old, new = ((states[i], states[count + i]) for states in (before, after))
                tiled_velocity.carry(self.schedule, layer, self.velocities[i], self.momentum, x, old, new)
            else:
                tiled_layer.carry(self.schedule, layer, x, before[i], after[i])
