"""The continuum's MLP as a PyTorch operator: schemas, shapes for tracing, autograd.

The implementation is given by name and imported when called, so that nothing imports Triton unless it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from nl_kernels.dispatch import without_autocast

_MLP, _BACKWARD = "nl_kernels::continuum_mlp", "nl_kernels::continuum_mlp_backward"

torch.library.define(_MLP, "(Tensor x, Tensor up, Tensor down, Tensor? gate, str impl) -> Tensor")
# Gives the gradients of x (with input_gradient, in its dtype) and of up, down, gate (in fp32), if there.
torch.library.define(
    _BACKWARD,
    "(Tensor error, Tensor x, Tensor up, Tensor down, Tensor? gate, bool input_gradient, str impl) "
    "-> Tensor[]",
)


class Update(NamedTuple):
    """Many matrices and what their steps take, each a list of one for each matrix or None.

    As :func:`nl_kernels.continuum_update` by ``sgd``, or with momenta by ``momentum``.
    """

    weights: Sequence[torch.Tensor]  # [.., out, in], overwritten
    gradients: Sequence[torch.Tensor]  # what is subtracted, rates included
    momenta: Sequence[torch.Tensor] | None  # overwritten
    decay: float  # of the momenta
    norms: Sequence[torch.Tensor] | None  # [out] or [.., out]: of every row after the step
    copies: Sequence[torch.Tensor] | None  # filled with the new weights, in 16 bits
    sources: Sequence[torch.Tensor] | None = (
        None  # [out, in] or [.., out, in]: stepped instead of the weights
    )
    where: Sequence[torch.Tensor] | None = None  # bool [..]: who steps; the others keep what they have
    initial: Sequence[torch.Tensor] | None = None  # [out, in] or [.., out, in]: W_0, together with
    retention: Sequence[torch.Tensor] | None = None  # α, of one number: (1 − α) (W − W_0) is taken off, too


def products(impl: str) -> ModuleType:
    """The module of a chunk's products: ``"eager"``, ``"compiled"``, ``"triton"``; a trace may come here."""
    if impl == "triton":
        from nl_kernels.ops.continuum import triton_chunk as found
    elif impl == "compiled":
        from nl_kernels.ops.continuum import compiled as found
    else:
        from nl_kernels.ops.continuum import eager as found
    return found


def mlp(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None, impl: str
) -> torch.Tensor:
    """The operator behind :func:`nl_kernels.continuum_mlp`, with its derivative; weights [B, ..]."""
    return _Mlp.apply(x, up, down, gate, impl)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(x, up, down, gate, impl):
        return torch.ops.nl_kernels.continuum_mlp(x, up, down, gate, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, up, down, gate = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        grads = torch.ops.nl_kernels.continuum_mlp_backward(
            grad.contiguous(), x, up, down, gate, wanted, ctx.impl
        )
        grad_x, *sums = grads if wanted else (None, *grads)
        sums = [g.to(w.dtype) for g, w in zip(sums, (up, down, gate))]
        return grad_x, *sums, *((None, None) if gate is None else (None,))


@torch.library.impl(_MLP, "CompositeExplicitAutograd")
def _(x, up, down, gate, impl):
    with torch.no_grad():
        return products(impl).mlp(x, up, down, gate)


@torch.library.register_fake(_MLP)
def _(x, up, down, gate, impl):
    return torch.empty_like(x)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _(error, x, up, down, gate, input_gradient, impl):
    with torch.no_grad(), without_autocast(x.device.type):
        gradients = products(impl).mlp_backward(error, x, up, down, gate, input_gradient)
    return [tensor for tensor in gradients if tensor is not None]


@torch.library.register_fake(_BACKWARD)
def _(error, x, up, down, gate, input_gradient, impl):
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = [w.new_empty(w.shape, dtype=dtype) for w in (up, down, gate) if w is not None]
    return [*([torch.empty_like(x)] if input_gradient else []), *sums]
