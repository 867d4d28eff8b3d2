"""Launch parameters of the tiled kernels, pure functions of shapes and architecture; and calls in order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nl_kernels.chunk_kernels.launch import precision_of
from nl_kernels.triton_support.ahead_of_time import CatalogueEntry, signature_of
from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.tiles import padded, power_of_two

MAX_LENGTH = 4096
"""Longest chunk: a chunk's numbers by token are one block."""

MAX_WIDTH = 4096
"""Widest head or hidden layer: a token's row is one block."""

SOLVE_BLOCK = 64  # tokens whose system is inverted at once
SOLVE_COLUMNS = 32  # columns a program takes through the blocks: few, as their number is what is parallel
ROW_NUMBERS = 2048  # numbers of a program that takes whole rows
MOVED_NUMBERS = 2048  # numbers of a program that moves weights


def tiled_precision(dtype: torch.dtype, architecture: str) -> str:
    """How products compute for callers of ``dtype``: bf16 ones round operands to bf16."""
    return "bf16" if dtype == torch.bfloat16 else precision_of(dtype, architecture)


def solve_precision(precision: str, architecture: str) -> str:
    """That of the triangular inverses, four times finer than what their result is rounded to in bf16."""
    return precision_of(torch.bfloat16, architecture) if precision == "bf16" else precision


def operand_dtype(precision: str) -> torch.dtype:
    """How what products alone read is stored."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def length_of(chunk_size: int, tokens: int) -> int:
    """Rows of a chunk's matrices: a power of two up to 64, or blocks of 64; few where tokens are few."""
    size = min(chunk_size, power_of_two(tokens))
    return padded(size) if size <= SOLVE_BLOCK else -(-size // SOLVE_BLOCK) * SOLVE_BLOCK


class Tiles(NamedTuple):
    """Tiles of a product, and how it runs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@functools.cache
def tiles_of(m: int, n: int, k: int, precision: str, architecture: str) -> Tiles:
    """Tiles of 128 where both extents fill several, else of 64; a step of 128 bytes of the contracted one."""
    large = min(m, n) >= 256
    side = 128 if large else 64
    deep = 64 if precision == "bf16" else 32
    warps = 8 if large else 4
    return Tiles(
        min(side, padded(m)), min(side, padded(n)), min(deep, padded(k)), warps, stages_of(architecture)
    )


def token_warps(length: int, architecture: str) -> int:
    """Warps of a program that takes all numbers by token of a chunk, in fp64: few registers a thread."""
    return 4 if length <= 512 or architecture.startswith("gfx") else 16


def stages_of(architecture: str) -> int:
    """Steps of a loop over tiles that are under way at once."""
    return 2 if architecture.startswith("gfx") else 3


@dataclass(frozen=True)
class Operand:
    """A matrix a batch: ``tensor`` holds [batches, rows, width], and the matrix begins at row ``start``.

    Of a launch for several memories a row of the call, batches are memory first: those of one memory lie
    ``step`` rows from those of the one before (``None``: [memories, batches, rows, width]; 0: they share it).
    A matrix may be the columns from ``column`` on of rows that are ``width`` wide (0: they are its own).
    """

    tensor: torch.Tensor
    rows: int
    start: int = 0
    turned: bool = False
    step: int | None = None
    width: int = 0
    column: int = 0

    @property
    def t(self) -> Operand:
        """The transpose."""
        return dataclasses.replace(self, turned=not self.turned)


class Term(NamedTuple):
    """a b with ``k`` contracted; ``span`` as in :func:`.tiled_products.product_kernel`."""

    a: Operand
    b: Operand
    k: int
    span: str = "-"


class Place(NamedTuple):
    """Where a result goes, or an addend comes from: ``limit`` rows from ``start`` on, of ``rows`` a batch.

    The others as of :class:`Operand`.
    """

    tensor: torch.Tensor
    rows: int
    start: int
    limit: int
    step: int | None = None
    width: int = 0
    column: int = 0


def whole(tensor: torch.Tensor | None) -> Operand | None:
    """[batches, rows, width] as an operand."""
    return None if tensor is None else Operand(tensor, tensor.shape[1])


def part_of(weights: Operand, first: int) -> Operand:
    """The rows of a matrix from ``first`` on."""
    return dataclasses.replace(weights, start=weights.start + first)


def slot_of(tensor: torch.Tensor, slot: int) -> Operand:
    """State number ``slot`` of [batches, slots, rows, width]."""
    return Operand(tensor, tensor.shape[1] * tensor.shape[2], slot * tensor.shape[2])


def every_row(tensor: torch.Tensor | None) -> Place | None:
    """All rows of [batches, rows, width]."""
    return None if tensor is None else Place(tensor, tensor.shape[1], 0, tensor.shape[1])


@dataclass(frozen=True)
class TokenGrid:
    """How a call's tokens fall into chunks; ``begin``, ``stop``, ``origin`` [batches] where those differ."""

    batches: int
    tokens: int
    offset: int
    chunk_size: int
    begin: torch.Tensor | None
    stop: torch.Tensor | None
    origin: torch.Tensor | None

    @property
    def lead(self) -> int:
        """Tokens of the first chunk that came before the call."""
        return self.offset % self.chunk_size

    @property
    def chunks(self) -> int:
        return -(-(self.lead + self.tokens) // self.chunk_size)

    @property
    def length(self) -> int:
        """Rows of a chunk's matrices."""
        return length_of(self.chunk_size, self.tokens)

    @property
    def pitch(self) -> int:
        """Rows of all chunks."""
        return self.chunks * self.length

    def tokens_of(self, chunk: int) -> tuple[int, int]:
        """First token and number of tokens of a chunk."""
        first = max(0, chunk * self.chunk_size - self.lead)
        return first, min(self.tokens, (chunk + 1) * self.chunk_size - self.lead) - first

    def arguments(self) -> dict[str, Any]:
        return {
            "begin": self.begin,
            "stop": self.stop,
            "origin": self.origin,
            "tokens": self.tokens,
            "offset": self.offset,
            "chunks": self.chunks,
        }


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], dict[str, int | None]]:
    """Names of a kernel's constants, and its other arguments with what stands for an absent one."""
    integers = ("_rows", "_start", "_limit", "_pitch", "_step")
    constants = tuple(name for name in kernel.arg_names if name.isupper())
    others = (name for name in kernel.arg_names if not name.isupper())
    return constants, {name: 0 if name.endswith(integers) else None for name in others}


