"""``python -m benchmarks.peer_kernels``: our kernels beside flash-linear-attention's, compiled the same way.

The gated delta rule in bf16 for sm_90, without a GPU: what the compiler says, no times. The peer chooses
among several configurations by timing them; shown is the one with the fewest spills, then the most warps at
once, of those that differ in more than the depth of their loops' pipelines. Takes minutes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nl_kernels.triton_support.kernel_call import KernelCall
from tools.ahead_of_time import compile_call
from tools.catalogue import unallocated
from tools.catalogue.delta_memory import catalogue
from tools.kernel_resources import Resources, resources_of

_TARGET = "sm_90"
_WIDTHS = (64, 128)


def our_rows(width: int) -> Iterator[tuple[str, int, Resources]]:
    """Kernel, warps and resources of one forward and backward."""
    for entry in catalogue(_TARGET):
        if entry.variant == f"bfloat16 {width}x{width} after" and entry.kernel != "step":
            yield entry.kernel, entry.call.num_warps, resources_of(compile_call(entry.call, _TARGET))


def peer_rows(width: int) -> Iterator[tuple[str, int, Resources]]:
    """The same of flash-linear-attention's ``chunk_gated_delta_rule``, which must be installed."""
    for launches in _peer_launches(width):
        found = [(call.num_warps, resources_of(compile_call(call, _TARGET))) for call in launches]
        warps, resources = min(found, key=lambda row: (row[1].spill_bytes, -row[0] * row[1].resident))
        name = launches[0].kernel.__name__.replace("chunk_gated_delta_rule_", "").replace("_kernel", "")
        yield name, warps, resources


def _peer_launches(width: int) -> list[list[KernelCall]]:
    """Its launches in order, each in all of its configurations, recorded instead of run."""
    import fla.utils
    from triton.runtime.autotuner import Heuristics

    # It looks at the GPU that is there; here it is to see a large one.
    fla.utils.check_shared_mem = lambda *_, **__: True
    fla.utils.IS_NVIDIA_HOPPER = True
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    recorded: dict[str, list[KernelCall]] = {}

    def record(self: Heuristics, *_: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        tuner = self.fn
        given = arguments | {name: value(arguments) for name, value in self.values.items()}
        constants = {p.name for p in tuner.fn.params if p.is_constexpr}
        recorded[tuner.fn.__name__] = [
            KernelCall(
                tuner.fn,
                (1,),
                {name: x for name, x in given.items() if name not in constants},
                {name: x for name, x in (given | config.kwargs).items() if name in constants},
                config.num_warps,
                config.num_stages,
            )
            for config in {(str(c.kwargs), c.num_warps): c for c in reversed(tuner.configs)}.values()
        ]

    original, Heuristics.run = Heuristics.run, record
    try:
        leading = (8, 512, 16)
        q, k, v, do = (unallocated(*leading, width, dtype=torch.bfloat16) for _ in range(4))
        g, beta = unallocated(*leading), unallocated(*leading)
        given = {"q": q, "k": k, "v": v, "beta": beta, "scale": 1.0, "initial_state": None}
        g, _, A, *_ = chunk_gated_delta_rule_fwd(**given, g=g, output_final_state=True)
        chunk_gated_delta_rule_bwd(**given, g=g, A=A, do=do, dht=None)
    finally:
        Heuristics.run = original
    return list(recorded.values())


def main() -> None:
    """Print the table; one line where flash-linear-attention is not installed."""
    if importlib.util.find_spec("fla") is None:
        print(
            "flash-linear-attention is not installed: no table beside its kernels (make bench-peers has it)"
        )
        return
    for width in _WIDTHS:
        table = Table(title=f"gated delta rule, bf16, {width} wide, {_TARGET}: what the compiler says")
        for heading in ("whose", "kernel"):
            table.add_column(heading)
        numbers = ("warps", "registers", "spill B", "shared KiB", "programs", "barriers", "instructions")
        for heading in numbers:
            table.add_column(heading, justify="right")
        for whose, rows in (("ours", our_rows(width)), ("theirs", peer_rows(width))):
            for kernel, warps, found in rows:
                cells = (warps, found.registers, found.spill_bytes, round(found.shared_bytes / 1024))
                cells += (found.resident, found.barriers, found.instructions)
                table.add_row(whose, kernel, *map(str, cells))
        Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
