"""A grid of programs of one kernel over tensors."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tools.ptx_emulator.memory import Findings, Global, Space
from tools.ptx_emulator.translate import Code
from tools.ptx_emulator.warps import Warps

code_of = functools.cache(Code)


class Program:
    """One program: its place in the grid, its shared memory, and what puts its threads in order.

    Attributes:
        interval: counts the barriers passed; ``step`` those of single warps too; ``meeting`` whatever warps
            do together.
    """

    def __init__(self, launch: Launch, index: int, interval: int):
        self.launch, self.index, self.grid = launch, index, launch.grid
        x, y, _ = launch.grid
        self.ids = index % x, index // x % y, index // (x * y)
        self.parameters = launch.parameters
        self.interval = self.step = self.meeting = interval
        self.shared = Space(np.full(launch.shared_bytes, 0xFF, np.uint8), "shared")
        if launch.watches:
            self.shared.watched(launch.code.units["shared"], shared_by_programs=False)

    def pass_warp_barrier(self) -> None:
        self.step += 1
        self.meeting += 1

    def meet(self) -> None:
        self.meeting += 1

    def run(self) -> None:
        launch = self.launch
        threads = np.arange(launch.code.function.threads)
        parts = [threads] if launch.order is None else list(threads.reshape(-1, 32))
        alive = [Warps(self, part) for part in parts]
        while alive:
            if launch.order is not None:
                launch.order.shuffle(alive)
            going_on = [warps.run() for warps in alive]
            if len(set(going_on)) > 1:
                launch.findings.add(
                    "some warps wait at a barrier, others have ended", launch.code.function.name
                )
            alive = [warps for warps, more in zip(alive, going_on) if more]
            self.interval += 1
            self.pass_warp_barrier()


class Launch:
    """One launch, run by :meth:`run`.

    Args:
        text: the kernel's PTX.
        shared_bytes: of a program.
        values: (Triton's type, value) of the parameters at run time, in order.
        order: ``None`` for lockstep, where every access is watched; else one warp and one program after the
            other, in random order.

    Attributes:
        findings: what is wrong.
        counts: how often warps ran each block.
    """

    def __init__(
        self,
        text: str,
        shared_bytes: int,
        grid: Sequence[int],
        values: Sequence[tuple[str, Any]],
        *,
        order: np.random.Generator | None = None,
    ):
        self.code, self.shared_bytes, self.order = code_of(text), shared_bytes, order
        self.grid = (*grid, 1, 1)[:3]
        self.watches = order is None
        self.findings = Findings()
        self.counts = np.zeros(len(self.code.function.blocks), np.int64)
        tensors = [value for _, value in values if isinstance(value, torch.Tensor)]
        self.memory = Global(tensors, self.code.units["global"] if self.watches else None)
        self.parameters = [self._bits(kind, value) for kind, value in values]
        self.parameters += [0] * (
            len(self.code.parameters) - len(values)
        )  # Triton's own: there is no scratch

    def _bits(self, kind: str, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return self.memory.address(value)
        return int(np.float32(value).view(np.uint32)) if kind == "fp32" else int(value)

    def run(self) -> Launch:
        programs = np.arange(int(np.prod(self.grid)))
        if self.order is not None:
            self.order.shuffle(programs)
        interval = 1
        with np.errstate(all="ignore"):
            for index in map(int, programs):
                program = Program(self, index, interval)
                program.run()
                interval = program.interval + 1
        return self

    def instructions(self) -> Counter:
        """Those that warps ran, by the classes of :func:`~tools.ptx_emulator.translate.class_of`."""
        total: Counter = Counter()
        for classes, count in zip(self.code.classes, self.counts.tolist()):
            total.update({name: number * count for name, number in classes.items() if count})
        return total
