"""Launch parameters of ``deep_memory``: pure functions of shapes, options and architecture.

The numbers come from ahead-of-time compilation (registers, spills and shared memory against each
architecture's limits), not from timings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.targets import is_ampere
from nl_kernels.triton_support.tiles import padded

MAX_WIDTH = 128
"""Widest head or hidden layer that one program takes, on any architecture."""

MAX_CHUNK = 64
"""Largest chunk that one program takes."""

SMALL_CHUNK = 16
"""Largest chunk for which a program has the most room for weights."""

HELD_MATRIX = 4096  # numbers of a linear memory up to which the forward kernel holds it in registers
HELD_TILE = 1024  # numbers of a chunk's hidden layer up to which the forward kernel holds it in registers
KEPT_BYTES = 256 << 20  # of states at every chunk's start; beyond, some are recomputed


class Inputs(NamedTuple):
    """What the kernels take, by row (see :mod:`nl_kernels.ops.deep_memory.rows`).

    Attributes:
        q, k, v: [N, S, ·]; rate, log_decay, momentum: [N, S]; momentum may be ``None``.
        inner, outer: running weights [N, h, D] and [N, Dv, h], or [N, Dv, D] and ``None``; then, for both
            layers, the velocity (with momentum), the snapshot (``None``: every row starts at a boundary) and
            the anchor (of an anchored rule).
        begin, stop: [N] int64, each row's slots are begin … stop − 1; ``None`` when all rows have the same.
        origin: [N] int64, the slot of each row's first number; ``None``: 0, or the offset of all rows.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rate: torch.Tensor
    log_decay: torch.Tensor
    momentum: torch.Tensor | None
    inner: torch.Tensor
    outer: torch.Tensor | None
    inner_velocity: torch.Tensor | None
    outer_velocity: torch.Tensor | None
    inner_snapshot: torch.Tensor | None
    outer_snapshot: torch.Tensor | None
    inner_anchor: torch.Tensor | None
    outer_anchor: torch.Tensor | None
    begin: torch.Tensor | None
    stop: torch.Tensor | None
    origin: torch.Tensor | None


class Results(NamedTuple):
    """What the forward kernel fills: reads [N, S, Dv], the final state, and states at some chunks' starts.

    ``None``: there is none; a snapshot that is ``None`` equals the running weights.
    """

    o: torch.Tensor
    final_inner: torch.Tensor
    final_outer: torch.Tensor | None
    final_inner_velocity: torch.Tensor | None
    final_outer_velocity: torch.Tensor | None
    final_inner_snapshot: torch.Tensor | None
    final_outer_snapshot: torch.Tensor | None
    kept_inner: torch.Tensor | None
    kept_outer: torch.Tensor | None
    kept_inner_velocity: torch.Tensor | None
    kept_outer_velocity: torch.Tensor | None


