"""The chunked self-modifying memory as PyTorch operators: schema, shapes for tracing, autograd.

The operators work on a call's tokens on the grid of chunks (``rows.py``). They import the kernels when
called, so that nothing imports Triton unless it runs. An optional result is an empty tensor inside the
operators, whose schema has no optional results.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from nl_kernels.chunk_kernels.launch import precision_of
from nl_kernels.chunk_kernels.step_launch import together
from nl_kernels.dispatch import without_autocast
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying.launch import (
    Options,
    StepInputs,
    checkpoint_interval,
    step_options,
)
from nl_kernels.ops.self_modifying.rows import (
    ABSENT,
    Placed,
    collect_output,
    collect_state,
    place_tokens,
)
from nl_kernels.ops.self_modifying.state import (
    MemoryStack,
    SelfModifyingState,
    SelfModifyingWeights,
)
from nl_kernels.triton_support.targets import architecture_of

_FORWARD = "nl_kernels::self_modifying_forward"
_BACKWARD = "nl_kernels::self_modifying_backward"
_STACKS = ("anchor", "running", "velocity", "snapshot")
_PARTS = ("first", "last", "gate")
_TENSORS = 9  # inputs before the stacks
_STATES = slice(_TENSORS + 3, _TENSORS + 12)  # running, velocity and snapshot among the inputs
_SPANS = 5  # the input that has no gradient
_TYPES = {"str": "str", "bool": "bool", "float": "float", "int": "int"}

_INPUTS = ", ".join(
    [
        "Tensor query, Tensor key_input, Tensor value_input, Tensor gate_input",
        "Tensor? momentum, Tensor? spans",
        "Tensor rate_max, Tensor rate_bias, Tensor retention_bias",
        *(f"Tensor? {stack}_{part}" for stack in _STACKS for part in _PARTS),
    ]
)
_KEPT = ", ".join(f"Tensor? kept_{i}" for i in range(6))
_COTANGENTS = ", ".join(f"Tensor? grad_{i}" for i in range(9))
_OPTIONS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in Options.__annotations__.items())
_MADE = 1 + 9 + 6  # o, the stacks after the call, what was kept
_GRADIENTS = 5 + 3 + 12  # of the inputs but for spans


def _results(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


torch.library.define(_FORWARD, f"({_INPUTS}, {_OPTIONS}) -> {_results(_MADE)}")
torch.library.define(
    _BACKWARD,
    f"(Tensor grad_o, {_COTANGENTS}, {_INPUTS}, {_KEPT}, {_OPTIONS}) -> {_results(_GRADIENTS)}",
)


_STEP = "nl_kernels::self_modifying_step"
_STEP_STATE = StepInputs._fields[StepInputs._fields.index("first_snapshot") : -1]
_STEP_INPUTS = ", ".join(
    [
        "Tensor query, Tensor key_input, Tensor value_input, Tensor gate_input, Tensor? momentum",
        "Tensor rate_max, Tensor rate_bias, Tensor retention_bias",
        *(f"Tensor? {name}" for name in StepInputs._fields if name.endswith(("_inner", "_outer"))),
        *(f"Tensor({chr(ord('a') + i)}!)? {name}" for i, name in enumerate(_STEP_STATE)),
        "Tensor? mask",
    ]
)
torch.library.define(_STEP, f"({_STEP_INPUTS}, {_OPTIONS}) -> Tensor")


def apply(*tensors: torch.Tensor | None, options: Options) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """``o`` and the nine parts of the states after the call, with gradients.

    Args:
        tensors: as in :func:`nl_kernels.ops.self_modifying.triton_forward.plan_forward`.
    """
    o, *made = _SelfModifying.apply(*tensors, *options.as_tuple())
    running, velocity = tensors[12:15], tensors[15:18]
    present = (*running, *velocity, *running)
    return o, [None if like is None else x for like, x in zip(present, made[:9], strict=True)]


def self_modifying_memory_triton(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: MemoryStack,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: torch.Tensor,
    rate_bias: torch.Tensor,
    retention_bias: torch.Tensor,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    truncate_every: int | None,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """As :func:`~nl_kernels.ops.self_modifying.reference.self_modifying_memory_reference`, by kernels.

    Args:
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
        checkpoint_every: chunks between the states kept for the backward pass.
        dtype: of the caller's inputs, before they were cast to the state's: it sets the precision of
        products.
    """
    period, chunk = max(chunk_size, generator_chunk_size), min(chunk_size, generator_chunk_size)
    tokens = (query, key_input, value_input, gate_input, momentum)
    placed = place_tokens(*tokens, mask, state.position, period=period, at_boundary=at_boundary)
    spans, offset, slots = _spans(placed, period)
    tensors = [
        *placed[:5],
        spans,
        rate_max,
        rate_bias,
        retention_bias,
        *(anchor if rule.anchored else ABSENT),
        *state.running,
        *(state.momentum or ABSENT),
        *(ABSENT if at_boundary else state.snapshot),
    ]
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    interval = checkpoint_interval(-(-slots // chunk), checkpoint_every, period // chunk)
    options = Options.of(
        rule,
        read=read,
        chunk_size=chunk_size,
        generator_chunk_size=generator_chunk_size,
        truncate=0 if truncate_every is None else chunk * truncate_every,
        checkpoint_every=interval if needs_grad else 0,
        precision=precision_of(dtype, architecture_of(query.device)),
        offset=offset,
        slots=slots,
    )
    o, made = apply(*tensors, options=options)
    stacks = (MemoryStack(*made[i : i + 3]) for i in (0, 3, 6))
    return collect_output(o, placed), collect_state(*stacks, placed)


def self_modifying_memory_step(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    momentum: torch.Tensor | None,
    weights: SelfModifyingWeights,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: torch.Tensor | float,
    rate_bias: torch.Tensor | float,
    retention_bias: torch.Tensor | float,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    mask: torch.Tensor | None,
    inplace: bool,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """As :func:`nl_kernels.ops.self_modifying.eager_step.self_modifying_memory_step`, by the kernel.

    The kernel writes where the state lies; not in place, that is a copy.
    """
    state = state if inplace else state.clone()
    heads = query.shape[1]
    gates = (
        x.contiguous() if isinstance(x, torch.Tensor) else torch.full((heads,), float(x), device=query.device)
        for x in (rate_max, rate_bias, retention_bias)
    )
    anchors = [layer for memory in weights for layer in memory] if rule.anchored else [None] * 10
    tokens = (query, key_input, value_input, gate_input, momentum)
    inputs = StepInputs(
        *(None if x is None else x.contiguous() for x in tokens),
        *gates,
        *together(anchors, query.shape[:2]),
        *state.snapshot,
        *state.running,
        *(state.momentum or ABSENT),
        state.position,
        None if mask is None else mask.contiguous().view(torch.uint8),
    )
    options = step_options(rule, read=read, chunk_size=chunk_size, generator_chunk_size=generator_chunk_size)
    return torch.ops.nl_kernels.self_modifying_step(*inputs, *options.as_tuple()), state


def _spans(placed: Placed, period: int) -> tuple[torch.Tensor | None, int, int]:
    """Each sequence's place [B, 3] (see ``triton_chunk.py``), the first token's slot, and all slots.

    ``None`` in place of the first when all sequences have the same.
    """
    grid, tokens = placed.grid, placed.query.shape[1]
    if grid.single:
        return torch.stack([grid.begin, grid.begin, grid.stop], 1), 0, period
    if grid.alignment is None:
        return None, grid.offset, grid.offset + tokens
    return torch.stack([torch.zeros_like(grid.begin), grid.begin, grid.stop], 1), 0, tokens


class _SelfModifying(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return torch.ops.nl_kernels.self_modifying_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        count = _TENSORS + 12
        ctx.save_for_backward(*inputs[:count], *output[10:])
        ctx.mark_non_differentiable(*output[10:])
        ctx.options = inputs[count:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, *grad_made):
        saved = ctx.saved_tensors
        inputs, kept = saved[: _TENSORS + 12], saved[_TENSORS + 12 :]
        if grad_o is None:
            grad_o = torch.zeros_like(inputs[0])
        grads = torch.ops.nl_kernels.self_modifying_backward(
            grad_o, *grad_made[:9], *inputs, *kept, *ctx.options
        )
        grads = [*grads[:_SPANS], None, *grads[_SPANS:]]
        grads = [g if x is not None else None for g, x in zip(grads, inputs, strict=True)]
        return (*grads, *[None] * len(ctx.options))


def _present(results, like: torch.Tensor):
    return tuple(like.new_empty(0) if x is None else x for x in results)


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward(*args):
    from nl_kernels.ops.self_modifying.triton_forward import self_modifying_forward

    count = _TENSORS + 12
    tensors, options = args[:count], Options(*args[count:])
    with without_autocast(tensors[0].device.type):
        return _present(self_modifying_forward(*tensors, options=options), tensors[0])


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward(grad_o, *args):
    from nl_kernels.ops.self_modifying.triton_backward import self_modifying_backward

    cotangents, args = args[:9], args[9:]
    count = _TENSORS + 12 + 6
    tensors, options = list(args[:count]), Options(*args[count:])
    tensors[-6:] = (None if x.numel() == 0 else x for x in tensors[-6:])
    with without_autocast(grad_o.device.type):
        return _present(self_modifying_backward(grad_o, cotangents, *tensors, options=options), grad_o)


@torch.library.register_fake(_FORWARD)
def _(*args):
    count = _TENSORS + 12
    tensors, options = args[:count], Options(*args[count:])
    query, running, velocity = tensors[0], tensors[12:15], tensors[15:18]
    made = [None if x is None else x.new_empty(x.shape) for x in (*running, *velocity, *running)]
    kept = [None] * 6
    if options.checkpoint_every:
        slots = -(-options.chunks // options.checkpoint_every)
        rows = (None if x is None else x.flatten(0, 1) for x in (*running, *velocity))
        kept = [None if x is None else x.new_empty((len(x), slots, *x.shape[1:])) for x in rows]
    return _present((query.new_empty(query.shape), *made, *kept), query)


@torch.library.register_fake(_BACKWARD)
def _(grad_o, *args):
    tensors = args[9 : 9 + _TENSORS + 12]
    inputs = [*tensors[:_SPANS], *tensors[_SPANS + 1 :]]
    # The snapshot after the call has a cotangent even where the call had none before it.
    inputs[-3:] = (x if x is not None else None for x in tensors[12:15])
    return _present([None if x is None else x.new_empty(x.shape) for x in inputs], grad_o)


@torch.library.impl(_STEP, "CompositeExplicitAutograd")
def _step(*args):
    from nl_kernels.ops.self_modifying.triton_step import self_modifying_step

    count = len(StepInputs._fields)
    return self_modifying_step(StepInputs(*args[:count]), Options(*args[count:]))


@torch.library.register_fake(_STEP)
def _(query, *rest):
    return query.new_empty(query.shape)
