"""A call of an op by the kernels: what they take, its tokens on the grid of chunks, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.chunk_alignment import place_on_grid
from nl_kernels.memory.kernels.arguments import Bank
from nl_kernels.memory.kernels.launch import Inputs, Options, checkpoint_interval, limits_of
from nl_kernels.memory.kernels.operator import learn
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.targets import architecture_of, precision_of


def unsupported(
    name: str,
    *,
    rule: MemoryRule,
    dtype: torch.dtype,
    width: int,
    hidden: int | None,
    chunk: int,
    momentum: bool,
    self_made: bool,
    architecture: str,
) -> str | None:
    """Why the kernels do not take a call, naming the argument and the limit; ``None`` if they do.

    Args:
        name: of the tokens, in messages.
        width: the widest of keys and values.
        self_made: memories that make their own keys and targets.
    """
    if dtype == torch.float64:
        return f"{name}: the Triton kernels take bfloat16, float16 and float32, got float64"
    if momentum:
        return "momentum: the Triton kernels have none"
    if rule.erase == "input":
        return "rule.erase: the Triton kernels take 'per_layer' and 'none', got 'input'"
    if rule.proximal and rule.erase != "none":
        return "rule.proximal: the Triton kernels take η as the rate alone"
    if self_made and not (rule.projection_residual and rule.target_residual):
        return "rule: the Triton kernels have projection_residual and target_residual always"
    longest, widest = limits_of(
        self_made=self_made, linear=hidden is None, chunk=chunk, architecture=architecture
    )
    kind = "linear" if hidden is None else "two-layer"
    if not widest:
        return (
            f"chunk_size: on {architecture} the Triton kernels of {kind} memories take chunks up to "
            f"{longest}, got {chunk}"
        )
    for argument, size in ((name, width), ("weights", hidden or 1)):
        if size > widest:
            what = "hidden layers" if argument == "weights" else "heads"
            return (
                f"{argument}: on {architecture} with chunks of {chunk} the Triton kernels take "
                f"{what} of {kind} memories up to {widest} wide, got {size}"
            )
    return None


class Call(NamedTuple):
    """A call of an op: its tokens [B, T, H, ..] and the banks of N = B · H heads.

    Attributes:
        query, key, value, gate, rate, log_decay: of :class:`~nl_kernels.memory.kernels.arguments.Tokens`.
        gates: largest rate and both biases [H], ``None`` where rates are given.
        running, snapshot, anchor: banks; no anchor for a rule that has none.
        position: [B], tokens since each sequence's last boundary.
        momentum: [B, T, H], and velocity, a bank; the kernels have none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None
    rate: torch.Tensor | None
    log_decay: torch.Tensor | None
    gates: tuple[torch.Tensor | None, ...]
    running: Bank
    snapshot: Bank
    anchor: Bank
    position: torch.Tensor
    momentum: torch.Tensor | None = None
    velocity: Bank = Bank(None, None)


def run(
    call: Call,
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
) -> tuple[torch.Tensor, Bank, Bank, None, torch.Tensor]:
    """Reads [B, T, H, Dv], the running weights and the snapshot after the call, no velocity, and positions.

    Args:
        at_boundary: every position is known to be 0 (spares reading them).
        dtype: of the caller's tokens: it sets the precision of products.
    """
    length = call.query.shape[1]
    period, chunk = max(chunk_size, generator_chunk_size), min(chunk_size, generator_chunk_size)
    grid = place_on_grid(call.position, mask, length, period, at_boundary)
    tokens = call[:6]
    spans, offset, slots = None, grid.offset, grid.offset + length
    if grid.single:
        spans, offset, slots = torch.stack([grid.begin, grid.begin, grid.stop], 1), 0, period
    elif grid.alignment is not None:
        tokens = [None if x is None else grid.alignment.gather(x) for x in tokens]
        spans = torch.stack([torch.zeros_like(grid.begin), grid.begin, grid.stop], 1)
        offset, slots = 0, tokens[0].shape[1]
    inputs = Inputs(*tokens, *call.gates, spans, *call.running, *call.snapshot, *call.anchor)
    architecture = architecture_of(call.query.device)
    options = Options.of(
        rule,
        read=read,
        chunk_size=chunk_size,
        generator_chunk_size=generator_chunk_size,
        truncate=0 if truncate_every is None else chunk * truncate_every,
        checkpoint_every=0,
        precision=precision_of(dtype, architecture),
        offset=offset,
        slots=slots,
        architecture=architecture,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        numbers = sum(x.numel() for x in call.running if x is not None)
        options = options._replace(checkpoint_every=checkpoint_interval(options, checkpoint_every, numbers))
    o, running, snapshot = learn(inputs, options)
    if grid.alignment is not None:
        o = grid.alignment.scatter(o, len(o), length)
    elif mask is not None:
        o = o.masked_fill(~mask[:, :, None, None], 0)
    return o, running, snapshot, None, grid.position
