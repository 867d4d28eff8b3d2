"""Chunked ``deep_memory`` in PyTorch: a bank of one memory that is given its targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.memory.bank import Bank, Layout
from nl_kernels.memory.chunk import BankRule, Tokens
from nl_kernels.memory.loop import Loop, State, run
from nl_kernels.memory.segments import footprint, plan_segments
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory.rows import run_on_rows
from nl_kernels.ops.deep_memory.state import DeepMemoryState


@torch.compiler.disable(
    reason="deep_memory's eager path is a loop over chunks, which a trace would unroll; "
    "without fullgraph=True it runs as it is"
)
def deep_memory_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
    operands: torch.dtype,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """As :func:`deep_memory_reference`, by chunks.

    Args:
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
        checkpoint_every: chunks between the states kept for the backward pass.
        operands: the dtype of the caller's tokens.
    """

    def compute(carried: State, constants: State, sequences: State, grid: ChunkGrid):
        linear = carried[1] is None
        layers = [x[:1] if linear else x for x in (carried[:2], carried[2:4], carried[4:], constants)]
        running = layers[0]
        layout = Layout(len(running[0]), running[-1].shape[1], False, linear)
        loop = Loop(
            BankRule(rule, read, layout),
            GivenTokens(max(1, 256 // chunk_size)),
            (chunk_size, chunk_size),
            None,
            grid,
            operands,
        )
        size = footprint(layout, running, chunk_size, sequences[1].shape[-1])
        segments = plan_segments(sequences[0].shape[1], chunk_size, grid.offset, checkpoint_every, size)
        *banks, anchors = layers
        o, after = run(loop, segments, tuple(x for bank in banks for x in bank), anchors, sequences)
        return o, tuple(x for part in after for x in (part, None)) if linear else after

    return run_on_rows(
        compute,
        q,
        k,
        v,
        rate,
        log_decay,
        momentum,
        anchor,
        state,
        anchored=rule.anchored,
        chunk_size=chunk_size,
        mask=mask,
        at_boundary=at_boundary,
    )


@dataclasses.dataclass(frozen=True)
class GivenTokens:
    """For :class:`~nl_kernels.memory.loop.Loop`: sequences are the tokens."""

    block: int

    def tokens(self, base: Bank, constants: State, sequences: State, keep: bool) -> tuple[Tokens, Any]:
        return Tokens(*sequences), None

    def tokens_adjoint(
        self, base, constants, sequences, made, d_tokens: Tokens, d_base: Bank
    ) -> tuple[State, State]:
        return d_tokens, ()
