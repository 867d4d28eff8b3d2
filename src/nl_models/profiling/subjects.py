"""What can be measured: a model of a config, a saved model, or a layer alone.

A *source* is plain data that goes to the process that measures; what it builds there, a *subject*, is called
in the same way whatever it is.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from nl_kernels.checks import check_choice
from nl_models.hf_names import CACHE_NAME
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.layers import (
    Attention,
    AttentionState,
    ContinuumMemory,
    GatedDeltaNet,
    LevelConfig,
    SelfModifyingTitans,
    Titans,
)
from nl_models.layers.state import state_tensors
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.open_model import open_model
from nl_models.stateful_cache import layer_tensors

MIXERS = {
    "self_modifying_titans": SelfModifyingTitans,
    "titans": Titans,
    "gated_delta_net": GatedDeltaNet,
    "attention": Attention,
}
# Of ContinuumMemory: the widths of a level in units of the layer's, and the chunks of the levels.
_CONTINUUM = {"continuum": (2, (32, 256)), "mlp": (4, (None,))}
LAYERS = (*MIXERS, *_CONTINUUM)
"""Layers that are measured alone: token mixers, a continuum of two levels, and an MLP of as many units."""

_SEED_TOKENS = 64


class Subject(ABC):
    """A module and how to feed it: ids ``[B, T]`` of a language model, ``x [B, T, d]`` of a layer."""

    module: nn.Module

    @abstractmethod
    def inputs(self, batch: int, length: int) -> torch.Tensor:
        """Random ones."""

    @abstractmethod
    def continued(self, inputs: torch.Tensor, state: Any) -> Any:
        """The state after ``inputs``, which follow those that ``state`` has read (``None``: nothing)."""

    @abstractmethod
    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        """A scalar to differentiate."""

    @abstractmethod
    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        """All of what is kept from one call to the next."""

    @property
    @abstractmethod
    def only_attention(self) -> bool:
        """Whether all state is keys and values."""

    @abstractmethod
    def lengthen(self, state: Any, length: int) -> Any:
        """A state of attention after ``length`` tokens, with the keys and values of a few over and over.

        Decoding costs the same whatever they hold, and computing them takes time quadratic in the context.
        """

    @torch.no_grad()
    def read(self, inputs: torch.Tensor, segment: int) -> Any:
        """The state after ``inputs``, read in segments."""
        state = None
        for piece in inputs.split(segment, dim=1):
            state = self.continued(piece, state)
        return state

    @torch.no_grad()
    def ready_to_decode(self, inputs: torch.Tensor, segment: int) -> Any:
        """A state after as many tokens, read; of attention filled."""
        if not self.only_attention:
            return self.read(inputs, segment)
        return self.lengthen(self.continued(inputs[:, :_SEED_TOKENS], None), inputs.shape[1])

    def state_bytes(self, state: Any) -> int:
        return sum(t.numel() * t.element_size() for t in self.state_tensors(state))


class LanguageModel(Subject):
    """A causal language model of this package or of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = model

    def inputs(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(self.module.config.vocab_size, (batch, length), device=self.module.device)

    def continued(self, inputs: torch.Tensor, state: Cache | None) -> Cache:
        cache = {} if state is None else {CACHE_NAME: state}
        return getattr(self.module(input_ids=inputs, use_cache=True, logits_to_keep=1, **cache), CACHE_NAME)

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids=inputs, labels=inputs, use_cache=False).loss

    def state_tensors(self, state: Cache) -> list[torch.Tensor]:
        return [tensor for layer in state.layers for tensor in layer_tensors(layer)]

    @property
    def only_attention(self) -> bool:
        if isinstance(self.module, HopeForCausalLM):
            return set(self.module.config.layer_types) == {"full_attention"}
        with torch.no_grad():
            layers = self.continued(self.inputs(1, 2), None).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    def lengthen(self, state: Cache, length: int) -> Cache:
        for layer in state.layers:
            if isinstance(layer, StateCacheLayer):
                more = length - layer.state.mixer.keys.shape[2]
                layer.commit(layer.state._replace(mixer=_lengthened(layer.state.mixer, length)), more)
            else:
                layer.keys, layer.values = (_tiled(t, length) for t in (layer.keys, layer.values))
        return state


class Layer(Subject):
    """A layer of :data:`LAYERS`."""

    def __init__(self, layer: nn.Module, hidden_size: int) -> None:
        self.module, self.hidden_size = layer, hidden_size

    def inputs(self, batch: int, length: int) -> torch.Tensor:
        like = next(self.module.parameters())
        return torch.randn(batch, length, self.hidden_size, device=like.device, dtype=like.dtype)

    def continued(self, inputs: torch.Tensor, state: Any) -> Any:
        return self.module(inputs, state, output_state=True)[1]

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.module(inputs)[0].float().square().mean()

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        return list(state_tensors(state))

    @property
    def only_attention(self) -> bool:
        return isinstance(self.module, Attention)

    def lengthen(self, state: AttentionState, length: int) -> AttentionState:
        return _lengthened(state, length)


@dataclass(frozen=True)
class ConfiguredModel:
    """A Hope with random weights.

    Attributes:
        config: arguments of :class:`HopeConfig`.
    """

    config: dict

    def build(self, device: torch.device, dtype: torch.dtype) -> Subject:
        return LanguageModel(HopeForCausalLM(HopeConfig(**self.config)).to(device, dtype))


@dataclass(frozen=True)
class SavedModel:
    """A model that :func:`nl_models.open_model.open_model` opens, with its tokenizer.

    Attributes:
        folder: of a training run, a checkpoint, or a saved or converted model.
    """

    folder: str

    def build(self, device: torch.device, dtype: torch.dtype) -> Subject:
        return LanguageModel(open_model(self.folder, device).model.to(dtype))


@dataclass(frozen=True)
class LayerAlone:
    """A layer with random weights.

    Attributes:
        layer: of :data:`LAYERS`.
        hidden_size, heads: its sizes.
    """

    layer: str
    hidden_size: int
    heads: int

    def __post_init__(self) -> None:
        check_choice("layer", self.layer, LAYERS)

    def build(self, device: torch.device, dtype: torch.dtype) -> Subject:
        if self.layer in MIXERS:
            layer = MIXERS[self.layer](self.hidden_size, self.heads)
        else:
            factor, chunks = _CONTINUUM[self.layer]
            levels = [LevelConfig(hidden_size=factor * self.hidden_size, chunk_size=c) for c in chunks]
            layer = ContinuumMemory(self.hidden_size, levels)
        return Layer(layer.to(device, dtype), self.hidden_size)


Source = ConfiguredModel | SavedModel | LayerAlone


def count_parameters(source: Source) -> int:
    """Tied ones once; without allocating them but for a saved model."""
    saved = isinstance(source, SavedModel)
    device = torch.device("cpu" if saved else "meta")
    with contextlib.nullcontext() if saved else device:
        return sum(p.numel() for p in source.build(device, torch.float32).module.parameters())


def _lengthened(state: AttentionState, length: int) -> AttentionState:
    keys, values = _tiled(state.keys, length), _tiled(state.values, length)
    position = torch.full_like(state.position, length)
    return AttentionState(keys=keys, values=values, mask=None, position=position)


def _tiled(x: torch.Tensor, length: int) -> torch.Tensor:
    """``[B, H, S, D]`` repeated along S, cut to ``length``."""
    return x.repeat(1, 1, -(-length // x.shape[2]), 1)[:, :, :length].clone()
