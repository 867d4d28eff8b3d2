"""Global and shared memory: bounds, alignment, and in which order threads touch what.

Global addresses are virtual: each tensor of a launch (overlapping ones together) is a region that starts at a
multiple of 2^40, plus its own offset modulo 512. So an address names its tensor, and one past a tensor's end
is in no other one.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    """An access outside the tensors of a launch, or one that is not aligned: the launch ends."""


class Findings:
    """What is wrong with a launch: each kind and place once, with the first details and a count."""

    def __init__(self) -> None:
        self.details: dict[tuple[str, str], str] = {}
        self.counts: Counter = Counter()

    def add(self, kind: str, place: str, details: str = "") -> None:
        self.details.setdefault((kind, place), details)
        self.counts[kind, place] += 1

    def lines(self) -> list[str]:
        return [
            f"{key[0]}, at {key[1]} ({self.counts[key]} times): {text}" for key, text in self.details.items()
        ]


class _Touched:
    """Of each unit of a memory the last load, or the last store.

    Attributes:
        thread: who did, or ``SEVERAL``; ``warp`` likewise.
        interval: between which barriers of the program, and ``step`` between which of warps. A store is in
            order with an earlier load by its warp also where the threads have only met in between: in a
            shuffle or a product, which waits for what was loaded.
        place: by which instruction.
        program: who ever did, or ``NOBODY`` or ``SEVERAL``.
    """

    def __init__(self, units: int):
        def filled() -> np.ndarray:
            return np.full(units, NOBODY, np.int32)

        self.thread, self.warp, self.interval, self.step = filled(), filled(), filled(), filled()
        self.place, self.program = filled(), filled()


class Watch:
    """Which accesses to a memory no barrier puts in order; ``shared_by_programs``: all of a launch."""

    def __init__(self, name: str, units: int, unit: int, shared_by_programs: bool):
        self.name, self.unit, self.shared_by_programs = name, unit, shared_by_programs
        self.loads, self.stores = _Touched(units), _Touched(units)

    def load(self, units: np.ndarray, thread: np.ndarray, warps: Any, place: int) -> None:
        """``units`` [threads, k]; ``thread`` [threads]."""
        thread = np.broadcast_to(thread[:, None], units.shape)
        program = warps.program
        if self.shared_by_programs:
            self._refuse_other_program(self.stores, units, warps, place, "loads what another has stored")
            earlier = self.loads.program[units]
            alone = (earlier == NOBODY) | (earlier == program.index)
            self.loads.program[units] = np.where(alone, program.index, SEVERAL)
        self._refuse_unordered(
            self.stores, program.step, units, thread, warps, place, "loads what was stored"
        )
        done, warp = self.loads, thread >> 5
        before = done.interval[units] != program.interval
        earlier_thread = np.where(before, thread, done.thread[units])
        earlier_warp = np.where(before, warp, done.warp[units])
        done.thread[units], done.warp[units] = thread, warp
        # A unit with several readers is marked by all of them, whoever was last.
        done.thread[units[(done.thread[units] != thread) | (earlier_thread != thread)]] = SEVERAL
        done.warp[units[(done.warp[units] != warp) | (earlier_warp != warp)]] = SEVERAL
        done.interval[units], done.step[units], done.place[units] = program.interval, program.meeting, place

    def store(
        self, units: np.ndarray, thread: np.ndarray, warps: Any, place: int, changed: np.ndarray
    ) -> None:
        """Before the store; ``changed``: units whose value the store changes."""
        thread = np.broadcast_to(thread[:, None], units.shape)
        program = warps.program
        if self.shared_by_programs:
            for done, what in ((self.stores, "stored"), (self.loads, "loaded")):
                self._refuse_other_program(done, units, warps, place, f"stores what another has {what}")
            self.stores.program[units] = program.index
        for done, step, what in (
            (self.stores, program.step, "stored"),
            (self.loads, program.meeting, "loaded"),
        ):
            self._refuse_unordered(
                done, step, units, thread, warps, place, f"stores what was {what}", changed
            )
        done = self.stores
        done.thread[units], done.warp[units], done.place[units] = thread, thread >> 5, place
        done.interval[units], done.step[units] = program.interval, program.step

    def _refuse_other_program(
        self, done: _Touched, units: np.ndarray, warps: Any, place: int, what: str
    ) -> None:
        others = done.program[units]
        if ((others != NOBODY) & (others != warps.program.index)).any():
            warps.report(f"{self.name}: a program {what}", place)

    def _refuse_unordered(
        self,
        done: _Touched,
        step: int,
        units: np.ndarray,
        thread: np.ndarray,
        warps: Any,
        place: int,
        what: str,
        changed: np.ndarray | bool = True,
    ) -> None:
        """Report what another thread did since the last barrier of both."""
        wrong = (done.interval[units] == warps.program.interval) & changed
        if not wrong.any():
            return
        other_warp = done.warp[units] != thread >> 5
        wrong &= other_warp | ((done.thread[units] != thread) & (done.step[units] == step))
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0])
            unit = units[first]
            other = done.thread[unit]
            who = "several threads" if other == SEVERAL else f"thread {other}"
            earlier = warps.code.places[done.place[unit]]
            details = f"thread {thread[first]}, and {who} at {earlier}"
            warps.report(f"{self.name}: a thread {what} without a barrier since", place, details)


class Space:
    """Bytes with views of every width, and the watch over them; ``start``: the address modulo 16."""

    def __init__(self, data: np.ndarray, name: str, start: int = 0):
        self.bytes, self.name, self.start = data, name, start
        self.watch: Watch | None = None
        self.pending: np.ndarray | None = None  # units that cp.async has not filled yet
        self._views: dict[tuple[int, int], np.ndarray] = {}

    def watched(self, unit: int, *, shared_by_programs: bool) -> Space:
        units = -(-self.bytes.size // unit)
        self.watch = Watch(self.name, units, unit, shared_by_programs)
        self.pending = np.zeros(units, bool)
        return self

    def rows(self, width: int, count: int) -> np.ndarray:
        """The bytes as [.., count] of unsigned numbers."""
        if (width, count) not in self._views:
            whole = self.bytes.size // (width * count) * width * count
            self._views[width, count] = self.bytes[:whole].view(UNSIGNED[width]).reshape(-1, count)
        return self._views[width, count]

    def units_of(self, offset: np.ndarray, size: int) -> np.ndarray:
        unit = self.watch.unit
        return (offset // unit)[:, None] + np.arange(size // unit)

    def _check(self, offset: np.ndarray, size: int, warps: Any, place: int, what: str) -> None:
        low, high = int(offset.min()), int(offset.max()) + size
        if low < 0 or high > self.bytes.size:
            raise Fault(
                f"{what} outside {self.name} of {self.bytes.size} bytes, from {low} to {high}, at "
                f"{warps.code.places[place]}"
            )
        if int(np.bitwise_or.reduce(offset) + self.start) & (size - 1):
            raise Fault(f"{what} of {size} bytes not aligned in {self.name}, at {warps.code.places[place]}")

    def _refuse_pending(self, units: np.ndarray, warps: Any, place: int, what: str) -> None:
        if self.pending[units].any():
            warps.report(f"{self.name}: {what} what cp.async has not filled", place)

    def load(
        self, offset: np.ndarray, width: int, count: int, thread: np.ndarray, warps: Any, place: int
    ) -> np.ndarray:
        """[threads, count] from byte ``offset`` [threads] on."""
        size = width * count
        self._check(offset, size, warps, place, "load")
        if self.watch is not None:
            units = self.units_of(offset, size)
            self.watch.load(units, thread, warps, place)
            self._refuse_pending(units, warps, place, "a load of")
        return self.rows(width, count)[offset // size]

    def store(
        self, offset: np.ndarray, values: np.ndarray, thread: np.ndarray, warps: Any, place: int
    ) -> None:
        """``values`` [threads, count]."""
        size = values.shape[1] * values.itemsize
        self._check(offset, size, warps, place, "store")
        rows, index = self.rows(values.itemsize, values.shape[1]), offset // size
        if self.watch is None:
            rows[index] = values
            return
        units = self.units_of(offset, size)
        self._refuse_pending(units, warps, place, "a store to")
        given = np.ascontiguousarray(values).view(UNSIGNED[self.watch.unit]).reshape(units.shape)
        memory = self.rows(self.watch.unit, 1)[:, 0]
        self.watch.store(units, thread, warps, place, memory[units] != given)
        rows[index] = values
        lost = memory[units] != given
        if lost.any():
            first = tuple(np.argwhere(lost)[0])
            details = (
                f"thread {thread[first[0]]} stores {given[first]:#x}, {memory[units[first]]:#x} remains; "
                f"{lost.sum()} of {lost.size} are lost"
            )
            warps.report(f"{self.name}: threads store different values to one address", place, details)


def _extent(x: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class Global:
    """The regions of a launch's tensors; ``unit``: bytes watched as one, or ``None`` for no watch."""

    def __init__(self, tensors: Iterable[torch.Tensor], unit: int | None):
        self.spans: list[tuple[int, int]] = []
        for low, high in sorted(_extent(x) for x in tensors if x.numel()):
            if self.spans and low < self.spans[-1][1]:
                self.spans[-1] = self.spans[-1][0], max(self.spans[-1][1], high)
            else:
                self.spans.append((low, high))
        self.regions, self.bases = [], []
        for i, (low, high) in enumerate(self.spans):
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
            region = Space(data, f"tensor {i}", low % 16)
            self.regions.append(region if unit is None else region.watched(unit, shared_by_programs=True))
            self.bases.append(((i + 1) << 40) + low % 512)

    def address(self, x: torch.Tensor) -> int:
        if not x.numel():
            return 0
        for (low, high), base in zip(self.spans, self.bases):
            if low <= x.data_ptr() < high:
                return base + x.data_ptr() - low
        raise KeyError("a tensor that the launch was not given")

    def contents(self) -> list[np.ndarray]:
        return [region.bytes.copy() for region in self.regions]

    def restore(self, contents: list[np.ndarray]) -> None:
        for region, data in zip(self.regions, contents):
            region.bytes[:] = data

    def locate(
        self, address: np.ndarray, warps: Any, place: int, what: str
    ) -> Iterator[tuple[Space, np.ndarray | slice, np.ndarray]]:
        """Regions, which of the addresses are in them, and offsets there."""
        number = (address >> np.uint64(40)).astype(np.int64)
        wrong = (number < 1) | (number > len(self.regions))
        if wrong.any():
            first = int(address[np.argmax(wrong)])
            raise Fault(f"{what} at {first:#x}, of no tensor, at {warps.code.places[place]}")
        numbers = np.unique(number)
        for n in numbers:
            some = slice(None) if len(numbers) == 1 else np.flatnonzero(number == n)
            yield self.regions[n - 1], some, (address[some] - np.uint64(self.bases[n - 1])).view(np.int64)
