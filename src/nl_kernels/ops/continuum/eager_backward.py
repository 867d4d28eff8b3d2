"""Steps that gradients do not flow through: a level's chunks as one node, with its gradient written out.

A step is then a constant that is added to the weights, so the gradient of the weights after it is that of the
weights before it. All chunks share one gradient, and it takes one product over all their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nl_kernels.ops.continuum.chunk_step import Weights, serve


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
        if torch.is_autocast_enabled(reads.device.type):
            dtype = torch.get_autocast_dtype(reads.device.type)
        weights, norms = Weights(*matrices[:3]), run.norms()
        outputs, made, owners, reset = [], [], [], False
        with torch.autocast(reads.device.type, enabled=False):
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
                    reset = _either(reset, _was_reset(run, chunk, lengths))
        ctx.save_for_backward(reads, *matrices)
        ctx.made, ctx.owners, ctx.last_owner = made, owners, reset
        ctx.mark_non_differentiable(*(m for m in momenta if m is not None))
        ctx.set_materialize_grads(False)
        y = torch.cat(outputs, dim=1) if outputs else reads.to(dtype)
        # the node must not keep, nor hand on, its own outputs and inputs
        return y, *(None if w is None else w.clone() for w in weights), *momenta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *grad_after):
        reads, *matrices = ctx.saved_tensors
        first, start = Weights(*matrices[:3]), Weights(*matrices[3:])
        totals = [None if w is None else torch.zeros_like(w) for w in matrices]
        grad_reads = None
        if grad is not None and ctx.made:
            grad_reads, layers = _through_reads(ctx.made, reads, grad)
            for reset, slots in _by_owner(ctx.owners, [m.hidden.shape[1] for m in ctx.made]):
                for i, layer in enumerate(layers):
                    if layer is not None:
                        _add_products(layer, reset, slots, totals[i], totals[i + 3])
        for i, g in enumerate(grad_after[:3]):
            if g is not None:
                _add_owned(g, ctx.last_owner, totals[i], totals[i + 3], first[i], start[i])
        return None, None, None, None, grad_reads, *totals


def _was_reset(run: Any, chunk: Any, lengths: torch.Tensor | None) -> bool | torch.Tensor:
    """Whether a sequence's weights went back to their start after this chunk: all, none, or [B]."""
    reset = False if run.resets is None else run.resets.after(chunk.number)
    if reset is False or lengths is None:
        return reset
    return (lengths >= chunk.stop) & reset


def _either(a: bool | torch.Tensor, b: bool | torch.Tensor) -> bool | torch.Tensor:
    return b if a is False else a if b is False or a is True else a | b


def _through_reads(
    made: Sequence[_Made], reads: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]]:
    """The gradient of what is read; and of up, down and gate, that of its output, with its input."""
    hidden = torch.cat([m.hidden for m in made], dim=1)
    signals = [torch.empty_like(hidden) for _ in made[0].slopes]
    grad_reads, begin = [], 0
    for part in made:
        end = begin + part.hidden.shape[1]
        back = grad[:, begin:end] @ part.weights.down
        inner = None
        for whole, slope, weight in zip(signals, part.slopes, (part.weights.up, part.weights.gate)):
            signal = back * slope
            whole[:, begin:end] = signal
            inner = signal @ weight if inner is None else inner + signal @ weight
        grad_reads.append(inner)
        begin = end
    inputs = reads.to(hidden.dtype)
    layers = ((signals[0], inputs), (grad, hidden), (signals[1], inputs) if len(signals) > 1 else None)
    return torch.cat(grad_reads, dim=1).to(reads.dtype), layers


def _by_owner(
    owners: Sequence[bool | torch.Tensor], sizes: Sequence[int]
) -> list[tuple[bool | torch.Tensor, slice]]:
    """Runs of slots that were served after a reset, before one, or [B, slots, 1] both."""
    if all(isinstance(owner, bool) for owner in owners):
        before = sum(size for owner, size in zip(owners, sizes) if not owner)
        runs = [(False, slice(0, before)), (True, slice(before, sum(sizes)))]
        return [(owner, slots) for owner, slots in runs if slots.stop > slots.start]
    device = next(owner.device for owner in owners if not isinstance(owner, bool))
    columns = [torch.as_tensor(owner, device=device).reshape(-1, 1) for owner in owners]
    batch = max(len(column) for column in columns)
    spread = [column.expand(batch, size) for column, size in zip(columns, sizes)]
    return [(torch.cat(spread, dim=1)[..., None], slice(None))]


def _add_products(
    layer: tuple[torch.Tensor, torch.Tensor],
    reset: bool | torch.Tensor,
    slots: slice,
    total: torch.Tensor,
    start_total: torch.Tensor | None,
) -> None:
    """Add a weight's gradient over ``slots`` to that of the weights it came from."""
    signal, inputs = (x[:, slots] for x in layer)
    if isinstance(reset, bool):
        _add_product(signal, inputs, start_total if reset else total)
    else:
        _add_product(signal * ~reset, inputs, total)
        _add_product(signal * reset, inputs, start_total)


def _add_product(signal: torch.Tensor, inputs: torch.Tensor, total: torch.Tensor) -> None:
    if total.ndim == 2:
        signal, inputs = signal.flatten(0, 1), inputs.flatten(0, 1)
    total += (signal.mT @ inputs).to(total.dtype)


def _add_owned(
    grad: torch.Tensor,
    reset: bool | torch.Tensor,
    total: torch.Tensor,
    start_total: torch.Tensor | None,
    first: torch.Tensor,
    start: torch.Tensor | None,
) -> None:
    """Add the gradient of last weights to that of the weights that they came from."""
    if isinstance(reset, bool):
        parts = [(grad, start_total, start)] if reset else [(grad, total, first)]
    else:
        reset = reset.view(-1, 1, 1)
        parts = [(grad * ~reset, total, first), (grad * reset, start_total, start)]
    for part, to, weight in parts:
        to += part.sum_to_size(weight.shape).to(to.dtype)
