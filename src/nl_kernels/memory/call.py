"""A call of an op: its tokens on the grid of chunks, by the torch engine or by the kernels, and back."""

from __future__ import annotations

import contextlib
import functools
import math

import torch

from nl_kernels.checks import has_readable_data, state_dtype
from nl_kernels.chunk_alignment import ChunkGrid, place_on_grid
from nl_kernels.dispatch import below_autograd, compiler_at_work, needs_gradient, without_autocast
from nl_kernels.memory.bank import Call, Layers, Layout, Request, Sequences
from nl_kernels.memory.chunk import BankRule
from nl_kernels.memory.generate import GeneratedTokens, GivenTokens
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
from nl_kernels.memory_rule import l2_normalize
from nl_kernels.zero_gradients import with_zero_gradients


def run(
    request: Request, cu_seqlens: torch.Tensor | None = None, checkpoint_every: int | None = None
) -> tuple[torch.Tensor, tuple]:
    """Reads [B, T, H, Dv] in the dtype of the queries, and the final state."""
    op, implementation, tensors, gates, weights, state, reference, rule, read, mask, *_ = request
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
            o, final = reference(*inputs, anchor, state, rule=rule, read=read, mask=mask, **gates)
        else:
            tokens = Sequences(**dict(zip(op.takes, inputs)))
            heads, width = tokens.value.shape[2:]
            layout = Layout(batch * heads, width, bool(gates), any(x is None for x in initial))
            banks = (state.running, state.snapshot, anchor if rule.anchored else None, state.momentum)
            banks = (None if x is None else layout.blocks_of(x) for x in banks)
            made = (layout, tokens, tuple(gates.values()), *banks, state.position)
            call = Call(*made, request, checkpoint_every, operands)
            learn_here = learn
            if implementation == "eager" and compiler_at_work():
                from nl_kernels.untraced import learn as learn_here
            o, *banks, position = learn_here(call, mask)
            banks = (None if x is None else layout.weights_of(type(initial), x, batch) for x in banks)
            running, snapshot, velocity = banks
            final = op.state(snapshot, running, position, velocity)
    if alignment is not None:
        o = alignment.scatter(o, 1, length)
    return o.to(dtype), final


def run_step(request: Request, inplace: bool) -> tuple[torch.Tensor, tuple]:
    """One token of an op, as :func:`run` without the time axis, which does it for gradients and kernels."""
    tensors, weights, state, mask = request.tensors, request.weights, request.state, request.mask
    if inplace:
        check_own_memory(state, tensors_in(state), tensors_in(weights))
    differentiable = request.implementation == "reference" or needs_gradient(*tensors)
    if torch.is_grad_enabled():
        leaves = (x for x in request.gates.values() if isinstance(x, torch.Tensor))
        differentiable = differentiable or needs_gradient(*tensors_in((weights, state)), *leaves)
    if differentiable or request.implementation == "triton":
        if inplace and differentiable:
            raise ValueError("inplace: not where gradients are needed, nor with impl='reference'")
        tensors = tuple(None if x is None else x.unsqueeze(1) for x in tensors)
        mask = None if mask is None else mask[:, None]
        o, after = run(request._replace(tensors=tensors, mask=mask))
        return o.squeeze(1), map_tensors(torch.Tensor.copy_, state, after) if inplace else after
    check_step_dtype(tensors_in(state), tensors_in((tensors, weights)))
    if mask is not None and mask.device.type == "cpu" and has_readable_data(mask) and bool(mask.all()):
        request = request._replace(mask=None)
    # What is written in place counts its changes for autograd.
    unseen = contextlib.nullcontext() if inplace else below_autograd()
    with without_autocast(tensors[0].device.type), unseen:
        o, state = step_token(request, inplace)
    return o.to(tensors[0].dtype), state


def learn(
    call: Call, mask: torch.Tensor | None
) -> tuple[torch.Tensor, Layers, Layers, Layers | None, torch.Tensor]:
    """Reads [B, T, H, Dv], running weights, snapshot and velocities after the call, and positions."""
    request, length = call.request, call.tokens.query.shape[1]
    # Without a state every position is known to be 0.
    grid = place_on_grid(call.position, mask, length, max(request.clocks), request.state is None)
    if grid.alignment is not None:
        call = call._replace(tokens=map_tensors(grid.alignment.gather, call.tokens))
        mask = grid.alignment.valid
    if request.implementation == "triton":
        o, *banks = kernels_call.learn_on_grid(call, grid)
    else:
        o, *banks = learn_on_grid(call, grid, mask)
    if grid.alignment is not None:
        o = grid.alignment.scatter(o, len(o), length)
    elif mask is not None:
        o = o.masked_fill(~mask[:, :, None, None], 0)
    return o, *banks, grid.position


def learn_on_grid(
    call: Call, grid: ChunkGrid, mask: torch.Tensor | None
) -> tuple[torch.Tensor, Layers, Layers, Layers | None]:
    """Reads on the grid [B, S, H, Dv], and running weights, snapshot and velocities after the call."""
    layout, request = call.layout, call.request
    clocks, truncate_every = request.clocks, request.truncate_every
    batch, _, heads, width = call.tokens.key.shape
    chunk = min(clocks)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return (x if x.ndim == 4 else x[..., None]).transpose(1, 2).flatten(0, 1)

    applied = mask
    if mask is not None:
        applied = by_head(mask[:, :, None].expand(*mask.shape, heads).to(call.tokens.query.dtype))
    # A block that a cut of the gradient lies in would carry gradients of later tokens across it.
    block = math.gcd(clocks[1] // chunk, truncate_every or 0)
    block = block if layout.self_made else max(1, 512 // chunk)
    tokens = map_tensors(by_head, call.tokens)
    query, key, value, gate, rate, log_decay, momentum = tokens
    source, sequences = GivenTokens(block), (query, key, value, rate, log_decay, momentum, applied)
    if layout.self_made:
        source = GeneratedTokens(request.rule, layout, block)
        sequences = (key, value, l2_normalize(query), gate, momentum, rate, applied)
    constants = tuple(x.repeat(batch)[:, None, None] for x in call.gates)
    loop = Loop(
        BankRule(request.rule, request.read, layout),
        source,
        clocks,
        None if truncate_every is None else chunk * truncate_every,
        grid.for_heads(heads),
        call.dtype,
    )
    snapshot = None if request.state is None else call.snapshot
    banks = (call.running, call.velocity, snapshot, call.anchor)
    running, velocity, snapshot, anchor = map(layout.layers_of, banks)
    size = footprint(layout, running, chunk, width)
    segments = plan_segments(
        tokens.query.shape[1],
        chunk,
        grid.offset,
        call.checkpoint_every,
        size,
        block if layout.self_made else 1,
    )
    state, constants = (*running, *velocity, *snapshot), (*anchor, *constants)
    o, after = run_segments(loop, segments, state, constants, sequences)

    o = o.unflatten(0, (batch, heads)).transpose(1, 2)
    count = layout.layers
    running, velocity, snapshot = (layout.as_blocks(after[i * count : (i + 1) * count]) for i in range(3))
    return o, running, running if snapshot is None else snapshot, velocity
