"""The continuum's functions as PyTorch operators: schemas, shapes for tracing, autograd of the MLP.

The implementation is given by name and imported when called, so that nothing imports Triton unless it runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from nl_kernels.dispatch import without_autocast

_UPDATE, _MLP, _BACKWARD = (
    f"nl_kernels::{name}" for name in ("continuum_update_", "continuum_mlp", "continuum_mlp_backward")
)
_MODULES = {
    "update_in_place": {"triton": "triton_update", "eager": "update"},
    "mlp": {"triton": "triton_forward"},
    "mlp_backward": {"triton": "triton_backward"},
}

torch.library.define(
    _UPDATE,
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[]? momenta, float decay, Tensor[]? norms, "
    "Tensor(c!)[]? copies, Tensor[]? sources, Tensor[]? where, Tensor[]? initial, Tensor[]? retention, "
    "str impl) -> ()",
)
torch.library.define(_MLP, "(Tensor x, Tensor up, Tensor down, Tensor? gate, str impl) -> Tensor")
# Gives the gradients of x (with input_gradient, in its dtype) and of up, down, gate (in fp32), those there
# are; tokens are weighted by rates [B, T] (None: 1), and bounded as continuum_gradients says.
torch.library.define(
    _BACKWARD,
    "(Tensor error, Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor? rates, float? error_bound, "
    "bool input_gradient, str impl) -> Tensor[]",
)


class Update(NamedTuple):
    """Many matrices and what their steps take, each a list of one for each matrix or None.

    See :func:`nl_kernels.continuum_update_`.
    """

    weights: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor]
    momenta: Sequence[torch.Tensor] | None
    decay: float
    norms: Sequence[torch.Tensor] | None
    copies: Sequence[torch.Tensor] | None
    sources: Sequence[torch.Tensor] | None = None
    where: Sequence[torch.Tensor] | None = None
    initial: Sequence[torch.Tensor] | None = None
    retention: Sequence[torch.Tensor] | None = None


def implementation(function: str, impl: str) -> Callable:
    """The function of this name, imported now."""
    module = _MODULES[function].get(impl, impl)
    return getattr(importlib.import_module(f"nl_kernels.ops.continuum.{module}"), function)


@functools.cache
def products(impl: str) -> ModuleType:
    """The module of a chunk's products: ``"eager"`` or ``"triton"``."""
    return importlib.import_module(f"nl_kernels.ops.continuum.{'triton_chunk' if impl == 'triton' else impl}")


def update_in_place(update: Update, impl: str) -> None:
    """The operator behind :func:`nl_kernels.continuum_update_`."""
    parts = (part if part is None or isinstance(part, float) else list(part) for part in update)
    torch.ops.nl_kernels.continuum_update_(*parts, impl)


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
            grad.contiguous(), x, up, down, gate, None, None, wanted, ctx.impl
        )
        grad_x, *sums = grads if wanted else (None, *grads)
        sums = [g.to(w.dtype) for g, w in zip(sums, (up, down, gate))]
        return grad_x, *sums, *((None, None) if gate is None else (None,))


@torch.library.impl(_UPDATE, "CompositeExplicitAutograd")
def _(*arguments):
    *parts, impl = arguments
    with torch.no_grad():
        implementation("update_in_place", impl)(Update(*parts))


@torch.library.register_fake(_UPDATE)
def _(*arguments):
    return None


@torch.library.impl(_MLP, "CompositeExplicitAutograd")
def _(x, up, down, gate, impl):
    with torch.no_grad():
        return implementation("mlp", impl)(x, up, down, gate)


@torch.library.register_fake(_MLP)
def _(x, up, down, gate, impl):
    return torch.empty_like(x)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _(error, x, up, down, gate, rates, error_bound, input_gradient, impl):
    with torch.no_grad(), without_autocast(x.device.type):
        gradients = implementation("mlp_backward", impl)(
            error, x, up, down, gate, rates, error_bound, input_gradient
        )
    return [tensor for tensor in gradients if tensor is not None]


@torch.library.register_fake(_BACKWARD)
def _(error, x, up, down, gate, rates, error_bound, input_gradient, impl):
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = [w.new_empty(w.shape, dtype=dtype) for w in (up, down, gate) if w is not None]
    return [*([torch.empty_like(x)] if input_gradient else []), *sums]
