"""Padding, and packed sequences as a padded batch: layers keep them apart by their treatment of padding."""

from __future__ import annotations

import torch

from nl_kernels.checks import check_cu_seqlens
from nl_models.layers.state_cache import StateCacheLayer, padding_digest


class Packing:
    """N sequences that lie end to end in a batch of one, and their padded form.

    Args:
        cu_seqlens: ``[N + 1]`` integers, the bounds of the sequences: 0, …, T.
        packed: ``[1, T, …]``, any packed tensor, for checks.

    Attributes:
        mask: ``[N, longest]`` bool, True at real tokens, or ``None`` where all sequences are equally long.

    Raises:
        ValueError: a batch other than one, or bounds that do not increase from 0 to T.
    """

    def __init__(self, cu_seqlens: torch.Tensor, packed: torch.Tensor):
        if packed.shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected a batch of one, got {packed.shape[0]}")
        check_cu_seqlens(cu_seqlens, packed.shape[1], packed)
        starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None].long()
        columns = torch.arange(int(lengths.max()), device=packed.device)
        self._real = columns < lengths
        self._index = (starts + columns).clamp(max=packed.shape[1] - 1)
        self.mask = None if bool(self._real.all()) else self._real

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """``[1, T, …]`` to ``[N, longest, …]``, with arbitrary values at padding."""
        return packed[0, self._index]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """``[N, longest, …]`` to ``[1, T, …]``."""
        return padded[self._real][None]


def current_mask(
    attention_mask: torch.Tensor | None, B: int, T: int, past: StateCacheLayer | None
) -> torch.Tensor | None:
    """The mask ``[B, T]`` bool of the current tokens, or ``None`` where all are real.

    ``past`` is the layer of a cache that has read what came before.

    Raises:
        ValueError: a mask of another shape, or whose past columns are not as they were read.
    """
    if attention_mask is None:
        return None
    seen = 0 if past is None else past.seen
    if tuple(attention_mask.shape) not in ((B, T), (B, seen + T)):
        raise ValueError(
            f"attention_mask: expected shape {(B, T)}, or {(B, seen + T)} with the past, "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    padded = not bool(mask.all())
    if seen and mask.shape[1] > T and (padded or past.padding is not None):
        contradicted = padding_digest(mask[:, :seen])
        if past.padding is not None:
            contradicted = contradicted - past.padding
        if bool(contradicted.any()):
            raise ValueError(
                f"attention_mask: the past columns of row {int(contradicted.nonzero()[0])} have padding "
                "elsewhere than the cache was given it. A state cannot forget: pass the mask of the past "
                f"as it was, or only that of the {T} current columns"
            )
    current = mask[:, mask.shape[1] - T :]
    return current if padded and not bool(current.all()) else None


def refuse_packed_positions(
    position_ids: torch.Tensor | None, mask: torch.Tensor | None, remedy: str
) -> None:
    """Positions that start anew mean packed sequences, which memories can tell apart by bounds only.

    Raises:
        ValueError: they do, at a real token.
    """
    if position_ids is None or position_ids.shape[1] < 2:
        return
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    if mask is not None:
        restarts = restarts & mask[:, 1:] & mask[:, :-1]
    if bool(restarts.any()):
        raise ValueError(f"position_ids: they start anew within a row; {remedy}")
