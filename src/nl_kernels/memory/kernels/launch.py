"""Launch parameters of a bank's kernels: pure functions of shapes, options and architecture.

The numbers come from ahead-of-time compilation (registers, spills and shared memory against each
architecture's limits), not from timings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nl_kernels.memory.kernels.arguments import Bank, Shape, Tokens, compiled_of
from nl_kernels.memory.state import map_tensors
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support import targets
from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.tiles import MIN_TILE, padded, power_of_two

KEPT_BYTES = 256 << 20  # of states at every chunk's start; beyond, some are recomputed
MOST_WARPS = 16

# By architecture the widest head and hidden layer by length of chunks: of given targets, linear and of two
# layers; then of self-made ones.
_LIMITS = {
    "sm_90": ({16: 128, 32: 64}, {16: 128, 32: 64}, {16: 128, 32: 32}, {16: 64}),
    "sm_80": ({16: 128, 32: 64}, {16: 128, 32: 64}, {16: 64, 32: 32}, {16: 32}),
    "sm_89": ({16: 64, 32: 64}, {16: 64, 32: 64}, {16: 32}, {16: 32}),
    "gfx942": ({16: 64}, {16: 64}, {16: 64}, {16: 16}),
}


class Options(NamedTuple):
    """What the operators take besides tensors, in the order of their schema.

    Attributes:
        activation, normalize_hidden, residual, error_bound: of :class:`~nl_kernels.memory_rule.MemoryRule`;
            ``error_bound`` 0 for none.
        erases: ``rule.erase`` is "per_layer", not "none".
        at_anchor: linear memories' errors are taken at the anchor.
        read: "running" or "snapshot".
        chunk_size, generator_chunk_size: tokens between snapshots of the memory that is read, and of others.
        truncate: tokens between cuts of the gradient, 0 for none.
        checkpoint_every: chunks between the states kept for the backward pass; 0 keeps none.
        precision: of the products, a name of :func:`nl_kernels.triton_support.language.matmul`.
        offset: slot of the first token, where all sequences have the same.
        slots: slots of the grid, from the boundary before the first token.
        architecture: whose launch parameters to take.
    """

    activation: str
    normalize_hidden: bool
    residual: bool
    error_bound: float
    erases: bool
    at_anchor: bool
    read: str
    chunk_size: int
    generator_chunk_size: int
    truncate: int
    checkpoint_every: int
    precision: str
    offset: int
    slots: int
    architecture: str

    @classmethod
    def of(cls, rule: MemoryRule, **others: Any) -> Options:
        """Those of a rule, and the others by name."""
        return cls(
            activation=rule.activation,
            normalize_hidden=rule.normalize_hidden,
            residual=rule.residual,
            error_bound=float(rule.error_bound or 0),
            erases=rule.erase != "none",
            at_anchor=rule.errs_at_anchor(linear=True),
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

    @property
    def ratio(self) -> int:
        """Chunks of the slower clock's period."""
        return max(self.chunk_size, self.generator_chunk_size) // self.chunk


class Inputs(NamedTuple):
    """A call's tensors, contiguous; also their gradients. A bank is absent where there is no anchor."""

    tokens: Tokens
    running: Bank
    snapshot: Bank
    anchor: Bank

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> Inputs:
        """The inverse of :attr:`tensors`."""
        count = len(Tokens._fields)
        banks = (Bank(*tensors[i : i + 2]) for i in range(count, len(tensors), 2))
        return cls(Tokens(*tensors[:count]), *banks)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """One after the other."""
        return tuple(x for part in self for x in part)


