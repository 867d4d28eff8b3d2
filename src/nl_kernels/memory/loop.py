"""The loop over chunks around a bank of memories: one node of the autograd graph for a whole call.

It owns all that is not arithmetic of a chunk: what the backward pass keeps and what it recomputes, snapshots
at the boundaries of two clocks, and truncation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.dispatch import products_for, without_autocast
from nl_kernels.memory.bank import Layers, snapshot_adjoint, take_snapshot
from nl_kernels.memory.chunk import BankRule, Learned, Prepared, Tokens, Weights, learn, prepare
from nl_kernels.memory.chunk_adjoint import ChunkAdjoint, TokenAdjoints, learn_adjoint, prepare_adjoint
from nl_kernels.memory.generate import GeneratedTokens, GivenTokens
from nl_kernels.memory.segments import Segment, State, by_chunk, joined, shaped


class _Chunk(NamedTuple):
    """What a chunk met; the snapshot is absent where it was the running weights."""

    running: Layers
    velocity: Layers
    snapshot: Layers
    learned: Learned


class _Block(NamedTuple):
    tokens: Tokens
    made: Any
    prepared: Prepared
    chunks: list[_Chunk]


@dataclasses.dataclass(frozen=True)
class Loop:
    """What runs a segment forward and backward.

    A state is running weights, velocities and snapshot, a bank each (:mod:`nl_kernels.memory.bank`);
    constants are the anchor's bank and those of ``source``.

    Attributes:
        clocks: tokens between the boundaries of the memory that is read, and of the others.
        truncate_period: tokens between boundaries that no gradient crosses, or ``None``.
        grid: where the tokens lie, for N banks.
        operands: the dtype of the caller's tokens.
    """

    bank: BankRule
    source: GivenTokens | GeneratedTokens
    clocks: tuple[int, int]
    truncate_period: int | None
    grid: ChunkGrid
    operands: torch.dtype

    def forward(
        self, segment: Segment, state: State, constants: State, sequences: State, keep: bool
    ) -> tuple[State, list[torch.Tensor], list[_Block]]:
        """The state after a segment, its reads in parts [N, .., Dv], and with ``keep`` for the backward."""
        running, velocity, snapshot = self._banks(state)
        anchor, own = self._constants(constants)
        scratch = [torch.empty_like(x) for x in anchor]
        outputs, blocks = [], []
        starts = self._blocks(segment)
        for (start, count), given in zip(starts, _spans(sequences, segment, starts)):
            base = _base(running, snapshot, anchor, scratch)
            tokens, made = self.source.tokens(base, own, given, keep)
            tokens = shaped(tokens, count)
            prepared = prepare(self.bank.rule, tokens)
            chunks = []
            for i, (part, here) in enumerate(zip(by_chunk(tokens, count), by_chunk(prepared, count))):
                if i:
                    base = _base(running, snapshot, anchor, scratch)
                met = Weights(base, running, velocity, anchor)
                o, after, velocity_after, learned = learn(self.bank, part, here, met, keep)
                outputs.append(o)
                if keep:
                    chunks.append(_Chunk(running, velocity, snapshot, learned))
                snapshot = self._snapshot(segment, start + i, after, running, snapshot)
                running, velocity = after, velocity_after
            if keep:
                blocks.append(_Block(tokens, made, prepared, chunks))
        return self._state(running, velocity, snapshot), outputs, blocks

    def backward(
        self,
        segment: Segment,
        blocks: list[_Block],
        constants: State,
        sequences: State,
        d_state: State,
        d_output: torch.Tensor | None,
        d_constants: State,
        d_sequences: State,
    ) -> State:
        """The adjoint of the state before a segment; adds to ``d_constants`` and fills ``d_sequences``.

        Tensors of ``d_state`` may be overwritten.
        """
        anchor, own = self._constants(constants)
        scratch = [torch.empty_like(x) for x in anchor]
        count = self.bank.layout.layers
        d_anchor, d_own = d_constants[:count], d_constants[count:]
        carried = [d_state[i * count : (i + 1) * count] for i in range(3)]
        starts, d_given, written = self._blocks(segment), [], segment.chunks
        given, d_reads = (_spans(x, segment, starts) for x in (sequences, (d_output,)))
        for start, count in reversed(starts):
            block, d_outputs = blocks.pop(), by_chunk(shaped(d_reads.pop(), count), count)
            parts, shared = by_chunk(block.tokens, count), by_chunk(block.prepared, count)
            found: list[TokenAdjoints] = []
            for i in reversed(range(count)):
                chunk = block.chunks.pop()
                d_running, d_velocity, d_snapshot = self._through_boundary(segment, start + i, carried, chunk)
                base = _base(chunk.running, chunk.snapshot, anchor, scratch)
                met = Weights(base, chunk.running, chunk.velocity, anchor)
                d_after = (d_outputs[i][0], d_running, d_velocity)
                found_here = learn_adjoint(self.bank, parts[i], shared[i], met, chunk.learned, *d_after)
                found.append(found_here.tokens)
                if i == 0:
                    d_tokens = prepare_adjoint(
                        self.bank.rule, block.tokens, block.prepared, joined(found[::-1])
                    )
                    if count > 1:
                        d_tokens = Tokens(*(None if x is None else x.flatten(1, 2) for x in d_tokens))
                    d_given.append(
                        self.source.tokens_adjoint(
                            base, own, given.pop(), block.made, d_tokens, found_here.base
                        )
                    )
                self._add_anchor(d_anchor, found_here)
                d_base = [d if old is None else old.add_(d) for d, old in zip(found_here.base, d_snapshot)]
                carried = [found_here.running, found_here.velocity, d_base]
                if not chunk.snapshot:
                    carried[0] = [d.add_(b) for d, b in zip(found_here.running, d_base)]
                    carried[2] = ()
            if start == 0 or (written - start) * segment.length >= 128:  # few copies, and none of much
                here = slice(start * segment.length, written * segment.length)
                _fill([None if x is None else x[:, here] for x in d_sequences], d_own, d_given)
                d_given, written = [], start
        return self._state(*carried)

    def _banks(self, state: State) -> Iterator[Layers]:
        """Running weights, velocities and snapshot."""
        count = self.bank.layout.layers
        parts = (state[i * count : (i + 1) * count] for i in range(3))
        return (() if part[0] is None else part for part in parts)

    def _constants(self, constants: State) -> tuple[Layers, State]:
        """The anchor, and what is the source's."""
        count = self.bank.layout.layers
        return () if constants[0] is None else constants[:count], constants[count:]

    def _state(self, *banks: Layers) -> State:
        """The inverse of :meth:`_banks`."""
        absent = (None,) * self.bank.layout.layers
        return tuple(x for bank in banks for x in (bank or absent))

    def _blocks(self, segment: Segment) -> list[tuple[int, int]]:
        """The first chunk, and the number of chunks, of each block of a segment."""
        block, chunks = self.source.block, segment.chunks
        return [(start, min(block, chunks - start)) for start in range(0, chunks, block)]

    def _met(self, segment: Segment, chunk: int, clocks: tuple[int, int]) -> list[bool | torch.Tensor]:
        """By layer, where boundaries of the clocks are met after a chunk."""
        end = segment.slot + (chunk + 1) * segment.length
        met = (self.grid.meets_boundary(end, clock) for clock in clocks)
        return self.bank.layout.met(*met, self.grid.position.device)

    def _snapshot(
        self, segment: Segment, chunk: int, after: Layers, before: Layers, snapshot: Layers
    ) -> Layers:
        met = self._met(segment, chunk, self.clocks)
        if met[0] is True:
            return ()
        return tuple(map(take_snapshot, met, after, before, snapshot or (None,) * len(met)))

    def _through_boundary(
        self, segment: Segment, chunk: int, carried: list, before: _Chunk
    ) -> tuple[Layers, Layers, list[torch.Tensor | None]]:
        """Adjoints of weights and velocities just after a chunk and of the snapshot that it had, by layer."""
        running, velocity, snapshot = (part or (None,) * self.bank.layout.layers for part in carried)
        if self.truncate_period is not None:
            cut = self._met(segment, chunk, (self.truncate_period,) * 2)
            running, velocity, snapshot = (
                [_without(met, d) for met, d in zip(cut, part)] for part in (running, velocity, snapshot)
            )
        met = self._met(segment, chunk, self.clocks)
        running, snapshot = zip(*map(snapshot_adjoint, met, running, snapshot))
        running = [torch.zeros_like(x) if d is None else d for d, x in zip(running, before.running)]
        velocity = [torch.zeros_like(x) if d is None else d for d, x in zip(velocity, before.velocity)]
        return running, velocity, snapshot

    def _add_anchor(self, totals: State, found: ChunkAdjoint) -> None:
        for total, d in zip(totals, found.base):
            if total is not None:
                total += d
        if found.error_anchor is not None and totals[0] is not None:
            totals[0].add_(found.error_anchor)
        for total, d in zip(totals, found.read_anchor):
            if total is not None:
                self.bank.layout.read_weights(total).add_(d)


