"""Launch parameters of a bank's kernels: pure functions of shapes, options and architecture.

The numbers come from ahead-of-time compilation (registers, spills and shared memory against each
architecture's limits), not from timings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nl_kernels.memory.kernels.arguments import Bank, Options, Tokens, compiled_of
from nl_kernels.memory.state import map_tensors
from nl_kernels.triton_support import targets
from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.tiles import padded

KEPT_BYTES = 256 << 20  # of states at every chunk's start; beyond, some are recomputed

# By architecture the widest head and hidden layer by length of chunks: of given targets, linear and of two
# layers; then of self-made ones.
_LIMITS = {
    "sm_90": ({16: 128, 32: 64}, {16: 128, 32: 64}, {16: 128, 32: 32}, {16: 64}),
    "sm_80": ({16: 128, 32: 64}, {16: 128, 32: 64}, {16: 64, 32: 32}, {16: 32}),
    "sm_89": ({16: 64, 32: 64}, {16: 64, 32: 64}, {16: 32}, {16: 32}),
    "gfx942": ({16: 64}, {16: 64}, {16: 64}, {16: 16}),
}


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


def precision_of(dtype: torch.dtype, architecture: str) -> str:
    """How products compute for callers of ``dtype``: in bf16 for bf16, else as elsewhere."""
    return "bf16" if dtype == torch.bfloat16 else targets.precision_of(dtype, architecture)


class Plan(NamedTuple):
    """How one call runs, and what its kernels share.

    Attributes:
        kind: what :func:`~.arguments.compiled_of` takes besides ``backward``.
        bank: what the forward kernel is compiled for.
    """

    inputs: Inputs
    options: Options
    kind: functools.partial
    bank: Any

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> Plan:
        tokens, weights = inputs.tokens, inputs.running
        kind = functools.partial(
            compiled_of,
            options._replace(checkpoint_every=0, offset=0, slots=0),
            tokens.key.shape[-1],
            tokens.value.shape[-1],
            0 if weights.first is None else weights.last.shape[-1],
            generates=tokens.gate is not None,
            anchored=inputs.anchor.last is not None,
            scaled=tokens.gate is not None and tokens.rate is not None,
        )
        return cls(inputs, options, kind, kind(backward=False))

    @property
    def heads(self) -> int:
        """N, of all sequences."""
        return self.inputs.running.last.shape[0]

    @property
    def layers(self) -> tuple[Any, Any]:
        """Sizes of the first layers and of the last ones."""
        return self.bank.FIRST, self.bank.LAST

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
        weights = (None if x is None else self.rows_of(x[:, index], y) for x, y in zip(kept, self.layers))
        state, (begin, _) = Bank(*weights), self.bounds()
        if begin is None:
            return state, copies(state)
        # Heads that have not begun, or begin here, still have what the call began with.
        pick = functools.partial(torch.where, begin < start)
        return map_tensors(pick, state, self.inputs.running), map_tensors(pick, state, self.inputs.snapshot)

    def rows_of(self, kept: torch.Tensor, layer: Any) -> torch.Tensor:
        """A layer's weights as the caller has them, from a copy that a kernel has kept."""
        # The order of kernels/fragments.py: tiles of 16 × 16, of which a lane has two rows of two numbers.
        tiles = kept.view(len(kept), -1, layer.BLOCK // 16, 2, 8, 4, 2, 2)
        rows = tiles.permute(0, 1, 6, 4, 2, 3, 5, 7).reshape(len(kept), -1, layer.WIDTH, layer.BLOCK)
        outs = (layer.OUT if m < layer.WIDE else layer.NARROW for m in range(self.bank.MEMORIES))
        return torch.cat([rows[:, m, :out, : layer.IN] for m, out in enumerate(outs)], 1)

    def call(self, kernel: Any, arguments: dict[str, Any], bank: Any) -> KernelCall:
        """The call of ``kernel``, one program a head."""
        tokens, options = self.inputs.tokens, self.options
        scratch = self.inputs.running.last.new_empty(self.heads, bank.SIZE)
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
            constants={"BANK": bank},
            num_warps=bank.BLOCKS,
            num_stages=1,
        )

    def learn(
        self, running: Bank, snapshot: Bank, kept: Bank, o: torch.Tensor | None, **span: int
    ) -> KernelCall:
        """The call that lets ``running`` and ``snapshot`` learn in place; ``span``: the integers."""
        from nl_kernels.memory.kernels.forward import learn_kernel

        banks = {"running": running, "snapshot": snapshot, "anchor": self.inputs.anchor, "kept": kept}
        return self.call(learn_kernel, {**banks, "o": o, **span}, self.bank)

    def adjoint(self, arguments: dict[str, Any], **span: int) -> KernelCall:
        """The call that takes the gradients of some chunks back."""
        from nl_kernels.memory.kernels.adjoint import learn_adjoint_kernel

        given = {"resumed": self.inputs.snapshot, "anchor": self.inputs.anchor}
        return self.call(learn_adjoint_kernel, {**given, **arguments, **span}, self.kind(backward=True))


def limits_of(*, self_made: bool, linear: bool, chunk: int, architecture: str) -> tuple[int, int]:
    """The longest chunk at all, and the widest head and hidden layer with chunks of ``chunk`` (0: none)."""
    table = _LIMITS["sm_90" if architecture == "sm_100" else architecture][2 * self_made + (not linear)]
    return max(table), next((width for most, width in sorted(table.items()) if padded(chunk) <= most), 0)


def copies(bank: Bank) -> Bank:
    """Both layers in memory of their own."""
    return map_tensors(torch.clone, bank)


def kept_states(plan: Plan, slots: int) -> Bank:
    """Room for ``slots`` states of each head, [N, slots, ..], in the kernels' order."""
    empty = plan.inputs.running.last.new_empty
    return Bank(*(empty(plan.heads, slots, x.KEPT) if x.KEPT else None for x in plan.layers))


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
