"""The gradient of what is read, with steps as constants: levels' chunks as one node.

A step is a constant that is added to the weights, so the gradient of the weights after it is that of the
weights before it: all chunks add to one gradient, of the weights that they came from. Each chunk's hidden
layer is computed again from its inputs and from the weights that served it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nl_kernels.ops.continuum import registration
from nl_kernels.ops.continuum.chunk_step import Weights
from nl_kernels.ops.continuum.level_pass import LevelPass, Made, Span, contiguous, in_chunks, walk
from nl_kernels.ops.continuum.schedule import Owner, add_owned

_INPUTS = 7  # of each span: reads, its weights, the weights that resets go back to


def serve_recorded(
    spans: Sequence[Span],
    reads: Sequence[torch.Tensor],
    states: Sequence[tuple[Weights, Weights]],
    keep_state: bool,
) -> list[tuple[torch.Tensor, Weights, Weights]]:
    """Of each span the outputs [B, L, D], and with ``keep_state`` the last weights and momenta."""
    tensors = []
    for span, part, (weights, _) in zip(spans, reads, states):
        level = span.call.level
        start = (level.up, level.down, level.gate) if span.call.resets is not None else (None, None, None)
        tensors += [part, *weights, *start]
    momenta = [each for _, each in states]
    found = iter(_FirstOrder.apply(spans, momenta, keep_state, *tensors))
    return [
        (next(found), Weights(*(next(found) for _ in range(3))), Weights(*(next(found) for _ in range(3))))
        for _ in spans
    ]


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spans, momenta, keep_state, *tensors):
        passes = []
        for i, (span, before) in enumerate(zip(spans, momenta)):
            reads, *matrices = tensors[i * _INPUTS : (i + 1) * _INPUTS]
            passes.append((LevelPass(span.call, Weights(*matrices[:3]), before, True), span.chunks(reads)))
        walk(passes, hold=False)
        served = [of.weights for level_pass, _ in passes for of in level_pass.made if of.weights is not None]
        # saved, not hung on the node: whoever checkpoints this call drops them
        ctx.save_for_backward(*tensors, *(w for weights in served for w in weights))
        ctx.spans = spans
        ctx.owners = [
            ([(of.weights is None, of.owner) for of in level_pass.made], level_pass.owner)
            for level_pass, _ in passes
        ]
        results = []
        for level_pass, _ in passes:
            weights, after = level_pass.last() if keep_state else ((None,) * 3, (None,) * 3)
            # the node must not keep, nor hand on, its own outputs and inputs
            fast = [None if w is None else w.clone() for w in weights]
            slow = [None if m is None else m.clone() for m in after]
            ctx.mark_non_differentiable(*(m for m in slow if m is not None))
            results += [torch.cat(level_pass.outputs, dim=1), *fast, *slow]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        found = []
        saved = ctx.saved_tensors
        served = iter(saved[len(ctx.spans) * _INPUTS :])
        for i, (span, (chunks, owner)) in enumerate(zip(ctx.spans, ctx.owners)):
            own = slice(i * _INPUTS, (i + 1) * _INPUTS)
            made = [
                Made(None if first else Weights(*(next(served) for _ in range(3))), of)
                for first, of in chunks
            ]
            found += _through(span, made, owner, grads[own], saved[own])
        return None, None, None, *found


def _through(
    span: Span,
    made: Sequence[Made],
    last_owner: Owner,
    grads: Sequence[torch.Tensor | None],
    tensors: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients of reads, weights and start."""
    reads, *matrices = tensors
    call = span.call
    first, start = contiguous(matrices[:3]), contiguous(matrices[3:])
    totals = [
        None if w is None else w.new_zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32))
        for w in matrices
    ]
    grad_reads = None
    if grads[0] is not None:
        backward = registration.implementation("read_backward", call.impl)
        begin, size = 0 if span.begin else call.first, call.level.chunk_size
        parts = zip(made, in_chunks(grads[0].to(reads.dtype), begin, size), in_chunks(reads, begin, size))
        grad_reads = torch.cat(
            [
                backward(
                    grad,
                    x,
                    *(of.weights or (start if of.owner is True else first)),
                    _owners(of.owner, totals, x),
                )
                for of, grad, x in parts
            ],
            dim=1,
        )
    for i, grad in enumerate(grads[1:4]):
        if grad is not None:
            add_owned(grad, last_owner, totals[i], totals[i + 3], first[i], start[i])
    return [grad_reads, *(None if t is None else t.to(w.dtype) for t, w in zip(totals, matrices))]


def _owners(owner: Owner, totals: Sequence[torch.Tensor | None], x: torch.Tensor) -> list[tuple]:
    """What the gradients of a chunk are added to, with the tokens that belong to it (None: all)."""
    first, start = totals[:3], totals[3:]
    if isinstance(owner, bool):
        return [(None, start if owner else first)]
    share = owner[:, None].expand(x.shape[:2]).to(first[0].dtype).contiguous()
    return [(1 - share, first), (share, start)]
