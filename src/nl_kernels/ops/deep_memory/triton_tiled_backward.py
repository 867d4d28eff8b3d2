"""Chunks too large for one program: the backward pass as tiled products, a fixed number of kernels a chunk.

A chunk is computed again from the state that was kept at its start, and then differentiated; an adjoint is
called ``at_…``. The formulas are those of ``eager_backward.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nl_kernels.chunk_kernels import tiled_call, tiled_layer_adjoint, tiled_velocity
from nl_kernels.chunk_kernels.tiled_launch import Operand, Schedule, Term, every_row, slot_of, whole
from nl_kernels.ops.deep_memory import launch
from nl_kernels.ops.deep_memory.triton_backward import Gradients
from nl_kernels.ops.deep_memory.triton_tiled_forward import TiledChunks, states_of
from nl_kernels.triton_support.kernel_call import run_calls
from nl_kernels.triton_support.targets import architecture_of


class TiledAdjoint:
    """The adjoint of one chunk at a time, last one first; ``chunks`` has what the chunk computed."""

    def __init__(self, chunks: TiledChunks, do: torch.Tensor, gradients: Gradients) -> None:
        self.chunks, self.gradients = chunks, gradients
        s, new = chunks.schedule, chunks.new
        count = len(chunks.layers)
        self._do, _ = tiled_call.place_tokens(s, do)
        self.given = do
        grads = gradients[6 : 6 + count]
        proximal = chunks.options.proximal
        self.layers = [
            tiled_layer_adjoint.LayerAdjoint.of(s, layer, grad, running=chunks.running, proximal=proximal)
            for layer, grad in zip(chunks.layers, grads)
        ]
        rounds = chunks.operand != torch.float32
        self._weights, self._velocity_weights = (
            [chunks.new_weight(layer) if rounds else None for layer in chunks.layers] for _ in range(2)
        )
        for layer, velocity, grad in zip(chunks.layers, chunks.velocities, gradients[8 : 8 + count]):
            velocity.prepare_adjoint(s, layer, grad, running=chunks.running)
        self.at_anchor = gradients[12 : 12 + count]
        self.at_snapshot = gradients[10 : 10 + count]
        self.at_rate = do.new_empty((chunks.grid.batches, chunks.grid.length))
        hidden, operand = chunks.hidden, chunks.operand
        self.at_error = new(chunks.value_dim)
        self.error_operand = new(chunks.value_dim, dtype=operand)
        self.error_plain = new(chunks.value_dim) if chunks.options.residual else None
        self.at_query = self.at_query_z = None
        if chunks.two_layer:
            self.at_query = new(hidden)
            self.at_query_z = new(hidden, dtype=operand)
            self.at_back, self.at_z = (new(hidden, dtype=operand) for _ in range(2))
            self.at_slope, self.at_value = new(hidden), new(hidden)
            self.radial = self.at_rate.new_empty(self.at_rate.shape)

    @property
    def do(self) -> Operand:
        """Of the present chunk's reads."""
        return Operand(self._do, self.chunks.grid.pitch, self.chunks.schedule.start)

    def chunk_adjoint(self, before: list[Operand]) -> None:
        """Gradients of the present chunk's tokens and, in place, weights; ``before``: the running ones."""
        chunks, s = self.chunks, self.chunks.schedule
        for layer, adjoint, buffer in zip(chunks.layers, self.layers, self._weights):
            adjoint.weights, _ = tiled_call.operands_of(
                s, layer.shape, whole(adjoint.grad), None, None, buffer, None
            )
        for layer, velocity, buffer in zip(chunks.layers, chunks.velocities, self._velocity_weights):
            velocity.grad_weights, _ = tiled_call.operands_of(
                s, layer.shape, whole(velocity.grad), None, None, buffer, None
            )
        self._read_adjoint()
        xs = chunks.xs()
        queries = [chunks.queries, whole(chunks.query_value)][: len(xs)]
        read_grads = [self.do] if not chunks.two_layer else [whole(self.at_query_z), self.do]
        if not chunks.running:
            read_grads = [None] * len(xs)
        for i, (layer, adjoint) in enumerate(zip(chunks.layers, self.layers)):
            given = (xs[i], read_grads[i], queries[i])
            options = {"proximal": chunks.options.proximal, "adds": i > 0}
            if chunks.velocities:
                tiled_velocity.write_adjoint(s, layer, adjoint, chunks.velocities[i], *given)
                tiled_layer_adjoint.rate_adjoint(s, layer, adjoint, self.at_rate, **options)
            else:
                tiled_layer_adjoint.write_adjoint(s, layer, adjoint, *given, self.at_rate, **options)
        base_terms = self._serve_adjoint()
        given = chunks.schedule.chunk == 0 and chunks.inputs.inner_snapshot is not None
        for i, (layer, adjoint) in enumerate(zip(chunks.layers, self.layers)):
            read_with = queries[i] if chunks.running else None
            if chunks.velocities:
                shared = (chunks.velocities[i], chunks.momentum)
                old = before[len(self.layers) + i]
                tiled_velocity.state_adjoint(s, layer, adjoint, *shared, read_with, old)
            tiled_layer_adjoint.state_adjoint(
                s,
                layer,
                adjoint,
                xs[i],
                read_with,
                before[i],
                base_terms[i],
                self.at_anchor[i],
                self.at_snapshot[i] if given else None,
            )
        gradients = self.gradients
        if chunks.momentum is not None:
            chunks.momentum.adjoint(s, chunks.velocities, gradients.d_momentum)
        given = (self.at_rate, gradients.d_log_decay, gradients.d_rate)
        tiled_layer_adjoint.decay_adjoint(s, chunks.layers, self.layers, *given, chunks.momentum)

    def _read_adjoint(self) -> None:
        """Gradients of the queries, and what reads of the running state leave for its writes."""
        from nl_kernels.chunk_kernels.tiled_rows import read_adjoint_rows_kernel

        chunks, s = self.chunks, self.chunks.schedule
        dq = chunks.tokens(self.gradients.dq)
        residual = chunks.tokens(self.given) if chunks.options.residual else None
        grad, layers = self.do, chunks.layers
        if chunks.two_layer:
            last, out = layers[-1], every_row(self.at_query)
            if chunks.running:
                more = self._weigh(grad, None, 1)
                tiled_layer_adjoint.read_adjoint(
                    s,
                    last,
                    self.layers[1],
                    grad,
                    whole(chunks.query_value),
                    whole(chunks.value),
                    out,
                    None,
                    self.at_anchor[1],
                    more,
                )
                more = self._weigh(whole(self.at_query), chunks.query_z, 0)
            else:
                terms = [Term(grad, last.base, last.out)]
                s.product("read to value", chunks.grid.length, last.into, terms, out=out)
                s.rows(
                    "query adjoint",
                    read_adjoint_rows_kernel,
                    chunks.hidden,
                    {
                        "grad": self.at_query,
                        "grad_rows": chunks.grid.length,
                        "z": chunks.query_z,
                        "operand": self.at_query_z,
                    },
                    **chunks.hidden_options(),
                )
            grad = whole(self.at_query_z)
        elif chunks.running:
            more = self._weigh(grad, None, 0)
        first = layers[0]
        if chunks.running:
            tiled_layer_adjoint.read_adjoint(
                s,
                first,
                self.layers[0],
                grad,
                chunks.queries,
                chunks.keys,
                dq,
                residual,
                self.at_anchor[0],
                more,
            )
        else:
            terms = [Term(grad, first.base, first.out)]
            s.product("query gradient", chunks.grid.length, first.into, terms, add0=residual, out=dq)

    def _weigh(self, grad: Operand, z: torch.Tensor | None, i: int) -> torch.Tensor | None:
        """The adjoint of layer i's running read as an operand, and times the decay.

        With momentum also what the read of the velocity gives the queries, which is returned.
        """
        from nl_kernels.chunk_kernels.tiled_rows import read_adjoint_rows_kernel

        chunks, adjoint = self.chunks, self.layers[i]
        chunks.schedule.rows(
            "weigh read",
            read_adjoint_rows_kernel,
            chunks.layers[i].out,
            {
                "grad": grad.tensor,
                "grad_rows": grad.rows,
                "grad_start": grad.start,
                "z": z,
                "recalled": chunks.layers[i].recalled,
                "operand": None if z is None else self.at_query_z,
                "weighted": adjoint.read_weighted,
                "after": adjoint.after,
            },
            **chunks.hidden_options(),
        )
        if not chunks.velocities:
            return None
        tiled_velocity.read_adjoint(
            chunks.schedule,
            chunks.layers[i],
            adjoint,
            chunks.velocities[i],
            chunks.momentum,
            grad if z is None else whole(self.at_query_z),
            adds=i + 1 < len(self.layers),
        )
        return chunks.velocities[i].at_query

    def _serve_adjoint(self) -> list[list[Term]]:
        """Gradients of keys and targets; by layer the products that are the adjoint of the snapshot."""
        from nl_kernels.chunk_kernels import tiled_rows

        chunks, s, length = self.chunks, self.chunks.schedule, self.chunks.grid.length
        options = chunks.options
        first, last = chunks.layers[0], chunks.layers[-1]
        bound = options.error_bound or 0.0
        at_error, adjoint = self.layers[-1].at_signal, self.layers[-1]
        if chunks.two_layer:
            erases = first.erases
            s.rows(
                "signal adjoint",
                tiled_rows.signal_adjoint_rows_kernel,
                chunks.hidden,
                {
                    "at_signal": self.layers[0].at_signal,
                    "z": chunks.z,
                    "back": chunks.back,
                    "right": first.right,
                    "at_value": adjoint.at_x,
                    "coefficient": adjoint.coefficient,
                    "at_back": self.at_back,
                    "at_value_after": self.at_value,
                    "at_slope": self.at_slope,
                    "radial": self.radial,
                    "before": self.layers[0].before if erases else None,
                },
                BOUND=bound,
                **chunks.hidden_options(),
            )
            s.product(
                "back to error",
                length,
                chunks.value_dim,
                [Term(whole(self.at_back), last.base.t, chunks.hidden)],
                add0=every_row(at_error),
                out=every_row(self.at_error),
            )
            at_error = self.at_error
        target = chunks.tokens(self.gradients.dv)
        s.rows(
            "error adjoint",
            tiled_rows.error_adjoint_rows_kernel,
            chunks.value_dim,
            {
                "at_error": at_error,
                "raw": chunks.raw,
                "error": chunks.error,
                "right": last.right,
                "solved": adjoint.solved,
                "operand": self.error_operand,
                "plain": self.error_plain,
                "d_target": target.tensor,
                "before": adjoint.before,
                "out_rows": target.rows,
                "out_start": target.start,
                "out_limit": target.limit,
            },
            BOUND=bound,
        )
        at_made = whole(self.error_operand)
        base_terms = [[Term(at_made.t, chunks.xs()[-1], length)]]
        if chunks.two_layer:
            base_terms[0].append(Term(whole(chunks.error_operand).t, whole(self.at_back), length))
            s.product(
                "error to value",
                length,
                chunks.hidden,
                [Term(at_made, last.base, chunks.value_dim)],
                add0=every_row(self.at_value),
                out=every_row(self.at_value),
            )
            s.rows(
                "hidden adjoint",
                tiled_rows.hidden_adjoint_rows_kernel,
                chunks.hidden,
                {
                    "at_value": self.at_value,
                    "z": chunks.z,
                    "radial": self.radial,
                    "at_slope": self.at_slope,
                    "operand": self.at_z,
                },
                **chunks.hidden_options(),
            )
            at_made = whole(self.at_z)
            base_terms.insert(0, [Term(at_made.t, chunks.keys, length)])
        if not chunks.running:
            queries = [chunks.queries, whole(chunks.query_value)]
            grads = [whole(self.at_query_z), self.do] if chunks.two_layer else [self.do]
            for terms, grad, query in zip(base_terms, grads, queries):
                terms.append(Term(grad.t, query, length))
        dk = chunks.tokens(self.gradients.dk)
        s.product(
            "key gradient",
            length,
            chunks.key_dim,
            [Term(at_made, first.base, first.out)],
            add0=every_row(self.layers[0].at_x),
            add1=every_row(self.error_plain),
            out=dk,
        )
        if self.layers[0].coefficient is not None:
            keys = chunks.keys
            s.rows(
                "proximal keys",
                tiled_rows.add_scaled_rows_kernel,
                chunks.key_dim,
                {
                    "x": keys.tensor,
                    "x_rows": keys.rows,
                    "x_start": keys.start,
                    "coefficient": self.layers[0].coefficient,
                    "out": dk.tensor,
                    "out_rows": dk.rows,
                    "out_start": dk.start,
                    "out_limit": dk.limit,
                },
            )
        return base_terms


