"""Steps that gradients do not flow through: a level's chunks as one node, with its gradient written out.

A step is then a constant that is added to the weights, so the gradient of the weights after it is that of the
weights before it: all chunks add to one gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nl_kernels.dispatch import autocasting, without_autocast
from nl_kernels.ops.continuum.chunk_step import Weights, row_norms, serve
from nl_kernels.ops.continuum.schedule import add_owned, either, reset_rows


class _Made(NamedTuple):
    """What the backward pass needs of one chunk."""

    weights: Weights  # as they served it
    hidden: torch.Tensor
    slopes: tuple[torch.Tensor, ...]


def serve_detached(
    run: Any,
    chunks: Sequence[Any],
    lengths: torch.Tensor | None,
    reads: torch.Tensor,
    weights: Weights,
    momenta: Weights,
) -> tuple[torch.Tensor, Weights, Weights]:
    """As ``run.serve``, with ``run.detach_updates``: outputs, last weights, last momenta."""
    level = run.level
    start = (level.up, level.down, level.gate) if run.resets is not None else (None, None, None)
    y, *after = _Detached.apply(run, chunks, lengths, momenta, reads, *weights, *start)
    return y, Weights(*after[:3]), Weights(*after[3:])


class _Detached(torch.autograd.Function):
    """Inputs that need gradients: reads [B, L, D], weights, and the weights that resets go back to."""

    @staticmethod
    def forward(ctx, run, chunks, lengths, momenta, reads, *matrices):
        dtype = reads.dtype
        if autocasting(reads.device.type):
            dtype = torch.get_autocast_dtype(reads.device.type)
        weights, norms = Weights(*matrices[:3]), row_norms(run.level)
        outputs, made, owners, reset = [], [], [], False
        with without_autocast(reads.device.type):
            for chunk, inner in zip(chunks, reads.split([c.read for c in chunks], dim=1)):
                served = None
                if chunk.read:
                    cast = Weights(*(None if w is None else w.to(dtype) for w in weights))
                    served = serve(inner.to(dtype), cast)
                    outputs.append(served.outputs.down)
                    made.append(_Made(cast, served.hidden, served.slopes))
                    owners.append(reset)
                if chunk.targets is not None:
                    shared = served if chunk.keys is None else None
                    weights, momenta = run.stepped(weights, momenta, norms, chunk, inner, shared, lengths)
                    full = None if lengths is None else lengths >= chunk.stop
                    reset = either(reset, reset_rows(run.resets, chunk.number, full))
        # saved, not hung on the node: whoever checkpoints this call drops them
        ctx.save_for_backward(
            reads, *matrices, *(t for of in made for t in (*of.weights, of.hidden, *of.slopes))
        )
        ctx.gated, ctx.owners, ctx.last_owner = weights.gate is not None, owners, reset
        ctx.mark_non_differentiable(*(m for m in momenta if m is not None))
        ctx.set_materialize_grads(False)
        y = torch.cat(outputs, dim=1) if outputs else reads.to(dtype)
        # the node must not keep, nor hand on, its own outputs and inputs
        return y, *(None if w is None else w.clone() for w in weights), *momenta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *grad_after):
        saved, each = ctx.saved_tensors, 6 if ctx.gated else 5
        (reads, *matrices), served = saved[:7], saved[7:]
        made = [
            _Made(Weights(*served[i : i + 3]), served[i + 3], served[i + 4 : i + each])
            for i in range(0, len(served), each)
        ]
        first, start = Weights(*matrices[:3]), Weights(*matrices[3:])
        totals = [None if w is None else torch.zeros_like(w) for w in matrices]
        grad_reads, begin = [], 0
        for of, reset in zip(made, ctx.owners) if grad is not None else ():
            end = begin + of.hidden.shape[1]
            inputs = reads[:, begin:end].to(of.hidden.dtype)
            inner, layers = _through_reads(of, inputs, grad[:, begin:end])
            grad_reads.append(inner)
            for i, layer in enumerate(layers):
                _add_product(*layer, reset, totals[i], totals[i + 3])
            begin = end
        grad_reads = torch.cat(grad_reads, dim=1).to(reads.dtype) if grad_reads else None
        for i, g in enumerate(grad_after[:3]):
            if g is not None:
                add_owned(g, ctx.last_owner, totals[i], totals[i + 3], first[i], start[i])
        return None, None, None, None, grad_reads, *totals


def _through_reads(
    made: _Made, inputs: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The gradient of what a chunk reads; and of up, down, gate, that of its output, with its input."""
    back, layers, inner = grad @ made.weights.down, [(grad, made.hidden)], None
    for slope, weight in zip(made.slopes, (made.weights.up, made.weights.gate)):
        signal = back * slope
        inner = signal @ weight if inner is None else inner + signal @ weight
        layers.append((signal, inputs))
    layers[:2] = layers[1::-1]
    return inner, layers


def _add_product(
    signal: torch.Tensor,
    inputs: torch.Tensor,
    reset: bool | torch.Tensor,
    total: torch.Tensor,
    start_total: torch.Tensor | None,
) -> None:
    """Add a weight's gradient over a chunk to that of the weights it came from: its first, or its start."""
    if not isinstance(reset, bool):
        reset = reset.view(-1, 1, 1)
        _add_product(signal * ~reset, inputs, False, total, None)
        signal, reset = signal * reset, True
    to = start_total if reset else total
    if to.ndim == 2:
        signal, inputs = signal.flatten(0, 1), inputs.flatten(0, 1)
    if to.dtype != signal.dtype:
        to += signal.mT @ inputs
    elif to.ndim == 2:
        to.addmm_(signal.mT, inputs)
    else:
        to.baddbmm_(signal.mT, inputs)
