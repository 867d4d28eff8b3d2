"""What a piece of work takes: operations, bytes, calls; and how much of each the machine does at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop, sdpa_backward_flop, sdpa_flop

from nl_kernels.dispatch import plain_pytorch

_aten = torch.ops.aten


def _formula(function: Any) -> Any:
    """Of an operator's shapes, where PyTorch's counter has it of its tensors."""
    return function.__wrapped__


# Operators that PyTorch's counter does not know, by the formulas of those that it does.
_MORE = {
    _aten.baddbmm_: _formula(baddbmm_flop),
    _aten._scaled_dot_product_flash_attention_for_cpu: _formula(sdpa_flop),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _formula(sdpa_backward_flop),
}


# Of their first argument they read what comes out, and not all of it.
_PICKING = (_aten.embedding, _aten.index, _aten.index_select, _aten.gather)


class _InsideOperators(TorchDispatchMode):
    """Shows a counter outside of it what is inside of this package's operators, and counts what it moves.

    Args:
        opened: ``False``: an operator of this package counts as one, and stays closed.
    """

    def __init__(self, opened: bool = True) -> None:
        super().__init__()
        self.opened, self.bytes, self.calls = opened, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "nl_kernels" and self.opened:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        moved = _bytes_moved(func, (args, kwargs), out)
        self.bytes += moved
        self.calls += moved > 0
        return out


def _bytes_moved(func: Any, inputs: Any, out: Any) -> int:
    """What an operator reads and writes if nothing stays in a cache; a view and empty memory: nothing."""
    read, written = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (inputs, out))
    storages = {x.untyped_storage()._cdata for x in read}
    view = not func._schema.is_mutable and any(x.untyped_storage()._cdata in storages for x in written)
    if view or "empty" in func._schema.name:
        return 0
    if func.overloadpacket in _PICKING:
        read = [*read[1:], *written]
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in (*read, *written))


class Moves(NamedTuple):
    """Bytes that operators read and write, and how many were called (on CUDA: kernels launched)."""

    bytes: int
    calls: int


def count_moves(action: Callable[[], object], device: torch.device) -> Moves:
    """What ``action`` moves, which is run once; operators that only make a view or reserve memory count none.

    On the CPU of every operator of PyTorch, those inside of this package's, too. On CUDA an operator of this
    package moves what goes in and comes out, as its kernels do.
    """
    if device.type != "cuda":
        with _InsideOperators() as inside:
            action()
        return Moves(inside.bytes, inside.calls)
    with torch.profiler.profile() as profiler, _InsideOperators(opened=False) as inside:
        action()
        torch.cuda.synchronize(device)
    kernels = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    return Moves(inside.bytes, sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels))


def count_flops(action: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention in ``action``, which is run once.

    A multiply-add counts two. As :class:`torch.utils.flop_counter.FlopCounterMode` counts: of causal
    attention the whole square, and nothing of what works element by element or solves triangular systems.
    What Triton kernels of this package compute counts as what plain PyTorch does in their place, which runs
    for the count: the same work has the same operations, whatever does it.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    with plain_pytorch(), counter, _InsideOperators():
        action()
    return counter.get_total_flops()


def matmul_ceiling(device: str, precision: str, threads: int) -> float:
    """FLOP/s of a large product of random square matrices: the fastest of some."""
    size = 8192 if device.startswith("cuda") else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads)
    return 2.0 * size**3 / min(timer.blocked_autorange(min_run_time=0.5).times)


def copy_ceiling(device: str, threads: int) -> float:
    """Bytes per second, read and written, of a large copy: the fastest of some."""
    source = torch.randn(2**28 if device.startswith("cuda") else 2**26, device=device)
    timer = Timer("b.copy_(a)", globals={"a": source, "b": torch.empty_like(source)}, num_threads=threads)
    return 2.0 * source.nbytes / min(timer.blocked_autorange(min_run_time=0.5).times)
