"""The kernels of ``deep_memory`` as PyTorch operators: schema, shapes for tracing, autograd.

Triton is imported when an operator runs or is traced. An optional result is an empty tensor inside the
operators, whose schema has no optional results.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.chunk_kernels.launch import precision_of
from nl_kernels.chunk_kernels.step_launch import together
from nl_kernels.dispatch import without_autocast
from nl_kernels.memory.loop import State
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory.launch import Inputs, Options, Results, StepInputs
from nl_kernels.ops.deep_memory.rows import run_on_rows
from nl_kernels.ops.deep_memory.state import DeepMemoryState
from nl_kernels.triton_support.targets import architecture_of

_FORWARD = "nl_kernels::deep_memory_forward"
_BACKWARD = "nl_kernels::deep_memory_backward"
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor rate, Tensor log_decay, Tensor? momentum, Tensor inner, "
    "Tensor? outer, Tensor? inner_velocity, Tensor? outer_velocity, Tensor? inner_snapshot, "
    "Tensor? outer_snapshot, Tensor? inner_anchor, Tensor? outer_anchor, Tensor? begin, Tensor? stop, "
    "Tensor? origin"
)
_OPTIONS = (
    "int offset, int chunk_size, str read, str activation, bool normalize_hidden, bool residual, str erase, "
    "bool proximal, float? error_bound, int checkpoint_every, str precision"
)
_STEP = "nl_kernels::deep_memory_step"
_STEP_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor rate, Tensor log_decay, Tensor? momentum, Tensor? inner_anchor, "
    "Tensor? outer_anchor, Tensor(a!) inner_snapshot, Tensor(b!)? outer_snapshot, Tensor(c!) inner, "
    "Tensor(d!)? outer, Tensor(e!)? inner_velocity, Tensor(f!)? outer_velocity, Tensor(g!) position, "
    "Tensor? mask"
)
_TENSORS = len(Inputs._fields)
_DIFFERENTIABLE = 14  # of the inputs
_VISIBLE = 7  # of the results: reads and final state; the others are kept for the backward pass

torch.library.define(
    _FORWARD, f"({_INPUTS}, {_OPTIONS}, bool keep) -> ({', '.join(['Tensor'] * len(Results._fields))})"
)
torch.library.define(
    _BACKWARD,
    "(Tensor do, Tensor? d_inner, Tensor? d_outer, Tensor? d_inner_velocity, Tensor? d_outer_velocity, "
    f"Tensor? d_inner_snapshot, Tensor? d_outer_snapshot, {_INPUTS}, Tensor kept_inner, Tensor? kept_outer, "
    "Tensor? kept_inner_velocity, Tensor? kept_outer_velocity, "
    f"{_OPTIONS}) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
)
torch.library.define(_STEP, f"({_STEP_INPUTS}, {_OPTIONS}) -> Tensor")


def deep_memory_triton(
    *tensors: torch.Tensor | None,
    anchor: DeepMemoryWeights,
    state: DeepMemoryState,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """As :func:`~nl_kernels.ops.deep_memory.eager.deep_memory_eager`, by the kernels.

    Args:
        tensors: q, k, v, rate, log decay, momentum.
        dtype: of the caller's tensors, which decides the precision of products.
    """

    def compute(carried: State, constants: State, sequences: State, grid: ChunkGrid):
        gates = (None if x is None else x[..., 0] for x in sequences[3:6])
        slots = (grid.begin, grid.stop, grid.begin if grid.single else None)
        options = Options.of(
            rule,
            offset=grid.offset,
            chunk_size=chunk_size,
            read=read,
            checkpoint_every=checkpoint_every,
            precision=precision_of(dtype, architecture_of(tensors[0].device)),
        )
        o, *after = apply(Inputs(*sequences[:3], *gates, *carried, *constants, *slots), options)
        return o, tuple(after)

    return run_on_rows(
        compute,
        *tensors,
        anchor,
        state,
        anchored=rule.anchored,
        chunk_size=chunk_size,
        mask=mask,
        at_boundary=at_boundary,
    )


def deep_memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum: torch.Tensor | None,
    weights: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    inplace: bool,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """As :func:`nl_kernels.ops.deep_memory.eager_step.deep_memory_step`, by the kernel.

    The kernel writes where the state lies; not in place, that is a copy.
    """
    state = state if inplace else state.clone()
    inputs = StepInputs(
        *(None if x is None else x.contiguous() for x in (q, k, v, rate, log_decay, momentum)),
        *(together(weights, q.shape[:2]) if rule.anchored else (None, None)),
        *state.snapshot,
        *state.running,
        *(state.momentum or (None, None)),
        state.position,
        None if mask is None else mask.contiguous().view(torch.uint8),
    )
    options = Options.of(
        rule, offset=0, chunk_size=chunk_size, read=read, checkpoint_every=None, precision="ieee"
    )
    return torch.ops.nl_kernels.deep_memory_step(*inputs, *options), state


def apply(inputs: Inputs, options: Options) -> list[torch.Tensor | None]:
    """Reads and the final state (as in :class:`Results`) with gradients."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        results = _DeepMemory.apply(*inputs, *options)
    else:
        results = torch.ops.nl_kernels.deep_memory_forward(*inputs, *options, False)
    present = _present(inputs, options)
    return [x if there else None for x, there in zip(results[:_VISIBLE], present)]


