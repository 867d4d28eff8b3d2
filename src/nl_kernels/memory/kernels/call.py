"""A call of an op by the kernels: what they take, and how they take it."""

from __future__ import annotations

from typing import Any

import torch

from nl_kernels.checks import state_dtype
from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.dispatch import choose_implementation
from nl_kernels.memory.bank import Call, Layers, Layout
from nl_kernels.memory.kernels.arguments import Bank, Options, Tokens
from nl_kernels.memory.kernels.launch import Inputs, checkpoint_interval, limits_of, precision_of
from nl_kernels.memory.kernels.operator import Learn
from nl_kernels.memory.state import tensors_in, weights_in
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.triton_support.targets import architecture_of


def unsupported(
    name: str,
    tokens: tuple[torch.Tensor | None, ...],
    weights: tuple,
    state: tuple | None,
    rule: MemoryRule,
    chunk: int,
) -> str | None:
    """Why the kernels do not take a checked call, naming the argument and the limit; ``None`` if they do.

    Args:
        name: of the tokens, in messages.
        tokens: of the op, the first three with widths, the last one its momentum.
        weights: of a memory that is given its targets, or of several that make them.
        chunk: tokens of a chunk, of the faster clock.
    """
    if state_dtype(*tokens, *tensors_in(weights), *weights_in(state)) == torch.float64:
        return f"{name}: the Triton kernels take bfloat16, float16 and float32, got float64"
    if tokens[-1] is not None:
        return "momentum: the Triton kernels have none"
    if rule.erase == "input":
        return "rule.erase: the Triton kernels take 'per_layer' and 'none', got 'input'"
    if rule.proximal and rule.erase != "none":
        return "rule.proximal: the Triton kernels take η as the rate alone"
    memory = weights if isinstance(weights, DeepMemoryWeights) else weights[0]
    linear, architecture = memory.outer is None, architecture_of(tokens[0].device)
    kind = "linear" if linear else "two-layer"
    longest, widest = limits_of(
        self_made=memory is not weights, linear=linear, chunk=chunk, architecture=architecture
    )
    if not widest:
        return (
            f"chunk_size: on {architecture} the Triton kernels of {kind} memories take chunks up to "
            f"{longest}, got {chunk}"
        )
    width, hidden = max(x.shape[-1] for x in tokens[:3]), 0 if linear else memory.inner.shape[-2]
    for argument, what, size in ((name, "heads", width), ("weights", "hidden layers", hidden)):
        if size > widest:
            return (
                f"{argument}: on {architecture} with chunks of {chunk} the Triton kernels take "
                f"{what} of {kind} memories up to {widest} wide, got {size}"
            )
    return None


def choose(op: str, impl: str | None, *call: Any) -> str:
    """The implementation of a checked call of ``op``; ``call`` is what :func:`unsupported` takes."""
    return choose_implementation(op, impl, call[1][0].device, unsupported=lambda: unsupported(*call))


def bank_of(blocks: Layers | None, layout: Layout) -> Bank:
    """Blocks of :class:`~nl_kernels.memory.bank.Layout` as the kernels have them."""
    if blocks is None:
        return Bank(None, None)
    rows = [x.flatten(1, 2) for x in blocks]
    first = None if layout.linear else rows.pop(0)
    return Bank(first, torch.cat(rows, 1) if layout.self_made else rows[0])


def blocks_of(bank: Bank, layout: Layout) -> Layers:
    """The inverse of :func:`bank_of`, views."""
    first = () if layout.linear else (bank.first.unflatten(1, (layout.memories, -1)),)
    return (*first, *layout.rows_by_memory(bank.last))


def learn_on_grid(call: Call, grid: ChunkGrid) -> tuple[torch.Tensor, Layers, Layers, None]:
    """As :func:`nl_kernels.memory.call.learn_on_grid`, by the kernels; they have no velocity."""
    request, length = call.request, call.tokens.query.shape[1]
    spans, offset, slots = None, grid.offset, grid.offset + length
    if grid.single:
        spans, offset, slots = torch.stack([grid.begin, grid.begin, grid.stop], 1), 0, max(request.clocks)
    elif grid.alignment is not None:
        spans = torch.stack([torch.zeros_like(grid.begin), grid.begin, grid.stop], 1)
        offset, slots = 0, length
    gates = call.gates or (None,) * 3
    banks = (bank_of(x, call.layout) for x in (call.running, call.snapshot, call.anchor))
    inputs = Inputs(Tokens(*call.tokens[:6], *gates, spans), *banks)
    architecture = architecture_of(call.tokens.query.device)
    options = Options.of(
        request.rule,
        read=request.read,
        chunk_size=request.clocks[0],
        generator_chunk_size=request.clocks[1],
        truncate=min(request.clocks) * (request.truncate_every or 0),
        checkpoint_every=0,
        precision=precision_of(call.dtype, architecture),
        offset=offset,
        slots=slots,
        architecture=architecture,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.tensors):
        numbers = sum(x.numel() for x in call.running)
        every = checkpoint_interval(options, call.checkpoint_every, numbers)
        options = options._replace(checkpoint_every=every)
        o, *weights = Learn.apply(*inputs.tensors, *options)
    else:
        o, *weights = torch.ops.nl_kernels.memory_forward(*inputs.tensors, *options)
    banks = (Bank(*weights[i : i + 2]) for i in (0, 2))
    return o, *(blocks_of(x, call.layout) for x in banks), None