def make_gradients(inputs: launch.Inputs, final: Sequence[torch.Tensor | None]) -> Gradients:
    """What the backward pass fills; those of running weights hold ``final``, those of the final ones."""
    tokens = [None if x is None else torch.empty_like(x) for x in inputs[:6]]
    running = [
        None if x is None else torch.zeros_like(x) if g is None else g.clone()
        for x, g in zip(inputs[6:10], final)
    ]
    snapshot = [None if x is None else torch.empty_like(x) for x in inputs[10:12]]
    anchor = [None if x is None else torch.zeros_like(x) for x in inputs[12:14]]
    return Gradients(*tokens, *running, *snapshot, *anchor)


def plan_backward(
    do: torch.Tensor,
    final: Sequence[torch.Tensor | None],
    snapshot: Sequence[torch.Tensor | None],
    inputs: launch.Inputs,
    kept: Sequence[torch.Tensor | None],
    options: launch.Options,
    *,
    architecture: str,
) -> tuple[Schedule, Gradients]:
    """The kernels' calls, and what they fill; arguments as in :mod:`.triton_backward`."""
    plan = launch.plan_rows(inputs, options)
    gradients = make_gradients(inputs, final)
    chunks = TiledChunks(inputs, options, architecture, keeps=True)
    s, count = chunks.schedule, len(chunks.layers)
    adjoint = TiledAdjoint(chunks, do, gradients)
    shapes = [layer.shape for layer in chunks.layers] * (1 if inputs.momentum is None else 2)
    kept = states_of(kept, count, inputs.momentum)
    running = [whole(x) for x in gradients[6 : 6 + count]]
    snapshots = [whole(x) for x in snapshot[:count] if x is not None]
    at_snapshot = [whole(x) for x in gradients[10 : 10 + count]]

    def add_snapshots(targets: list[Operand], when: str, index: int = 0) -> None:
        for x, to, shape in zip(snapshots, targets, shapes):
            tiled_call.move(s, x, to, shape, when=when, adds=True, index=index)

    if inputs.begin is not None:
        add_snapshots(running, "met")
    step, last = plan.checkpoint, chunks.grid.chunks - 1
    stack = kept
    if step > 1:
        stack = [x.new_empty((plan.rows, step, *x.shape[2:])) for x in kept]
    for chunk in range(last, -1, -1):
        slot = chunk
        if step > 1:
            slot = chunk % step
            if chunk == last or slot == step - 1:
                _run_again(chunks, kept, stack, chunk - slot, slot, shapes)
        before = [slot_of(x, slot) for x in stack]
        chunks.take_weights(before, chunk)
        chunks.serve_and_write()
        chunks.read_queries(None)
        adjoint.chunk_adjoint(before)
        ragged = inputs.begin is not None
        if chunk and (ragged or chunk == last):
            add_snapshots(running, "left", chunk)
    if last == 0 or inputs.begin is not None:
        add_snapshots(running if at_snapshot[0] is None else at_snapshot, "left")
    return s, gradients


