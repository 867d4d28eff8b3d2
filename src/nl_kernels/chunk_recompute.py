"""A loop over chunks whose backward pass recomputes: it keeps some states, not every token's activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

State = tuple[torch.Tensor | None, ...]


class Segment(NamedTuple):
    """Consecutive chunks of one length that are computed, and recomputed, together.

    Attributes:
        start: index of the first token in the call.
        length: tokens in each chunk.
        chunks: number of chunks.
        slot: slot of the first token on the grid.
        kept: its activations are kept, so that it is not recomputed; only at the end of a call.
    """

    start: int
    length: int
    chunks: int
    slot: int
    kept: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.length * self.chunks


class Footprint(NamedTuple):
    """Bytes that decide what the backward pass keeps.

    Attributes:
        state: of a state kept for one segment.
        chunk: of what one chunk's backward pass needs.
        kept: to spend on chunks, the last ones, that are not recomputed.
    """

    state: int
    chunk: int
    kept: int


def plan_segments(
    tokens: int, chunk_size: int, offset: int, checkpoint_every: int | None, footprint: Footprint
) -> list[Segment]:
    """Cut ``tokens`` at the chunk boundaries of a grid on which the first one has slot ``offset``.

    Without ``checkpoint_every`` the last chunks are one segment that is not recomputed, as many as
    ``footprint.kept`` has room for, and the others are cut so that the states kept and the activations of a
    segment that is recomputed take like shares of memory; at least into segments as long as the last one,
    whose memory is free again by then.
    """
    head = min(-offset % chunk_size, tokens)
    whole = (tokens - head) // chunk_size
    step, last = checkpoint_every, 0
    if step is None:
        last = min(whole, footprint.kept // footprint.chunk)
        step = max(1, last, math.isqrt((whole - last) * footprint.state // footprint.chunk))
    segments = [Segment(0, head, 1, offset)] if head else []
    cuts = [*range(0, whole - last, step), *([whole - last] if last else []), whole]
    for begin, end in itertools.pairwise(cuts):
        start = head + begin * chunk_size
        segments.append(Segment(start, chunk_size, end - begin, offset + start, begin == whole - last))
    done = head + whole * chunk_size
    if done < tokens:
        segments.append(Segment(done, tokens - done, 1, offset + done, last > 0 or not whole))
    return segments


def run_segments(
    compute: Callable[[Segment, State, State, State], tuple[State, torch.Tensor]],
    segments: Sequence[Segment],
    state: State,
    constants: State,
    sequences: State,
) -> tuple[torch.Tensor, State]:
    """Run ``compute`` over the segments and join its outputs along time.

    Args:
        compute: ``(segment, state, constants, sequences of that segment) -> (state, output [N, tokens,
            ..])``,
            made of differentiable operations on the tensors that it is given.
        segments: in order, covering the sequences.
        state: tensors carried from segment to segment (``None`` for an absent one, in and out).
        constants: tensors that every segment uses.
        sequences: tensors [N, T, ..].

    Returns:
        The outputs [N, T, ..] and the last state. Gradients flow to all tensors; the backward pass keeps one
        state per segment and recomputes the rest, one segment at a time. It cannot be differentiated again.
    """
    tensors = (*state, *constants, *sequences)
    if len(segments) == 1 or not (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    ):
        return _forward(compute, segments, state, constants, sequences, None)
    recomputed = tuple(segment for segment in segments if not segment.kept)
    outputs = []
    if recomputed:
        layout = (len(state), len(constants))
        stop = recomputed[-1].stop
        head = tuple(x if x is None else x[:, :stop] for x in sequences)
        output, *state = _Recompute.apply(compute, recomputed, layout, *state, *constants, *head)
        state = tuple(state)
        outputs.append(output)
    if len(recomputed) < len(segments):
        output, state = _forward(compute, segments[len(recomputed) :], state, constants, sequences, None)
        outputs.append(output)
    return _joined(outputs), state


class WrittenOut(Protocol):
    """A loop over chunks with its derivative written out, for :func:`run_with_adjoint`.

    Tensors may be ``None`` where they are absent. Neither method changes what it is given, but for what
    ``backward`` is to fill.
    """

    def forward(
        self, segment: Segment, state: State, constants: State, sequences: State, keep: bool
    ) -> tuple[State, list[torch.Tensor], Any]:
        """The state after a segment, its outputs [N, tokens, ..] in parts, and what ``backward`` needs.

        With ``keep`` False the last one is not asked for.
        """

    def backward(
        self,
        segment: Segment,
        made: Any,
        constants: State,
        sequences: State,
        grad_state: State,
        grad_output: torch.Tensor | None,
        grad_constants: State,
        grad_sequences: State,
    ) -> State:
        """The gradient of the state before a segment from those of the state after it and of its output.

        ``grad_state``'s tensors may be overwritten. Adds to ``grad_constants`` and fills ``grad_sequences``;
        neither is given where no gradient is wanted.
        """


def run_with_adjoint(
    compute: WrittenOut, segments: Sequence[Segment], state: State, constants: State, sequences: State
) -> tuple[torch.Tensor, State]:
    """As :func:`run_segments`, for a loop that brings its own derivative: one node of the autograd graph.

    Segments that are marked as kept are not recomputed.
    """
    tensors = (*state, *constants, *sequences)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        layout = (len(state), len(constants))
        output, *state = _WithAdjoint.apply(compute, tuple(segments), layout, *tensors)
        return output, tuple(state)
    outputs = []
    for segment in segments:
        state, parts, _ = compute.forward(segment, state, constants, _slice(sequences, segment), False)
        outputs += parts
    return _joined(outputs), state


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, segments, layout, *tensors):
        states, constants = layout
        state, shared, sequences = _split(tensors, states, constants)
        outputs, starts, made = [], [], []
        for segment in segments:
            starts += state if made else ()
            keep = segment.kept or len(segments) == 1
            state, parts, kept = compute.forward(segment, state, shared, _slice(sequences, segment), keep)
            outputs += parts
            made.append(kept if keep else None)
        ctx.compute, ctx.segments, ctx.layout, ctx.made = compute, segments, layout, made
        ctx.save_for_backward(*tensors, *starts)
        ctx.set_materialize_grads(False)
        return (_joined(outputs), *_unaliased(state, tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *grad_state):
        states, constants = ctx.layout
        needs = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors
        first, shared, sequences = _split(saved[: len(needs)], states, constants)
        starts = [first, *(saved[i : i + states] for i in range(len(needs), len(saved), states))]
        _, shared_needs, sequence_needs = _split(needs, states, constants)
        totals = [torch.zeros_like(x) if need else None for x, need in zip(shared, shared_needs)]
        joined = [torch.empty_like(x) if need else None for x, need in zip(sequences, sequence_needs)]
        grad_state = tuple(None if g is None else g.clone() for g in grad_state)
        for i in reversed(range(len(ctx.segments))):
            segment, made = ctx.segments[i], ctx.made[i]
            parts = _slice(sequences, segment)
            ctx.made[i] = None  # frees it; a second backward pass recomputes
            if made is None:
                made = ctx.compute.forward(segment, starts[i], shared, parts, True)[2]
            outer = None if grad_output is None else grad_output[:, segment.start : segment.stop]
            grad_state = ctx.compute.backward(
                segment, made, shared, parts, grad_state, outer, totals, _slice(joined, segment)
            )
            made = None
        grad_state = (g if need else None for g, need in zip(grad_state, needs))
        return (None, None, None, *grad_state, *totals, *joined)


def _split(tensors: State, states: int, constants: int) -> tuple[State, State, State]:
    return tensors[:states], tensors[states : states + constants], tensors[states + constants :]


def _joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _unaliased(final: State, tensors: State) -> State:
    """The same tensors, cloned where one is among ``tensors`` or comes twice, as a node's outputs may not."""
    fresh = []
    for i, x in enumerate(final):
        # compared, not looked up by id: torch.compile would take the ids of one call for constants
        seen = any(x is other for other in (*tensors, *final[:i]))
        fresh.append(x.clone() if x is not None and seen else x)
    return tuple(fresh)


