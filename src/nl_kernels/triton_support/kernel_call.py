"""One launch of a Triton kernel as a value: planned by a launcher, then run, or compiled ahead of time.

A launcher that only *plans* has one source of truth: the argument types that the ahead-of-time compiler
checks on a machine without a GPU are those of the very call that runs on one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nl_kernels.dispatch import planning
from nl_kernels.triton_support.hazards import warn_of_hazards

Argument = torch.Tensor | int | float | None

GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Most programs along each axis, on NVIDIA."""


@dataclass(eq=False, slots=True)  # frozen it would take twice as long to make
class KernelCall:
    """A kernel, its grid, and everything it is called with.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis.
        arguments: run-time arguments by name, or tuples of them; ``None`` for an absent tensor (known at
            compile time).
        constants: ``tl.constexpr`` arguments by name.
        num_warps: warps (of 32 threads; 64 on AMD) a program.
        num_stages: depth of the software pipeline of its loops.

    Raises:
        ValueError: more programs along an axis than a GPU takes.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Argument | tuple[Argument, ...]]
    constants: dict[str, int | float | bool | str | tuple[int, ...]]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if max(self.grid) > min(GRID_LIMITS) and any(map(operator.gt, self.grid, GRID_LIMITS)):
            raise ValueError(
                f"{self.kernel.__name__}: expected a grid of at most {GRID_LIMITS} programs, got "
                f"{self.grid}; call the op on parts of the batch"
            )

    def run(self) -> None:
        """Launch on the current device."""
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=True,
        )


def run_calls(calls: Iterable[KernelCall], device: torch.device) -> None:
    """Launch ``calls`` in order on ``device``; nothing while they are only planned."""
    if planning():
        return
    if device.type == "cuda" and torch.version.hip is None:
        warn_of_hazards(torch.cuda.get_device_capability(device))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for call in calls:
            call.run()