def _run_again(chunks: TiledChunks, kept, stack, first: int, count: int, shapes) -> None:
    """The states at the starts of chunks ``first`` … ``first + count``, into the stack."""
    step = stack[0].shape[1]
    weights = range(len(stack))
    for i in weights:
        tiled_call.move(chunks.schedule, slot_of(kept[i], first // step), slot_of(stack[i], 0), shapes[i])
    for below in range(count):
        before, after = ([slot_of(stack[i], below + ahead) for i in weights] for ahead in (0, 1))
        chunks.take_weights(before, first + below)
        chunks.serve_and_write()
        chunks.carry(before, after)


def deep_memory_backward(
    do: torch.Tensor,
    final: Sequence[torch.Tensor | None],
    snapshot: Sequence[torch.Tensor | None],
    inputs: launch.Inputs,
    kept: Sequence[torch.Tensor | None],
    options: launch.Options,
) -> Gradients:
    """Run what :func:`plan_backward` plans."""
    inputs = launch.Inputs(*launch.contiguous(inputs))
    cotangents = list(launch.contiguous((do, *final, *snapshot)))
    device = inputs.q.device
    schedule, gradients = plan_backward(
        cotangents[0],
        cotangents[1:5],
        cotangents[5:],
        inputs,
        kept,
        options,
        architecture=architecture_of(device),
    )
    run_calls(schedule.calls, device)
    return gradients
