"""Which 32-bit integers of a kernel can overflow, from its code and what a launch gives it; takes no GPU.

Interval arithmetic over Triton's intermediate code: program numbers come from the grid, integer arguments
from the calls. What was loaded from memory is unknown, and so is all that is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nl_kernels.triton_support.kernel_call import KernelCall
from tools.ahead_of_time import intermediate_code

Range = tuple[int, int] | None  # lowest and highest value; None: unknown

_LOCATION = re.compile(r'\s*loc\((?:#loc\d*|"[^"]*"\(#loc\d*\)|unknown)\)')
_ASSIGNED = re.compile(r"^(%[\w#]+)(?::\d+)? = ([\w.]+)(.*)$")
_VALUE = re.compile(r"%[\w#]+")
_LOOP = re.compile(r"scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")


def overflows(calls: Sequence[KernelCall], architecture: str) -> list[str]:
    """Lines of the code of ``calls``, of one kernel and the same constants, whose 32-bit result can overflow.

    Raises:
        AssertionError: the analysis understood no pointer arithmetic, so that it says nothing.
    """
    code = _LOCATION.sub("", intermediate_code(calls[0], architecture))
    known: dict[str, Range] = {}
    for name in calls[0].arguments:
        values = [call.arguments[name] for call in calls]
        if all(isinstance(x, int) for x in values):
            known[f"%{name}"] = min(values), max(values)
    grid = [max(programs) for programs in zip(*((*call.grid, 1, 1)[:3] for call in calls))]
    found, pointers = [], 0
    for line in map(str.strip, code.splitlines()):
        loop = _LOOP.search(line)
        if loop:
            index, start, stop, _ = loop.groups()
            known[index] = _spanned(known.get(start), known.get(stop))
        match = _ASSIGNED.match(line)
        if not match:
            continue
        name, operation, rest = match.groups()
        pointers += operation == "tt.addptr"
        result = _result(operation, rest, known, grid)
        if re.search(r"\bi32$|xi32>$", rest) and result is not None and not _fits(result):
            found.append(f"{line} : {result}")
            result = None
        known[name] = result
    assert pointers, "no pointer arithmetic found in the code"
    return found


def _fits(bounds: tuple[int, int]) -> bool:
    return bounds[0] >= -(2**31) and bounds[1] < 2**31


def _spanned(start: Range, stop: Range) -> Range:
    """An index from ``start`` up to before ``stop``."""
    return None if start is None or stop is None else (start[0], max(start[0], stop[1] - 1))


def _result(operation: str, rest: str, known: dict[str, Range], grid: Sequence[int]) -> Range:
    if operation == "arith.constant":
        constant = re.match(r" (?:dense<)?(-?\d+)>? : ", rest)
        return None if constant is None else (int(constant[1]),) * 2
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        programs = grid["xyz".index(rest.split()[0])]
        return (0, programs - 1) if operation.endswith("id") else (programs, programs)
    if operation == "tt.make_range":
        bounds = dict(re.findall(r"(\w+) = (-?\d+)", rest))
        return int(bounds["start"]), int(bounds["end"]) - 1
    operands = [known.get(x) for x in _VALUE.findall(rest)]
    if operation == "arith.select":
        operands = operands[1:]
    if operation == "arith.remsi" and len(operands) == 2:
        return _remainder(*operands)
    if not operands or None in operands:
        return None
    if operation in _KEEPS or operation == "arith.select":
        return min(x[0] for x in operands), max(x[1] for x in operands)
    if operation in _BINARY and len(operands) == 2:
        corners = [
            _BINARY[operation](a, b) for a in operands[0] for b in operands[1] if _defined(operation, b)
        ]
        return (min(corners), max(corners)) if corners else None
    return None


def _remainder(a: Range, b: Range) -> Range:
    if b is None:
        return None
    largest = max(abs(x) for x in b) - 1
    if a is None or a[0] < 0:
        return -largest, largest
    return 0, min(a[1], largest)


def _defined(operation: str, divisor: int) -> bool:
    return operation != "arith.divsi" or divisor != 0


_KEEPS = {
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.trans",
}
_KEEPS |= {"tt.reshape"}
_BINARY = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "arith.minsi": min,
    "arith.maxsi": max,
}
