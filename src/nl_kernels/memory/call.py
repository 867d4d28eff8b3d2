"""A call of an op: its tokens on the grid of chunks, by the torch engine or by the kernels, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nl_kernels.checks import has_readable_data, state_dtype
from nl_kernels.chunk_alignment import ChunkGrid, place_on_grid
from nl_kernels.dispatch import compiler_at_work, needs_gradient, without_autocast
from nl_kernels.memory.bank import Bank, Call, Layout, Sequences
from nl_kernels.memory.chunk import BankRule
from nl_kernels.memory.generate import GeneratedTokens, GivenTokens
from nl_kernels.memory.kernels import call as kernels_call
from nl_kernels.memory.loop import Loop, run_segments
from nl_kernels.memory.segments import footprint, plan_segments
from nl_kernels.memory.state import (
    beginning,
    cast,
    map_tensors,
    tensors_in,
    weights_in,
)
from nl_kernels.memory_checks import (
    by_sequence,
    check_step_dtype,
    one_token,
    per_sequence,
)
from nl_kernels.memory_rule import MemoryRule, l2_normalize
from nl_kernels.zero_gradients import with_zero_gradients


class Op(NamedTuple):
    """What the two ops of chunked memories do in their own way.

    Attributes:
        state: the named tuple of its states.
        weights: what a state has of initial weights [B, H, ..]. bank_of, weights_of: that as a
            :class:`~nl_kernels.memory.bank.Bank`, and of a bank and B back.
        given: which of the tokens of :class:`~nl_kernels.memory.bank.Sequences` the reference takes.
    """

    state: type
    weights: Callable
    bank_of: Callable
    weights_of: Callable
    given: tuple[int, ...]


def run(
    op: Op,
    implementation: str,
    tokens: list[torch.Tensor | None],
    momentum: torch.Tensor | None,
    parameters: dict[str, torch.Tensor],
    weights: tuple,
    initial_state: tuple | None,
    *,
    reference: Callable,
    rule: MemoryRule,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, tuple]:
    """Reads [B, T, H, Dv] in the dtype of the queries, and the final state, of checked arguments.

    Args:
        tokens: query, key, value, gate, rate and log decay of :class:`~nl_kernels.memory.bank.Sequences`.
        parameters: by head, of memories that make their own gates.
        weights: the op's initial ones, shared or by sequence.
        reference: the op's definition, of tokens, momentum, anchor, state, mask and ``parameters``.
        options: of :func:`learn_on_grid`.
    """
    dtype, leaves = tokens[0].dtype, tensors_in(weights)
    operands = functools.reduce(torch.promote_types, (x.dtype for x in tokens[:3]))
    length, inputs = tokens[0].shape[1], [*tokens, momentum]
    batch = tokens[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    inner = state_dtype(*inputs, *leaves, *weights_in(initial_state))
    if implementation != "triton":  # the kernels take 16-bit tokens as they are
        inputs = [None if x is None else x.to(inner) for x in inputs]
    parameters = {name: x.to(inner) for name, x in parameters.items()}
    tied = leaves if initial_state is not None and not rule.anchored else ()
    if implementation == "reference":  # its loop leaves out what the last tokens would write
        tied = [*inputs[1:], *parameters.values(), *leaves]
    inputs[0] = with_zero_gradients(inputs[0], tied)
    inputs, mask, alignment = by_sequence(inputs, mask, cu_seqlens)

    initial = op.weights(map_tensors(lambda w: per_sequence(w, batch, inner), weights))
    anchor = initial if rule.anchored else map_tensors(torch.zeros_like, initial)
    if initial_state is None:
        state = beginning(op.state, initial, rule.anchored, batch, momentum is not None)
    else:
        state = cast(initial_state, inner)
    # Autocast would round the products, and with them the state, to half precision.
    with without_autocast(tokens[0].device.type):
        if implementation == "reference":
            given = [inputs[i] for i in op.given]
            o, final = reference(*given, inputs[-1], anchor, state, mask=mask, **parameters)
        else:
            banks = (state.running, state.snapshot, anchor if rule.anchored else None, state.momentum)
            banks = [Bank(None, None) if x is None else op.bank_of(x) for x in banks]
            gates = tuple(parameters.values()) or (None,) * 3
            call = Call(Sequences(*inputs), gates, *banks, state.position)
            options |= {"rule": rule, "at_boundary": initial_state is None, "dtype": operands}
            learn_here = learn
            if implementation == "eager" and compiler_at_work():
                from nl_kernels.untraced import learn as learn_here
            o, *banks, position = learn_here(call, implementation, mask=mask, **options)
            banks = (None if x is None else op.weights_of(x, batch) for x in banks)
            running, snapshot, velocity = banks
            final = op.state(snapshot, running, position, velocity)
    if alignment is not None:
        o = alignment.scatter(o, 1, length)
    return o.to(dtype), final


def run_step(
    implementation: str,
    tensors: tuple[torch.Tensor | None, ...],
    leaves: tuple,
    state: tuple,
    *,
    mask: torch.Tensor | None,
    inplace: bool,
    op: Callable,
    eager_step: Callable,
) -> tuple[torch.Tensor, tuple]:
    """One token of an op, of checked arguments: by the op itself where gradients are needed, or by kernels.

    Args:
        tensors: the op's, of the token, and the momentum.
        leaves: tensors, in nested tuples, of which gradients may be needed, too.
        op: of tokens; eager_step: of tensors, all other arguments bound.
    """
    differentiable = implementation == "reference" or needs_gradient(*tensors)
    if torch.is_grad_enabled():
        differentiable = differentiable or needs_gradient(*tensors_in(leaves))
    if differentiable or implementation == "triton":
        if inplace and differentiable:
            raise ValueError("inplace: not where gradients are needed, nor with impl='reference'")
        (*tokens, momentum), mask = one_token(tensors, mask)
        o, after = op(*tokens, momentum=momentum, mask=mask, initial_state=state, output_final_state=True)
        return o.squeeze(1), map_tensors(torch.Tensor.copy_, state, after) if inplace else after
    check_step_dtype(state, tensors, leaves)
    if mask is not None and mask.device.type == "cpu" and has_readable_data(mask) and bool(mask.all()):
        mask = None
    with without_autocast(tensors[0].device.type):
        o, state = eager_step(*tensors, state=state, mask=mask, inplace=inplace)
    return o.to(tensors[0].dtype), state


def learn(
    call: Call,
    implementation: str,
    *,
    chunk_size: int,
    generator_chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
    **options: Any,
) -> tuple[torch.Tensor, Bank, Bank, Bank | None, torch.Tensor]:
    """Reads [B, T, H, Dv], running weights, snapshot and velocities after the call, and positions."""
    period = max(chunk_size, generator_chunk_size)
    length = call.tokens.query.shape[1]
    grid = place_on_grid(call.position, mask, length, period, at_boundary)
    if grid.alignment is not None:
        call = call._replace(tokens=map_tensors(grid.alignment.gather, call.tokens))
        mask = grid.alignment.valid
    options |= {"chunk_size": chunk_size, "generator_chunk_size": generator_chunk_size}
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
) -> tuple[torch.Tensor, Bank, Bank, Bank | None]:
    """Reads on the grid [B, S, H, Dv], and running weights, snapshot and velocities after the call.

    Args:
        grid: where the call's tokens lie.
        at_boundary: every position is known to be 0 (spares reading them).
        checkpoint_every: chunks between the states kept for the backward pass.
        dtype: of the caller's tokens: it sets the precision of products.
    """
    query, key, value, gate, *numbers = call.tokens
    batch, _, heads, _ = query.shape
    chunk = min(chunk_size, generator_chunk_size)
    self_made = gate is not None
    rate, log_decay, momentum = (None if x is None else x[..., None] for x in numbers)
    if self_made:
        sequences = (key, value, l2_normalize(query), gate, momentum, rate)
    else:
        sequences = (query, key, value, rate, log_decay, momentum)
    applied = mask
    if applied is not None:
        applied = applied[:, :, None, None].expand(*applied.shape, heads, 1).to(query.dtype)
    sequences = tuple(None if x is None else x.transpose(1, 2).flatten(0, 1) for x in (*sequences, applied))

    layout = Layout(batch * heads, value.shape[-1], self_made, call.running.first is None)
    snapshot = Bank(None, None) if at_boundary else call.snapshot
    running, velocity, snapshot, anchor = (
        layout.layers_of(bank) for bank in (call.running, call.velocity, snapshot, call.anchor)
    )
    source, constants = GivenTokens(max(1, 512 // chunk_size)), ()
    if self_made:
        rate_max, *biases = call.gates
        biases = torch.stack(biases, -1).repeat(batch, 1)[:, None]
        constants = (rate_max.repeat(batch)[:, None, None], biases)
        # A block that a cut of the gradient lies in would carry gradients of later tokens across it.
        block = math.gcd(generator_chunk_size // chunk, truncate_every or 0)
        source = GeneratedTokens(rule, layout, block)
    loop = Loop(
        BankRule(rule, read, layout),
        source,
        (chunk_size, generator_chunk_size),
        None if truncate_every is None else chunk * truncate_every,
        grid.for_heads(heads),
        dtype,
    )
    size = footprint(layout, running, chunk, key.shape[-1])
    block = source.block if self_made else 1
    segments = plan_segments(sequences[0].shape[1], chunk, grid.offset, checkpoint_every, size, block)
    banks = (*running, *velocity, *snapshot)
    o, after = run_segments(loop, segments, banks, (*anchor, *constants), sequences)

    o = o.unflatten(0, (batch, heads)).transpose(1, 2)
    count = layout.layers
    running, velocity, snapshot = (layout.bank_of(after[i * count : (i + 1) * count]) for i in range(3))
    return o, running, running if snapshot is None else snapshot, velocity
