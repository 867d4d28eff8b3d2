"""Gradients of zero for what a call may take and leave.

Which tensors a memory uses depends on the length and on a carried state: without a step in a call nothing
depends on what steps are made of, and a carried state stands in the place of the initial weights. Autograd
then gives such a tensor no gradient at all, which gradient reduction over processes takes for a fault (DDP
waits for every parameter).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nl_kernels.dispatch import needs_gradient


def with_zero_gradients(x: torch.Tensor, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """``x`` as it is; a gradient that reaches it gives zeros to ``tensors``, on top of what else they get."""
    tied = [t for t in tensors if t is not None and needs_gradient(t)]
    return _Tie.apply(x, *tied) if tied else x


class _Tie(torch.autograd.Function):
    # no product with 0, which makes nan of inf
    generate_vmap_rule = True

    @staticmethod
    def forward(x, *tied):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        # shapes, not tensors: one that is changed in place before the backward pass is no fault here
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs[1:]]

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
