"""The cache of a converted model: keys and values, states of memories, and the fast weights that served."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from nl_models.layers.state import first_column, state_tensors
from nl_models.layers.state_cache import StateCacheLayer, padding_digest
from nl_models.stateful_cache import StatefulCache
from nl_models.surgery.fast_weights import FastWeights


class ContinuumCache(StatefulCache, DynamicCache):
    """A :class:`transformers.DynamicCache` that carries fast weights along, and the states of memories.

    ``model.generate(ids, cache=ContinuumCache(model.config, fast_weights))`` reads with them;
    they follow their sequences when beams are reordered.

    Args:
        config: of the converted model.
        fast_weights: of B sequences, for batches of a multiple of B; ``None``: the model's own weights.

    Attributes:
        mask: ``[B, S]``, which of the columns that were read are real, as the model was last told; ``None``:
            nothing was said.
        is_ragged: whether rows that have read unequally much were joined; the model then takes masks and
            positions of the past from here.
    """

    def __init__(self, config: PreTrainedConfig, fast_weights: FastWeights | None = None):
        super().__init__(config=config)
        for index in config.memory_layers or {}:
            self.layers[int(index)] = StateCacheLayer()
        self.fast_weights = fast_weights
        self.mask: torch.Tensor | None = None
        self.is_ragged = False

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first token."""
        first = self.layers[0]
        if isinstance(first, StateCacheLayer):
            return first.batch_size
        return first.keys.shape[0] if first.is_initialized else -1

    def whole_mask(self, attention_mask: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor | None:
        """The mask ``[B, S + T]`` of what was read and of ``inputs [B, T]``; ``None``: nothing is said.

        ``attention_mask`` is of all columns, or of those of ``inputs`` alone.
        """
        past, (B, T) = self.get_seq_length(), inputs.shape[:2]
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            if self.mask is None or attention_mask is not None:
                return None
            attention_mask = self.mask.new_ones(B, T)
        if attention_mask.shape[1] != T or not past:
            return attention_mask
        before = attention_mask.new_ones(B, past) if self.mask is None else self.mask.to(attention_mask)
        return torch.cat([before, attention_mask], 1)

    def reset(
        self, rows: torch.Tensor | Sequence[int] | None = None, model: torch.nn.Module | None = None
    ) -> None:
        super().reset(rows, model)
        if rows is None:
            self.mask, self.is_ragged = None, False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` that follow one another."""
        super().batch_repeat_interleave(repeats)
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(repeats, dim=0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the row ``beam_idx[i]`` of before."""
        self._follow(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._follow(indices)
        super().batch_select_indices(indices)
        if self.is_ragged:
            self._trim()

    def _join(self, caches: Sequence[ContinuumCache]) -> None:
        kinds = {tuple(map(type, cache.layers)) for cache in caches}
        if len(kinds) > 1:
            raise ValueError("caches: made for models of different kinds of layers")
        masks, longest = [], max(cache.get_seq_length() for cache in caches)
        for cache in caches:
            length, mask = cache.get_seq_length(), cache.mask
            mask = torch.ones(cache.batch_size, length) if mask is None else mask[:, :length]
            masks.append(F.pad(mask.long().cpu(), (longest - length, 0)))
        self.layers = [_join_layers(each) for each in zip(*(cache.layers for cache in caches))]
        self.mask, self.is_ragged = torch.cat(masks).to(_device_of(self.layers[0])), True
        if any(cache.fast_weights is not None for cache in caches):
            like = next(cache.fast_weights for cache in caches if cache.fast_weights is not None)
            none = like.select(torch.zeros(1, dtype=torch.int64)).map(torch.zeros_like)
            each = [
                fast.select(torch.arange(fast.batch_size).repeat_interleave(n // fast.batch_size))
                for fast, n in ((cache.fast_weights or none, cache.batch_size) for cache in caches)
            ]
            self.fast_weights = FastWeights.join(each)
        self._trim()

    def _trim(self) -> None:
        """Leave out the columns that no row has read."""
        start = first_column(self.mask)
        self.mask = self.mask[:, start:]
        whole = bool(self.mask.all())
        for layer in self.layers:
            if isinstance(layer, StateCacheLayer):
                layer.seen -= start
                layer.padding = None if whole else padding_digest(self.mask.bool())
                layer.tokens = None
                continue
            surplus = max(0, layer.keys.shape[-2] - self.mask.shape[1])
            layer.keys, layer.values = layer.keys[..., surplus:, :], layer.values[..., surplus:, :]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length -= start
        if whole:
            self.mask, self.is_ragged = None, False

    def _forget_columns(self) -> None:
        self.mask = None
        super()._forget_columns()
        for layer in self.layers:
            if not isinstance(layer, StateCacheLayer):
                layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = 0

    def _follow(self, rows: torch.Tensor) -> None:
        """Mask and fast weights of the rows ``rows``; fast weights of one sequence serve any row."""
        if self.mask is not None:
            self.mask = self.mask[rows.to(self.mask.device)]
        fast = self.fast_weights
        if fast is None or fast.batch_size == 1:
            return
        before = self.batch_size
        shared = before // fast.batch_size
        if shared == 1:
            self.fast_weights = fast.select(rows)
            return
        own = torch.arange(before, device=rows.device) // shared
        if len(rows) != before or bool((rows // shared != own).any()):
            raise ValueError(
                f"rows: {shared} share the fast weights of each of {fast.batch_size} sequences; they may "
                f"change places among themselves only, got {rows.tolist()}"
            )


def _device_of(layer: CacheLayerMixin) -> torch.device:
    """Where what a layer of a cache holds lies."""
    return (
        next(state_tensors(layer.state)).device if isinstance(layer, StateCacheLayer) else layer.keys.device
    )


def _join_layers(layers: Sequence[CacheLayerMixin]) -> CacheLayerMixin:
    """The rows of several layers in one; keys and values of shorter ones get columns on the left."""
    if isinstance(layers[0], StateCacheLayer):
        return StateCacheLayer.join(layers)
    joined, longest = copy.copy(layers[0]), max(layer.keys.shape[-2] for layer in layers)
    for name in ("keys", "values"):
        held = [getattr(layer, name).to(layers[0].keys.device) for layer in layers]
        filled = [F.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in held]
        setattr(joined, name, torch.cat(filled))
    if hasattr(joined, "cumulative_length"):
        joined.cumulative_length = max(layer.cumulative_length for layer in layers)
    return joined
