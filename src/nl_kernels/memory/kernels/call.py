"""A call of an op by the kernels: what they take, and how they take it."""

from __future__ import annotations

import torch

from nl_kernels.checks import state_dtype
from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.dispatch import choose_implementation
from nl_kernels.memory.bank import Call, Layers, Layout
from nl_kernels.memory.kernels.arguments import Bank, Tokens
from nl_kernels.memory.kernels.launch import Inputs, Options, checkpoint_interval, limits_of, precision_of
from nl_kernels.memory.kernels.operator import Learn
from nl_kernels.memory.state import tensors_in, weights_in
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.triton_support.targets import architecture_of


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


def choose(
    op: str,
    impl: str | None,
    name: str,
    tokens: tuple[torch.Tensor | None, ...],
    weights: tuple,
    state: tuple | None,
    rule: MemoryRule,
    chunk: int,
) -> str:
    """The implementation of a checked call of ``op``.

    Args:
        name: of the tokens, in messages.
        tokens: of the op, the first three with widths, the last one its momentum.
        weights: of a memory that is given its targets, or of several that make them.
    """
    memory = weights if isinstance(weights, DeepMemoryWeights) else weights[0]
    device = tokens[0].device

    def refused() -> str | None:
        return unsupported(
            name,
            rule=rule,
            dtype=state_dtype(*tokens, *tensors_in(weights), *weights_in(state)),
            width=max(x.shape[-1] for x in tokens[:3]),
            hidden=None if memory.outer is None else memory.inner.shape[-2],
            chunk=chunk,
            momentum=tokens[-1] is not None,
            self_made=memory is not weights,
            architecture=architecture_of(device),
        )

    return choose_implementation(op, impl, device, unsupported=refused)


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


def learn_on_grid(
    call: Call,
    grid: ChunkGrid,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    truncate_every: int | None,
    checkpoint_every: int | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Layers, Layers, None]:
    """As :func:`nl_kernels.memory.call.learn_on_grid`, by the kernels; they have no velocity."""
    period, chunk = max(chunk_size, generator_chunk_size), min(chunk_size, generator_chunk_size)
    length = call.tokens.query.shape[1]
    spans, offset, slots = None, grid.offset, grid.offset + length
    if grid.single:
        spans, offset, slots = torch.stack([grid.begin, grid.begin, grid.stop], 1), 0, period
    elif grid.alignment is not None:
        spans = torch.stack([torch.zeros_like(grid.begin), grid.begin, grid.stop], 1)
        offset, slots = 0, length
    gates = call.gates or (None,) * 3
    banks = (bank_of(x, call.layout) for x in (call.running, call.snapshot, call.anchor))
    inputs = Inputs(Tokens(*call.tokens[:6], *gates, spans), *banks)
    architecture = architecture_of(call.tokens.query.device)
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
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.tensors):
        numbers = sum(x.numel() for x in call.running)
        options = options._replace(checkpoint_every=checkpoint_interval(options, checkpoint_every, numbers))
        o, *weights = Learn.apply(*inputs.tensors, *options)
    else:
        o, *weights = torch.ops.nl_kernels.memory_forward(*inputs.tensors, *options)
    banks = (Bank(*weights[i : i + 2]) for i in (0, 2))
    return o, *(blocks_of(x, call.layout) for x in banks), None
