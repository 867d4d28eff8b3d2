"""A bank's kernels as PyTorch operators: schema, shapes for tracing, autograd.

Triton is imported when an operator runs. An optional result is an empty tensor inside the operators, whose
schema has no optional results.
"""

from __future__ import annotations

from typing import get_type_hints

import torch
from torch.autograd.function import once_differentiable

from nl_kernels.dispatch import without_autocast
from nl_kernels.memory.kernels.arguments import Bank, Options, Tokens
from nl_kernels.memory.kernels.launch import Inputs, plan_forward
from nl_kernels.memory.kernels.launch_backward import plan_backward
from nl_kernels.memory.state import map_tensors
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls

_FORWARD = "nl_kernels::memory_forward"
_BACKWARD = "nl_kernels::memory_backward"
_NAMES = [
    *Tokens._fields,
    *(f"{name}{bank}" for bank in ("", "_snapshot", "_anchor") for name in Bank._fields),
]
_COUNT = len(_NAMES)
_SPANS = _NAMES.index("spans")  # the input that has no gradient
_VISIBLE = 5  # of the results: reads, weights and snapshot after the call; the others are kept for backward
_ALWAYS = ("query", "key", "value", "last", "last_snapshot")
_INPUTS = ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in _NAMES)
_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())


def _results(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


torch.library.define(_FORWARD, f"({_INPUTS}, {_OPTIONS}) -> {_results(_VISIBLE + 2)}")
torch.library.define(
    _BACKWARD,
    "(Tensor d_o, Tensor? d_first, Tensor? d_last, Tensor? d_first_snapshot, Tensor? d_last_snapshot, "
    f"{_INPUTS}, Tensor? kept_first, Tensor kept_last, {_OPTIONS}) -> {_results(_COUNT - 1)}",
)


class Learn(torch.autograd.Function):
    """Of all inputs and options: reads, and the weights after the call and their snapshot."""

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
    return map_tensors(torch.Tensor.contiguous, Inputs.of(args[:_COUNT])), args[_COUNT:]


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward(*args):
    inputs, options = _split(args)
    device = inputs.tokens.query.device
    with without_autocast(device.type):
        calls, results = plan_forward(inputs, Options(*options))
        run_calls(calls, device)
    return _present(results, inputs.running.last)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward(d_o, *args):
    inputs, (kept_first, kept_last, *options) = _split(args[4:])
    kept = Bank(None if inputs.running.first is None else kept_first, kept_last)
    final = (map_tensors(_gradient_of, inputs.running, Bank(*args[i : i + 2])) for i in (0, 2))
    with without_autocast(d_o.device.type):
        for item in plan_backward(d_o.contiguous(), *final, inputs, kept, Options(*options)):
            if isinstance(item, KernelCall):
                run_calls([item], d_o.device)
            else:
                found = item.tensors
    return _present((*found[:_SPANS], *found[_SPANS + 1 :]), inputs.running.last)


def _gradient_of(x: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    """What came for a result; zeros where nothing did."""
    return torch.zeros_like(x) if grad is None or not grad.numel() else grad.contiguous()


@torch.library.register_fake(_FORWARD)
def _(*args):
    inputs, options = _split(args)
    return _present(plan_forward(inputs, Options(*options))[1], inputs.running.last)


@torch.library.register_fake(_BACKWARD)
def _(d_o, *args):
    inputs = args[4 : 4 + _COUNT]
    found = [None if x is None else x.new_empty(x.shape) for i, x in enumerate(inputs) if i != _SPANS]
    return _present(found, inputs[_NAMES.index("last")])
