"""Floating-point operations of a piece of work, and how many the machine does at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop, sdpa_backward_flop, sdpa_flop

from nl_kernels.dispatch import plain_pytorch

_aten = torch.ops.aten
# Operators that PyTorch's counter does not know, by the formulas of those that it does.
_MORE = {
    _aten.baddbmm_: baddbmm_flop.__wrapped__,
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}


class _InsideOperators(TorchDispatchMode):
    """Shows a counter the products inside of this package's operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "nl_kernels":
            return func(*args, **kwargs)
        with self:
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)


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
