"""A bank's kernels as PyTorch operators: schema, shapes for tracing, autograd.

Triton is imported when an operator runs. An optional result is an empty tensor inside the operators, whose
schema has no optional results.
"""

from __future__ import annotations

from typing import get_type_hints

import torch
from torch.autograd.function import once_differentiable

from nl_kernels.dispatch import without_autocast
from nl_kernels.memory.bank import Bank
from nl_kernels.memory.kernels import launch, launch_backward
from nl_kernels.memory.kernels.launch import Inputs, Options
from nl_kernels.memory.kernels.launch_backward import Gradients
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls

_FORWARD = "nl_kernels::memory_forward"
_BACKWARD = "nl_kernels::memory_backward"
_COUNT = len(Inputs._fields)
_SPANS = Inputs._fields.index("spans")  # the input that has no gradient
_VISIBLE = 5  # of the results: reads, weights and snapshot after the call; the others are kept for backward
_ALWAYS = ("query", "key", "value", "last", "last_snapshot")
_INPUTS = ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in Inputs._fields)
_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())


def _results(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


torch.library.define(_FORWARD, f"({_INPUTS}, {_OPTIONS}) -> {_results(_VISIBLE + 2)}")
torch.library.define(
    _BACKWARD,
    "(Tensor d_o, Tensor? d_first, Tensor? d_last, Tensor? d_first_snapshot, Tensor? d_last_snapshot, "
    f"{_INPUTS}, Tensor? kept_first, Tensor kept_last, {_OPTIONS}) -> {_results(_COUNT - 1)}",
)


def learn(inputs: Inputs, options: Options) -> tuple[torch.Tensor, Bank, Bank]:
    """Reads, and the weights after the call and their snapshot, with gradients."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        o, *weights = _Learn.apply(*inputs, *options)
    else:
        o, *weights = torch.ops.nl_kernels.memory_forward(*inputs, *options)
    first, last, first_snapshot, last_snapshot = weights[: _VISIBLE - 1]
    if inputs.first is None:
        first = first_snapshot = None
    return o, Bank(first, last), Bank(first_snapshot, last_snapshot)


class _Learn(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return torch.ops.nl_kernels.memory_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_COUNT], *output[_VISIBLE:])
        ctx.mark_non_differentiable(*output[_VISIBLE:])
        ctx.options = inputs[_COUNT:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o, *grads):
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them for that
        inputs, kept = saved[:_COUNT], saved[_COUNT:]
        if d_o is None:
            d_o = torch.zeros_like(inputs[2])
        found = torch.ops.nl_kernels.memory_backward(
            d_o, *grads[: _VISIBLE - 1], *inputs, *kept, *ctx.options
        )
        found = [*found[:_SPANS], None, *found[_SPANS:]]
        found = [grad if x is not None else None for grad, x in zip(found, inputs, strict=True)]
        return (*found, *[None] * len(ctx.options))


def _present(results, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _split(args) -> tuple[Inputs, tuple]:
    return Inputs(*(None if x is None else x.contiguous() for x in args[:_COUNT])), args[_COUNT:]


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward(*args):
    inputs, options = _split(args)
    with without_autocast(inputs.query.device.type):
        calls, results = launch.plan_forward(inputs, Options(*options))
        run_calls(calls, inputs.query.device)
    return _present(results, inputs.last)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward(d_o, *args):
    inputs, (kept_first, kept_last, *options) = _split(args[4:])
    kept = Bank(None if inputs.first is None else kept_first, kept_last)
    weights = (*inputs[10:12], *inputs[10:12])
    grads = [
        None if x is None else torch.zeros_like(x) if grad is None or not grad.numel() else grad.contiguous()
        for x, grad in zip(weights, args[:4], strict=True)
    ]
    with without_autocast(d_o.device.type):
        for item in launch_backward.plan_backward(
            d_o.contiguous(),
            *launch_backward.final_gradients(grads, inputs, Options(*options)),
            inputs,
            kept,
            Options(*options),
        ):
            if isinstance(item, KernelCall):
                run_calls([item], d_o.device)
            else:
                found = _by_input(item, inputs)
    return _present(found, inputs.last)


def _by_input(found: Gradients, inputs: Inputs) -> list[torch.Tensor | None]:
    """Gradients in the order of the inputs but ``spans``; those of gate parameters by head."""
    gates = [None] * 3
    if found.gates is not None:
        by_head = found.gates.unflatten(0, (-1, inputs.query.shape[2])).sum(0)
        gates = [x.to(like.dtype, copy=True) for x, like in zip(by_head.unbind(1), inputs[6:9], strict=True)]
    return [*found.tokens[:6], *gates, *found.running, *found.snapshot, *found.anchor]


@torch.library.register_fake(_FORWARD)
def _(*args):
    inputs, options = _split(args)
    return _present(launch.plan_forward(inputs, Options(*options))[1], inputs.last)


@torch.library.register_fake(_BACKWARD)
def _(d_o, *args):
    inputs = args[4 : 4 + _COUNT]
    found = [None if x is None else x.new_empty(x.shape) for i, x in enumerate(inputs) if i != _SPANS]
    return _present(found, inputs[11])