def _forward(compute, segments, state, constants, sequences, kept: list[State] | None):
    outputs = []
    for segment in segments:
        if kept is not None:
            kept.append(state)
        state, output = compute(segment, state, constants, _slice(sequences, segment))
        outputs.append(output)
    return _joined(outputs), state


def _slice(sequences: State, segment: Segment) -> State:
    return tuple(x if x is None else x[:, segment.start : segment.stop] for x in sequences)


def chunk_of(sequences: State, segment: Segment, i: int) -> State:
    """The i-th chunk of a segment's sequences."""
    start = i * segment.length
    return tuple(x if x is None else x[:, start : start + segment.length] for x in sequences)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, segments, layout, *tensors):
        states, constants = layout
        state = tensors[:states]
        shared = tensors[states : states + constants]
        sequences = tensors[states + constants :]
        kept: list[State] = []
        output, final = _forward(compute, segments, state, shared, sequences, kept)
        ctx.compute, ctx.segments, ctx.layout = compute, segments, layout
        flat = [x for each in kept[1:] for x in each]
        ctx.save_for_backward(*tensors, *flat)
        ctx.set_materialize_grads(False)
        # A segment may hand a tensor on untouched: outputs must not alias inputs or one another.
        return (output, *_unaliased(final, tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *grad_state):
        states, constants = ctx.layout
        saved = ctx.saved_tensors
        total = len(ctx.needs_input_grad) - 3
        needs = ctx.needs_input_grad[3:]
        tensors = saved[:total]
        kept = [tensors[:states], *(saved[i : i + states] for i in range(total, len(saved), states))]
        shared = [_leaf(x, need) for x, need in zip(tensors[states:], needs[states : states + constants])]
        sequences = tensors[states + constants :]
        sequence_needs = needs[states + constants :]
        totals: list[torch.Tensor | None] = [None] * constants
        joined = [torch.zeros_like(x) if need else None for x, need in zip(sequences, sequence_needs)]
        grad_state = list(grad_state)

        for segment, before in zip(reversed(ctx.segments), reversed(kept)):
            first = segment is ctx.segments[0]
            state = [_leaf(x, needs[i] if first else True) for i, x in enumerate(before)]
            parts = [_leaf(x, need) for x, need in zip(_slice(sequences, segment), sequence_needs)]
            with torch.enable_grad():
                after, output = ctx.compute(segment, tuple(state), tuple(shared), tuple(parts))
            outer = None if grad_output is None else grad_output[:, segment.start : segment.stop]
            roots = [
                (value, grad)
                for value, grad in zip((output, *after), (outer, *grad_state))
                if value is not None and grad is not None and value.requires_grad
            ]
            inputs = [x for x in (*state, *shared, *parts) if x is not None and x.requires_grad]
            found = [None] * len(inputs)
            if roots and inputs:
                found = torch.autograd.grad(
                    [value for value, _ in roots], inputs, [grad for _, grad in roots], allow_unused=True
                )
            grads = {id(x): grad for x, grad in zip(inputs, found)}
            grad_state = [grads.get(id(x)) for x in state]
            for i, x in enumerate(shared):
                grad = grads.get(id(x))
                if grad is not None:
                    totals[i] = grad if totals[i] is None else totals[i] + grad
            for part, whole in zip(parts, joined):
                grad = grads.get(id(part))
                if grad is not None:
                    whole[:, segment.start : segment.stop] = grad

        return (None, None, None, *grad_state, *totals, *joined)


def _leaf(x: torch.Tensor | None, requires_grad: bool) -> torch.Tensor | None:
    if x is None:
        return None
    return x.detach().requires_grad_(requires_grad and x.is_floating_point())