class StepInputs(NamedTuple):
    """What the one-token kernel takes; it writes into the state's tensors, which are contiguous.

    Attributes:
        q, k, v: [B, H, ·]; rate, log_decay, momentum: [B, H]; momentum may be ``None``.
        inner_anchor, outer_anchor: of an anchored rule, shared [H, ..] or by sequence [B, H, ..].
        inner_snapshot, outer_snapshot, inner, outer: [B, H, ..], the outer ones ``None`` if linear.
        inner_velocity, outer_velocity: with momentum.
        position: [B] int64. mask: [B] uint8, 0 where there is no token; ``None``: all have one.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rate: torch.Tensor
    log_decay: torch.Tensor
    momentum: torch.Tensor | None
    inner_anchor: torch.Tensor | None
    outer_anchor: torch.Tensor | None
    inner_snapshot: torch.Tensor
    outer_snapshot: torch.Tensor | None
    inner: torch.Tensor
    outer: torch.Tensor | None
    inner_velocity: torch.Tensor | None
    outer_velocity: torch.Tensor | None
    position: torch.Tensor
    mask: torch.Tensor | None


class Options(NamedTuple):
    """What the kernels are compiled for, but for shapes; plain values, as an operator's schema has them.

    Attributes:
        offset: slot of the first token where all rows have the same slots.
        checkpoint_every: chunks between the states kept for the backward pass; 0 picks.
        precision: of products, a name of :func:`nl_kernels.triton_support.language.matmul`.
    """

    offset: int
    chunk_size: int
    read: str
    activation: str
    normalize_hidden: bool
    residual: bool
    erase: str
    proximal: bool
    error_bound: float | None
    checkpoint_every: int
    precision: str

    @classmethod
    def of(
        cls,
        rule: MemoryRule,
        *,
        offset: int,
        chunk_size: int,
        read: str,
        checkpoint_every: int | None,
        precision: str,
    ) -> Options:
        return cls(
            offset,
            chunk_size,
            read,
            rule.activation,
            rule.normalize_hidden,
            rule.residual,
            rule.erase,
            rule.proximal,
            rule.error_bound,
            checkpoint_every or 0,
            precision,
        )


def contiguous(tensors: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """Each tensor in the row-major layout that the kernels index."""
    return (None if x is None else x.contiguous() for x in tensors)


def unsupported(
    *,
    key_dim: int,
    value_dim: int,
    hidden: int | None,
    chunk_size: int,
    rule: MemoryRule,
    has_momentum: bool,
    dtype: torch.dtype,
    architecture: str,
) -> str | None:
    """Why the kernels do not serve a call, naming the argument and the limit; ``None`` when they do."""
    if has_momentum and rule.erase != "none":
        return f"momentum: the Triton kernels take it with rule.erase='none' alone, got {rule.erase!r}"
    if dtype == torch.float64:
        return "q, k, v: the Triton kernels take bfloat16, float16 and float32, got float64"
    longest = MAX_CHUNK if widest(MAX_CHUNK, architecture) else SMALL_CHUNK
    if chunk_size > longest:
        return (
            f"chunk_size: on {architecture} the Triton kernels take chunks up to {longest}, got {chunk_size}"
        )
    limit = widest(chunk_size, architecture)
    for name, size in (("q, k", key_dim), ("v", value_dim), ("weights", hidden or 1)):
        if size > limit:
            what = "hidden layers" if name == "weights" else "heads"
            return (
                f"{name}: on {architecture} with chunks of {chunk_size} the Triton kernels take {what} up to "
                f"{limit} wide, got {size}"
            )
    return None


def widest(chunk_size: int, architecture: str) -> int:
    """Widest head or hidden layer for one program: a layer's matrix is a tile, so is a chunk's hidden one.

    What limits them is shared memory; on sm_80 spills, and on sm_100 tensor memory.
    """
    small = chunk_size <= SMALL_CHUNK
    if architecture == "sm_90":
        return MAX_WIDTH if small else 64
    return 64 if small or is_ampere(architecture) else 0


def warps_of(block_c: int, block_k: int, block_v: int, block_h: int) -> int:
    """Warps of a program: enough that its matrices fit the registers of its threads.

    A chunk of 64 tokens is one row of warp-group products, which more than four warps would compute twice.
    """
    largest = block_h * max(block_k, block_v)
    return 4 if largest <= 1024 or (block_c == 64 and largest <= 4096) else 8


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One call's sizes, and what its kernels share."""

    rows: int
    tokens: int
    key_dim: int
    value_dim: int
    hidden: int
    two_layer: bool
    has_momentum: bool
    options: Options
    chunks: int
    checkpoint: int
    kept: int
    ends_at_boundary: bool

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """Tiles of tokens, keys, values and the hidden layer."""
        return tuple(map(padded, (self.options.chunk_size, self.key_dim, self.value_dim, self.hidden)))

    @property
    def forward_scratch(self) -> tuple[int, ...]:
        """Shape of the memory by which the steps of a chunk hand on their tiles; empty: in registers."""
        block_c, _, block_v, block_h = self.blocks
        if block_c * max(block_v, block_h) <= HELD_TILE:
            return ()
        return self.rows, block_c * (3 * block_h + 2 * block_v + block_c)

    @property
    def holds_weights(self) -> bool:
        """Whether the forward kernel holds the running weights in registers; two layers of 64 × 64 spill."""
        _, block_k, block_v, _ = self.blocks
        narrow = block_k * block_v <= HELD_MATRIX
        return narrow and not (self.two_layer or self.has_momentum or self.forward_scratch)

    def call(
        self, kernel: Any, arguments: dict[str, torch.Tensor | int | None], *, by_chunk: bool = False
    ) -> KernelCall:
        """The call of ``kernel``: what it takes of ``arguments``, sizes, options and tiles.

        One program a row, or, ``by_chunk``, one a row and chunk.
        """
        options = self.options
        blocks = self.blocks
        run_time = {
            **arguments,
            "tokens": self.tokens,
            "kept": self.kept,
            "checkpoint": self.checkpoint,
            "offset": options.offset,
            "chunks": self.chunks,
            "chunk_places": self.chunks,
        }
        constants = {
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "HIDDEN": self.hidden,
            "TWO_LAYER": self.two_layer,
            "CHUNK": options.chunk_size,
            "RECOMPUTES": self.checkpoint > 1,
            "HELD": self.holds_weights,
            "RUNNING": options.read == "running",
            "ACTIVATION": options.activation,
            "NORMALIZED": options.normalize_hidden,
            "RESIDUAL": options.residual,
            "ERASE_INNER": options.erase != "none",
            "ERASE_OUTER": options.erase == "per_layer",
            "PROXIMAL": options.proximal,
            "BOUND": options.error_bound or 0.0,
            **dict(zip(("BLOCK_C", "BLOCK_K", "BLOCK_V", "BLOCK_H"), blocks)),
            "PRECISION": options.precision,
        }
        names = kernel.arg_names
        return KernelCall(
            kernel,
            (self.rows * self.chunks if by_chunk else self.rows,),
            {name: value for name, value in run_time.items() if name in names},
            {name: value for name, value in constants.items() if name in names},
            4 if by_chunk else warps_of(*blocks),
            1,
        )


def plan_rows(inputs: Inputs, options: Options) -> RowPlan:
    """The sizes of a call; how many chunks lie between the states kept for its backward pass."""
    rows, tokens, key_dim = inputs.k.shape
    value_dim = inputs.v.shape[-1]
    size = options.chunk_size
    uniform = inputs.begin is None
    chunks = -(-(options.offset % size + tokens) // size)
    numbers = sum(x[0].numel() for x in inputs[6:10] if x is not None)
    step = options.checkpoint_every
    if not step:
        step = 1 if 4 * rows * chunks * numbers <= KEPT_BYTES else math.isqrt(chunks)
    return RowPlan(
        rows=rows,
        tokens=tokens,
        key_dim=key_dim,
        value_dim=value_dim,
        hidden=inputs.inner.shape[1],
        two_layer=inputs.outer is not None,
        has_momentum=inputs.momentum is not None,
        options=options,
        chunks=chunks,
        checkpoint=step,
        kept=-(-chunks // step),
        ends_at_boundary=uniform and (options.offset + tokens) % size == 0,
    )
