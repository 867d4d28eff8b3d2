"""Padding, and packed sequences as a padded batch: layers keep them apart by their treatment of padding."""

from __future__ import annotations

import torch

from nl_kernels.checks import check_cu_seqlens, has_readable_data
from nl_models.layers.state_cache import StateCacheLayer, padding_digest


class Packing:
    """N sequences that lie end to end in a batch of one, and their padded form.

    Args:
        cu_seqlens: ``[N + 1]`` integers, the bounds of the sequences: 0, …, T.
        packed: ``[1, T, …]``, any packed tensor, for checks.
        longest: no sequence is longer; needed where bounds cannot be read, while a CUDA graph is captured.

    Attributes:
        mask: ``[N, longest]`` bool, True at real tokens, or ``None`` where all sequences are equally long.

    Raises:
        ValueError: a batch other than one, or bounds that do not increase from 0 to T.
    """

    def __init__(self, cu_seqlens: torch.Tensor, packed: torch.Tensor, longest: int | None = None):
        if packed.shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected a batch of one, got {packed.shape[0]}")
        check_cu_seqlens(cu_seqlens, packed.shape[1], packed)
        bounds, readable = cu_seqlens.long(), has_readable_data(cu_seqlens)
        starts, lengths = bounds[:-1, None], bounds.diff()[:, None]
        if readable:
            longest = int(lengths.max())
        elif longest is None:
            raise ValueError(
                "max_length_q: expected an int while a CUDA graph is captured, when cu_seqlens cannot be read"
            )
        columns = torch.arange(longest, device=packed.device)
        real = columns < lengths
        token = torch.arange(packed.shape[1], device=packed.device)
        row = torch.searchsorted(bounds, token, right=True) - 1
        self._place = row, token - bounds[row]
        self._index = (starts + columns).clamp(max=packed.shape[1] - 1)
        self.mask = None if readable and bool(real.all()) else real

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """``[1, T, …]`` to ``[N, longest, …]``, with arbitrary values at padding."""
        return packed[0, self._index]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """``[N, longest, …]`` to ``[1, T, …]``."""
        return padded[self._place][None]


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
    if not has_readable_data(mask):
        return mask[:, mask.shape[1] - T :]
    padded = not bool(mask.all())
    if past is not None and seen and mask.shape[1] > T and (padded or past.padding is not None):
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


PACKING_NAMES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What packed sequences are told by, beside ``position_ids`` that begin anew."""


def packed_bounds(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The bounds ``[N + 1]`` of packed sequences, by whichever names they came; ``None``: nothing is packed.

    Collators of transformers and TRL send several of them at once, which must tell the same. While a CUDA
    graph is captured nothing can be read: bounds are then taken as they are, and positions tell of none.

    Args:
        position_ids: ``[B, T]``; where they do not grow from one real token to the next, a sequence begins.
        attention_mask: ``[B, T]``, or with columns of the past before.
        cu_seqlens, cu_seq_lens_q, cu_seq_lens_k: ``[N + 1]`` bounds: 0, …, T.
        max_length_q, max_length_k: at least the longest length; only beside bounds.
        seq_idx: ``[1, T]``, the number of each token's sequence.

    Raises:
        ValueError: they contradict each other, have another number of dimensions, or positions begin anew in
            a batch of several rows.
    """
    bounds = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    found = {name: each for name, each in bounds.items() if each is not None}
    given = next(iter(found.values()), None)
    if given is not None and not has_readable_data(given):
        return given
    for name, ids in (("seq_idx", seq_idx), ("position_ids", position_ids)):
        if ids is not None and ids.ndim != 2:
            raise ValueError(f"{name}: expected shape [B, T], got {tuple(ids.shape)}")
    if seq_idx is not None:
        found["seq_idx"] = _bounds_at_changes("seq_idx", seq_idx, seq_idx[:, 1:] != seq_idx[:, :-1])
    if position_ids is not None and position_ids.shape[1] > 1 and has_readable_data(position_ids):
        anew = position_ids[:, 1:] <= position_ids[:, :-1]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -position_ids.shape[1] :].bool()
            anew = anew & real[:, 1:] & real[:, :-1]
        if bool(anew.any()):
            found["position_ids"] = _bounds_at_changes("position_ids", position_ids, anew)
    said = {"max_length_q": max_length_q, "max_length_k": max_length_k}
    longest = {name: int(length) for name, length in said.items() if length is not None}
    if not found:
        if longest:
            raise ValueError(f"{next(iter(longest))}: comes with bounds only; pass cu_seqlens, too")
        return None
    name, first = next(iter(found.items()))
    for other, others in found.items():
        if others is not first and not torch.equal(others.long(), first.long().to(others.device)):
            raise ValueError(
                f"{other}: bounds of packed sequences other than those of {name}: "
                f"{others.tolist()} and {first.tolist()}"
            )
    for other, length in longest.items():
        if length < int(first.diff().max()):
            raise ValueError(f"{other}: {length}, but the bounds of {name} have a longer sequence")
    return first


def _bounds_at_changes(name: str, of: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    if of.shape[0] != 1:
        raise ValueError(
            f"{name}: tells of packed sequences in a batch of {of.shape[0]} rows; lay them end to end in one"
        )
    starts = changes[0].nonzero()[:, 0] + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), of.shape[1])])
