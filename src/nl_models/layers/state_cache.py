"""The layer of a transformers cache that holds a whole state in the place of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from nl_models.layers.state import State, join_states, map_state, select_state, state_tensors

COLUMNS = ("padding", "tokens", "unread")
"""What the first layer of a cache that has a state knows of the columns that all have read."""


def padding_digest(mask: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Which columns of ``mask [B, T]`` are padding (False), as a number for each row, ``[B]`` int64.

    A sum over columns of numbers that look random, 0 where there is no padding: it adds up piece by piece,
    and its size does not grow with the context. ``start`` is the number of the first column.
    """
    columns = torch.arange(start + 1, start + 1 + mask.shape[1], device=mask.device)
    return torch.where(mask, 0, _scattered(columns)).sum(1)


def token_digest(ids: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Which tokens ``ids [B, T]`` are and where, likewise; padding counts as what stands there."""
    columns = torch.arange(start + 1, start + 1 + ids.shape[1], device=ids.device)
    return _scattered(_scattered(columns) + ids).sum(1)


def _scattered(x: torch.Tensor) -> torch.Tensor:
    x = x * -7046029254386353131  # splitmix64: its increment and its first round
    x = (x ^ (x >> 30)) * -4658895280553007687
    return x ^ (x >> 27)


class StateCacheLayer(CacheLayerMixin):
    """The state of one layer, and what columns of the input it has seen.

    Attributes:
        state: what the layer carries.
        seen: number of columns, padding included.
        padding: ``[B]`` int64, which of them were padding, as :func:`padding_digest` has it; ``None``: none.
        tokens: ``[B]`` int64, what stood in them, as :func:`token_digest` has it; ``None``: not known.
        unread: ids ``[B, k]`` that ``generate`` wrote last and nothing has read yet, and where they are real;
            they hold as long as no other columns are seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: State = None
        self.seen = 0
        self.padding: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.unread: tuple[torch.Tensor, torch.Tensor] | None = None

    def commit(
        self,
        state: State,
        tokens: int,
        mask: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Replace the state by that after ``tokens`` more columns.

        ``mask [B, tokens]`` is True at real ones; ``None``: all are. ``ids``: what they are, if known.
        """
        if ids is None or (self.seen and self.tokens is None):
            self.tokens = None
        else:
            digest = token_digest(ids, self.seen)
            self.tokens = digest if self.tokens is None else self.tokens + digest
        if mask is not None:
            padding = padding_digest(mask, self.seen)
            self.padding = padding if self.padding is None else self.padding + padding
        self.state = state
        self.unread = None
        self.seen += tokens
        self.is_initialized = True

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``function`` to every tensor of the state."""
        held = (self.state, self.padding, self.tokens, self.unread)
        self.state, self.padding, self.tokens, self.unread = map_state(function, held)

    @classmethod
    def join(cls, layers: Sequence[StateCacheLayer]) -> StateCacheLayer:
        """The rows of several layers in one; those that have seen less count as padded on the left.

        Where a row that is moved so has padding of its own, no mask of the past is right any more.
        """
        joined, seen = cls(), max(layer.seen for layer in layers)
        joined.state, joined.seen, joined.is_initialized = join_states([x.state for x in layers]), seen, True
        sizes = [layer.batch_size for layer in layers]
        if any(layer.padding is not None or layer.seen < seen for layer in layers):
            device = next(state_tensors(joined.state)).device
            gaps = [torch.zeros(n, seen - x.seen, dtype=torch.bool) for n, x in zip(sizes, layers)]
            found = [padding_digest(gap.to(device)) for gap in gaps]
            found = [g if x.padding is None else g + x.padding.to(device) for g, x in zip(found, layers)]
            joined.padding = torch.cat(found)
        if all(layer.tokens is not None and layer.seen == seen for layer in layers):
            joined.tokens = join_states([layer.tokens for layer in layers])
        if any(layer.unread is not None for layer in layers):
            empty = torch.zeros(1, 0, dtype=torch.int64)
            each = [x.unread or (empty.expand(n, 0),) * 2 for n, x in zip(sizes, layers)]
            longest = max(ids.shape[1] for ids, _ in each)
            filled = [tuple(F.pad(t, (longest - t.shape[1], 0)) for t in pair) for pair in each]
            joined.unread = join_states(filled)
        return joined

    @property
    def batch_size(self) -> int:
        """Number of rows, or -1 before the first token."""
        return -1 if self.state is None else next(state_tensors(self.state)).shape[0]

    def forget_columns(self) -> None:
        """What has been seen counts as not seen, as after padding alone."""
        self.batch_select_indices(torch.arange(self.batch_size))
        self.seen, self.padding, self.tokens, self.unread = 0, None, None, None

    def reset(self) -> None:
        self.state = self.padding = self.tokens = self.unread = None
        self.seen, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        held = (self.state, self.padding, self.tokens, self.unread)
        self.state, self.padding, self.tokens, self.unread = select_state(held, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise TypeError("this layer commits its whole state; it has no keys and values to initialize")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        raise TypeError("this layer commits its whole state with `commit`, not keys and values")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("crop: a state cannot forget its last tokens by itself; crop the whole cache")
