"""Blocks of PTX as Python functions over numpy arrays of one element a thread.

A register is an array of its bits. It is kept in the dtype that its definition makes, its *home*: float32 of
``.f32``, float64 of ``.f64``, else unsigned. Arrays are never changed in place. The functions take ``R``,
the registers by number; ``W``, the :class:`~tools.ptx_emulator.warps.Warps`; and ``M``, where threads have
parted, those that run.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tools.ptx_emulator import arithmetic
from tools.ptx_emulator.ptx import Address, Instruction, Operand, parse

_KINDS = {"u": "u", "s": "i", "b": "u", "f": "f"}
_SPECIAL = {"%laneid": "W.lane.astype(u4)", "%warpid": "(W.thread.astype(u4) >> u4(5))"}
_NO_RESULT = ("st", "bra", "ret", "bar", "cp", "fence")
_POISON = 0x7FFFDEAD7FFFDEAD  # NaN in fp64, and each half of it in fp32


class Unsupported(NotImplementedError):
    """An instruction that the emulator does not know."""


def kind_of(type_: str) -> str:
    """``s32`` → ``i4``, ``f32`` → ``f4``, ``pred`` → ``?``."""
    if type_ == "pred":
        return "?"
    letter, bits = re.fullmatch(r"([usbf])(\d+)", type_).groups()
    return _KINDS[letter] + str(int(bits) // 8)


def is_type(part: str) -> bool:
    return bool(re.fullmatch(r"[usbf]\d+|bf16|tf32|pred|b?f16x2", part))


def access_of(op: tuple[str, ...]) -> tuple[str, int]:
    """The memory that a load or a store touches, and the bytes of one element."""
    space = next(part for part in op if part in ("global", "shared"))
    return space, int(re.sub(r"\D", "", op[-1])) // 8


class Code:
    """A kernel's PTX, translated block by block when it is first run."""

    def __init__(self, text: str):
        self.function = parse(text)
        self.widths = self.function.widths
        self.number = {name: i for i, name in enumerate(self.widths)}
        self.parameters = {name: i for i, name in enumerate(self.function.parameters)}
        self.places: list[str] = []
        self.homes = self._homes()
        self.outward = self._outward()
        self.units = self._units()
        self.classes = [Counter(map(class_of, block.everything())) for block in self.function.blocks]
        self.block = functools.cache(self._translated)

    def fresh_registers(self, threads: int) -> list[np.ndarray]:
        made = {"?": np.zeros(threads, bool)}
        for home in set(self.homes.values()) - {"?"}:
            size = int(home[1])
            made[home] = np.full(threads, _POISON & (2 ** (8 * size) - 1), f"u{size}").view(home)
        return [made[self.homes[name]] for name in self.widths]

    def place(self, ins: Instruction) -> int:
        """A number for where an instruction is, an index into ``places``."""
        self.places.append(f"{ins.line} `{ins.text}`")
        return len(self.places) - 1

    def _unsigned(self, name: str) -> str:
        return "?" if self.widths[name] == 1 else f"u{self.widths[name] // 8}"

    def registers_in(self, operand: Operand) -> list[str]:
        if isinstance(operand, list):
            names = operand
        elif isinstance(operand, Address):
            names = [operand.base]
        else:
            names = operand.removeprefix("!").split("|")
        return [name for name in names if name in self.number]

    def _results(self, ins: Instruction) -> list[str]:
        return [] if ins.op[0] in _NO_RESULT or not ins.args else self.registers_in(ins.args[0])

    def _sources(self, ins: Instruction) -> Iterator[str]:
        for operand in ins.args if ins.op[0] in _NO_RESULT else ins.args[1:]:
            yield from self.registers_in(operand)
        if ins.predicate:
            yield ins.predicate
            yield from self._results(ins)  # which keep what they were

    def _homes(self) -> dict[str, str]:
        homes: dict[str, str] = {}
        moves: list[tuple[str, list[str]]] = []
        for ins in (i for block in self.function.blocks for i in block.instructions):
            op, results = ins.op, self._results(ins)
            if op[0] in ("mov", "selp") and op[1][0] == "b" and isinstance(ins.args[0], str):
                operands = ins.args[1 : 2 if op[0] == "mov" else 3]
                sources = [name for operand in operands for name in self.registers_in(operand)]
                if len(sources) == len(operands) and not isinstance(operands[0], list):
                    moves.append((results[0], sources))
                    continue
            made = None
            if op[0] not in ("setp", "ld"):
                made = {"f32": "f4", "f64": "f8"}.get(next(filter(is_type, op), ""))
            for name in results:
                fits = made and int(made[1]) * 8 == self.widths[name]
                homes.setdefault(name, made if fits else self._unsigned(name))
        for _ in range(8):
            for result, sources in moves:
                if result not in homes and all(name in homes for name in sources):
                    homes[result] = homes[sources[0]]
        return {name: homes.get(name) or self._unsigned(name) for name in self.widths}

    def _outward(self) -> set[str]:
        """Registers seen in more than one block, or read in theirs before they are surely defined."""
        first_seen: dict[str, int] = {}
        outward: set[str] = set()
        for block in self.function.blocks:
            defined: set[str] = set()
            for ins in block.everything():
                results, sources = self._results(ins), set(self._sources(ins))
                outward |= sources - defined
                for name in (*results, *sources):
                    if first_seen.setdefault(name, block.index) != block.index:
                        outward.add(name)
                defined.update(results)
            if block.end is not None and block.end.predicate:
                outward.add(block.end.predicate)
        return outward

    def _units(self) -> dict[str, int]:
        """The smallest access to each memory in bytes: what is watched as one."""
        units = {"shared": 4, "global": 4}
        for ins in (i for block in self.function.blocks for i in block.instructions):
            if ins.op[0] in ("ld", "st") and ins.op[1] in units:
                units[ins.op[1]] = min(units[ins.op[1]], access_of(ins.op)[1])
        return units

    def _translated(self, index: int, parted: bool) -> Callable[[list, Any, np.ndarray | None], None]:
        body = Body(self, parted)
        for ins in self.function.blocks[index].instructions:
            body.add(ins)
        source = "def run(R, W, M):\n" + "".join(f"    {line}\n" for line in [*body.lines, "return"])
        scope = {**_NAMES, **body.constants}
        exec(compile(source, f"<{self.function.name}, block {index}>", "exec"), scope)
        return scope["run"]