def _present(inputs: Inputs, options: Options) -> list[bool]:
    """Which of the results there are."""
    known = inputs.begin is None and (options.offset + inputs.q.shape[1]) % options.chunk_size == 0
    weights = [x is not None for x in inputs[6:10]]
    return [True, *weights, not known, not known and weights[1]]


class _DeepMemory(torch.autograd.Function):
    # By name: torch.compile counts the parameters to see that forward takes no context.
    @staticmethod
    def forward(
        q,
        k,
        v,
        rate,
        log_decay,
        momentum,
        inner,
        outer,
        inner_velocity,
        outer_velocity,
        inner_snapshot,
        outer_snapshot,
        inner_anchor,
        outer_anchor,
        begin,
        stop,
        origin,
        offset,
        chunk_size,
        read,
        activation,
        normalize_hidden,
        residual,
        erase,
        proximal,
        error_bound,
        checkpoint_every,
        precision,
    ):
        return torch.ops.nl_kernels.deep_memory_forward(
            q,
            k,
            v,
            rate,
            log_decay,
            momentum,
            inner,
            outer,
            inner_velocity,
            outer_velocity,
            inner_snapshot,
            outer_snapshot,
            inner_anchor,
            outer_anchor,
            begin,
            stop,
            origin,
            offset,
            chunk_size,
            read,
            activation,
            normalize_hidden,
            residual,
            erase,
            proximal,
            error_bound,
            checkpoint_every,
            precision,
            True,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[_VISIBLE:])
        ctx.save_for_backward(*inputs[:_TENSORS], *output[_VISIBLE:])
        ctx.options = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, *grads):
        saved = ctx.saved_tensors
        inputs = Inputs(*saved[:_TENSORS])
        if do is None:
            do = torch.zeros_like(inputs.v)
        present = _present(inputs, Options(*ctx.options))[1:]
        cotangents = [g if there else None for g, there in zip(grads, present)]
        kept = [x if w is not None else None for x, w in zip(saved[_TENSORS:], inputs[6:10])]
        found = torch.ops.nl_kernels.deep_memory_backward(do, *cotangents, *inputs, *kept, *ctx.options)
        found = [g if x is not None else None for g, x in zip(found, inputs)]
        return (*found, *[None] * (_TENSORS - _DIFFERENTIABLE + len(ctx.options)))


def _filled(results, like: torch.Tensor):
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _split(args) -> tuple[Inputs, tuple]:
    return Inputs(*args[:_TENSORS]), args[_TENSORS:]


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward(*args):
    from nl_kernels.ops.deep_memory.triton_forward import deep_memory_forward

    inputs, (*options, keep) = _split(args)
    with without_autocast(inputs.q.device.type):
        return _filled(deep_memory_forward(inputs, Options(*options), keep=keep), inputs.q)


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward(do, *args):
    from nl_kernels.ops.deep_memory.triton_backward import deep_memory_backward

    inputs, rest = _split(args[6:])
    options = Options(*rest[4:])
    with without_autocast(do.device.type):
        found = deep_memory_backward(do, args[:4], args[4:6], inputs, rest[:4], options)
    return _filled(found, do)


@torch.library.register_fake(_FORWARD)
def _(*args):
    from nl_kernels.ops.deep_memory.triton_forward import plan_forward

    inputs, (*options, keep) = _split(args)
    inputs = Inputs(*(None if x is None else x.contiguous() for x in inputs))
    return _filled(plan_forward(inputs, Options(*options), keep=keep)[1], inputs.q)


@torch.library.register_fake(_BACKWARD)
def _(do, *args):
    inputs, _ = _split(args[6:])
    return _filled((None if x is None else x.new_empty(x.shape) for x in inputs[:_DIFFERENTIABLE]), do)


@torch.library.impl(_STEP, "CompositeExplicitAutograd")
def _step(*args):
    from nl_kernels.ops.deep_memory.triton_step import deep_memory_step

    count = len(StepInputs._fields)
    return deep_memory_step(StepInputs(*args[:count]), Options(*args[count:]))


@torch.library.register_fake(_STEP)
def _(q, k, v, *rest):
    return q.new_empty(v.shape)
