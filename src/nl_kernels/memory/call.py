"""A call of an op: its tokens on the grid of chunks, by the torch engine or by the kernels, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from nl_kernels.chunk_alignment import ChunkGrid, place_on_grid
from nl_kernels.memory.bank import Bank, Call, Layers, Layout
from nl_kernels.memory.chunk import BankRule, Tokens
from nl_kernels.memory.generate import GeneratedTokens
from nl_kernels.memory.kernels import call as kernels_call
from nl_kernels.memory.loop import Loop, run_segments
from nl_kernels.memory.segments import State, footprint, plan_segments
from nl_kernels.memory_rule import MemoryRule, l2_normalize


def learn_tokens(
    implementation: str,
    tokens: tuple,
    momentum: torch.Tensor | None,
    state: tuple,
    anchor: tuple | None,
    conversions: tuple[Callable, Callable],
    **options: Any,
) -> tuple[torch.Tensor, tuple]:
    """Reads [B, T, H, Dv] and the state of an op after its tokens, by the engine or the kernels.

    Args:
        implementation: "eager" or "triton".
        tokens: the first fields of :class:`~nl_kernels.memory.bank.Call`.
        state: the op's, before the tokens. anchor: weights [B, H, ..] of a rule that has one.
        conversions: of the op's weights to a bank, and of a bank and B back.
        options: of :func:`learn_on_grid`.
    """
    bank_of, weights_of = conversions
    banks = (state.running, state.snapshot, anchor, state.momentum)
    running, snapshot, anchor, velocity = (Bank(None, None) if x is None else bank_of(x) for x in banks)
    call = Call(*tokens, running, snapshot, anchor, state.position, momentum, velocity)
    if implementation == "triton":
        o, *banks, position = _run(call, kernels_call.learn_on_grid, **options)
    else:
        places = {name: options[name] for name in ("mask", "at_boundary")}
        o, *banks, position = _run_eager(call, functools.partial(learn_on_grid, **places), **options)
    batch = len(position)
    running, snapshot, velocity = (None if x is None else weights_of(x, batch) for x in banks)
    return o, type(state)(snapshot, running, position, velocity)


def _run(
    call: Call,
    on_grid: Callable,
    *,
    chunk_size: int,
    generator_chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
    **options: Any,
) -> tuple[torch.Tensor, Bank, Bank, Bank | None, torch.Tensor]:
    """What ``on_grid`` makes of the call, with reads [B, T, H, Dv]; and the positions after it."""
    period = max(chunk_size, generator_chunk_size)
    length = call.query.shape[1]
    grid = place_on_grid(call.position, mask, length, period, at_boundary)
    clocks = {"chunk_size": chunk_size, "generator_chunk_size": generator_chunk_size}
    o, *banks = on_grid(call, grid, **clocks, **options)
    if grid.alignment is not None:
        o = grid.alignment.scatter(o, len(o), length)
    elif mask is not None:
        o = o.masked_fill(~mask[:, :, None, None], 0)
    return o, *banks, grid.position


_run_eager = torch.compiler.disable(
    _run,
    reason="the eager path of a chunked memory is a loop over chunks, which a trace would unroll; "
    "without fullgraph=True it runs as it is",
)


@dataclasses.dataclass(frozen=True)
class GivenTokens:
    """For :class:`~nl_kernels.memory.loop.Loop`: sequences are the tokens."""

    block: int

    def tokens(self, base: Layers, constants: State, sequences: State, keep: bool) -> tuple[Tokens, Any]:
        return Tokens(*sequences), None

    def tokens_adjoint(
        self, base, constants, sequences, made, d_tokens: Tokens, d_base: Layers
    ) -> tuple[State, State]:
        return d_tokens, ()


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
    batch, _, heads, _ = call.query.shape
    chunk = min(chunk_size, generator_chunk_size)
    self_made = call.gate is not None
    gates = (call.rate, call.log_decay, call.momentum)
    rate, log_decay, momentum = (None if x is None else x[..., None] for x in gates)
    if self_made:
        sequences = (call.key, call.value, l2_normalize(call.query), call.gate, momentum)
    else:
        sequences = (call.query, call.key, call.value, rate, log_decay, momentum)
    applied = mask
    if grid.alignment is not None:
        sequences = [None if x is None else grid.alignment.gather(x) for x in sequences]
        applied = grid.alignment.valid
    if applied is not None:
        applied = applied[:, :, None, None].expand(*applied.shape, heads, 1).to(call.query.dtype)
    sequences = tuple(None if x is None else x.transpose(1, 2).flatten(0, 1) for x in (*sequences, applied))

    layout = Layout(batch * heads, call.value.shape[-1], self_made, call.running.first is None)
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
    size = footprint(layout, running, chunk, call.key.shape[-1])
    block = source.block if self_made else 1
    segments = plan_segments(sequences[0].shape[1], chunk, grid.offset, checkpoint_every, size, block)
    banks = (*running, *velocity, *snapshot)
    o, after = run_segments(loop, segments, banks, (*anchor, *constants), sequences)

    o = o.unflatten(0, (batch, heads)).transpose(1, 2)
    count = layout.layers
    running, velocity, snapshot = (layout.bank_of(after[i * count : (i + 1) * count]) for i in range(3))
    return o, running, running if snapshot is None else snapshot, velocity
