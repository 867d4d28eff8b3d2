"""A call of an op: its tokens on the grid of chunks, by the torch engine or by the kernels, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from nl_kernels.checks import has_readable_data, state_dtype
from nl_kernels.chunk_alignment import ChunkGrid, place_on_grid
from nl_kernels.dispatch import compiler_at_work, needs_gradient, without_autocast
from nl_kernels.memory.bank import Call, Layers, Layout, Sequences
from nl_kernels.memory.chunk import BankRule
from nl_kernels.memory.generate import source_of
from nl_kernels.memory.kernels import call as kernels_call
from nl_kernels.memory.loop import Loop, run_segments
from nl_kernels.memory.segments import footprint, plan_segments
from nl_kernels.memory.state import beginning, cast, map_tensors, tensors_in, weights_in
from nl_kernels.memory.step import step_token
from nl_kernels.memory_checks import (
    by_sequence,
    check_own_memory,
    check_step_dtype,
    head_parameter,
    per_sequence,
)
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.zero_gradients import with_zero_gradients


class Op(NamedTuple):
    """What the two ops of chunked memories do in their own way.

    Attributes:
        state: the named tuple of its states.
        weights: what a state has of initial weights [B, H, ..].
        takes: which of :class:`~nl_kernels.memory.bank.Sequences` its tensors are, in order.
    """

    state: type
    weights: Callable
    takes: tuple[str, ...]

    def sequences(self, tensors: Iterable[torch.Tensor | None]) -> Sequences:
        return Sequences(**dict(zip(self.takes, tensors)))


def run(
    op: Op,
    implementation: str,
    tensors: tuple[torch.Tensor | None, ...],
    gates: dict[str, torch.Tensor | float],
    weights: tuple,
    state: tuple | None,
    *,
    reference: Callable,
    rule: MemoryRule,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, tuple]:
    """Reads [B, T, H, Dv] in the dtype of the queries, and the final state, of checked arguments.

    Args:
        tensors: the op's, of the tokens, the last one its momentum.
        gates: parameters [H], or numbers, of memories that make their own gates.
        weights: the op's initial ones, shared or by sequence.
        state: to begin with; ``None``: of the weights.
        reference: the op's definition, of tensors, anchor and state; all else by name.
        options: of :func:`learn_on_grid`, those that the op has.
    """
    dtype, leaves = tensors[0].dtype, tensors_in(weights)
    operands = functools.reduce(torch.promote_types, (x.dtype for x in tensors[:3]))
    length, inputs = tensors[0].shape[1], list(tensors)
    batch = tensors[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    at_boundary, inner = state is None, state_dtype(*inputs, *leaves, *weights_in(state))
    if implementation != "triton":  # the kernels take 16-bit tokens as they are
        inputs = [None if x is None else x.to(inner) for x in inputs]
    gates = {name: head_parameter(x, tensors[0]).to(inner) for name, x in gates.items()}
    tied = () if at_boundary or rule.anchored else leaves
    if implementation == "reference":  # its loop leaves out what the last tokens would write
        tied = [*inputs[1:], *gates.values(), *leaves]
    inputs[0] = with_zero_gradients(inputs[0], tied)
    inputs, mask, alignment = by_sequence(inputs, mask, cu_seqlens)

    initial = op.weights(map_tensors(lambda w: per_sequence(w, batch, inner), weights))
    anchor = initial if rule.anchored else map_tensors(torch.zeros_like, initial)
    if at_boundary:
        state = beginning(op.state, initial, rule.anchored, batch, tensors[-1] is not None)
    else:
        state = cast(state, inner)
    # Autocast would round the products, and with them the state, to half precision.
    with without_autocast(tensors[0].device.type):
        if implementation == "reference":
            o, final = reference(*inputs, anchor, state, rule=rule, mask=mask, **gates, **options)
        else:
            tokens = op.sequences(inputs)
            layout = Layout.of(batch * tokens.value.shape[2], tokens, initial)
            banks = (state.running, state.snapshot, anchor if rule.anchored else None, state.momentum)
            banks = (None if x is None else layout.blocks_of(x) for x in banks)
            call = Call(layout, tokens, tuple(gates.values()), *banks, state.position)
            options = {"generator_chunk_size": options["chunk_size"], "truncate_every": None, **options}
            options |= {"rule": rule, "at_boundary": at_boundary, "dtype": operands}
            learn_here = learn
            if implementation == "eager" and compiler_at_work():
                from nl_kernels.untraced import learn as learn_here
            o, *banks, position = learn_here(
                call, implementation, mask=mask, checkpoint_every=checkpoint_every, **options
            )
            banks = (None if x is None else layout.weights_of(type(initial), x, batch) for x in banks)
            running, snapshot, velocity = banks
            final = op.state(snapshot, running, position, velocity)
    if alignment is not None:
        o = alignment.scatter(o, 1, length)
    return o.to(dtype), final


def run_step(
    op: Op,
    implementation: str,
    tensors: tuple[torch.Tensor | None, ...],
    gates: dict[str, torch.Tensor | float],
    weights: tuple,
    state: tuple,
    *,
    rule: MemoryRule,
    mask: torch.Tensor | None,
    inplace: bool,
    **options: Any,
) -> tuple[torch.Tensor, tuple]:
    """One token of an op, as :func:`run` without the time axis, which does it for gradients and kernels."""
    held, own = tensors_in(state), tensors_in(weights)
    if inplace:
        check_own_memory(state, held, own)
    leaves = tuple(x for x in gates.values() if isinstance(x, torch.Tensor))
    differentiable = implementation == "reference" or needs_gradient(*tensors)
    if torch.is_grad_enabled():
        differentiable = differentiable or needs_gradient(*own, *held, *leaves)
    if differentiable or implementation == "triton":
        if inplace and differentiable:
            raise ValueError("inplace: not where gradients are needed, nor with impl='reference'")
        inputs = [None if x is None else x.unsqueeze(1) for x in tensors]
        mask = None if mask is None else mask[:, None]
        o, after = run(op, implementation, inputs, gates, weights, state, rule=rule, mask=mask, **options)
        return o.squeeze(1), map_tensors(torch.Tensor.copy_, state, after) if inplace else after
    check_step_dtype(held, (*tensors, *own))
    if mask is not None and mask.device.type == "cpu" and has_readable_data(mask) and bool(mask.all()):
        mask = None
    with without_autocast(tensors[0].device.type):
        clocks = (options["chunk_size"], options.get("generator_chunk_size", options["chunk_size"]))
        made = {"rule": rule, "read": options["read"], "clocks": clocks, "mask": mask, "inplace": inplace}
        tokens = op.sequences(tensors)
        o, state = step_token(tokens, tuple(gates.values()), weights, state, **made)
    return o.to(tensors[0].dtype), state


def learn(
    call: Call, implementation: str, *, mask: torch.Tensor | None, at_boundary: bool, **options: Any
) -> tuple[torch.Tensor, Layers, Layers, Layers | None, torch.Tensor]:
    """Reads [B, T, H, Dv], running weights, snapshot and velocities after the call, and positions."""
    period = max(options["chunk_size"], options["generator_chunk_size"])
    length = call.tokens.query.shape[1]
    grid = place_on_grid(call.position, mask, length, period, at_boundary)
    if grid.alignment is not None:
        call = call._replace(tokens=map_tensors(grid.alignment.gather, call.tokens))
        mask = grid.alignment.valid
    if implementation == "triton":
        o, *banks = kernels_call.learn_on_grid(call, grid, **options)
    else:
        o, *banks = learn_on_grid(call, grid, mask=mask, at_boundary=at_boundary, **options)
    if grid.alignment is not None:
        o = grid.alignment.scatter(o, len(o), length)
    elif mask is not None:
        o = o.masked_fill(~mask[:, :, None, None], 0)
    return o, *banks, grid.position


def learn_on_grid(
    call: Call,
    grid: ChunkGrid,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    truncate_every: int | None,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Layers, Layers, Layers | None]:
    """Reads on the grid [B, S, H, Dv], and running weights, snapshot and velocities after the call.

    Args:
        grid: where the call's tokens lie.
        at_boundary: every position is known to be 0 (spares reading them).
        checkpoint_every: chunks between the states kept for the backward pass.
        dtype: of the caller's tokens: it sets the precision of products.
    """
    layout = call.layout
    batch, _, heads, width = call.tokens.key.shape
    chunk = min(chunk_size, generator_chunk_size)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return (x if x.ndim == 4 else x[..., None]).transpose(1, 2).flatten(0, 1)

    applied = mask
    if mask is not None:
        applied = by_head(mask[:, :, None].expand(*mask.shape, heads).to(call.tokens.query.dtype))
    # A block that a cut of the gradient lies in would carry gradients of later tokens across it.
    block = math.gcd(generator_chunk_size // chunk, truncate_every or 0)
    block = block if layout.self_made else max(1, 512 // chunk_size)
    tokens = map_tensors(by_head, call.tokens)
    source, sequences = source_of(rule, layout, tokens, applied, block, False)
    constants = tuple(x.repeat(batch)[:, None, None] for x in call.gates)
    loop = Loop(
        BankRule(rule, read, layout),
        source,
        (chunk_size, generator_chunk_size),
        None if truncate_every is None else chunk * truncate_every,
        grid.for_heads(heads),
        dtype,
    )
    snapshot = None if at_boundary else call.snapshot
    running, *others = map(layout.layers_of, (call.running, call.velocity, snapshot, call.anchor))
    size = footprint(layout, running, chunk, width)
    segments = plan_segments(
        tokens.query.shape[1], chunk, grid.offset, checkpoint_every, size, block if layout.self_made else 1
    )
    velocity, snapshot, anchor = others
    banks = (*running, *velocity, *snapshot)
    o, after = run_segments(loop, segments, banks, (*anchor, *constants), sequences)

    o = o.unflatten(0, (batch, heads)).transpose(1, 2)
    count = layout.layers
    running, velocity, snapshot = (layout.as_blocks(after[i * count : (i + 1) * count]) for i in range(3))
    return o, running, running if snapshot is None else snapshot, velocity
