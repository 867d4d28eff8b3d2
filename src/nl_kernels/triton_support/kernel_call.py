"""One launch of a Triton kernel as a value: planned by a launcher, then run, or compiled ahead of time.

A launcher that only *plans* has one source of truth: the argument types that the ahead-of-time compiler
checks on a machine without a GPU are those of the very call that runs on one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Argument = torch.Tensor | int | float | None


@dataclass(frozen=True)
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
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Argument | tuple[Argument, ...]]
    constants: dict[str, int | float | bool | str | tuple[int, ...]]
    num_warps: int
    num_stages: int

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
    """Launch ``calls`` in order on ``device``."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for call in calls:
            call.run()
