"""What of ``deep_memory`` is compiled ahead of time: its launchers' calls, planned on no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from nl_kernels.chunk_kernels.launch import precision_of
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.deep_memory.launch import Inputs, Options, StepInputs, widest
from nl_kernels.triton_support.ahead_of_time import CatalogueEntry, unallocated

ROWS = 8


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """Both kernels at the widths models use, with each rule and read: the calls of the launchers."""
    default, literal = MemoryRule(), MemoryRule.literal()
    titans = dataclasses.replace(literal, erase="none", proximal=False)
    for width, hidden, chunk in ((64, 64, 16), (64, 128, 16), (64, 64, 64), (128, 128, 16)):
        if widest(chunk, architecture) >= max(width, hidden):
            for read in ("snapshot", "running"):
                sizes = (width, hidden, chunk)
                yield from _entries(architecture, torch.bfloat16, *sizes, read, "default", default)
    for dim, chunk in ((64, 16), (64, 64), (128, 16)):
        if widest(chunk, architecture) >= dim:
            yield from _entries(architecture, torch.bfloat16, dim, None, chunk, "running", "default", default)
    for hidden in (64, None):
        sizes = (64, hidden, 16)
        yield from _entries(architecture, torch.float32, *sizes, "running", "default", default)
        yield from _entries(architecture, torch.bfloat16, *sizes, "snapshot", "literal", literal)
        yield from _entries(architecture, torch.bfloat16, *sizes, "running", "titans", titans, momentum=True)
    for sizes in ((64, 64), (64, 256), (128, 128), (64, None), (128, None)):
        for momentum in (False, True):
            yield _step_entry(architecture, torch.bfloat16, *sizes, "running", "default", default, momentum)
    for dtype, read in ((torch.float32, "snapshot"), (torch.float16, "running")):
        yield _step_entry(architecture, dtype, 40, 24, read, "literal", literal, False)
    gelu = MemoryRule(activation="gelu", erase="input")
    yield from _entries(architecture, torch.bfloat16, 40, 24, 10, "snapshot", "gelu input", gelu)


def _entries(
    architecture: str,
    dtype: torch.dtype,
    width: int,
    hidden: int | None,
    chunk_size: int,
    read: str,
    name: str,
    rule: MemoryRule,
    *,
    momentum: bool = False,
) -> Iterator[CatalogueEntry]:
    from nl_kernels.ops.deep_memory.triton_backward import plan_backward
    from nl_kernels.ops.deep_memory.triton_forward import plan_forward

    options = Options.of(
        rule,
        offset=0,
        chunk_size=chunk_size,
        read=read,
        checkpoint_every=4,
        precision=precision_of(dtype, architecture),
    )
    inputs = inputs_of(ROWS, 1024, width, hidden, rule, momentum=momentum)
    words = f"{str(dtype).removeprefix('torch.')} {width}x{hidden or 'linear'} C{chunk_size} {read} {name}"
    forward, results = plan_forward(inputs, options, keep=True)
    backward, _ = plan_backward(results.o, results[1:5], results[5:7], inputs, results[7:], options)
    for call in (*forward, backward[-1]):
        yield CatalogueEntry("deep_memory", words, call)


def inputs_of(
    rows: int,
    tokens: int,
    width: int,
    hidden: int | None,
    rule: MemoryRule,
    *,
    momentum: bool,
    resumed: bool = False,
    apart: bool = False,
) -> Inputs:
    """On no device; ``resumed``: with a snapshot, ``apart``: rows that lie differently."""
    inner = unallocated(rows, hidden or width, width)
    outer = None if hidden is None else unallocated(rows, width, hidden)
    layers, none = (inner, outer), (None, None)
    slots = [unallocated(rows, dtype=torch.int64)] * 2 if apart else none
    return Inputs(
        *(unallocated(rows, tokens, width) for _ in range(3)),
        *(unallocated(rows, tokens) for _ in range(2)),
        unallocated(rows, tokens) if momentum else None,
        *layers,
        *(layers if momentum else none),
        *(layers if resumed else none),
        *(layers if rule.anchored else none),
        *slots,
        None,
    )


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

    def layers(*lead: int) -> list[torch.Tensor | None]:
        outer = None if hidden is None else unallocated(*lead, width, hidden)
        return [unallocated(*lead, hidden or width, width), outer]

    anchors = layers(heads) if shared_anchors else layers(batch, heads)
    return StepInputs(
        *(unallocated(batch, heads, width, dtype=dtype) for _ in range(3)),
        *(unallocated(batch, heads) for _ in range(2)),
        unallocated(batch, heads) if momentum else None,
        *(anchors if rule.anchored else (None, None)),
        *layers(batch, heads),
        *layers(batch, heads),
        *(layers(batch, heads) if momentum else (None, None)),
        unallocated(batch, dtype=torch.int64),
        unallocated(batch, dtype=torch.uint8),
    )


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
    from nl_kernels.ops.deep_memory.triton_step import plan_step

    inputs = step_inputs_of(2, 4, width, hidden, rule, dtype=dtype, momentum=momentum)
    options = Options.of(rule, offset=0, chunk_size=16, read=read, checkpoint_every=None, precision="ieee")
    words = [str(dtype).removeprefix("torch."), f"{width}x{hidden or 'linear'}", read, name]
    calls, _ = plan_step(inputs, options)
    return CatalogueEntry("deep_memory", " ".join(words + ["momentum"] * momentum), calls[0])
