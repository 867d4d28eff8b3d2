"""The state of a conversation: what every block of Hope carries from token to token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from nl_models.layers.state import LAYER_STATES, State, describe_state, rebuild_state
from nl_models.layers.state_cache import COLUMNS, StateCacheLayer
from nl_models.stateful_cache import StatefulCache

if TYPE_CHECKING:
    from nl_models.hope.configuration_hope import HopeConfig


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

    Attributes:
        relative: whether the next call of the model adds the states to its initial ones, as in training.
    """

    file_format = "nl_models.HopeCache.1"
    relative = False

    def __init__(self, config: HopeConfig):
        super().__init__(layers=[StateCacheLayer() for _ in range(config.num_hidden_layers)])
        self.fingerprint = config.fingerprint()
        self._config = config

    def _check_nothing_pends(self) -> None:
        super()._check_nothing_pends()
        if self.relative:
            raise ValueError("cache: is to be added to the initial state; the next call of the model does it")

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
        self.end_recording()
        for layer in self.layers:
            layer.map(torch.Tensor.detach)
        return self

    def to(self, device: torch.device | str) -> HopeCache:
        """Move every state to ``device`` (in place)."""
        self.end_recording()
        for layer in self.layers:
            layer.map(lambda t: t.to(device))
        return self

    def describe(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """All that a file of it says, as JSON by name; tensors go into ``tensors``, by names of their own."""
        first = self.layers[0]  # all have read the same columns
        return {
            "seen": [layer.seen for layer in self.layers],
            "structure": [
                describe_state(layer.state, str(i), tensors) for i, layer in enumerate(self.layers)
            ],
            **{name: describe_state(getattr(first, name), name, tensors) for name in COLUMNS},
        }

    def rebuild(self, described: Mapping[str, Any], get_tensor: Callable[[str], torch.Tensor]) -> None:
        """Take over, as an empty cache, what :meth:`describe` gave."""
        # Files of earlier versions say nothing of padding, then there is none, nor of tokens.
        columns = {name: rebuild_state(described.get(name), get_tensor, {}) for name in COLUMNS}
        for layer, seen, state in zip(self.layers, described["seen"], described["structure"], strict=True):
            if state is not None:
                layer.commit(rebuild_state(state, get_tensor, STATE_TYPES), seen)
                layer.padding = columns["padding"]
        self.layers[0].tokens, self.layers[0].unread = columns["tokens"], columns["unread"]
