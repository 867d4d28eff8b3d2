"""Chunks too large for one program: the forward pass as tiled products, a fixed number of kernels a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    slot_of,
    whole,
)
from nl_kernels.ops.deep_memory import launch
from nl_kernels.triton_support.kernel_call import run_calls
from nl_kernels.triton_support.targets import architecture_of


class TiledChunks:
    """The buffers of one chunk, and the kernels that fill them; they serve every chunk in turn.

    Args:
        keeps: the buffers also have what the adjoint needs.
    """

    def __init__(
        self, inputs: launch.Inputs, options: launch.Options, architecture: str, *, keeps: bool
    ) -> None:
        batches, tokens, key_dim = inputs.k.shape
        slots = (inputs.begin, inputs.stop, inputs.origin)
        grid = TokenGrid(batches, tokens, options.offset, options.chunk_size, *slots)
        self.inputs, self.options, self.grid = inputs, options, grid
        self.schedule = s = Schedule(grid, options.precision, architecture)
        self.two_layer = inputs.outer is not None
        self.running = options.read == "running"
        self.key_dim, self.value_dim = key_dim, inputs.v.shape[-1]
        self.hidden = inputs.inner.shape[1]
        self.operand = operand_dtype(options.precision)
        proximal = options.proximal and options.erase != "none"

        self.rate = tiled_call.coefficients_of(s, inputs.rate, inputs.log_decay)
        placed, effective = tiled_call.place_tokens(s, inputs.k, proximal=proximal)
        self._keys = placed
        self._queries, _ = tiled_call.place_tokens(s, inputs.q)

        wide, out = self.hidden, self.value_dim
        self.raw, self.error = self.new(out), self.new(out)
        self.error_operand = self.error
        if self.two_layer and self.operand != torch.float32:
            self.error_operand = self.new(out, dtype=self.operand)
        self.z = self.value = self.back = self.query_z = self.query_value = None
        signal = self.error
        if self.two_layer:
            self.z, self.back, self.query_z, signal = (self.new(wide) for _ in range(4))
            self.value, self.query_value = (self.new(wide, dtype=self.operand) for _ in range(2))
        self.signals = [signal, self.error] if self.two_layer else [self.error]

        shared: dict[str, Any] = {"running": self.running, "keeps": keeps}
        erases = options.erase != "none", options.erase == "per_layer"
        buffers = tiled_layer.LayerBuffers.of
        self.layers = [
            buffers(
                s,
                inputs.q,
                wide,
                key_dim,
                erases=erases[0],
                rate=self.rate if effective is None else effective,
                signal=signal,
                **shared,
            )
        ]
        if self.two_layer:
            rate = self.rate
            if options.proximal and erases[1]:
                rate = inputs.q.new_empty((batches, grid.pitch))
            self.layers.append(
                buffers(s, inputs.q, out, wide, erases=erases[1], rate=rate, signal=self.error, **shared)
            )
        self.momentum, self.velocities = None, []
        if inputs.momentum is not None:
            self.momentum = tiled_velocity.Momentum.of(s, inputs.momentum, inputs.log_decay, **shared)
            self.velocities = [tiled_velocity.Velocity.of(s, layer, **shared) for layer in self.layers]
            for layer, velocity in zip(self.layers, self.velocities):
                rounds = self.running and self.operand != torch.float32
                velocity.rounded = self.new_weight(layer) if rounds else None
        self._weights = [self._weight_buffers(i) for i in range(len(self.layers))]
        for layer, anchor in zip(self.layers, inputs[12:14]):
            layer.anchor = self._anchor(layer, anchor) if self.running else None

    def new(self, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A matrix of a chunk's tokens."""
        return self.inputs.q.new_empty((self.grid.batches, self.grid.length, width), dtype=dtype)

    def new_weight(self, layer: tiled_layer.LayerBuffers) -> torch.Tensor:
        """A weight as an operand."""
        return self.inputs.q.new_empty((self.grid.batches, layer.out, layer.into), dtype=self.operand)

    def _weight_buffers(self, i: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room for a layer's running weights as an operand, and the snapshot's; none if fp32 ones serve."""
        rounds = self.operand != torch.float32
        apart = self.inputs[10] is not None or self.inputs[12] is not None
        layer = self.layers[i]
        return (self.new_weight(layer) if rounds else None, self.new_weight(layer) if apart else None)

    def _anchor(self, layer: tiled_layer.LayerBuffers, anchor: torch.Tensor | None) -> Operand | None:
        if anchor is None or self.operand == torch.float32:
            return whole(anchor)
        rounded = self.new_weight(layer)
        return tiled_call.operands_of(self.schedule, layer.shape, whole(anchor), None, None, rounded, None)[0]

    @property
    def keys(self) -> Operand:
        """The present chunk's."""
        return Operand(self._keys, self.grid.pitch, self.schedule.start)

    @property
    def queries(self) -> Operand:
        """The present chunk's."""
        return Operand(self._queries, self.grid.pitch, self.schedule.start)

    def xs(self) -> list[Operand]:
        """The layers' inputs."""
        return [self.keys, whole(self.value)][: len(self.layers)]

    def tokens(self, tensor: torch.Tensor) -> Place:
        """The present chunk's rows of [N, S, width]."""
        first, count = self.grid.tokens_of(self.schedule.chunk)
        return Place(tensor, self.grid.tokens, first, count)

    def hidden_options(self) -> dict[str, Any]:
        return {"ACTIVATION": self.options.activation, "NORMALIZED": self.options.normalize_hidden}

    def take_weights(self, before: list[Operand], chunk: int) -> None:
        """Make ``chunk`` the present one, and its weights operands.

        ``before`` are the running ones and, with momentum, the velocities.
        """
        self.schedule.chunk = chunk
        if self.momentum is not None:
            self.momentum.make_matrices(self.schedule)
        for layer, velocity, weight in zip(self.layers, self.velocities, before[len(self.layers) :]):
            velocity.weights, _ = tiled_call.operands_of(
                self.schedule, layer.shape, weight, None, None, velocity.rounded, None
            )
        for i, layer in enumerate(self.layers):
            snapshot = self.inputs[10 + i] if chunk == 0 else None
            operand, base = self._weights[i]
            if operand is None and snapshot is None and self.inputs[12 + i] is None:
                base = None
            layer.weights, layer.base = tiled_call.operands_of(
                self.schedule, layer.shape, before[i], snapshot, self.inputs[12 + i], operand, base
            )

    def serve_and_write(self) -> None:
        """Errors at the snapshot, and what they write."""
        from nl_kernels.chunk_kernels import tiled_rows

        s, options, layers = self.schedule, self.options, self.layers
        length, bound = self.grid.length, options.error_bound or 0.0
        first, last = layers[0], layers[-1]
        x = self.keys
        if self.two_layer:
            s.product(
                "hidden layer",
                length,
                self.hidden,
                [Term(self.keys, first.base.t, self.key_dim)],
                out=every_row(self.z),
            )
            effective = last.rate if options.proximal and last.erases else None
            s.rows(
                "activation",
                tiled_rows.hidden_rows_kernel,
                self.hidden,
                {"z": self.z, "value": self.value, "effective": effective},
                **self.hidden_options(),
            )
            x = whole(self.value)
        s.product(
            "error",
            length,
            self.value_dim,
            [Term(x, last.base.t, last.into)],
            add0=self.tokens(self.inputs.v),
            sign=-1,
            add1=self.tokens(self.inputs.k) if options.residual else None,
            out=every_row(self.raw),
        )
        s.rows(
            "bound",
            tiled_rows.error_rows_kernel,
            self.value_dim,
            {
                "raw": self.raw,
                "error": self.error,
                "operand": None if self.error_operand is self.error else self.error_operand,
                **self._written(-1),
            },
            BOUND=bound,
        )
        if self.two_layer:
            s.product(
                "error back",
                length,
                self.hidden,
                [Term(whole(self.error_operand), last.base, self.value_dim)],
                out=every_row(self.back),
            )
            s.rows(
                "signal",
                tiled_rows.signal_rows_kernel,
                self.hidden,
                {"z": self.z, "back": self.back, "signal": self.signals[0], **self._written(0)},
                BOUND=bound,
                **self.hidden_options(),
            )
        for layer, operand, signal in zip(layers, self.xs(), self.signals):
            if layer.erases:
                tiled_layer.erase_and_write(s, layer, operand, signal)

    def _written(self, i: int) -> dict[str, torch.Tensor | None]:
        """Where the i-th layer's writes go that wait for no solve."""
        layer = self.layers[i]
        if layer.erases:
            return {}
        carried = self.velocities[i].carried if self.velocities else None
        return {"written": layer.written, "weighted": layer.weighted, "carried": carried}

    def read_queries(self, o: torch.Tensor | None) -> None:
        """The reads, into ``o`` [N, S, Dv]; without it what the adjoint needs of them alone."""
        from nl_kernels.chunk_kernels.tiled_rows import hidden_rows_kernel

        s, length, last = self.schedule, self.grid.length, self.layers[-1]
        residual = self.tokens(self.inputs.q) if self.options.residual else None
        out = None if o is None else self.tokens(o)
        queries = self.queries
        if self.two_layer:
            if self.running:
                self._read_running(0, queries, every_row(self.query_z), None)
            else:
                terms = [Term(queries, self.layers[0].base.t, self.key_dim)]
                s.product("query", length, self.hidden, terms, out=every_row(self.query_z))
            s.rows(
                "query activation",
                hidden_rows_kernel,
                self.hidden,
                {"z": self.query_z, "value": self.query_value},
                **self.hidden_options(),
            )
            queries = whole(self.query_value)
        if self.running:
            self._read_running(len(self.layers) - 1, queries, out, residual)
        elif out is not None:
            terms = [Term(queries, last.base.t, last.into)]
            s.product("snapshot read", length, self.value_dim, terms, add1=residual, out=out)

    def _read_running(self, i: int, queries: Operand, out: Place | None, residual: Place | None) -> None:
        x, layer = self.xs()[i], self.layers[i]
        if self.velocities:
            shared = (self.velocities[i], self.momentum)
            tiled_velocity.read(self.schedule, layer, *shared, queries, x, out, residual)
        else:
            tiled_layer.read(self.schedule, layer, queries, x, out, residual)

    def carry(self, before: list[Operand], after: list[Operand]) -> None:
        """The running weights, and with momentum the velocities, after the chunk."""
        count = len(self.layers)
        for i, (layer, x) in enumerate(zip(self.layers, self.xs())):
            if self.velocities:
                old, new = ((states[i], states[count + i]) for states in (before, after))
                shared = (self.velocities[i], self.momentum)
                tiled_velocity.carry(self.schedule, layer, *shared, x, old, new)
            else:
                tiled_layer.carry(self.schedule, layer, x, before[i], after[i])


def states_of(
    tensors: Sequence[torch.Tensor | None], count: int, momentum: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Of two weights and two velocities those of ``count`` layers; velocities where there is momentum."""
    return [*tensors[:count], *(tensors[2 : 2 + count] if momentum is not None else ())]


def make_results(inputs: launch.Inputs, options: launch.Options, *, keep: bool) -> launch.Results:
    """What the forward pass fills."""
    plan = launch.plan_rows(inputs, options)
    o = torch.empty_like(inputs.v)
    weights = inputs[6:10]
    final = [None if x is None else torch.empty_like(x) for x in weights]
    snapshot = [None if x is None or plan.ends_at_boundary else torch.empty_like(x) for x in weights[:2]]
    kept = [
        None if x is None or not keep else x.new_empty((plan.rows, plan.kept, *x.shape[1:])) for x in weights
    ]
    return launch.Results(o, *final, *snapshot, *kept)


def plan_forward(
    inputs: launch.Inputs, options: launch.Options, *, keep: bool, architecture: str
) -> tuple[Schedule, launch.Results]:
    """The kernels' calls, and what they fill; ``keep`` also keeps the states that the backward pass needs."""
    plan = launch.plan_rows(inputs, options)
    results = make_results(inputs, options, keep=keep)
    chunks = TiledChunks(inputs, options, architecture, keeps=False)
    s, count = chunks.schedule, len(chunks.layers)
    shapes = [layer.shape for layer in chunks.layers] * (1 if inputs.momentum is None else 2)
    given, final, kept = (
        states_of(x, count, inputs.momentum) for x in (inputs[6:10], results[1:5], results[7:])
    )
    snapshots = [x for x in results[5 : 5 + count] if x is not None]
    for i, snapshot in enumerate(snapshots):
        known = inputs[10 + i] if inputs[10 + i] is not None else given[i]
        tiled_call.move(s, whole(known), whole(snapshot), shapes[i])
    in_slots = keep and plan.checkpoint == 1
    before = [whole(x) for x in given]
    last = chunks.grid.chunks - 1
    for chunk in range(last + 1):
        if keep and chunk % plan.checkpoint == 0 and not (in_slots and chunk):
            for x, to, shape in zip(before, kept, shapes):
                tiled_call.move(s, x, slot_of(to, chunk // plan.checkpoint), shape)
        for x, to, shape in zip(before, snapshots, shapes):
            if inputs.begin is not None and chunk:
                tiled_call.move(s, x, whole(to), shape, when="last", index=chunk)
            elif chunk == last and chunk:
                tiled_call.move(s, x, whole(to), shape)
        chunks.take_weights(before, chunk)
        chunks.serve_and_write()
        chunks.read_queries(results.o)
        to_slot = in_slots and chunk < last
        after = [slot_of(x, chunk + 1) for x in kept] if to_slot else [whole(x) for x in final]
        chunks.carry(before, after)
        before = after
    if inputs.begin is not None:
        for x, to, shape in zip(before, snapshots, shapes):
            tiled_call.move(s, x, whole(to), shape, when="met")
    return s, results


def deep_memory_forward(inputs: launch.Inputs, options: launch.Options, *, keep: bool) -> launch.Results:
    """Run what :func:`plan_forward` plans."""
    inputs = launch.Inputs(*launch.contiguous(inputs))
    device = inputs.q.device
    schedule, results = plan_forward(inputs, options, keep=keep, architecture=architecture_of(device))
    run_calls(schedule.calls, device)
    return results
