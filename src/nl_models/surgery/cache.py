"""The cache of a converted model: keys and values, states of memories, and the fast weights that served."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from nl_models.layers.state import LAYER_STATES, describe_state, first_column, rebuild_state
from nl_models.layers.state_cache import COLUMNS, StateCacheLayer, padding_digest
from nl_models.stateful_cache import StatefulCache, layer_tensors
from nl_models.surgery.fast_weights import FastWeights, LayerFastWeights

_NO_MATTER = {"name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
_TYPES = {**LAYER_STATES, "LayerFastWeights": LayerFastWeights}


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

    file_format = "nl_models.ContinuumCache.1"

    def __init__(self, config: PreTrainedConfig, fast_weights: FastWeights | None = None):
        super().__init__(config=config)
        for index in config.memory_layers or {}:
            self.layers[int(index)] = StateCacheLayer()
        self.fast_weights = fast_weights
        self.mask: torch.Tensor | None = None
        self.is_ragged = False
        self._config = config

    @property
    def fingerprint(self) -> str:
        """A digest of the config but for what says nothing of the model."""
        fields = {n: v for n, v in self._config.to_dict().items() if n.strip("_") not in _NO_MATTER}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()

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
        before = (
            attention_mask.new_ones(B, past) if self.mask is None else self.mask[:, :past].to(attention_mask)
        )
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
        self.end_recording()
        self._follow(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self.end_recording()
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
        self.mask, self.is_ragged = torch.cat(masks).to(layer_tensors(self.layers[0])[0].device), True
        if any(cache.fast_weights is not None for cache in caches):
            like = next(cache.fast_weights for cache in caches if cache.fast_weights is not None)
            none = like.select(torch.zeros(1, dtype=torch.int64)).map(torch.zeros_like)
            each = [
                fast.select(torch.arange(fast.batch_size).repeat_interleave(n // fast.batch_size))
                for fast, n in ((cache.fast_weights or none, cache.batch_size) for cache in caches)
            ]
            self.fast_weights = FastWeights.join(each)
        self._trim()

    def describe_layers(self, tensors: dict[str, torch.Tensor]) -> list:
        """What every layer has seen, and its state or keys and values, as JSON; ``tensors`` is extended."""
        description = []
        for index, layer in enumerate(self.layers):
            memory = isinstance(layer, StateCacheLayer)
            state = layer.state if memory else (layer.keys, layer.values)
            description.append([layer.get_seq_length(), describe_state(state, str(index), tensors)])
        return description

    def rebuild_layers(self, description: list, get_tensor: Callable[[str], torch.Tensor]) -> None:
        """The inverse of :meth:`describe_layers`, into a new cache."""
        for layer, (seen, described) in zip(self.layers, description, strict=True):
            state = rebuild_state(described, get_tensor, _TYPES)
            if isinstance(layer, StateCacheLayer):
                if state is not None:
                    layer.commit(state, seen)
                continue
            layer.lazy_initialization(*state)
            layer.keys, layer.values = state
            if layer.is_sliding:
                layer.cumulative_length = seen

    def describe(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """All that a file of it says, as JSON by name; tensors go into ``tensors``, by names of their own."""
        if self.batch_size < 0:
            raise ValueError("cache: it has read nothing that could be saved")
        memory = next((layer for layer in self.layers if isinstance(layer, StateCacheLayer)), None)
        fast = None if self.fast_weights is None else self.fast_weights.layers
        held = {name: getattr(memory, name, None) for name in COLUMNS} | {"mask": self.mask, "fast": fast}
        described = {name: describe_state(value, name, tensors) for name, value in held.items()}
        return {"layers": self.describe_layers(tensors), "is_ragged": self.is_ragged, **described}

    def rebuild(self, described: Mapping[str, Any], get_tensor: Callable[[str], torch.Tensor]) -> None:
        """Take over, as an empty cache, what :meth:`describe` gave."""
        self.rebuild_layers(described["layers"], get_tensor)
        held = {
            name: rebuild_state(described[name], get_tensor, _TYPES) for name in (*COLUMNS, "mask", "fast")
        }
        memories = [layer for layer in self.layers if isinstance(layer, StateCacheLayer)]
        for layer in memories:
            layer.padding = held["padding"]
        if memories:
            memories[0].tokens, memories[0].unread = held["tokens"], held["unread"]
        self.mask, self.is_ragged = held["mask"], described["is_ragged"]
        self.fast_weights = None if held["fast"] is None else FastWeights(held["fast"])

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

    def forget_columns(self) -> None:
        self.mask = None
        super().forget_columns()
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
