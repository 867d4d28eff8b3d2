"""The state of a conversation: what every block of Hope carries from token to token."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import safetensors
import safetensors.torch
import torch
from transformers.cache_utils import Cache

from nl_models.files import write_bytes
from nl_models.layers.state import LAYER_STATES, State, describe_state, rebuild_state, state_tensors
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.stateful_cache import StatefulCache

if TYPE_CHECKING:
    from nl_models.hope.configuration_hope import HopeConfig

FILE_FORMAT = "nl_models.HopeCache.1"
COLUMNS = ("padding", "tokens", "unread")
"""What the first layer of a cache knows of the columns that all have read."""


class BlockState(NamedTuple):
    """The state of one block; every tensor has the batch as first dimension.

    Attributes:
        convolution: ``[B, window - 1, d]``, the inputs that the next token's convolution still sees; ``None``
            without a convolution.
        mixer: the state of the token mixer: of attention its keys and values, of a memory its fast weights.
        continuum: the state of the continuum memory system that follows.
    """

    convolution: torch.Tensor | None
    mixer: State
    continuum: State


STATE_TYPES = {**LAYER_STATES, "BlockState": BlockState}
"""The named tuples that a saved cache may hold, by name."""


class HopeCache(StatefulCache, Cache):
    """The states of all blocks of a :class:`HopeModel`, for one batch of conversations.

    Its size does not grow with the context, but for the keys and values of attention layers. Fast weights and
    counters keep their own dtype (fp32, int64) whatever the model's.

    Args:
        config: of the model that will use it; a model refuses the cache of another config.
    """

    def __init__(self, config: HopeConfig):
        super().__init__(layers=[StateCacheLayer() for _ in range(config.num_hidden_layers)])
        self.fingerprint = config.fingerprint()
        self._config = config

    def check_config(self, config: HopeConfig) -> None:
        """Raise ``ValueError`` unless this is a cache for models of ``config``."""
        if config is self._config:
            return  # every token asks, and a digest takes longer than a norm
        if self.fingerprint != config.fingerprint():
            raise ValueError("cache: this HopeCache was made for a model of another config")
        self._config = config

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first token."""
        return self.layers[0].batch_size

    def _join(self, caches: Sequence[HopeCache]) -> None:
        if len({cache.fingerprint for cache in caches}) > 1:
            raise ValueError("caches: made for models of different configs")
        self.layers = [StateCacheLayer.join(each) for each in zip(*(cache.layers for cache in caches))]

    def detach(self) -> HopeCache:
        """Cut the graph behind every state (in place), as truncated backpropagation does between segments."""
        for layer in self.layers:
            layer.map(torch.Tensor.detach)
        return self

    def to(self, device: torch.device | str) -> HopeCache:
        """Move every state to ``device`` (in place)."""
        for layer in self.layers:
            layer.map(lambda t: t.to(device))
        return self

    def num_bytes(self) -> int:
        """Bytes that the states occupy."""
        tensors = (t for layer in self.layers for t in state_tensors(layer.state))
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file; the file appears whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        structure = [describe_state(layer.state, str(i), tensors) for i, layer in enumerate(self.layers)]
        first = self.layers[0]  # all have read the same columns
        columns = {name: describe_state(getattr(first, name), name, tensors) for name in COLUMNS}
        metadata = {
            "format": FILE_FORMAT,
            "fingerprint": self.fingerprint,
            "seen": json.dumps([layer.seen for layer in self.layers]),
            "structure": json.dumps(structure),
            **{name: json.dumps(description) for name, description in columns.items()},
        }
        write_bytes(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: HopeConfig, device: torch.device | str = "cpu"
    ) -> HopeCache:
        """Read a cache that :meth:`save` wrote.

        Args:
            path: the file.
            config: of the model that will use the cache.
            device: where its tensors go.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is no saved cache, or was made for another config.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: no such file: {path}")
        cache = cls(config)
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise ValueError(f"path: {path} is no saved HopeCache")
                if metadata["fingerprint"] != cache.fingerprint:
                    raise ValueError(f"path: {path} was saved from a model of another config")
                seen, structure = json.loads(metadata["seen"]), json.loads(metadata["structure"])
                # Files of earlier versions say nothing of padding, then there is none, nor of tokens.
                columns = {
                    name: rebuild_state(json.loads(metadata.get(name, "null")), file.get_tensor, {})
                    for name in COLUMNS
                }
                for layer, tokens, description in zip(cache.layers, seen, structure, strict=True):
                    if description is not None:
                        layer.commit(rebuild_state(description, file.get_tensor, STATE_TYPES), tokens)
                        layer.padding = columns["padding"]
                cache.layers[0].tokens, cache.layers[0].unread = columns["tokens"], columns["unread"]
        except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} is truncated or no saved HopeCache: {error}") from error
        return cache
