"""What of a bank's kernels is compiled ahead of time: its launchers' calls, planned on no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from nl_kernels.memory.kernels.arguments import Bank, Options
from nl_kernels.memory.kernels.launch import Inputs, limits_of, plan_forward, precision_of
from nl_kernels.memory.kernels.launch_backward import plan_backward
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.kernel_call import KernelCall
from tools.catalogue.entry import CatalogueEntry, unallocated

_DEFAULT = MemoryRule()
_LITERAL = dataclasses.replace(MemoryRule.literal(), proximal=False)
_NAMED = {"default": _DEFAULT, "literal": _LITERAL, "gelu": dataclasses.replace(_DEFAULT, activation="gelu")}
_NAMED["titans"] = dataclasses.replace(_DEFAULT, erase="none")

_CASES = [
    (torch.bfloat16, 64, None, 16, "running", "default"),
    (torch.bfloat16, 64, None, 16, "snapshot", "literal"),
    (torch.bfloat16, 64, None, 32, "running", "default"),
    (torch.bfloat16, 128, None, 16, "running", "default"),
    (torch.bfloat16, 32, None, 16, "running", "default"),
    (torch.bfloat16, 64, 64, 16, "running", "default"),
    (torch.bfloat16, 64, 64, 16, "snapshot", "literal"),
    (torch.bfloat16, 64, 64, 32, "running", "default"),
    (torch.bfloat16, 128, 128, 16, "running", "default"),
    (torch.bfloat16, 32, 32, 16, "running", "default"),
    (torch.bfloat16, 64, None, 16, "running", "titans"),
    (torch.float32, 64, None, 16, "running", "default"),
    (torch.float16, 40, 24, 10, "running", "gelu"),
]


def catalogue(op: str, architecture: str, *, self_made: bool) -> Iterator[CatalogueEntry]:
    """Both passes at the widths models use, with each rule and read."""
    for dtype, width, hidden, chunk, read, name in _CASES:
        sizes = {"self_made": self_made, "linear": hidden is None, "architecture": architecture}
        if limits_of(**sizes, chunk=chunk)[1] < max(width, hidden or 0):
            continue
        inputs = inputs_of(
            2,
            128 * chunk,
            4,
            width,
            hidden,
            _NAMED[name],
            self_made=self_made,
            dtype=dtype,
            apart=name == "gelu",
        )
        options = options_of(dtype, _NAMED[name], chunk, 128 * chunk, architecture, read=read)
        words = f"{str(dtype).removeprefix('torch.')} {width}x{hidden or 'linear'} C{chunk} {read} {name}"
        forward, _, backward = calls_of(inputs, options)[:3]
        for call in (forward, backward):
            yield CatalogueEntry(op, words, call)


def options_of(
    dtype: torch.dtype,
    rule: MemoryRule,
    chunk: int,
    slots: int,
    architecture: str,
    *,
    read: str,
    offset: int = 0,
) -> Options:
    """Those of a call with a backward pass that keeps few states, and one clock."""
    return Options.of(
        rule,
        read=read,
        chunk_size=chunk,
        generator_chunk_size=chunk,
        truncate=0,
        checkpoint_every=16,
        precision=precision_of(dtype, architecture),
        offset=offset,
        slots=slots,
        architecture=architecture,
    )


def inputs_of(
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    hidden: int | None,
    rule: MemoryRule,
    *,
    self_made: bool,
    dtype: torch.dtype,
    apart: bool = False,
) -> Inputs:
    """A call's tensors on no device; ``apart``: sequences that lie differently."""
    token = [unallocated(batch, tokens, heads, width, dtype=dtype) for _ in range(4 if self_made else 3)]
    if self_made:
        scale = unallocated(batch, tokens, heads) if hidden is None else None
        given = [*token, scale, None, *(unallocated(heads) for _ in range(3))]
    else:
        rates = [unallocated(batch, tokens, heads, dtype=dtype) for _ in range(2)]
        given = [*token, None, *rates, *[None] * 3]
    memories, outputs = (5, 3 * width + 2) if self_made else (1, width)
    banks = batch * heads
    first = None if hidden is None else unallocated(banks, memories * hidden, width)
    bank = first, unallocated(banks, outputs, hidden or width)
    spans = unallocated(batch, 3, dtype=torch.int64) if apart else None
    anchor = bank if rule.anchored else (None, None)
    return Inputs.of((*given, spans, *bank, *bank, *anchor))


def calls_of(inputs: Inputs, options: Options) -> list[KernelCall]:
    """The calls of both passes, the last segment of the backward pass first."""
    calls, (o, first, last, first_snapshot, last_snapshot, *kept) = plan_forward(inputs, options)
    back = plan_backward(
        o, Bank(first, last), Bank(first_snapshot, last_snapshot), inputs, Bank(*kept), options
    )
    return [*calls, *(item for item in back if isinstance(item, KernelCall))]