def shape_of(*, generates: bool, key_dim: int, value_dim: int, hidden: int, options: Options) -> Shape:
    """The sizes of a bank and how its layers are cut into blocks of rows, one for each warp."""
    memories = (5 if hidden else 4) if generates else 1
    padded_memories = power_of_two(memories)
    block_k, block_v = padded(key_dim), padded(value_dim)
    block_h = padded(hidden) if hidden else MIN_TILE
    narrowest = min(block_v, block_h) if hidden else block_v
    many = max(block_k, block_v, block_h) > 64 or padded_memories > 4
    most = MOST_WARPS if many else MOST_WARPS // 2
    per = max(1, min(narrowest // MIN_TILE, most // padded_memories))
    wide, narrow = min(memories, 3), (1 if hidden else 2) if generates else 0
    outputs = wide * value_dim + (memories - wide) * narrow
    return Shape(
        MEMORIES=memories,
        WIDE=wide,
        NARROW=narrow,
        OWN=2 if generates else 0,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        HIDDEN=hidden,
        CHUNK=options.chunk,
        MEMORY_CLOCK=options.chunk_size,
        OTHERS_CLOCK=options.generator_chunk_size,
        TRUNCATE=options.truncate,
        PER=per,
        BLOCKS=padded_memories * per,
        SLICE=min(32, block_k, block_v, block_h) if hidden else min(32, block_k),
        BLOCK_C=padded(options.chunk),
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        BLOCK_H=block_h,
        LAST_IN=hidden or key_dim,
        LAST_BLOCK=block_h if hidden else block_k,
        FIRST_SIZE=memories * hidden * key_dim,
        LAST_SIZE=outputs * (hidden or key_dim),
        FIRST_KEPT=padded_memories * block_h * block_k if hidden else 0,
        LAST_KEPT=padded_memories * block_v * (block_h if hidden else block_k),
    )


def precision_of(dtype: torch.dtype, architecture: str) -> str:
    """How products compute for callers of ``dtype``: in bf16 for bf16, else as elsewhere."""
    return "bf16" if dtype == torch.bfloat16 else targets.precision_of(dtype, architecture)


@dataclass(frozen=True)
class Plan:
    """How one call runs, and what its kernels share."""

    inputs: Inputs
    options: Options
    shape: Shape
    rule: dict[str, Any]

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> Plan:
        tokens, weights = inputs.tokens, inputs.running
        generates = tokens.gate is not None
        shape = shape_of(
            generates=generates,
            key_dim=tokens.key.shape[-1],
            value_dim=tokens.value.shape[-1],
            hidden=0 if weights.first is None else weights.last.shape[-1],
            options=options,
        )
        rule = {
            "GENERATES": generates,
            "RUNNING": options.read == "running",
            "ANCHORED": inputs.anchor.last is not None,
            "ACTIVATION": options.activation,
            "NORMALIZED": options.normalize_hidden,
            "RESIDUAL": options.residual,
            "ERASES": options.erases,
            "AT_ANCHOR": options.at_anchor and weights.first is None,  # linear memories' errors at keys
            "SCALED": generates and tokens.rate is not None,
            "BOUND": options.error_bound,
            "PRECISION": options.precision,
        }
        return cls(inputs, options, shape, rule)

    @property
    def heads(self) -> int:
        """N, of all sequences."""
        return self.inputs.running.last.shape[0]

    def segments(self) -> list[tuple[int, int]]:
        """First and stop of the chunks between kept states."""
        every, chunks = self.options.checkpoint_every, self.options.chunks
        return [(first, min(first + every, chunks)) for first in range(0, chunks, every)]

    def bounds(self) -> tuple[torch.Tensor | None, torch.Tensor | int]:
        """Slots of a head's first token and after its last one [N, 1, 1]; ``None`` and a number for all."""
        query, *_, spans = self.inputs.tokens
        if spans is None:
            return None, self.options.offset + query.shape[1]
        begin, stop = (spans[:, i].repeat_interleave(query.shape[2])[:, None, None] for i in (1, 2))
        return begin, stop

    def at_segment(self, kept: Bank, index: int, start: int) -> tuple[Bank, Bank]:
        """Running weights and snapshot before the chunk at slot ``start``, in memory of their own."""
        if index == 0:
            return copies(self.inputs.running), copies(self.inputs.snapshot)
        pairs, (begin, _) = [], self.bounds()
        for states, running, snapshot in zip(kept, self.inputs.running, self.inputs.snapshot, strict=True):
            if states is None:
                pairs.append((None, None))
                continue
            state = self.rows_of(states[:, index], like=running)
            if begin is None:
                pairs.append((state, state.clone()))
            else:
                # Heads that have not begun, or begin here, still have what the call began with.
                pairs.append(tuple(torch.where(begin < start, state, x) for x in (running, snapshot)))
        running, snapshot = zip(*pairs, strict=True)
        return Bank(*running), Bank(*snapshot)

    def rows_of(self, kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A layer's weights as rows, ``like`` the caller's, from a copy that a kernel has kept."""
        shape, (count, width) = self.shape, like.shape[1:]
        first = like is self.inputs.running.first
        out, wide = (shape.BLOCK_H, shape.MEMORIES) if first else (shape.BLOCK_V, shape.WIDE)
        size = shape.HIDDEN if first else shape.VALUE_DIM
        # The order of kernels/fragments.py: tiles of 16 × 16, of which a lane has two rows of two numbers.
        tiles = kept.view(kept.shape[0], -1, padded(width) // 16, 2, 8, 4, 2, 2)
        rows = tiles.permute(0, 1, 6, 4, 2, 3, 5, 7).reshape(kept.shape[0], -1, out, padded(width))
        parts = [rows[:, m, : size if m < wide else shape.NARROW] for m in range(shape.MEMORIES)]
        return torch.cat(parts, 1)[:, :count, :width].contiguous()

    def call(self, kernel: Any, shape: Shape, arguments: dict[str, Any], *, backward: bool) -> KernelCall:
        """The call of ``kernel``, one program a head."""
        tokens, options = self.inputs.tokens, self.options
        compiled = compiled_of(shape, backward=backward, **self.rule)
        scratch = self.inputs.running.last.new_empty(self.heads, compiled.SIZE)
        return KernelCall(
            kernel=kernel,
            grid=(self.heads,),
            arguments={
                "tokens": tokens,
                "scratch": scratch,
                "T": tokens.query.shape[1],
                "H": tokens.query.shape[2],
                "offset": options.offset,
                **arguments,
            },
            constants={"BANK": compiled},
            num_warps=shape.BLOCKS,
            num_stages=1,
        )

    def learn(
        self, running: Bank, snapshot: Bank, kept: Bank, o: torch.Tensor | None, **span: int
    ) -> KernelCall:
        """The call that lets ``running`` and ``snapshot`` learn in place; ``span``: the integers."""
        from nl_kernels.memory.kernels.forward import learn_kernel

        banks = {"running": running, "snapshot": snapshot, "anchor": self.inputs.anchor, "kept": kept}
        return self.call(learn_kernel, self.shape, {**banks, "o": o, **span}, backward=False)

    def adjoint(self, arguments: dict[str, Any], **span: int) -> KernelCall:
        """The call that takes the gradients of some chunks back."""
        from nl_kernels.memory.kernels.adjoint import learn_adjoint_kernel

        given = {"resumed": self.inputs.snapshot, "anchor": self.inputs.anchor}
        wide = self.shape.BLOCKS == MOST_WARPS and self.shape.BLOCK_K > 64  # shared memory
        shape = self.shape._replace(SLICE=16) if wide else self.shape
        return self.call(learn_adjoint_kernel, shape, {**given, **arguments, **span}, backward=True)


def limits_of(*, self_made: bool, linear: bool, chunk: int, architecture: str) -> tuple[int, int]:
    """The longest chunk at all, and the widest head and hidden layer with chunks of ``chunk`` (0: none)."""
    table = _LIMITS["sm_90" if architecture == "sm_100" else architecture][2 * self_made + (not linear)]
    return max(table), next((width for most, width in sorted(table.items()) if padded(chunk) <= most), 0)


def copies(bank: Bank) -> Bank:
    """Both layers in memory of their own."""
    return map_tensors(torch.clone, bank)


def kept_states(plan: Plan, slots: int) -> Bank:
    """Room for ``slots`` states of each head, [N, slots, ..], in the kernels' order."""
    sizes = (plan.shape.FIRST_KEPT, plan.shape.LAST_KEPT)
    return Bank(*(plan.inputs.running.last.new_empty(plan.heads, slots, n) if n else None for n in sizes))


def plan_forward(
    inputs: Inputs, options: Options
) -> tuple[list[KernelCall], tuple[torch.Tensor | None, ...]]:
    """The call of the forward pass and what it fills: reads, weights after the call, their snapshot, and kept
    weights. Meta tensors will do."""
    plan = Plan.of(inputs, options)
    running, snapshot = copies(inputs.running), copies(inputs.snapshot)
    like = torch.empty_like if inputs.tokens.spans is None else torch.zeros_like
    o = like(inputs.tokens.value)
    kept, slots = Bank(None, None), 0
    if options.checkpoint_every:
        slots = len(plan.segments())
        kept = kept_states(plan, slots)
    call = plan.learn(
        running,
        snapshot,
        kept,
        o,
        first_chunk=0,
        stop_chunk=options.chunks,
        kept_every=max(1, options.checkpoint_every),
        kept_first=0,
        kept_slots=slots,
    )
    return [call], (o, *running, *snapshot, *kept)


def checkpoint_interval(options: Options, every: int | None, numbers: int) -> int:
    """Chunks between kept states of ``numbers`` in all: whole periods of the slower clock."""
    if every is None:
        every = (
            options.ratio
            if 4 * options.chunks * numbers <= KEPT_BYTES
            else max(1, math.isqrt(options.chunks))
        )
    return -(-min(every, options.chunks) // options.ratio) * options.ratio