def run_segments(
    loop: Loop, segments: Sequence[Segment], state: State, constants: State, sequences: State
) -> tuple[torch.Tensor, State]:
    """Run the segments and join their reads along time.

    Args:
        segments: in order, covering the sequences.
        state: tensors carried from segment to segment (``None`` for an absent one, in and out).
        constants: tensors that every segment uses.
        sequences: tensors [N, T, ..].

    Returns:
        The reads [N, T, Dv] and the last state. Gradients flow to all tensors; the backward pass keeps one
        state per segment and recomputes the rest, one segment at a time, but for the segments marked as kept.
        It cannot be differentiated again.
    """
    tensors = (*state, *constants, *sequences)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        layout = (len(state), len(constants))
        output, *state = _WithAdjoint.apply(loop, tuple(segments), layout, *tensors)
        return output, tuple(state)
    output, state, _, _ = _through(loop, segments, state, constants, sequences, False)
    return output, state


def _through(
    loop: Loop, segments: Sequence[Segment], state: State, constants: State, sequences: State, keep: bool
) -> tuple[torch.Tensor, State, list[State], list[list[_Block] | None]]:
    """Reads and the last state; the state before each segment, and with ``keep`` what the last one made."""
    outputs, starts, made = [], [], []
    with products_for(loop.operands, sequences[0].device.type):
        for segment in segments:
            starts.append(state)
            keeps = keep and (segment.kept or len(segments) == 1)
            given = _of_segment(sequences, segment)
            state, parts, blocks = loop.forward(segment, state, constants, given, keeps)
            outputs += parts
            made.append(blocks if keeps else None)
    return _joined(outputs), state, starts, made


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loop, segments, layout, *tensors):
        output, state, starts, ctx.made = _through(loop, segments, *_split(tensors, *layout), True)
        ctx.loop, ctx.segments, ctx.layout = loop, segments, layout
        ctx.save_for_backward(*tensors, *(x for start in starts[1:] for x in start))
        ctx.set_materialize_grads(False)
        return (output, *_unaliased(state, tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, *d_state):
        states, constants = ctx.layout
        needs = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors
        first, shared, sequences = _split(saved[: len(needs)], states, constants)
        starts = [first, *(saved[i : i + states] for i in range(len(needs), len(saved), states))]
        _, shared_needs, sequence_needs = _split(needs, states, constants)
        totals = [torch.zeros_like(x) if need else None for x, need in zip(shared, shared_needs)]
        joined = [torch.empty_like(x) if need else None for x, need in zip(sequences, sequence_needs)]
        d_state = tuple(None if d is None else d.clone() for d in d_state)
        device = sequences[0].device.type
        with products_for(ctx.loop.operands, device), without_autocast(device):
            for i in reversed(range(len(ctx.segments))):
                segment, blocks = ctx.segments[i], ctx.made[i]
                given, places, (d_reads,) = (
                    _of_segment(x, segment) for x in (sequences, joined, (d_output,))
                )
                ctx.made[i] = None  # frees it; a second backward pass recomputes
                if blocks is None:
                    blocks = ctx.loop.forward(segment, starts[i], shared, given, True)[2]
                d_state = ctx.loop.backward(segment, blocks, shared, given, d_state, d_reads, totals, places)
        d_state = (d if need else None for d, need in zip(d_state, needs))
        return (None, None, None, *d_state, *totals, *joined)


def _fill(places: State, totals: State, blocks: list[tuple[State, State]]) -> None:
    """Copy adjoints of sequences to their places, and add those of constants; the last block comes first."""
    d_sequences, d_by_token = (zip(*parts) for parts in zip(*blocks[::-1]))
    for place, parts in zip(places, d_sequences):
        if place is not None:
            place.zero_() if parts[0] is None else place.copy_(_joined(parts))
    for total, parts in zip(totals, d_by_token):
        if total is not None:
            total += _joined(parts).sum(1, keepdim=True)


def _split(tensors: State, states: int, constants: int) -> tuple[State, State, State]:
    return tensors[:states], tensors[states : states + constants], tensors[states + constants :]


def _joined(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _unaliased(final: State, tensors: State) -> State:
    """The same tensors, cloned where one is among ``tensors`` or comes twice, as a node's outputs may not."""
    own = []
    for i, x in enumerate(final):
        # compared, not looked up by id: torch.compile would take the ids of one call for constants
        seen = any(x is other for other in (*tensors, *final[:i]))
        own.append(x.clone() if x is not None and seen else x)
    return tuple(own)


def _of_segment(sequences: State, segment: Segment) -> State:
    return tuple(x if x is None else x[:, segment.start : segment.stop] for x in sequences)


def _spans(sequences: State, segment: Segment, blocks: list[tuple[int, int]]) -> list[State]:
    """A segment's sequences by block."""
    sizes = [count * segment.length for _, count in blocks]
    return list(zip(*([None] * len(sizes) if x is None else x.split_with_sizes(sizes, 1) for x in sequences)))


def _base(running: Layers, snapshot: Layers, anchor: Layers, scratch: list[torch.Tensor]) -> Layers:
    """The weights at the snapshot; sums are put into ``scratch``, which stays in the cache."""
    weights = snapshot or running
    return [torch.add(*x, out=out) for *x, out in zip(weights, anchor, scratch)] if anchor else weights


def _without(met: bool | torch.Tensor, d: torch.Tensor | None) -> torch.Tensor | None:
    """``d`` without what is cut where ``met``."""
    if d is None or met is True:
        return None
    return d if met is False else d.masked_fill(met, 0)