_SHAPE = ("TURNED", "WIDTH", "COLUMN")


class Schedule:
    """Kernel calls in the order in which they run, and what each is for.

    Args:
        by_chunk: the coefficients are those of the present chunk alone, made anew for each.
    """

    def __init__(self, grid: TokenGrid, precision: str, architecture: str, *, by_chunk: bool = False):
        self.grid, self.precision, self.architecture = grid, precision, architecture
        self.by_chunk = by_chunk
        self.chunk = 0
        self.calls: list[KernelCall] = []
        self.names: list[str] = []
        self.coefficients: torch.Tensor | None = None
        self.final: torch.Tensor | None = None
        self.momenta: torch.Tensor | None = None

    @property
    def start(self) -> int:
        """First row of the present chunk among those of all chunks."""
        return self.chunk * self.grid.length

    def add(
        self,
        name: str,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 1,
    ) -> None:
        """One call: what the kernel takes of ``arguments`` and ``constants``; other tensors are absent."""
        grid = self.grid
        common = {
            **grid.arguments(),
            "coefficients": self.coefficients,
            "momenta": self.momenta,
            "batches": grid.batches,
            "pitch": grid.length if self.by_chunk else grid.pitch,
            "start": 0 if self.by_chunk else self.start,
            "chunk": self.chunk,
        }
        fixed = {"LENGTH": grid.length, "CHUNK": grid.chunk_size, "PRECISION": self.precision, **constants}
        given = {**common, **arguments}
        names, defaults = _parameters(kernel)
        taken = {name: given.get(name, default) for name, default in defaults.items()}
        known = {name: fixed[name] for name in names}
        self.calls.append(KernelCall(kernel, (programs,), taken, known, warps, stages))
        self.names.append(name)

    def product(
        self,
        name: str,
        m: int,
        n: int,
        terms: list[Term],
        *,
        out: Place | None,
        factor: int = -1,
        decay: str = "",
        aside: torch.Tensor | Operand | None = None,
        aside_terms: int = 1,
        aside_adds: bool = False,
        add0: Place | None = None,
        sign: int = 1,
        scaled: torch.Tensor | None = None,
        against: Operand | None = None,
        inner: torch.Tensor | None = None,
        add1: Place | None = None,
        scaled1: torch.Tensor | None = None,
        inner1: torch.Tensor | None = None,
        matrix: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        groups: int = 1,
    ) -> None:
        """See :func:`.tiled_products.product_kernel`; ``scaled`` and ``scaled1`` are its ``final`` ones.

        ``groups``: memories of a row of the call that this is for; batches are then memory first.
        """
        from nl_kernels.chunk_kernels.tiled_products import product_kernel

        tiles = tiles_of(m, n, max((t.k for t in terms), default=16), self.precision, self.architecture)
        given: dict[str, Any] = {"final": scaled}
        if aside is not None:
            given |= self._matrix("aside", aside if isinstance(aside, Operand) else Operand(aside, m))
        given |= {"final1": scaled1, "inner1": inner1, "matrix": matrix}
        if coefficients is not None:
            given["coefficients"] = coefficients
        given |= {f"k{i}": terms[i].k if i < len(terms) else 0 for i in range(4)}
        constants: dict[str, Any] = {"M": m, "N": n}
        for i in range(4):
            for side, extent in (("a", m), ("b", n)):
                key = f"{side}{i}"
                turned, width, column = False, 0, 0
                if i < len(terms):
                    operand = getattr(terms[i], side)
                    given |= self._matrix(key, operand)
                    turned, column = operand.turned, operand.column
                    # What is not turned has its contracted (a) or its outer (b) extent as its width.
                    width = operand.width or (extent if turned == (side == "a") else terms[i].k)
                shape = zip(_SHAPE, (turned, width, column))
                constants |= {f"{key.upper()}_{part}": x for part, x in shape}
        for key, place in (("add0", add0), ("add1", add1), ("out", out)):
            width, column = 0, 0
            if place is not None:
                given |= self._matrix(key, place) | {f"{key}_limit": place.limit}
                width, column = place.width or n, place.column
            constants |= {f"{key.upper()}_WIDTH": width, f"{key.upper()}_COLUMN": column}
        if inner is not None:
            given |= {"inner": inner, **self._matrix("against", against)}
        constants |= {
            **{f"K{i}": terms[i].k if i < len(terms) else 0 for i in range(4)},
            **{f"SPAN{i}": terms[i].span if i < len(terms) else "-" for i in range(4)},
            "FACTOR": factor,
            "DECAY": decay,
            "ASIDE_TERMS": aside_terms if aside is not None else 0,
            "ASIDE_ADDS": aside_adds,
            "ADD0_SIGN": sign,
            "BLOCK_M": tiles.m,
            "BLOCK_N": tiles.n,
            "BLOCK_K": tiles.k,
        }
        programs = groups * self.grid.batches * -(-m // tiles.m) * -(-n // tiles.n)
        self.add(name, product_kernel, programs, given, constants, tiles.warps, tiles.stages)

    def _matrix(self, name: str, matrix: Operand | Place) -> dict[str, Any]:
        """The run-time arguments by which a kernel finds a matrix."""
        step = self.grid.batches * matrix.rows if matrix.step is None else matrix.step
        return {
            name: matrix.tensor,
            f"{name}_rows": matrix.rows,
            f"{name}_start": matrix.start,
            f"{name}_step": step,
        }

    def weight_tiles(self, out: int, into: int) -> int:
        """Tiles of a product that makes a weight [out, in]."""
        tiles = tiles_of(out, into, self.grid.length, self.precision, self.architecture)
        return -(-out // tiles.m) * -(-into // tiles.n)

    def rows(
        self,
        name: str,
        kernel: Any,
        width: int,
        arguments: dict[str, Any],
        *,
        groups: int = 1,
        **constants: Any,
    ) -> None:
        """A kernel that takes whole rows of a chunk's matrices; ``groups`` as of :meth:`product`."""
        block, rows, warps = row_tiles(width, self.grid.length)
        programs = groups * self.grid.batches * self.grid.length // rows
        constants = {"WIDTH": width, "ROWS": rows, "BLOCK": block, **constants}
        self.add(name, kernel, programs, arguments, constants, warps)


def row_tiles(width: int, length: int) -> tuple[int, int, int]:
    """Block of columns, rows and warps of a program that takes whole rows, all of one chunk."""
    block = padded(width)
    rows = max(1, min(SOLVE_BLOCK, length, ROW_NUMBERS // block))
    return block, rows, 8 if block * rows >= ROW_NUMBERS else 4


def entries_of(op: str, words: str, schedules: dict[str, Schedule]) -> Iterator[CatalogueEntry]:
    """One call of each kind in the schedules, to compile ahead of time; what it is for ends the variant."""
    seen = set()
    for kind, schedule in schedules.items():
        for name, call in zip(schedule.names, schedule.calls):
            signature = tuple(signature_of(call).items()), tuple(call.constants.items())
            key = call.kernel.__name__, signature, call.num_warps
            if key not in seen:
                seen.add(key)
                yield CatalogueEntry(op, f"{words} {kind}: {name}", call)
