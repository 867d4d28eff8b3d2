"""How tokens lie in chunks for the eager path: segments of chunk steps, and states in the order of rows.

A tensor "in chunks" is ``[R, C, …]``: R runs over chunk steps, sequences and heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nl_kernels.checks import state_dtype

# Temporaries of a segment have about this many elements: few enough to stay in a CPU's cache, many enough to
# fill a GPU.
SEGMENT_ELEMENTS = {"cpu": 2**17}
SEGMENT_ELEMENTS_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Grid:
    """How tokens lie in chunks: chunk step by chunk step, within a step the sequences that reach it.

    Packed sequences are ordered by falling length, so that those still running are a prefix and every step is
    one batched product, however ragged the lengths.
    """

    sequences: int
    state_shape: tuple[int, int, int]  # H, Dv, Dk
    like: torch.Tensor  # any tensor of the state's dtype and device
    order: torch.Tensor | None  # [N]: sequences by falling length; None: as given
    segments: list[Segment]

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, chunk_size: int) -> Grid:
        batch, length, heads, value_width = v.shape
        width = k.shape[-1]
        elements = SEGMENT_ELEMENTS.get(k.device.type, SEGMENT_ELEMENTS_ELSEWHERE)
        like = k.new_empty(0, dtype=state_dtype(k))
        state_shape = (heads, value_width, width)
        if cu_seqlens is None:
            chunk = min(chunk_size, length)
            together = max(1, elements // (batch * heads * chunk * max(chunk, width))) * chunk
            segments = [
                Segment(chunk, heads, batch, slice(start, min(start + together, length)))
                for start in range(0, length, together)
            ]
            return cls(batch, state_shape, like, None, segments)
        bounds = cu_seqlens.to("cpu", torch.int64)
        lengths = bounds.diff()
        chunk = min(chunk_size, int(lengths.max()))
        chunks = -(-lengths // chunk)
        order = torch.argsort(chunks, descending=True, stable=True)
        alive = (chunks[order] > torch.arange(int(chunks.max()))[:, None]).sum(1)
        segments, first = [], 0
        while first < len(alive):
            together = max(1, elements // (int(alive[first]) * heads * chunk * max(chunk, width)))
            last = min(first + together, len(alive))
            step = torch.repeat_interleave(torch.arange(first, last), alive[first:last])
            sequence = torch.cat([order[:n] for n in alive[first:last].tolist()])
            token = bounds[sequence, None] + step[:, None] * chunk + torch.arange(chunk)
            token = torch.where(token < bounds[sequence + 1, None], token, length).flatten().to(k.device)
            segments.append(Segment(chunk, heads, 1, token, (alive[first:last] * heads).tolist(), length))
            first = last
        return cls(len(lengths), state_shape, like, order.to(k.device), segments)

    def to_state_order(self, state: torch.Tensor | None) -> torch.Tensor:
        """A new ``[N · H, Dv, Dk]`` in the grid's order of sequences; zeros for None."""
        if state is None:
            return self.like.new_zeros(self.sequences * self.state_shape[0], *self.state_shape[1:])
        state = state if self.order is None else state[self.order]
        return state.to(self.like.dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)

    def from_state_order(self, state: torch.Tensor) -> torch.Tensor:
        """``[N · H, Dv, Dk]`` back to ``[N, H, Dv, Dk]`` in the caller's order."""
        state = state.unflatten(0, (-1, self.state_shape[0]))
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)


class Segment:
    """Consecutive chunk steps that are computed together, between two states that are kept.

    Args:
        tokens: the stretch of tokens of every sequence; or, packed, the token of each place ``[chunks · C]``,
            with ``length`` for padding.
        rows: of each step, (sequences that reach it) × heads; None: all of the batch.
    """

    def __init__(self, chunk, heads, batch, tokens, rows=None, length=None):
        self.chunk, self.heads, self.batch, self.tokens = chunk, heads, batch, tokens
        self.packed = isinstance(tokens, torch.Tensor)
        if self.packed:
            self.rows = rows
            self.is_token = tokens < length
            self.padded = not bool(self.is_token.all())
        else:
            self.missing = (tokens.start - tokens.stop) % chunk
            self.rows = [batch * heads] * (-((tokens.start - tokens.stop) // chunk))
            self.padded = self.missing > 0

    def to_chunks(self, x: torch.Tensor, dtype: torch.dtype, fill: float = 0.0) -> torch.Tensor:
        """``[B, T, H, …]`` to contiguous ``[R, C, …]``, with ``fill`` where a chunk has no token.

        Heads of keys that serve several heads of values are repeated for them, in this segment alone.
        """
        if self.packed:
            x = F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1), value=fill).index_select(0, self.tokens)
            x = x.unflatten(0, (-1, self.chunk))
        else:
            x = x[:, self.tokens]
            if self.missing:
                x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.missing), value=fill)
            x = x.unflatten(1, (-1, self.chunk)).transpose(0, 1).flatten(0, 1)
        x = x.transpose(1, 2)
        if x.shape[1] != self.heads:
            x = x.repeat_interleave(self.heads // x.shape[1], dim=1)
        return x.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)

    def write(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Put ``[R, C, …]`` into its place in ``[B, T, H, …]``; padding is dropped.

        What is of several heads of values, and of one head of keys in ``out``, is summed.
        """
        x = x.unflatten(0, (-1, self.heads))
        if out.shape[2] != self.heads:
            x = x.unflatten(1, (out.shape[2], -1)).sum(2)
        x = x.transpose(1, 2)
        if self.packed:
            x = x.flatten(0, 1)
            out[0, self.tokens[self.is_token]] = (x[self.is_token] if self.padded else x).to(out.dtype)
            return
        x = x.unflatten(0, (-1, self.batch)).transpose(0, 1)
        out = out[:, self.tokens]
        if self.missing:
            out.copy_(x.flatten(1, 2)[:, : out.shape[1]])
        else:
            out.unflatten(1, (-1, self.chunk)).copy_(x)
