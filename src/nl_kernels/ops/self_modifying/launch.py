"""Launch parameters of ``self_modifying_memory``: pure functions of shapes, options and architecture.

The numbers come from ahead-of-time compilation (registers, spills and shared memory against each
architecture's limits), not from timings.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.tiles import padded

# By architecture and by whether memories are linear: the widest head and hidden layer by length of chunks.
_LIMITS = {
    "sm_90": {True: {16: 128, 32: 64}, False: {16: 64}},
    "sm_80": {True: {16: 64, 32: 32}, False: {16: 64}},
    "sm_89": {True: {32: 32}, False: {16: 32}},  # literal rule: 106 KiB at 64 linear; default: 125 at 64, 64
    "gfx942": {True: {16: 64, 32: 32}, False: {16: 32}},
}


@dataclass(frozen=True)
class Options:
    """What the operators take besides tensors, in the order of their schema.

    Attributes:
        activation … proximal: of :class:`~nl_kernels.memory_rule.MemoryRule`.
        error_bound: the same, 0 for no bound.
        read, chunk_size, generator_chunk_size: of the public function.
        truncate: tokens between cuts of the gradient, 0 for none.
        checkpoint_every: chunks between the states kept for the backward pass; 0 keeps none.
        precision: of the products, a name of :func:`nl_kernels.triton_support.language.matmul`.
        offset: slot of the first token.
        slots: slots of the grid, from the boundary before the first token.
    """

    activation: str
    normalize_hidden: bool
    residual: bool
    projection_residual: bool
    target_residual: bool
    erase: str
    proximal: bool
    error_bound: float
    read: str
    chunk_size: int
    generator_chunk_size: int
    truncate: int
    checkpoint_every: int
    precision: str
    offset: int
    slots: int

    @classmethod
    def of(cls, rule: MemoryRule, **others: Any) -> Options:
        """Those of a rule, and the others by name."""
        return cls(
            activation=rule.activation,
            normalize_hidden=rule.normalize_hidden,
            residual=rule.residual,
            projection_residual=rule.projection_residual,
            target_residual=rule.target_residual,
            erase=rule.erase,
            proximal=rule.proximal,
            error_bound=float(rule.error_bound or 0),
            **others,
        )

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: of the faster clock."""
        return min(self.chunk_size, self.generator_chunk_size)

    @property
    def chunks(self) -> int:
        """Chunks of the grid."""
        return -(-self.slots // self.chunk)

    def as_tuple(self) -> tuple:
        return dataclasses.astuple(self)


class StepInputs(NamedTuple):
    """What the one-token kernel takes; it writes into the state's tensors, which are contiguous.

    Attributes:
        query, key_input, value_input, gate_input: [B, H, D]; momentum: [B, H] or ``None``.
        rate_max, rate_bias, retention_bias: [H].
        key_inner … retention_outer: the anchors of an anchored rule, shared [H, ..] or by sequence
            [B, H, ..]; the outer ones ``None`` if linear.
        first_snapshot … gate_velocity: the parts of the state's stacks; velocities with momentum.
        position: [B] int64. mask: [B] uint8, 0 where there is no token; ``None``: all have one.
    """

    query: torch.Tensor
    key_input: torch.Tensor
    value_input: torch.Tensor
    gate_input: torch.Tensor
    momentum: torch.Tensor | None
    rate_max: torch.Tensor
    rate_bias: torch.Tensor
    retention_bias: torch.Tensor
    key_inner: torch.Tensor | None
    key_outer: torch.Tensor | None
    value_inner: torch.Tensor | None
    value_outer: torch.Tensor | None
    memory_inner: torch.Tensor | None
    memory_outer: torch.Tensor | None
    rate_inner: torch.Tensor | None
    rate_outer: torch.Tensor | None
    retention_inner: torch.Tensor | None
    retention_outer: torch.Tensor | None
    first_snapshot: torch.Tensor | None
    last_snapshot: torch.Tensor
    gate_snapshot: torch.Tensor
    first: torch.Tensor | None
    last: torch.Tensor
    gate: torch.Tensor
    first_velocity: torch.Tensor | None
    last_velocity: torch.Tensor | None
    gate_velocity: torch.Tensor | None
    position: torch.Tensor
    mask: torch.Tensor | None


def step_options(rule: MemoryRule, *, read: str, chunk_size: int, generator_chunk_size: int) -> Options:
    """The options of one token: no grid, no gradient, plain fp32 arithmetic."""
    return Options.of(
        rule,
        read=read,
        chunk_size=chunk_size,
        generator_chunk_size=generator_chunk_size,
        truncate=0,
        checkpoint_every=0,
        precision="ieee",
        offset=0,
        slots=1,
    )


@dataclass(frozen=True)
class Config:
    """How a kernel runs: warps, and whether states stay in registers."""

    num_warps: int
    resident: bool


def config_of(
    *, linear: bool, backward: bool, width: int, hidden: int, chunk: int, momentum: bool, architecture: str
) -> Config:
    """How the kernel of one kind of memory runs at these sizes."""
    tile = padded(width) * padded(hidden)
    # The forward kernel would spill what the states leave no registers for.
    resident = backward and linear and not momentum and tile <= 64 * 64 and not architecture.startswith("gfx")
    return Config(4 if tile < 64 * 64 else 8, resident)


def why_not(
    *, rule: MemoryRule, dtype: torch.dtype, width: int, hidden: int | None, chunk: int, momentum: bool,
    architecture: str,
) -> str | None:  # fmt: skip
    """What the kernels do not cover of a call, with the remedy; ``None`` if they cover it."""
    if dtype == torch.float64:
        return "query: the Triton kernels take bfloat16, float16 and float32, got float64; use impl='eager'"
    if momentum and rule.erase != "none":
        return (
            f"momentum: the Triton kernels have it with rule.erase='none' alone, got {rule.erase!r}; "
            "use impl='eager'"
        )
    if momentum and rule.momentum != "sum":
        return (
            f"momentum: the Triton kernels take rule.momentum='sum' alone, got {rule.momentum!r}; "
            "use impl='eager'"
        )
    longest, widest = limits_of(linear=hidden is None, chunk=chunk, architecture=architecture)
    kind = "linear" if hidden is None else "two-layer"
    if not widest:
        return (
            f"chunk_size: on {architecture} the Triton kernels of {kind} memories take chunks up to "
            f"{longest}, got {chunk}; use impl='eager'"
        )
    largest = max(width, hidden or 0)
    if largest > widest:
        return (
            f"weights: on {architecture} with chunks of {chunk} the Triton kernels take heads and hidden "
            f"layers of {kind} memories up to {widest} wide, got {largest}; use impl='eager'"
        )
    return None


def limits_of(*, linear: bool, chunk: int, architecture: str) -> tuple[int, int]:
    """The longest chunk at all, and the widest head and hidden layer with chunks of ``chunk`` (0: none).

    What decides is the shared memory of the backward kernels.
    """
    table = _LIMITS["sm_90" if architecture == "sm_100" else architecture][linear]
    return max(table), next((width for most, width in sorted(table.items()) if padded(chunk) <= most), 0)


def checkpoint_interval(chunks: int, every: int | None, ratio: int) -> int:
    """Chunks between kept states: whole periods (of ``ratio`` chunks) of the slower clock.

    By default about the square root of their number.
    """
    every = max(1, math.isqrt(chunks)) if every is None else every
    return -(-min(every, chunks) // ratio) * ratio


@dataclass(frozen=True)
class Plan:
    """How one call runs, and what its kernels share."""

    options: Options
    batch: int
    tokens: int
    heads: int
    width: int
    hidden: int | None
    momentum: bool
    architecture: str

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def ratio(self) -> int:
        """Chunks of the slower clock's period."""
        options = self.options
        return max(options.chunk_size, options.generator_chunk_size) // options.chunk

    def segments(self) -> list[tuple[int, int]]:
        """First and stop of the chunks between kept states."""
        every, chunks = self.options.checkpoint_every, self.options.chunks
        return [(first, min(first + every, chunks)) for first in range(0, chunks, every)]

    def scratch(self, like: torch.Tensor) -> torch.Tensor | None:
        """Memory for the chunk's keys and values, which the memories of two layers take in turn."""
        if self.hidden is None:
            return None
        return like.new_empty(self.rows, 2, padded(self.options.chunk), padded(self.width))

    def call(self, kernel: Any, arguments: dict[str, Any], *, backward: bool) -> KernelCall:
        """The call of ``kernel``: what it takes of ``arguments``, sizes and constants."""
        options = self.options
        linear = self.hidden is None
        config = config_of(
            linear=linear,
            backward=backward,
            width=self.width,
            hidden=self.hidden or self.width,
            chunk=options.chunk,
            momentum=self.momentum,
            architecture=self.architecture,
        )
        constants = {
            "WIDTH": self.width,
            "HIDDEN": self.hidden,
            "CHUNK": options.chunk,
            "MEMORY_CLOCK": options.chunk_size,
            "OTHERS_CLOCK": options.generator_chunk_size,
            "RUNNING": options.read == "running",
            "ACTIVATION": options.activation,
            "NORMALIZED": options.normalize_hidden,
            "ERASES": options.erase != "none",
            "ERASES_LAST": options.erase == "per_layer",
            "PROXIMAL": options.proximal,
            "RESIDUAL": options.residual,
            "PROJECTION": options.projection_residual,
            "TARGET": options.target_residual,
            "BOUND": options.error_bound,
            "TRUNCATE": options.truncate,
            "RESIDENT": config.resident,
            "BLOCK_C": padded(options.chunk),
            "BLOCK_D": padded(self.width),
            "BLOCK_H": padded(self.hidden or self.width),
            "PRECISION": options.precision,
        }
        names = kernel.arg_names
        arguments = {"T": self.tokens, "H": self.heads, "offset": options.offset, **arguments}
        return KernelCall(
            kernel=kernel,
            grid=(self.rows,),
            arguments={name: arguments[name] for name in names if name not in constants},
            constants={name: value for name, value in constants.items() if name in names},
            num_warps=config.num_warps,
            num_stages=1,
        )


def plan_of(query, running_first, running_last, momentum, options: Options, architecture: str) -> Plan:
    """The plan of a call on tokens [B, T, H, D] with states [B, H, ..]."""
    batch, tokens, heads, width = query.shape
    hidden = None if running_first is None else running_last.shape[-1]
    return Plan(options, batch, tokens, heads, width, hidden, momentum is not None, architecture)
