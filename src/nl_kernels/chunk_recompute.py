"""A loop over chunks whose backward pass recomputes: it keeps some states, not every token's activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    segment that is recomputed take like shares of memory.
    """
    head = min(-offset % chunk_size, tokens)
    whole = (tokens - head) // chunk_size
    step, last = checkpoint_every, 0
    if step is None:
        last = min(whole, footprint.kept // footprint.chunk)
        step = max(1, math.isqrt((whole - last) * footprint.state // footprint.chunk))
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
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), state


def _forward(compute, segments, state, constants, sequences, kept: list[State] | None):
    outputs = []
    for segment in segments:
        if kept is not None:
            kept.append(state)
        state, output = compute(segment, state, constants, _slice(sequences, segment))
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), state


def _slice(sequences: State, segment: Segment) -> State:
    return tuple(x if x is None else x[:, segment.start : segment.stop] for x in sequences)


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
        seen: set[int] = {id(x) for x in tensors}
        fresh = []
        for x in final:
            fresh.append(x.clone() if x is not None and id(x) in seen else x)
            seen.add(id(x))
        return (output, *fresh)

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