_NAMES = {
    "np": np,
    **{name: value for name, value in vars(arithmetic).items() if callable(value)},
    **{k: np.dtype(k).type for k in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")},
}


class Body:
    """The source of one block's function, as it grows; ``parted``: for some of the threads only."""

    def __init__(self, code: Code, parted: bool):
        self.code, self.parted = code, parted
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.local: set[str] = set()

    def add(self, ins: Instruction) -> None:
        from tools.ptx_emulator.opcodes import OPCODES

        try:
            OPCODES[ins.op[0]](self, ins)
        except (KeyError, StopIteration, AttributeError, IndexError, TypeError, ValueError) as error:
            raise Unsupported(f"{ins.text} at {ins.line} ({type(error).__name__}: {error})") from error

    def is_register(self, operand: Operand) -> bool:
        return isinstance(operand, str) and operand in self.code.number

    def read(self, name: str) -> str:
        number = self.code.number[name]
        return f"v{number}" if name in self.local else f"R[{number}]"

    def value(self, operand: str, kind: str, *, whole: bool = False) -> str:
        """An operand as an expression of dtype ``kind``; ``whole``: an array also where it is a constant."""
        if operand.startswith("!"):
            return f"(~{self.value(operand[1:], kind)})"
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand not in self.code.number:
            constant = self.constant(operand, kind)
            return f"np.full(W.n, {constant})" if whole else constant
        text, home = self.read(operand), self.code.homes[operand]
        if home == kind:
            return text
        if home[1:] != kind[1:]:
            if kind[0] not in "ui" or home[0] != "u":
                raise Unsupported(f"register {operand}, kept as {home}, as {kind}")
            text = f"{text}.astype(u{kind[1]})"
        return f"{text}.view({kind})"

    def constant(self, text: str, kind: str) -> str:
        size = int(kind[1])
        bits = 0 if text == "global_smem" else int(re.sub("^0[fFdD]", "0x", text).rstrip("U"), 0)
        if text[:2] in ("0f", "0F") and size == 8:
            raise Unsupported(f"an fp32 constant as {kind}")
        value = np.array(bits & (2 ** (8 * size) - 1), f"u{size}").view(kind)
        name = f"K{kind}_{value.tobytes().hex()}"
        self.constants[name] = value[()]
        return name

    def mask(self, ins: Instruction) -> str | None:
        """The threads that an instruction is for, or ``None`` for all."""
        mask = None
        if ins.predicate:
            mask = f"(~{self.read(ins.predicate)})" if ins.negated else self.read(ins.predicate)
        if self.parted:
            mask = "M" if mask is None else f"(M & {mask})"
        return mask

    def define(
        self,
        ins: Instruction,
        name: str,
        kind: str,
        expression: str,
        *,
        whole: bool = True,
        merged: bool = False,
    ) -> None:
        """Assign a register; not ``whole``: the expression is a scalar; ``merged``: masked already."""
        if name == "_":
            return
        home, number = self.code.homes[name], self.code.number[name]
        if not whole:
            expression = f"np.full(W.n, {expression}, {'bool' if kind == '?' else kind})"
        if kind[1:] != home[1:]:
            kind, expression = f"{kind[0]}{home[1]}", f"({expression}).astype({kind[0]}{home[1]})"
        if kind != home:
            expression = f"({expression}).view({home})"
        mask = self.mask(ins)
        if mask is not None and not merged:
            expression = f"np.where({mask}, {expression}, {self.read(name)})"
        kept = f"; R[{number}] = v{number}" if name in self.code.outward or self.parted else ""
        self.lines.append(f"v{number} = {expression}{kept}")
        self.local.add(name)

    def define_all(
        self, ins: Instruction, names: list[str], kind: str, call: str, *, merged: bool = False
    ) -> None:
        """Assign registers the results of one call."""
        self.lines.append(f"t = {call}")
        for i, name in enumerate(names):
            self.define(ins, name, kind, f"t[{i}]", merged=merged)

    def address(self, place: Address, space: str) -> str:
        kind = "u8" if space == "global" else "u4"
        offset = self.constant(str(place.offset), kind)
        if place.base == "global_smem":
            return f"np.full(W.n, {offset})"
        base = self.value(place.base, kind)
        return f"({base} + {offset})" if place.offset else base


def class_of(ins: Instruction) -> str:
    """The column of the table of instructions that one belongs to."""
    op = ins.op
    if op[0] == "mma":
        return "mma"
    if op[0] in ("ld", "st", "cp", "ldmatrix"):
        # cp.async.ca.shared.global moves from global memory, its groups move nothing
        return next((space for space in ("global", "shared") if space in op), "alu")
    if op[0] == "bar":
        return "barriers"
    return "shuffles" if op[0] in ("shfl", "redux") else "alu"
