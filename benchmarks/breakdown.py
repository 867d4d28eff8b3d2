"""Where the CPU time of a layer's op goes: products, solves, element-wise work, views, and the rest.

    python -m benchmarks.breakdown deep_memory --chunk-size 64 --hidden 64 --momentum --read snapshot
    python -m benchmarks.breakdown self_modifying_memory --chunk-size 16

One call forward and backward is timed whole (median); then every PyTorch call in it is timed again alone, on
warm caches. So the rest is Python, and what cold caches cost.
"""

from __future__ import annotations

import time
from collections import Counter
from enum import Enum
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nl_kernels import (
    DeepMemoryWeights,
    SelfModifyingWeights,
    deep_memory,
    self_modifying_memory,
)
from nl_kernels.memory_rule import l2_normalize

console = Console()
REPEATS = 7
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linalg_vecdot"}
SOLVES = {"linalg_solve_triangular", "triangular_solve", "linalg_inv_ex", "linalg_solve_ex"}


class Op(str, Enum):
    deep_memory = "deep_memory"
    self_modifying_memory = "self_modifying_memory"


class Recorder(TorchDispatchMode):
    """Keeps every call that reaches a kernel, with copies of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls.append((func, *tree_map_only(torch.Tensor, _copy, (args, kwargs))))
        return func(*args, **kwargs)


def _copy(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in the same strides, so that a call in place changes nothing that others see."""
    once = x.detach()
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim]:
            once = once.narrow(dim, 0, 1)
    return torch.empty_strided(once.shape, x.stride(), dtype=x.dtype).copy_(once).expand(x.shape)


def kind_of(func: torch._ops.OpOverload) -> str:
    name = func.overloadpacket.__name__.rstrip("_")
    if name in PRODUCTS:
        return "products"
    if name in SOLVES:
        return "solves"
    return "views" if func.is_view else "element-wise"


def seconds(function) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return median(found)


def make_call(op: Op, tokens: int, heads: int, width: int, hidden: int | None, momentum: bool, options: dict):
    """A function without arguments: the op forward and backward on random inputs."""
    torch.manual_seed(0)

    def weights(rows: int, spread: float = 0.02) -> DeepMemoryWeights:
        if hidden is None:
            return DeepMemoryWeights((spread * torch.randn(heads, rows, width)).requires_grad_(), None)
        inner = torch.randn(heads, hidden, width) / width**0.5
        outer = spread * torch.randn(heads, rows, hidden)
        return DeepMemoryWeights(inner.requires_grad_(), outer.requires_grad_())

    tensors = [torch.randn(1, tokens, heads, width).requires_grad_() for _ in range(4)]
    decay = torch.full((1, tokens, heads), 0.5).requires_grad_() if momentum else None
    if op is Op.deep_memory:
        memory = weights(width)
        rate = torch.rand(1, tokens, heads).requires_grad_()
        log_decay = (-0.02 * torch.rand(1, tokens, heads)).requires_grad_()

        def call():
            q, k, v, _ = tensors
            o, _ = deep_memory(
                l2_normalize(q), l2_normalize(k), v, rate, log_decay, memory,
                momentum=decay, impl="eager", **options,
            )  # fmt: skip
            o.sum().backward()
    else:
        gates = (weights(1, 0.25), weights(1, 0.25))
        memories = SelfModifyingWeights(weights(width), weights(width), weights(width), *gates)

        def call():
            query, *inputs = tensors
            o, _ = self_modifying_memory(
                query, *map(l2_normalize, inputs), memories, momentum=decay, impl="eager", **options
            )
            o.sum().backward()

    return call


def main(
    op: Op,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 16,
    hidden: Annotated[int, typer.Option(min=0, help="Hidden width; 0: linear memories.")] = 0,
    momentum: Annotated[bool, typer.Option(help="With momentum.")] = False,
    read: Annotated[str, typer.Option(help="running or snapshot.")] = "running",
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    width: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
) -> None:
    """Time one op on one CPU thread and print where its time goes, in µs a token."""
    torch.set_num_threads(1)
    options = {"chunk_size": chunk_size, "read": read}
    call = make_call(op, tokens, heads, width, hidden or None, momentum, options)
    call()
    whole = seconds(call)
    with Recorder() as recorder:
        call()
    time_of, calls_of = Counter(), Counter()
    for func, args, kwargs in track(recorder.calls, "calls", console=console, transient=True):
        kind = kind_of(func)
        calls_of[kind] += 1
        time_of[kind] += seconds(lambda: func(*args, **kwargs))  # noqa: B023
    chunks = -(-tokens // chunk_size)
    table = Table(
        "part", "µs a token", "calls a chunk", title=f"C = {chunk_size}, h = {hidden}, {read} reads"
    )
    micro = 1e6 / tokens
    table.add_row("measured", f"{whole * micro:.0f}", "")
    for kind in ("products", "solves", "element-wise", "views"):
        table.add_row(kind, f"{time_of[kind] * micro:.0f}", f"{calls_of[kind] / chunks:.0f}")
    table.add_row("rest", f"{(whole - sum(time_of.values())) * micro:.0f}", "")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
