"""What kernels take beside what the compiled code predicts: ``python -m benchmarks.model_factor``.

A prediction is a floor, the longer of two times. One is that of the bytes of the call's tensors, each once,
at the copy bandwidth measured here. The other is that of issuing instructions, one a cycle on each of four
schedulers of a multiprocessor; how many a kernel executes is of docs/compiled_kernels.md, counted without a
GPU at a small call of one head, and taken in proportion to tokens and heads. A kernel's factor is the time
measured over the prediction: about the same factor everywhere says that predictions order kernels rightly, a
large one which kernel waits for something else. On a CPU rows have no time, and the floor of its own copies.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch.utils._pytree import tree_leaves, tree_map

import nl_kernels
from benchmarks.harness import environment
from benchmarks.measure import measure_ceilings
from benchmarks.run import Device, append_rows
from nl_kernels.dispatch import kernels_planned
from nl_kernels.triton_support import kernel_call
from nl_kernels.triton_support.kernel_call import KernelCall
from tools.environment import ROOT
from tools.op_inputs import delta_memory_inputs, self_modifying_inputs

_SCHEDULERS = 4  # of a multiprocessor
_ASSUMED = {"multi_processor_count": 132, "clock_rate": 1_755_000}  # of an H200, kHz, where torch has none
_REPEATS = 5

_BF16 = {"dtype": torch.bfloat16}


def counted_instructions() -> dict[tuple[str, str], int]:
    """What all warps of a program execute, in bf16, by op and kernel."""
    bf16 = (ROOT / "docs/compiled_kernels.md").read_text().split("### bf16")[1].split("\n### ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (\w+) \|.*\| ([\d,]+) \|$", bf16, re.MULTILINE)
    return {(op, kernel): int(count.replace(",", "")) for op, kernel, count in rows}


def _delta_memory(tokens: int, heads: int, device: torch.device) -> Callable[[], object]:
    return _work(nl_kernels.delta_memory, delta_memory_inputs(1, tokens, heads, 64, **_BF16), device)


def _self_modifying(tokens: int, heads: int, device: torch.device) -> Callable[[], object]:
    made = self_modifying_inputs(1, tokens, heads, 64, None, outer_scale=0.1, **_BF16)
    return _work(functools.partial(nl_kernels.self_modifying_memory, chunk_size=16), made, device)


def _work(op: Callable, inputs: dict, device: torch.device) -> Callable[[], object]:
    """Forward and backward of ``op``."""
    inputs = tree_map(lambda x: x if x is None else x.to(device).requires_grad_(), inputs)
    return lambda: op(**inputs)[0].float().square().sum().backward()


# The op as docs/compiled_kernels.md calls it, the tokens of its call there, and the same call at any size.
_CASES = {
    "delta_memory, 64 wide": (128, _delta_memory),
    "self_modifying, linear, 64 wide": (32, _self_modifying),
}


def launches_of(work: Callable[[], object]) -> list[KernelCall]:
    """What ``work`` would launch; nothing is, so its results are of no use."""
    found: list[KernelCall] = []
    with (
        kernels_planned(),
        patch.object(kernel_call, "planning", lambda: False),
        patch.object(KernelCall, "run", lambda call: found.append(call)),
    ):
        work()
    return found


def seconds_of(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that each kernel takes in ``work`` on CUDA, the least of some runs."""
    run = KernelCall.run
    best: dict[str, float] = {}
    for _ in range(_REPEATS + 1):
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

        def timed(call: KernelCall, marks: list = marks) -> None:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run(call)
            ended.record()
            marks.append((_name(call), began, ended))

        with patch.object(KernelCall, "run", timed):
            work()
        torch.cuda.synchronize()
        taken: Counter[str] = Counter()
        for name, began, ended in marks:
            taken[name] += began.elapsed_time(ended) / 1e3
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in taken.items()}
    return best


def rows_of(op: str, tokens: int, heads: int, device: torch.device, copy: float) -> Iterator[dict[str, Any]]:
    """A row a kernel of ``op``: its floor at ``copy`` bytes a second, and on CUDA what it takes."""
    counted_tokens, make = _CASES[op]
    counts = counted_instructions()
    counted = launches_of(make(counted_tokens, 1, torch.device("cpu")))
    work = make(tokens, heads, device)
    measured = seconds_of(work) if device.type == "cuda" else {}
    launched = launches_of(work)
    properties = torch.cuda.get_device_properties(device) if measured else None
    multiprocessors, clock = (getattr(properties, name, value) for name, value in _ASSUMED.items())
    for name in dict.fromkeys(map(_name, launched)):
        mine = [call for call in launched if _name(call) == name]
        programs = sum(math.prod(call.grid) for call in counted if _name(call) == name)
        instructions = counts[op, name] * programs * tokens * heads / counted_tokens
        moved = sum(_bytes(call) for call in mine)
        floors = {
            "bytes_s": moved / copy,
            "issue_s": instructions / (multiprocessors * _SCHEDULERS * clock * 1e3),
        }
        predicted, seconds = max(floors.values()), measured.get(name)
        yield {
            "op": op,
            "kernel": name,
            "tokens": tokens,
            "heads": heads,
            "launches": len(mine),
            "bytes": moved,
            "instructions": round(instructions),
            **floors,
            "predicted_s": predicted,
            "measured_s": seconds,
            "factor": None if seconds is None else seconds / predicted,
        }


def _name(call: KernelCall) -> str:
    return call.kernel.__name__.removesuffix("_kernel")


def _bytes(call: KernelCall) -> int:
    """Of the tensors that a launch takes, each once."""
    tensors = {x.data_ptr(): x for x in tree_leaves(call.arguments) if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def main(
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cuda,
    tokens: Annotated[int, typer.Option(min=1, help="Of the sequence.")] = 2048,
    heads: Annotated[int, typer.Option(min=1, help="Each a program of a scan.")] = 128,
    output: Annotated[Path | None, typer.Option(help="JSONL file to append to.")] = None,
) -> None:
    """Print and record, for each kernel, its time, its predicted floor and their ratio."""
    where = torch.device(device.value)
    shared = environment(where)
    copy = measure_ceilings(where, torch.bfloat16).copy
    for op in _CASES:
        for row in rows_of(op, tokens, heads, where, copy):
            typer.echo(row)
            if output is not None:
                append_rows(output, [shared | row])


if __name__ == "__main__":
    typer.run(main)
