"""What of ``self_modifying_memory`` is compiled ahead of time: its launchers' calls, planned on no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from nl_kernels.chunk_kernels.launch import precision_of
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying.launch import (
    Options,
    StepInputs,
    limits_of,
    step_options,
)
from nl_kernels.triton_support.ahead_of_time import CatalogueEntry, unallocated
from nl_kernels.triton_support.kernel_call import KernelCall


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """Every kernel at the widths models use: the calls of the launchers."""
    yield from _chunk_entries(architecture)
    yield from _step_entries(architecture)


def _step_entries(architecture: str) -> Iterator[CatalogueEntry]:
    """The one-token kernel, planned on meta tensors."""
    default, literal = MemoryRule(), MemoryRule.literal()
    for sizes in ((64, None), (128, None), (64, 64), (64, 128), (128, 128)):
        for momentum in (False, True):
            yield _step_entry(architecture, torch.bfloat16, *sizes, "running", "default", default, momentum)
    for dtype, read in ((torch.float32, "snapshot"), (torch.float16, "running")):
        for hidden in (None, 24):
            yield _step_entry(architecture, dtype, 40, hidden, read, "literal", literal, False)


def _step_entry(
    architecture: str,
    dtype: torch.dtype,
    width: int,
    hidden: int | None,
    read: str,
    name: str,
    rule: MemoryRule,
    momentum: bool,
) -> CatalogueEntry:
    from nl_kernels.ops.self_modifying.triton_step import plan_step

    inputs = step_inputs_of(2, 4, width, hidden, rule, dtype=dtype, momentum=momentum)
    options = step_options(rule, read=read, chunk_size=16, generator_chunk_size=16)
    words = [str(dtype).removeprefix("torch."), f"{width}x{hidden or 'linear'}", read, name]
    calls, _ = plan_step(inputs, options)
    return CatalogueEntry("self_modifying", " ".join(words + ["momentum"] * momentum), calls[0])


def _chunk_entries(architecture: str) -> Iterator[CatalogueEntry]:
    """The chunked kernels of both kinds of memory, with each rule and read."""
    default, literal = MemoryRule(), MemoryRule.literal()
    titans = dataclasses.replace(default, erase="none")
    gelu = MemoryRule(activation="gelu", erase="input")
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [
        (bf16, 64, None, 16, "running", "default", default),
        (bf16, 64, None, 32, "running", "default", default),
        (bf16, 128, None, 16, "running", "default", default),
        (fp32, 64, None, 16, "running", "default", default),
        (bf16, 64, None, 16, "snapshot", "literal", literal),
        (bf16, 64, None, 16, "running", "titans", titans),
        (bf16, 40, None, 10, "running", "gelu", gelu),
        (bf16, 32, None, 32, "running", "default", default),
        (bf16, 32, None, 16, "snapshot", "literal", literal),
        (bf16, 32, 32, 16, "running", "default", default),
        (bf16, 32, 32, 16, "snapshot", "literal", literal),
        (bf16, 64, 64, 16, "running", "default", default),
        (bf16, 64, 64, 16, "snapshot", "literal", literal),
        (bf16, 40, 24, 10, "running", "gelu", gelu),
    ]
    for dtype, width, hidden, chunk, read, name, rule in cases:
        _, widest = limits_of(linear=hidden is None, chunk=chunk, architecture=architecture)
        if max(width, hidden or 0) <= widest:
            words = [
                str(dtype).removeprefix("torch."),
                f"{width}x{hidden or 'linear'}",
                f"C{chunk}",
                read,
                name,
            ]
            for call in _chunk_calls(
                architecture, dtype, width, hidden, chunk, read, rule, resumed=name == "gelu"
            ):
                yield CatalogueEntry("self_modifying", " ".join(words), call)


def _chunk_calls(
    architecture: str,
    dtype: torch.dtype,
    width: int,
    hidden: int | None,
    chunk: int,
    read: str,
    rule: MemoryRule,
    *,
    resumed: bool,
) -> list[KernelCall]:
    """The forward and the backward call; a resumed one has two clocks, and sequences that lie differently."""
    from nl_kernels.ops.self_modifying.triton_backward import plan_backward
    from nl_kernels.ops.self_modifying.triton_forward import plan_forward

    tokens = 128 * chunk
    arguments = arguments_of(2, tokens, 4, width, hidden, rule, resumed=resumed, apart=resumed)
    options = Options.of(
        rule,
        read=read,
        chunk_size=chunk,
        generator_chunk_size=chunk * (2 if resumed else 1),
        truncate=0,
        checkpoint_every=16,
        precision=precision_of(dtype, architecture),
        offset=0,
        slots=tokens,
    )
    shared = {"options": options, "architecture": architecture}
    (forward,), (o, *made) = plan_forward(*arguments, **shared)
    (_, backward, *_), _ = plan_backward(o, made[:9], *arguments, *made[9:], **shared)
    return [forward, backward]


def arguments_of(
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    hidden: int | None,
    rule: MemoryRule,
    *,
    resumed: bool = False,
    apart: bool = False,
) -> list[torch.Tensor | None]:
    """The operator's tensors, on no device; with momentum by a rule that does not erase.

    ``resumed``: with a snapshot, ``apart``: sequences that lie differently.
    """

    def stack(present: bool) -> list[torch.Tensor | None]:
        return _stack(batch, heads, width, hidden) if present else [None] * 3

    has_momentum = rule.erase == "none"
    spans = unallocated(batch, 3, dtype=torch.int64) if apart else None
    momentum = unallocated(batch, tokens, heads) if has_momentum else None
    sequences = [*(unallocated(batch, tokens, heads, width) for _ in range(4)), momentum, spans]
    stacks = [*stack(rule.anchored), *stack(True), *stack(has_momentum), *stack(resumed)]
    return [*sequences, *(unallocated(heads) for _ in range(3)), *stacks]


def step_inputs_of(
    batch: int,
    heads: int,
    width: int,
    hidden: int | None,
    rule: MemoryRule,
    *,
    dtype: torch.dtype,
    momentum: bool,
    shared_anchors: bool = True,
) -> StepInputs:
    """On no device; anchors of all sequences, or of each one its own."""

    lead = (heads,) if shared_anchors else (batch, heads)

    def anchor(out: int) -> list[torch.Tensor | None]:
        outer = None if hidden is None else unallocated(*lead, out, hidden)
        return [unallocated(*lead, hidden or out, width), outer]

    return StepInputs(
        *(unallocated(batch, heads, width, dtype=dtype) for _ in range(4)),
        unallocated(batch, heads) if momentum else None,
        *(unallocated(heads) for _ in range(3)),
        *([x for out in (width, width, width, 1, 1) for x in anchor(out)] if rule.anchored else [None] * 10),
        *_stack(batch, heads, width, hidden),
        *_stack(batch, heads, width, hidden),
        *(_stack(batch, heads, width, hidden) if momentum else [None] * 3),
        unallocated(batch, dtype=torch.int64),
        unallocated(batch, dtype=torch.uint8),
    )


def _stack(batch: int, heads: int, width: int, hidden: int | None) -> list[torch.Tensor | None]:
    """Weights of the five memories: first layers, last layers of the wide ones and of the gates."""
    inner = hidden or width
    first = None if hidden is None else unallocated(batch, heads, 5, hidden, width)
    return [first, unallocated(batch, heads, 3, width, inner), unallocated(batch, heads, 2, inner)]
