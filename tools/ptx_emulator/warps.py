"""Threads of a program that run in lockstep: control, and what one instruction does for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.ptx_emulator.arithmetic import towards_zero
from tools.ptx_emulator.memory import UNSIGNED


class Warps:
    """All warps of a program, or one of them.

    Attributes:
        n, thread, lane: how many threads, their numbers in the program, and in their warps.
        R: registers by number.
        at: the next block, or ``None`` where threads have parted; then ``each`` has every thread's.
    """

    def __init__(self, program: Any, threads: np.ndarray):
        self.program, self.code = program, program.launch.code
        self.n = threads.size
        self.thread = threads.astype(np.int32)
        self.lane = (threads & 31).astype(np.int64)
        self.R = self.code.fresh_registers(self.n)
        self.at: int | None = 0
        self.each = np.zeros(self.n, np.int64)
        self.waiting, self.done = np.zeros(self.n, bool), np.zeros(self.n, bool)
        self.copies: list[list] = []  # of cp.async, by group; the last is open
        self.copies.append([])
        self.sources: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}  # of shuffles

    def report(self, kind: str, place: int, details: str = "") -> None:
        self.program.launch.findings.add(kind, self.code.places[place], details)

    # Control

    def run(self) -> bool:
        """To the next barrier, or to the end: whether there is more to run."""
        counts = self.program.launch.counts
        while self.at is not None:
            at = self.at
            counts[at] += self.n // 32
            self.code.block(at, False)(self.R, self, None)
            end = self.code.function.blocks[at].end
            if end is None:
                self.at = at + 1
            elif end.op[0] == "bar":
                self.at = at + 1
                return True
            elif end.op[0] == "ret":
                self._check_ret(end)
                return False
            else:
                self._branch(at, end)
        return self._run_parted()

    def _check_ret(self, end: Any) -> None:
        if end.predicate is not None:
            raise NotImplementedError(end.text)

    def _taken(self, end: Any) -> np.ndarray:
        if end.predicate is None:
            return np.ones(self.n, bool)
        taken = self.R[self.code.number[end.predicate]]
        return ~taken if end.negated else taken

    def _branch(self, at: int, end: Any) -> None:
        target, taken = self.code.function.blocks[at].target, self._taken(end)
        if taken.all():
            self.at = target
        elif not taken.any():
            self.at = at + 1
        else:
            self.each, self.at = np.where(taken, target, at + 1), None

    def _run_parted(self) -> bool:
        """Threads at different blocks: those that are furthest behind run, until all are together."""
        while True:
            live = ~self.done & ~self.waiting
            if not live.any():
                if self.done.all():
                    return False
                self.waiting[:] = False
                self._together()
                return True
            at = int(self.each[live].min())
            mask = live & (self.each == at)
            self.program.launch.counts[at] += len(np.unique(self.thread[mask] >> 5))
            self.code.block(at, True)(self.R, self, mask)
            block = self.code.function.blocks[at]
            following = np.full(self.n, at + 1)
            if block.end is not None:
                if block.end.op[0] == "bra":
                    following = np.where(self._taken(block.end), block.target, at + 1)
                elif block.end.op[0] == "bar":
                    if self.done.any():
                        self.report("a barrier after some threads have ended", self.code.place(block.end))
                    self.waiting |= mask
                else:
                    self._check_ret(block.end)
                    self.done |= mask
            self.each[mask] = following[mask]
            if self._together():
                return self.run()

    def _together(self) -> bool:
        if self.done.any() or self.waiting.any() or (self.each != self.each[0]).any():
            return False
        self.at = int(self.each[0])
        return True

    # Memory

    def _some(self, mask: np.ndarray | None) -> np.ndarray | slice:
        return slice(None) if mask is None or mask.all() else np.flatnonzero(mask)

    def load(
        self,
        space: str,
        address: np.ndarray,
        width: int,
        count: int,
        mask: np.ndarray | None,
        before: list[np.ndarray | None] | None,
        place: int,
    ) -> list[np.ndarray]:
        """``count`` registers of ``width`` bytes; what is not in ``mask`` stays as ``before``."""
        lanes = self._some(mask)
        address, thread = address[lanes], self.thread[lanes]
        data = np.empty((address.size, count), UNSIGNED[width])
        if address.size:
            for region, some, offset in self._locate(space, address, place, "load"):
                data[some] = region.load(offset, width, count, thread[some], self, place)
        columns = list(np.ascontiguousarray(data.T))
        if isinstance(lanes, slice):
            return columns
        merged = []
        for old, new in zip(before, columns):
            whole = np.zeros(self.n, UNSIGNED[width]) if old is None else old.copy()
            whole[lanes] = new
            merged.append(whole)
        return merged

    def store(
        self, space: str, address: np.ndarray, values: list, width: int, mask: np.ndarray | None, place: int
    ) -> None:
        lanes = self._some(mask)
        address, thread = address[lanes], self.thread[lanes]
        stacked = np.stack(values, axis=1)[lanes]
        if address.size:
            for region, some, offset in self._locate(space, address, place, "store"):
                region.store(offset, stacked[some], thread[some], self, place)

    def _locate(self, space: str, address: np.ndarray, place: int, what: str):
        if space == "shared":
            return [(self.program.shared, slice(None), address.astype(np.int64))]
        return self.program.launch.memory.locate(address, self, place, what)

    def load_matrices(self, address: np.ndarray, count: int, turned: bool, place: int) -> list[np.ndarray]:
        """``ldmatrix``: lanes 8 i … of each warp have the addresses of the rows of matrix i."""
        self.program.meet()
        warps = self.n // 32
        rows = address.astype(np.int64).reshape(warps, 32)[:, : 8 * count].reshape(-1)
        threads = self.thread.reshape(warps, 32)[:, : 8 * count].reshape(-1)
        data = self.program.shared.load(rows, 4, 4, threads, self, place).reshape(warps, count, 8, 4)
        if turned:
            halves = data.view(np.uint16).reshape(warps, count, 8, 8).swapaxes(2, 3)
            data = np.ascontiguousarray(halves).view(np.uint32)
        data = data.reshape(warps, count, 32)
        return [np.ascontiguousarray(data[:, i]).reshape(-1) for i in range(count)]

    def copy(
        self,
        target: np.ndarray,
        source: np.ndarray,
        size: int,
        given: np.ndarray | int,
        mask: np.ndarray | None,
        place: int,
    ) -> None:
        """``cp.async`` of ``size`` bytes a thread, of which ``given`` (all or none) are read, else zero.

        What is there until it is waited for is undefined: NaN.
        """
        lanes = self._some(mask)
        target, source, thread = target[lanes].astype(np.int64), source[lanes], self.thread[lanes]
        if not target.size:
            return
        given = np.broadcast_to(given, self.n)[lanes]
        if not np.isin(given, (0, size)).all():
            raise NotImplementedError("cp.async of a part of its bytes")
        data = np.zeros((target.size, size // 4), np.uint32)
        full = np.flatnonzero(given)
        origins = []
        if full.size:
            for region, some, offset in self._locate("global", source[full], place, "cp.async"):
                data[full[some]] = region.load(offset, 4, size // 4, thread[full[some]], self, place)
                origins.append((region, full[some], offset))
        shared = self.program.shared
        shared.store(target, np.full_like(data, 0xFFFFFFFF), thread, self, place)
        if shared.watch is not None:
            shared.pending[shared.units_of(target, size)] = True
        self.copies[-1].append((target, data, thread, place, origins))

    def commit_copies(self) -> None:
        self.copies.append([])

    def wait_for_copies(self, keep: int) -> None:
        """All but the last ``keep`` groups have arrived."""
        while len(self.copies) > keep + 1:
            for target, data, thread, place, origins in self.copies.pop(0):
                size = data.shape[1] * 4
                for region, rows, offset in origins:
                    if not np.array_equal(region.rows(4, data.shape[1])[offset // size], data[rows]):
                        self.report("global: what cp.async reads changed before it was waited for", place)
                shared = self.program.shared
                if shared.watch is not None:
                    shared.pending[shared.units_of(target, size)] = False
                shared.store(target, data, thread, self, place)

    # Between the lanes of a warp

    def shuffle(self, mode: str, value: np.ndarray, by: Any, clamp: Any) -> tuple[np.ndarray, np.ndarray]:
        """Another lane's value by ``mode``, and whether there is such a lane."""
        self.program.meet()
        key = (mode, int(by), int(clamp)) if np.ndim(by) == np.ndim(clamp) == 0 else None
        if key is None or key not in self.sources:
            lane, by, clamp = (
                self.lane,
                np.asarray(by).astype(np.int64) & 31,
                np.asarray(clamp).astype(np.int64),
            )
            segment = (clamp >> 8) & 31
            least, most = lane & segment, (lane & segment) | (clamp & ~segment & 31)
            source = {
                "up": lambda: lane - by,
                "down": lambda: lane + by,
                "bfly": lambda: lane ^ by,
                "idx": lambda: least | (by & ~segment & 31),
            }[mode]()
            exists = source >= most if mode == "up" else source <= most
            found = (np.arange(self.n) & ~31) + np.where(exists, source, lane), exists
            if key is None:
                return value[found[0]], exists
            self.sources[key] = found
        source, exists = self.sources[key]
        return value[source], exists

    def reduce(self, what: str, value: np.ndarray, members: np.ndarray) -> np.ndarray:
        """``redux`` over whole warps."""
        self.program.meet()
        if not np.all(members == np.uint32(0xFFFFFFFF)):
            raise NotImplementedError("redux of some lanes")
        function = {"min": np.minimum, "max": np.maximum, "add": np.add}[what]
        return np.repeat(function.reduce(value.reshape(-1, 32), axis=1), 32).astype(value.dtype)

    def product(self, kind: str, a: list, b: list, c: list) -> np.ndarray:
        """``mma``: D = A B + C, 16 × 8 a warp, exact in fp64, then rounded towards zero."""
        self.program.meet()
        warps = self.n // 32
        A, B = (_operands(np.stack(x), kind) for x in (a, b))
        pairs = A.shape[-1]
        depth = len(a) // 2 * 4 * pairs
        A = (
            A.reshape(len(a) // 2, 2, warps, 8, 4, pairs)
            .transpose(2, 1, 3, 0, 4, 5)
            .reshape(warps, 16, depth)
        )
        B = B.reshape(len(b), warps, 8, 4, pairs).transpose(1, 0, 3, 4, 2).reshape(warps, depth, 8)
        C = np.stack(c).reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        D = towards_zero(np.matmul(A.astype(np.float64), B.astype(np.float64)) + C)
        return D.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.n)


def _operands(registers: np.ndarray, kind: str) -> np.ndarray:
    """The numbers [.., 1 or 2] that 32-bit registers hold; of tf32 the low 13 bits are ignored."""
    if kind == "tf32":
        return (registers & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if kind == "f16":
        return registers.view(np.float16).reshape(*registers.shape, 2)
    return np.stack([registers << np.uint32(16), registers & np.uint32(0xFFFF0000)], axis=-1).view(np.float32)
