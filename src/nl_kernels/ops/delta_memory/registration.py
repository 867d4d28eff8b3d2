"""The delta memory as PyTorch operators: schema, shapes for tracing, autograd and vmap.

The operators take the implementation by name and import it when called, so that nothing imports Triton unless
it runs. An optional result is an empty tensor inside the operators, whose schema has no optional results.
"""

from __future__ import annotations

import importlib

import torch
from torch.autograd.function import once_differentiable

from nl_kernels.checks import state_dtype
from nl_kernels.dispatch import needs_gradient, without_autocast

_FORWARD = "nl_kernels::delta_memory_forward"
_BACKWARD = "nl_kernels::delta_memory_backward"
_STEP = "nl_kernels::delta_memory_step"
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor erase, Tensor? momentum, "
    "Tensor? initial_state, Tensor? initial_momentum, Tensor? cu_seqlens, "
    "float scale, str read, int chunk_size, str impl"
)
_TENSORS = 9  # of the inputs above, the last of which has no gradient

torch.library.define(_FORWARD, f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    _BACKWARD,
    f"(Tensor do, Tensor? d_final_state, Tensor? d_final_momentum, {_INPUTS}) "
    f"-> ({', '.join(['Tensor'] * 8)})",
)
torch.library.define(
    _STEP,
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor erase, Tensor? momentum, Tensor state, "
    "Tensor? momentum_state, float scale, str read, str impl) -> (Tensor, Tensor, Tensor)",
)


def apply(*args):
    """``delta_memory_forward`` with gradients: the nine tensors, then scale, read, chunk_size and impl."""
    if needs_gradient(*args[:_TENSORS]):
        o, state, momentum_state = _DeltaMemory.apply(*args)
    else:
        o, state, momentum_state = torch.ops.nl_kernels.delta_memory_forward(*args)
    return o, state, None if args[5] is None else momentum_state


def step(*args):
    """``delta_memory_step``, without gradients: the eight tensors, then scale, read and impl."""
    o, state, momentum_state = torch.ops.nl_kernels.delta_memory_step(*args)
    return o, state, None if args[5] is None else momentum_state


class _DeltaMemory(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return torch.ops.nl_kernels.delta_memory_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.options = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_state, d_momentum):
        inputs = ctx.saved_tensors
        v, momentum, initial_state, initial_momentum = inputs[2], *inputs[5:8]
        if do is None:
            do = torch.zeros_like(v)
        d_momentum = None if momentum is None else d_momentum
        grads = torch.ops.nl_kernels.delta_memory_backward(do, d_state, d_momentum, *inputs, *ctx.options)
        optional = (momentum, initial_state, initial_momentum)
        grads = (*grads[:5], *(g if x is not None else None for g, x in zip(grads[5:], optional)))
        return (*grads, None, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_over_heads(_DeltaMemory.apply, info, in_dims, args, _INPUT_AXES, _OUTPUT_AXES)


def _implementation(op: str, impl: str):
    modules = {
        "eager": {_FORWARD: "eager", _BACKWARD: "eager", _STEP: "eager_step"},
        "triton": {_FORWARD: "triton_forward", _BACKWARD: "triton_backward", _STEP: "triton_step"},
    }
    module = importlib.import_module(f"nl_kernels.ops.delta_memory.{modules[impl][op]}")
    return getattr(module, op.split("::")[1])


def _present(results, like: torch.Tensor):
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _run(op: str, impl: str, tensors, **options):
    with without_autocast(tensors[0].device.type):
        return _present(_implementation(op, impl)(*tensors, **options), tensors[0])


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward(*args):
    *tensors, scale, read, chunk_size, impl = args
    return _run(_FORWARD, impl, tensors, scale=scale, read=read, chunk_size=chunk_size)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward(*args):
    *tensors, scale, read, chunk_size, impl = args
    return _run(_BACKWARD, impl, tensors, scale=scale, read=read, chunk_size=chunk_size)


@torch.library.impl(_STEP, "CompositeExplicitAutograd")
def _step(*args):
    *tensors, scale, read, impl = args
    return _run(_STEP, impl, tensors, scale=scale, read=read)


def _state(q, k, v, cu_seqlens) -> torch.Tensor:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((sequences, v.shape[2], v.shape[3], k.shape[3]), dtype=state_dtype(q))


@torch.library.register_fake(_FORWARD)
def _(q, k, v, *rest):
    _, _, momentum, _, _, cu_seqlens = rest[:6]
    state = _state(q, k, v, cu_seqlens)
    return v.new_empty(v.shape), state, q.new_empty(0) if momentum is None else torch.empty_like(state)


@torch.library.register_fake(_BACKWARD)
def _(do, d_final_state, d_final_momentum, q, k, v, *rest):
    log_decay, erase, momentum, initial_state, initial_momentum, cu_seqlens = rest[:6]
    state = _state(q, k, v, cu_seqlens)
    like_state = state if initial_momentum is None else initial_momentum
    return (
        *(x.new_empty(x.shape) for x in (q, k, v, log_decay, erase)),
        q.new_empty(0) if momentum is None else momentum.new_empty(momentum.shape),
        state if initial_state is None else initial_state.new_empty(state.shape),
        q.new_empty(0) if momentum is None else like_state.new_empty(state.shape),
    )


@torch.library.register_fake(_STEP)
def _(q, k, v, log_decay, erase, momentum, state, momentum_state, scale, read, impl):
    new_state = state.new_empty(state.shape, dtype=state_dtype(q))
    return (
        v.new_empty(v.shape),
        new_state,
        q.new_empty(0) if momentum is None else torch.empty_like(new_state),
    )


# Which axis of each tensor counts heads.
_TOKEN, _STATE = 2, 1
_INPUT_AXES = (*[_TOKEN] * 6, _STATE, _STATE, None)
_OUTPUT_AXES = (_TOKEN, _STATE, _STATE)


def _vmap_over_heads(function, info, in_dims, args, axes, result_axes):
    """A vmapped dimension becomes more heads: ``[B, T, V · H, …]``, states ``[N, V · H, …]``."""
    folded = list(args)
    for i, (x, dim, axis) in enumerate(zip(args, in_dims, axes)):
        if x is None:
            continue
        if axis is None:
            if dim is not None:
                raise ValueError("cu_seqlens: expected the same bounds for the whole vmapped dimension")
            continue
        x = x.unsqueeze(axis).expand(*x.shape[:axis], info.batch_size, *x.shape[axis:]) if dim is None else x
        folded[i] = (x if dim is None else x.movedim(dim, axis)).flatten(axis, axis + 1)
    results = function(*folded)
    absent = [x.numel() == 0 for x in results]
    unfolded = (
        x if gone else x.unflatten(axis, (info.batch_size, -1))
        for x, axis, gone in zip(results, result_axes, absent)
    )
    return tuple(unfolded), tuple(None if gone else axis for axis, gone in zip(result_axes, absent))


@torch.library.register_vmap(_BACKWARD)
def _(info, in_dims, *args):
    axes = (_TOKEN, _STATE, _STATE, *_INPUT_AXES)
    results = (*[_TOKEN] * 6, _STATE, _STATE)
    return _vmap_over_heads(torch.ops.nl_kernels.delta_memory_backward, info, in_dims, args, axes, results)


@torch.library.register_vmap(_STEP)
def _(info, in_dims, *args):
    axes = (*[_STATE] * 8,)  # without the time axis heads come second everywhere
    return _vmap_over_heads(torch.ops.nl_kernels.delta_memory_step, info, in_dims, args, axes, (_STATE,) * 3)
