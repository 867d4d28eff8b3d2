"""How a level's tokens lie on its grid of chunks, and what of them is left for the next call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nl_kernels.checks import has_readable_data
from nl_kernels.chunk_alignment import ChunkAlignment, align_batch
from nl_kernels.ops.continuum.state import ContinuumLevelState, ContinuumState, all_equal_to, equal_positions


class Grid(NamedTuple):
    """The tokens of a call, behind those that came with the state, by their place since a chunk's start.

    Position p of every sequence belongs to chunk p // C, so that all sequences step together.
    """

    inputs: torch.Tensor  # [B, L, D], fp32: n(x) of all tokens
    rates: torch.Tensor  # [B, L], 0 where there is no token
    reads: torch.Tensor  # [B, L - first, D]: n(x) as it is read
    first: int  # the first position that is read
    lengths: torch.Tensor | None  # [B]: how many positions are taken; None: all of every sequence
    ends: list[int] | None  # the same, on the host; None, too, where that cannot read them
    alignment: ChunkAlignment | None  # how tokens moved; None: they lie as they came

    def restored(self, y: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """Outputs of what is read, back in the places of the call's tokens."""
        if self.alignment is None:
            return y
        return self.alignment.scatter(F.pad(y, (0, 0, self.first, 0)), batch, length)


class Counts(NamedTuple):
    """What the host must know of a call: the positions and the mask are read once, for all levels."""

    positions: list[list[int] | None]  # of each level, those of its state
    tokens: list[int] | None  # of each sequence; None: no padding
    known: bool = True  # False: as many as there are columns, of a mask that cannot be read

    @classmethod
    def of(cls, levels: int, state: ContinuumState | None, mask: torch.Tensor | None) -> Counts:
        """Those of a call on this many levels."""
        tokens, known = None, mask is None or has_readable_data(mask)
        if not known:
            tokens = [mask.shape[1]] * mask.shape[0]
        elif mask is not None:
            tokens = mask.sum(1).tolist()
            if all(count == mask.shape[1] for count in tokens):
                tokens = None
        there = [index for index, level in enumerate(state or ()) if level is not None]
        equal = {index: all_equal_to(state[index].position) for index in there}
        positions = {index: [value] * len(state[index].position) for index, value in equal.items()}
        unknown = [index for index in there if equal[index] is None]
        compiling = torch.compiler.is_compiling()
        if unknown and not compiling and not has_readable_data(state[unknown[0]].position):
            raise ValueError(
                f"initial_state[{unknown[0]}].position: the host must know them, and cannot read them while "
                "a CUDA graph is captured; expected a state of unpadded sequences, as returned"
            )
        if unknown:
            numbers = torch.Tensor.tolist
            if compiling:
                from nl_kernels.untraced import numbers
            found = numbers(torch.stack([state[index].position for index in unknown]))
            positions.update(zip(unknown, found))
        positions = [positions.get(index) for index in range(levels)]
        return cls(positions, tokens, known)


def place_on_grid(
    inner: torch.Tensor,
    rates: torch.Tensor,
    before: ContinuumLevelState | None,
    mask: torch.Tensor | None,
    position: Sequence[int] | None,
    counts: Counts,
) -> Grid:
    """The grid of ``inner`` [B, T, D] with ``rates`` [B, T] in the dtype of the steps.

    ``position``: that of ``counts`` for this level.
    """
    (batch, length), tokens = inner.shape[:2], counts.tokens
    position = [0] * batch if position is None else position
    if tokens is not None or len(set(position)) > 1:
        tokens = [length] * batch if tokens is None else tokens
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=inner.device)
        return _ragged_grid(inner, rates, before, mask, position, tokens, counts.known)
    inputs = inner.to(rates.dtype)
    first = position[0]
    if first:
        inputs = torch.cat((before.pending_inputs[:, :first], inputs), dim=1)
        rates = torch.cat((before.pending_rates[:, :first], rates), dim=1)
    return Grid(inputs, rates, inner, first, None, None, None)


def pending_tokens(grid: Grid, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [B, P, D] and rates [B, P] of the tokens after each sequence's last step, and how many [B]."""
    batch, length, width = grid.inputs.shape
    if grid.lengths is None:
        pending = length % chunk_size
        position = equal_positions(batch, pending, grid.inputs.device)
        # state outlives the call: no views of parameters or of the whole sequence
        inputs = grid.inputs
        if pending < length:
            inputs = inputs[:, length - pending :].clone()
        return inputs, grid.rates[:, length - pending :].clone(), position
    position = grid.lengths % chunk_size
    longest = min(chunk_size - 1, length) if grid.ends is None else max(e % chunk_size for e in grid.ends)
    place = torch.arange(longest, device=position.device)
    taken = place < position[:, None]
    pending = ((grid.lengths - position)[:, None] + place).clamp_max(length - 1)
    inputs = grid.inputs.gather(1, pending[..., None].expand(-1, -1, width)) * taken[..., None]
    return inputs, grid.rates.gather(1, pending) * taken, position


def _ragged_grid(
    inner: torch.Tensor,
    rates: torch.Tensor,
    before: ContinuumLevelState | None,
    mask: torch.Tensor,
    position: Sequence[int],
    tokens: Sequence[int],
    known: bool,
) -> Grid:
    since = mask.new_zeros(len(position), dtype=torch.int64) if before is None else before.position
    ends = [p + n for p, n in zip(position, tokens)]
    alignment = align_batch(mask, since, max(ends))
    inputs, rates = alignment.gather(inner.to(rates.dtype)), alignment.gather(rates)
    first = 0
    if before is not None:
        first = min(position)
        pending = min(before.pending_rates.shape[1], inputs.shape[1])
        taken = torch.arange(pending, device=inner.device) < before.position[:, None]
        empty = inputs.shape[1] - pending
        # tokens of the state and of this call have different places
        earlier = before.pending_inputs[:, :pending] * taken[..., None]
        inputs = inputs + F.pad(earlier, (0, 0, 0, empty))
        rates = rates + F.pad(before.pending_rates[:, :pending] * taken, (0, empty))
    reads = inputs[:, first:].to(inner.dtype)
    return Grid(inputs, rates, reads, first, alignment.stop, ends if known else None, alignment)
