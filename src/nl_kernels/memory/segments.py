"""How a call is cut into segments: chunks that the backward pass keeps, or recomputes, together."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from nl_kernels.memory.bank import Layers, Layout

State = tuple[torch.Tensor | None, ...]
KEPT_MEGABYTES = {"one linear": 6, "one": 10, "five linear": 11, "five": 42, "continuum": 256}
"""Of activations that are not recomputed, by memories of a bank; and of a continuum's level."""


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
    tokens: int,
    chunk_size: int,
    offset: int,
    checkpoint_every: int | None,
    footprint: Footprint,
    block: int = 1,
) -> list[Segment]:
    """Cut ``tokens`` at the chunk boundaries of a grid on which the first one has slot ``offset``.

    No segment begins within a block, which is as many chunks, but for what the call's ends leave of one.
    Without ``checkpoint_every`` the last chunks are one segment that is not recomputed, as many as
    ``footprint.kept`` has room for, and the others are cut so that the states kept and the activations of a
    segment that is recomputed take like shares of memory; at least into segments as long as the last one,
    whose memory is free again by then.
    """
    head = min(-offset % chunk_size, tokens)
    segments = [Segment(0, head, 1, offset)] if head else []
    chunks, done = (tokens - head) // chunk_size, head
    first = min(-((offset + done) // chunk_size) % block, chunks)
    if first:
        segments.append(Segment(done, chunk_size, first, offset + done))
        done += first * chunk_size
    blocks, odd = divmod(chunks - first, block)
    every = None if checkpoint_every is None else max(1, checkpoint_every // block)
    kept = True
    for begin, end, kept in spans(blocks, every, footprint._replace(chunk=footprint.chunk * block)):
        start = done + begin * block * chunk_size
        segments.append(Segment(start, chunk_size, (end - begin) * block, offset + start, kept))
    done += blocks * block * chunk_size
    if odd:
        segments.append(Segment(done, chunk_size, odd, offset + done, kept))
        done += odd * chunk_size
    if done < tokens:
        segments.append(Segment(done, tokens - done, 1, offset + done, kept))
    return segments


def spans(chunks: int, every: int | None, footprint: Footprint) -> list[tuple[int, int, bool]]:
    """First and stop of chunks that go together, and whether their activations are kept.

    ``every``: chunks between the states that are kept, with nothing else; None: as in :func:`plan_segments`.
    """
    last = 0 if every else min(chunks, footprint.kept // footprint.chunk)
    step = every or max(1, last, math.isqrt((chunks - last) * footprint.state // footprint.chunk))
    cuts = [*range(0, chunks - last, step), *([chunks - last] if last else []), chunks]
    return [(begin, end, begin == chunks - last) for begin, end in itertools.pairwise(cuts)]


def footprint(layout: Layout, running: Layers, chunk_size: int, width: int) -> Footprint:
    """What the backward pass needs, from counts of tensors in :class:`~nl_kernels.memory.chunk.Learned`."""
    numbers = sum(x.numel() for x in running)
    tokens, item = layout.banks * chunk_size, running[0].element_size()
    if layout.linear:
        chunk = numbers + tokens * (4 * running[0].shape[1] + 2 * width + 5 * chunk_size)
    else:
        hidden = running[0].shape[1]
        chunk = numbers + layout.memories * tokens * (13 * hidden + 6 * width + 11 * chunk_size)
    kind = f"{'five' if layout.self_made else 'one'}{' linear' if layout.linear else ''}"
    return Footprint(item * numbers, item * chunk, KEPT_MEGABYTES[kind] << 20)


def shaped(values: State, chunks: int) -> State:
    """Tensors [N, n · c, ..] as [N, n, c, ..]; those of a single chunk stay [N, c, ..]."""
    if chunks == 1:
        return values
    parts = (None if x is None else x.unflatten(1, (chunks, -1)) for x in values)
    return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)


def by_chunk(value, chunks: int) -> list:
    """Nested tuples of tensors [N, n, c, ..], or of one chunk, by chunk."""
    if chunks == 1:
        return [value]
    if value is None:
        return [None] * chunks
    if isinstance(value, torch.Tensor):
        return value.unbind(1)
    kind = type(value) if hasattr(value, "_fields") else lambda *parts: parts
    return [kind(*parts) for parts in zip(*(by_chunk(part, chunks) for part in value))]


def joined(values: list):
    """The inverse of :func:`by_chunk`, of dictionaries too."""
    first = values[0]
    if first is None or len(values) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.stack(values, 1)
    if isinstance(first, dict):
        return {name: joined([value[name] for value in values]) for name in first}
    return type(first)(*map(joined, zip(*values)))
