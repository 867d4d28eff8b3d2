"""The adjoint of one chunk of the tiled kernels: the steps that fill its buffers, in order.

The formulas are those of ``eager_backward.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nl_kernels.chunk_kernels import tiled_call, tiled_layer_adjoint, tiled_velocity
from nl_kernels.chunk_kernels.tiled_launch import Operand, Place, Term, every_row, part_of, whole
from nl_kernels.chunk_kernels.tiled_layer import AFTER
from nl_kernels.chunk_kernels.tiled_layer_adjoint import pair_tile
from nl_kernels.ops.self_modifying import (
    triton_tiled_adjoint,
    triton_tiled_gates,
    triton_tiled_state_adjoint,
)
from nl_kernels.ops.self_modifying.rows import GATE_ROWS
from nl_kernels.ops.self_modifying.triton_tiled_adjoint_buffers import (
    AdjointBuffers,
    VelocitySums,
    memory_part,
)
from nl_kernels.ops.self_modifying.triton_tiled_buffers import MEMORIES, READ, WIDE
from nl_kernels.triton_support.tiles import power_of_two


class TiledAdjoint(AdjointBuffers):
    """The kernels of one chunk's adjoint, step by step; ``chunks`` has what the chunk computed."""

    def chunk_adjoint(self, before: list[Operand]) -> None:
        """Gradients of the present chunk's tokens and, in place, weights; ``before``: the running ones."""
        chunks, s = self.chunks, self.schedule
        for layer, adjoint, buffer in zip(chunks.layers, self.layers, self._weights):
            shape = layer.groups * layer.out, layer.into
            weights, _ = tiled_call.operands_of(s, shape, whole(adjoint.grad), None, None, buffer, None)
            adjoint.weights = dataclasses.replace(weights, step=layer.out)
        for layer, velocity, buffer in zip(chunks.layers, chunks.velocities, self._velocity_weights):
            shape = layer.groups * layer.out, layer.into
            weights, _ = tiled_call.operands_of(s, shape, whole(velocity.grad), None, None, buffer, None)
            velocity.grad_weights = dataclasses.replace(weights, step=layer.out)
        if chunks.running:
            self._read_adjoint()
        self._write_adjoint()
        if chunks.linear:
            self._linear_error_adjoint()
        else:
            self._error_adjoint()
        self._made_adjoint()
        triton_tiled_state_adjoint.state_adjoint(self, before)
        self._gates_adjoint()
        if chunks.linear:
            self._linear_input_adjoint()
        else:
            self._served_adjoint()
        self._input_adjoint()
        triton_tiled_state_adjoint.served_state_adjoint(self)

    def _read_adjoint(self) -> None:
        """Gradients of the queries, and what reads of the running state leave for its writes."""
        chunks = self.chunks
        if chunks.linear:
            self._layer_read_adjoint(0, self.grad_o, None, chunks.queries, chunks.keys, self.at_query)
            return
        hidden, value = chunks.memory_of(chunks.hidden, READ), whole(chunks.query_value)
        self._layer_read_adjoint(1, self.grad_o, None, value, hidden, self.at_query_value)
        grad = whole(self.at_query_value)
        self._layer_read_adjoint(0, grad, chunks.query_z, chunks.queries, chunks.keys, self.at_query)

    def _layer_read_adjoint(
        self, i: int, grad: Operand, z: torch.Tensor | None, queries: Operand, x: Operand, out: torch.Tensor
    ) -> None:
        """Of one layer's read; ``grad`` is that of its result or, with ``z``, of the hidden layer there."""
        from nl_kernels.chunk_kernels.tiled_rows import read_adjoint_rows_kernel

        chunks, s, layer, adjoint = self.chunks, self.schedule, self.chunks.layers[i], self.reads[i]
        length, rows, read = chunks.grid.length, chunks.read_rows()[i], chunks.reads[i]
        s.rows(
            "weigh read",
            read_adjoint_rows_kernel,
            rows,
            {
                "grad": grad.tensor,
                "grad_rows": grad.rows,
                "grad_start": grad.start,
                "z": z,
                "recalled": read.recalled,
                "operand": None if z is None else self.at_query_z,
                "weighted": adjoint.weighted,
                "after": adjoint.after,
            },
            **chunks.hidden_options(),
        )
        if z is not None:
            grad = whole(self.at_query_z)
        if chunks.velocities:
            tiled_velocity.velocity_read_adjoint(
                s,
                (rows, layer.into),
                chunks.written_of(i),
                chunks.velocities[i].weights,
                read.velocity_recalled,
                read.products,
                chunks.momentum,
                grad,
                weighted=adjoint.velocity_weighted,
                mixed_after=adjoint.mixed_after,
                pairs=adjoint.pairs,
                at_query=adjoint.at_query,
                adds=i + 1 < len(self.reads),
            )
        else:
            given = (grad, chunks.written_of(i), rows, read.scores, "full")
            sums = {"row_sums": adjoint.full_rows, "column_sums": adjoint.full_columns}
            tiled_layer_adjoint.pairs(s, "read pairs", *given, rate=None, out=adjoint.pairs, **sums)
        terms = [Term(grad, part_of(layer.weights, READ * rows), rows)]
        if chunks.anchors[i] is not None:
            terms.append(Term(grad, chunks.anchors[i], rows))
            at_anchor = memory_part(self.gradients.anchor[i], READ * rows, rows)
            by_anchor = [Term(grad.t, queries, length)]
            s.product("read to anchor", rows, layer.into, by_anchor, add0=at_anchor, out=at_anchor)
        terms.append(Term(whole(adjoint.pairs), x, length, "l"))
        more = every_row(adjoint.at_query)
        s.product("read to queries", length, layer.into, terms, factor=AFTER, add1=more, out=every_row(out))
        terms = [Term(whole(read.scores).t, grad, length, "u")]
        s.product("read to written", length, rows, terms, out=every_row(adjoint.written))

    def _write_adjoint(self) -> None:
        """Adjoints of signals, rates and of what is written along."""
        chunks, s = self.chunks, self.schedule
        n, c = chunks.grid.batches, chunks.grid.length
        for i, (layer, adjoint, x) in enumerate(zip(chunks.layers, self.layers, chunks.xs())):
            more, more_terms = None, ()
            if chunks.running and i < len(self.reads):
                read, rows = self.reads[i], chunks.read_rows()[i]
                if layer.groups > 1:
                    more = Operand(read.written, c, READ * n * c)
                else:
                    more = Operand(read.written, c, column=READ * rows)
                    more_terms = [Term(whole(read.pairs).t, chunks.queries, c, "u")]
            given = (s, layer, adjoint)
            reading = {"more": more, "more_terms": more_terms}
            rates = {"proximal": chunks.proximal, "adds": False}
            if chunks.velocities:
                tiled_velocity.write_adjoint(*given, chunks.velocities[i], x, None, None, **reading)
                tiled_layer_adjoint.rate_adjoint(*given, self.at_rates[i], **rates)
            else:
                tiled_layer_adjoint.write_adjoint(*given, x, None, None, self.at_rates[i], **rates, **reading)
        if chunks.running and not chunks.linear:
            place = Place(self.at_hidden, c, READ * n * c, c)
            terms = [Term(whole(self.reads[1].pairs).t, whole(chunks.query_value), c, "u")]
            s.product("read to hidden", c, chunks.hidden_width, terms, add0=place, out=place)

    def _error_adjoint(self) -> None:
        """Through signals, errors and hidden layers to what keys and values get."""
        chunks, s, width, h = self.chunks, self.schedule, self.chunks.width, self.chunks.hidden_width
        length, bound = chunks.grid.length, chunks.options.error_bound
        (first, last, gate), (at_first, at_last, at_gate) = chunks.layers, self.layers
        s.rows(
            "signal adjoint",
            triton_tiled_adjoint.signal_adjoint_kernel,
            h,
            {
                "at_signal": at_first.at_signal,
                "z": chunks.pair_z,
                "back": chunks.back,
                "right": first.right,
                "at_value": self.at_hidden,
                "coefficient": self.coefficient,
                **chunks.base_gates,
                "gate_error": chunks.gate_error,
                "gate_right": gate.right,
                "at_gate_signal": at_gate.at_signal,
                "at_back": self.at_back,
                "at_value_after": self.at_value,
                "at_slope": self.at_slope,
                "radial": self.radial,
                "before": at_first.before,
                "at_gate_error": self.at_gate_error,
                "gate_before": at_gate.before,
            },
            groups=MEMORIES,
            BOUND=bound,
            **chunks.hidden_options(),
        )
        s.product(
            "back to error",
            length,
            width,
            [Term(whole(self.at_back), last.base.t, h)],
            add0=every_row(at_last.at_signal),
            out=every_row(self.at_raw_error),
            groups=WIDE,
        )
        s.rows(
            "error adjoint",
            triton_tiled_adjoint.error_adjoint_kernel,
            width,
            {
                "at_error": self.at_raw_error,
                "error": chunks.error,
                "factor": chunks.factor,
                "right": last.right,
                "solved": at_last.solved,
                "operand": self.at_error,
                "plain": None if self.error_plain is self.at_error else self.error_plain,
                "before": at_last.before,
            },
            groups=WIDE,
            BOUND=bound,
        )
        s.product(
            "error to value",
            length,
            h,
            [Term(whole(self.at_error), last.base, width)],
            out=every_row(self.at_difference),
            groups=WIDE,
        )
        s.rows(
            "pair adjoint",
            triton_tiled_adjoint.pair_adjoint_kernel,
            h,
            {
                "at_value": self.at_value,
                "at_difference": self.at_difference,
                "at_gate_error": self.at_gate_error,
                **chunks.base_gates,
                "z": chunks.pair_z,
                "radial": self.radial,
                "at_slope": self.at_slope,
                "operand": self.at_z,
            },
            groups=MEMORIES,
            **chunks.hidden_options(),
        )
        terms = [Term(whole(self.at_z), dataclasses.replace(first.base, step=0), first.out)]
        s.product("pair to keys", length, width, terms, out=every_row(self.at_pair), groups=2)

    def _linear_error_adjoint(self) -> None:
        """The same of linear memories; ``at_pair`` is then of k − v."""
        chunks, s, layer, adjoint = self.chunks, self.schedule, self.chunks.layers[0], self.layers[0]
        s.rows(
            "error adjoint",
            triton_tiled_adjoint.linear_error_adjoint_kernel,
            chunks.width,
            {
                "at_error": adjoint.at_signal,
                "error": chunks.error,
                "factor": chunks.factor,
                "right": layer.right,
                "operand": self.at_error,
                "plain": None if self.error_plain is self.at_error else self.error_plain,
                "before": adjoint.before,
            },
            groups=WIDE,
            GATES=GATE_ROWS,
            BOUND=chunks.options.error_bound,
        )
        terms = [Term(whole(self.at_error), layer.base, layer.out)]
        s.product("error to keys", chunks.grid.length, chunks.width, terms, out=every_row(self.at_pair))

    def _made_adjoint(self) -> None:
        """What the memories of keys and values made."""
        chunks, s = self.chunks, self.schedule
        error = self.error_plain
        apart = chunks.width if chunks.linear else chunks.grid.batches * chunks.grid.length * chunks.width
        rounds = self.made_plain is not self.at_made
        s.rows(
            "key and value adjoint",
            triton_tiled_adjoint.key_value_adjoint_kernel,
            chunks.width,
            {
                "at_pair": self.at_pair,
                "at_x": self.layers[0].at_x,
                "coefficient": self.layers[0].coefficient,
                "at_error": error,
                "error_pitch": error.shape[-1],
                "error_apart": apart,
                "made": chunks.made,
                "key_scale": chunks.key_scale,
                "at_output": None if chunks.running else self._grad_o,
                "at_output_rows": chunks.grid.pitch,
                "at_output_start": s.start,
                "operand": self.at_made,
                "plain": self.made_plain if rounds else None,
            },
            PAIRED=not chunks.linear,
            **chunks.residuals(),
        )

    def _gates_adjoint(self) -> None:
        """The logits of rates and retentions, and the gates' parameters."""
        chunks, s, length = self.chunks, self.schedule, self.chunks.grid.length
        given: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        names = ["before", "to_end", "strict_rows", "strict_columns", "inner"]
        for i in range(3):
            constants |= {f"WEIGHT_TILES{i}": 0, f"WEIGHT_BLOCK{i}": 1}
        for i, layer in enumerate(chunks.layers):
            tiles = s.weight_tiles(layer.out, layer.into)
            constants |= {f"WEIGHT_TILES{i}": tiles, f"WEIGHT_BLOCK{i}": power_of_two(tiles)}
        if chunks.velocities:
            names.remove("to_end")  # spans of the mixture are shared
            self._momentum_adjoint(constants)
        for i, (layer, adjoint) in enumerate(zip(chunks.layers, self.layers)):
            given |= {f"{name}{i}": getattr(adjoint, name) for name in names}
            given |= {f"rate{i}": layer.rate, f"at_rate{i}": self.at_rates[i]}
        for i, read in enumerate(self.reads):
            given |= {f"{name}{i}": getattr(read, name) for name in ("after", "full_rows", "full_columns")}
        if chunks.velocities:
            shared = chunks.momentum
            given |= {"shared_to_end": shared.to_end, "shared_log": shared.log}
            given |= {"full_rows0": shared.full_rows, "full_columns0": shared.full_columns}
        given |= {"final": s.final, "logits": chunks.logits, "rate_max": chunks.inputs.rate_max}
        given |= {"at_logits": self.at_logits, "operand": self.at_gates}
        given["at_parameters"] = self.gradients.parameters
        constants |= {"TILES": -(-length // pair_tile(length)), "BLOCK": power_of_two(length)}
        constants |= {"GATES": GATE_ROWS, "PARTS0": WIDE if chunks.linear else MEMORIES}
        s.add(
            "gates adjoint",
            triton_tiled_gates.gates_adjoint_kernel,
            chunks.grid.batches,
            given,
            constants,
            tiled_layer_adjoint.token_warps(length, s.architecture),
        )

    def _momentum_adjoint(self, constants: dict[str, Any]) -> None:
        """The momenta, and what decays get through the mixture; ``constants`` has the weights' tiles."""
        chunks, s, sums = self.chunks, self.schedule, self.velocity_sums
        names = ("mixed_to_end", "carried_to_end", "mixed_inner", "carried_inner")
        given = {name: getattr(sums, name) for name in names}
        for i, velocity in enumerate(chunks.velocities):
            given |= {f"{name}{i}": getattr(velocity, name) for name in names}
        constants = {**constants, "BLOCK": power_of_two(chunks.grid.length)}
        s.add("velocity sums", triton_tiled_gates.velocity_sums_kernel, chunks.grid.batches, given, constants)
        after = [read.mixed_after for read in self.reads] or [None]
        layers = [sums._replace(mixed_after=after[0])]
        layers += [VelocitySums(None, None, None, None, x) for x in after[1:]]
        chunks.momentum.adjoint(s, layers, self.gradients.momentum)

    def _served_adjoint(self) -> None:
        """Through the hidden layers at the inputs."""
        chunks, s, width, h = self.chunks, self.schedule, self.chunks.width, self.chunks.hidden_width
        length, (first, last, _) = chunks.grid.length, chunks.layers
        s.product(
            "made to served",
            length,
            h,
            [Term(whole(self.at_made), last.base, width)],
            out=every_row(self.at_served),
            groups=self.served,
        )
        s.rows(
            "served adjoint",
            triton_tiled_adjoint.served_adjoint_kernel,
            h,
            {
                "at_value": self.at_served,
                "at_gate": self.at_logits,
                **chunks.base_gates,
                "z": chunks.served_z,
                "operand": self.at_served_z,
            },
            groups=MEMORIES,
            SERVED=self.served,
            **chunks.hidden_options(),
        )
        base = dataclasses.replace(first.base, step=h)
        terms = [Term(whole(self.at_served_z), base, h)]
        s.product("served to inputs", length, width, terms, out=every_row(self.at_inputs), groups=MEMORIES)

    def _linear_input_adjoint(self) -> None:
        """Of linear memories, whose inputs are what they serve."""
        chunks, s, width = self.chunks, self.schedule, self.chunks.width
        length, base = chunks.grid.length, chunks.layers[0].base
        groups = len(self.at_inputs) // chunks.grid.batches
        terms = [Term(whole(self.at_made), dataclasses.replace(base, step=width), width)]
        s.product("made to inputs", length, width, terms, out=every_row(self.at_inputs), groups=groups)
        terms = [Term(whole(self.at_gates), part_of(base, WIDE * width), GATE_ROWS)]
        s.product("gates to inputs", length, width, terms, out=every_row(self.at_gate_inputs))

    def _input_adjoint(self) -> None:
        chunks, gradients = self.chunks, self.gradients
        place = chunks.tokens(gradients.query)
        self.schedule.rows(
            "input adjoint",
            triton_tiled_adjoint.input_adjoint_kernel,
            chunks.width,
            {
                "at_inputs": self.at_inputs,
                "at_gates": self.at_gate_inputs,
                "at_made": self.made_plain if chunks.options.projection_residual else None,
                "at_read": self.at_query,
                "at_output": self.given if chunks.options.residual else None,
                "query": chunks.inputs.query,
                "d_query": gradients.query,
                "d_key_input": gradients.key_input,
                "d_value_input": gradients.value_input,
                "d_gate_input": gradients.gate_input,
                "out_rows": place.rows,
                "out_start": place.start,
                "out_limit": place.limit,
            },
        )
