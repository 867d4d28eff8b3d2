"""What Triton's interpreter cannot see: races between programs and between a program's threads.

The interpreter runs a grid's programs one after the other and each operation on a whole tile at once. On a
GPU programs run side by side in any order, and a tile is shared out over threads that wait for one another
only at barriers. Within :func:`detect_races` every address that a kernel loads or stores under the
interpreter is recorded, and a launch is refused that

- loads or stores outside the tensors it was given,
- stores an address that another program of the launch loads or stores,
- stores one address twice in one operation,
- loads an address that it has stored, or stores one that it has loaded or stored, without a
  ``tl.debug_barrier()`` in between.

The last is allowed where one thread does both, as in ``x[tile] += y``: a store by the same place of a tile of
the same shape, if that has an element for every thread. (The compiler lays a tile out by its shape. A smaller
one is replicated: several threads load a number that one of them stores.) Barriers that the compiler puts in
for its own use of shared memory are not counted on. Atomic operations are not recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

_NOBODY = -1
_SEVERAL = -2
_THREADS_PER_WARP = 32
_TRITON = str(Path(triton.__file__).parent)


class DataRace(AssertionError):
    """A launch whose result depends on the order in which programs or threads run."""


class _Accesses:
    """Of each element of a storage, its last load or its last store in a launch.

    Attributes:
        program: who did, or one of ``_NOBODY``, ``_SEVERAL``.
        interval: between which barriers.
        lane: by which place of a tile of which shape, or ``_SEVERAL``.
        operation: by which line, an index into the launch's ``places``.
    """

    def __init__(self, count: int):
        self.program = np.full(count, _NOBODY, dtype=np.int32)
        self.interval = np.zeros(count, dtype=np.int64)
        self.lane = np.zeros(count, dtype=np.int64)
        self.operation = np.zeros(count, dtype=np.int32)


class _Buffer:
    """What one launch has done to one storage, whose elements have ``unit`` bytes."""

    def __init__(self, storage: torch.UntypedStorage, unit: int):
        self.start = storage.data_ptr()
        self.end = self.start + storage.nbytes()
        self.unit = unit
        count = storage.nbytes() // unit + 1
        self.loads, self.stores = _Accesses(count), _Accesses(count)
        self.order = np.empty(count, dtype=np.int64)


class _Launch:
    """The record of one launch."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor], num_warps: int):
        self.kernel = kernel
        self.threads = num_warps * _THREADS_PER_WARP
        units: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for x in tensors:
            storage = x.untyped_storage()
            _, unit = units.get(storage.data_ptr(), (storage, x.element_size()))
            units[storage.data_ptr()] = (storage, min(unit, x.element_size()))
        self.buffers = [_Buffer(storage, unit) for storage, unit in units.values() if storage.nbytes()]
        self.program = _NOBODY
        self.interval = 0
        self.shapes: dict[tuple[int, ...], int] = {}
        self.places: list[tuple[str, list[tuple[str, int]]]] = []

    def next_program(self) -> None:
        self.program += 1
        self.interval += 1

    def next_interval(self) -> None:
        self.interval += 1

    def load(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        for buffer, index, lane in self._locate(addresses, mask, size, "load"):
            self._refuse_other_program(buffer.stores, index, "stored")
            self._refuse_unordered(buffer.stores, index, None, "stored")
            done = buffer.loads
            alone = (done.program[index] == _NOBODY) | (done.program[index] == self.program)
            done.program[index] = np.where(alone, self.program, _SEVERAL)
            again = (done.interval[index] == self.interval) & (done.lane[index] != lane)
            done.lane[index] = np.where(again, _SEVERAL, lane)
            done.interval[index] = self.interval
            done.operation[index] = len(self.places) - 1

    def store(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        for buffer, index, lane in self._locate(addresses, mask, size, "store"):
            order = np.arange(index.size)
            buffer.order[index] = order
            if (buffer.order[index] != order).any():
                raise DataRace(f"{self._describe(-1)}: one store writes an address more than once")
            for done, what in ((buffer.stores, "stored"), (buffer.loads, "loaded")):
                self._refuse_other_program(done, index, what)
                self._refuse_unordered(done, index, lane, what)
            done = buffer.stores
            done.program[index] = self.program
            done.interval[index] = self.interval
            done.lane[index] = lane
            done.operation[index] = len(self.places) - 1

    def _locate(
        self, addresses: np.ndarray, mask: np.ndarray, size: int, what: str
    ) -> Iterator[tuple[_Buffer, np.ndarray, np.ndarray]]:
        """Each buffer, the elements touched, and the lane that touches each; appends to ``places``."""
        lane = np.flatnonzero(np.broadcast_to(mask, addresses.shape))
        if not lane.size:
            return
        self.places.append((what, _kernel_lines()))
        touched = addresses.reshape(-1)[lane]
        if addresses.size >= self.threads:
            lane += self.shapes.setdefault(addresses.shape, len(self.shapes)) << 40
        else:
            lane = np.full_like(lane, _SEVERAL)
        for buffer in self.buffers:
            if not touched.size:
                return
            inside = (touched >= buffer.start) & (touched + np.uint64(size) <= buffer.end)
            if inside.any():
                index = (touched[inside] - np.uint64(buffer.start)) // np.uint64(buffer.unit)
                yield buffer, index.astype(np.int64), lane[inside]
                touched, lane = touched[~inside], lane[~inside]
        if touched.size:
            raise DataRace(f"{self._describe(-1)}: addresses outside the tensors of the launch")

    def _refuse_other_program(self, done: _Accesses, index: np.ndarray, what: str) -> None:
        programs = done.program[index]
        others = programs[(programs != _NOBODY) & (programs != self.program)]
        if others.size:
            who = "several programs have" if others[0] == _SEVERAL else f"program {others[0]} has"
            raise DataRace(f"{self._describe(-1)}: program {self.program} touches what {who} {what}")

    def _refuse_unordered(
        self, done: _Accesses, index: np.ndarray, lane: np.ndarray | None, what: str
    ) -> None:
        """``lane``: whose own accesses are in order, or None."""
        wrong = done.interval[index] == self.interval
        if lane is not None:
            wrong &= (lane == _SEVERAL) | (done.lane[index] != lane)
        if wrong.any():
            earlier = self._describe(done.operation[index][wrong][0])
            raise DataRace(f"{self._describe(-1)}: no barrier since it was {what} by {earlier}")

    def _describe(self, operation: int) -> str:
        what, lines = self.places[operation]
        where = ", called at ".join(f"{Path(name).name}:{line}" for name, line in lines)
        return f"{self.kernel}, {what} at {where}"


def _kernel_lines() -> list[tuple[str, int]]:
    """File and line of the kernel's functions on the stack, innermost first."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "run":
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(_TRITON):
            lines.append((name, frame.f_lineno))
        frame = frame.f_back
    return lines


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


@contextmanager
def detect_races() -> Iterator[None]:
    """Within it, a kernel run by Triton's interpreter raises :class:`DataRace` where a GPU could differ.

    Raises:
        RuntimeError: Triton's interpreter is off.
        DataRace: while a kernel runs; see the module. The message names kernel, operation and line.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("detect_races watches Triton's interpreter: set TRITON_INTERPRET=1")
    builder = interpreter.InterpreterBuilder
    launches: list[_Launch] = []

    def run(self, *args, grid, warmup, num_warps=4, **kwargs):
        launches.append(_Launch(self.__name__, _tensors([*args, *kwargs.values()]), num_warps))
        try:
            return originals["run"](self, *args, grid=grid, warmup=warmup, num_warps=num_warps, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, DataRace):
                cause = cause.__cause__
            raise (cause or error) from None
        finally:
            launches.pop()

    def set_grid_idx(self, x, y, z):
        launches[-1].next_program()
        return originals["set_grid_idx"](self, x, y, z)

    def create_barrier(self):
        launches[-1].next_interval()
        return originals["create_barrier"](self)

    def create_masked_load(self, ptrs, mask, *rest):
        launches[-1].load(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return originals["create_masked_load"](self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        launches[-1].store(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return originals["create_masked_store"](self, ptrs, value, mask, *rest)

    watched = [
        (interpreter.InterpretedFunction, run, "run"),
        *((builder, f, f.__name__) for f in (set_grid_idx, create_barrier)),
        *((builder, f, f.__name__) for f in (create_masked_load, create_masked_store)),
    ]
    originals = {name: getattr(owner, name) for owner, _, name in watched}
    for owner, replacement, name in watched:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, _, name in watched:
            setattr(owner, name, originals[name])
