"""Ragged batches on a common chunk grid, so that every sequence meets its chunk boundaries at the same slot.

A chunked memory takes gradients at chunk boundaries that each sequence counts in its own real tokens.
Sequences with padding, or that resume at different positions in a chunk, are therefore moved: real token
number i of a sequence that has already seen p tokens of its chunk goes to slot p + i, and the slots that no
token fills are marked as empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.checks import has_readable_data


class ChunkAlignment(NamedTuple):
    """Where each token of a batch of N sequences goes.

    Attributes:
        source: [N, width] int64, the flat index of the token in each slot (0 in empty slots).
        valid: [N, width] bool, False in empty slots.
        slot: [tokens] int64, the flat slot of each token (0 for padding).
        real: [tokens] bool, False for padding.
        stop: [N] int64, the slot after each sequence's last token.
    """

    source: torch.Tensor
    valid: torch.Tensor
    slot: torch.Tensor
    real: torch.Tensor
    stop: torch.Tensor

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T, …] on the grid, [N, width, …]; empty slots are zero whatever padding holds."""
        flat = x.flatten(0, 1)
        picked = flat.index_select(0, self.source.flatten()).unflatten(0, self.source.shape)
        return picked.masked_fill(_trailing(~self.valid, picked), 0)

    def scatter(self, y: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """Values on the grid [N, width, …] back at their tokens, [batch, length, …]; padding is zero."""
        flat = y.flatten(0, 1).index_select(0, self.slot)
        return flat.masked_fill(_trailing(~self.real, flat), 0).unflatten(0, (batch, length))


def align_batch(mask: torch.Tensor, position: torch.Tensor, width: int | None = None) -> ChunkAlignment:
    """Alignment of a padded batch by ``mask`` [B, T] (True = real) and tokens already seen, [B] int64.

    ``width``: no sequence's last token is beyond that slot, where the host knows it.
    """
    counts = mask.cumsum(1)
    rank = counts - 1 + position[:, None]
    row = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
    return _align(row.flatten(), rank.flatten(), mask.flatten(), position + counts[:, -1], width)


def align_packed(cu_seqlens: torch.Tensor) -> ChunkAlignment:
    """Alignment of sequences packed one after another, each to a row of its own from slot 0."""
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    rank = torch.arange(len(row), device=lengths.device) - cu_seqlens[row]
    return _align(row, rank, torch.ones_like(row, dtype=torch.bool), lengths)


def _align(
    row: torch.Tensor, rank: torch.Tensor, real: torch.Tensor, stop: torch.Tensor, width: int | None = None
) -> ChunkAlignment:
    width = max(int(stop.max()) if width is None else width, 1)  # the one value that the host must know
    slot = torch.where(real, row * width + rank, 0)
    token = torch.arange(len(row), device=row.device)
    source = torch.zeros(len(stop) * width, dtype=torch.int64, device=row.device)
    valid = torch.zeros_like(source, dtype=torch.bool)
    # Padding writes nothing: it is sent to an extra slot that is cut off again.
    spare = torch.where(real, slot, len(source))
    source = torch.cat([source, source.new_zeros(1)]).scatter(0, spare, token)[:-1]
    valid = torch.cat([valid, valid.new_zeros(1)]).scatter(0, spare, real)[:-1]
    return ChunkAlignment(source.view(-1, width), valid.view(-1, width), slot, real, stop)


def _trailing(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return mask.view(mask.shape + (1,) * (like.ndim - mask.ndim))


class ChunkGrid(NamedTuple):
    """How a call's tokens lie on the chunk grid.

    Attributes:
        alignment: how tokens move, or ``None`` where they already lie right.
        offset: slot of the first token.
        begin, stop: [B] int64, each sequence's slots are begin … stop − 1; ``None`` when all have the same.
        single: the call has one token per sequence, so that slots differ within the one chunk of the call.
        position: [B] int64, tokens since the last boundary after the call.
    """

    alignment: ChunkAlignment | None
    offset: int
    begin: torch.Tensor | None
    stop: torch.Tensor | None
    single: bool
    position: torch.Tensor

    def for_heads(self, heads: int) -> ChunkGrid:
        """The same for [B · heads] rows, ``heads`` for each sequence one after another."""
        begin, stop = (None if x is None else x.repeat_interleave(heads) for x in (self.begin, self.stop))
        return self._replace(begin=begin, stop=stop)

    def meets_boundary(self, end: int, clock: int) -> bool | torch.Tensor:
        """Whether a boundary of ``clock`` lies just before slot ``end``: for all, for none, or [B] bool."""
        if self.single:
            return (self.stop % clock == 0) & (self.stop > self.begin)
        if end % clock:
            return False
        return True if self.stop is None else (self.stop >= end) & (self.begin < end)


def place_on_grid(
    position: torch.Tensor, mask: torch.Tensor | None, length: int, period: int, at_boundary: bool
) -> ChunkGrid:
    """The grid with a boundary every ``period`` tokens, for sequences ``position`` [B] tokens past theirs.

    Equal positions without padding cost nothing; a single token needs no alignment whatever the positions.
    ``at_boundary`` says that every position is 0, so that the tensor need not be read.
    """
    if length == 1 and not at_boundary:
        after = position + 1 if mask is None else position + mask[:, 0]
        return ChunkGrid(None, 0, position, after, True, after % period)
    if mask is not None and has_readable_data(mask) and bool(mask.all()):
        mask = None
    offset, readable = 0, has_readable_data(position)
    ragged = mask is not None or not (at_boundary or readable)
    if not (ragged or at_boundary):
        positions = position.tolist()
        offset = positions[0]
        ragged = any(p != offset for p in positions)
    if not ragged:
        return ChunkGrid(None, offset, None, None, False, (position + length) % period)
    if mask is None:
        mask = torch.ones(len(position), length, dtype=torch.bool, device=position.device)
    width = length if at_boundary else None if readable else length + period - 1
    alignment = align_batch(mask, position, width)
    return ChunkGrid(alignment, 0, position, alignment.stop, False, alignment.stop % period)
