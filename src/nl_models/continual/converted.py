"""The fast parameters of a converted model: the levels of its MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nl_models.continual.fast_parameters import Context, FastParameter, FastParameters, ModelOutput
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.module_views import device_of, dtype_of
from nl_models.surgery import ContinuumCache, FastWeights, LayerFastWeights
from nl_models.surgery.parts import matrix_of


class ConvertedParameters(FastParameters):
    """See :class:`FastParameters`; the model is one that ``convert_mlp_to_continuum`` gave."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.units = model.config.level_units()
        if not self.units:
            raise ValueError("model: its MLPs have no levels; convert it with convert_mlp_to_continuum")
        self.chunk_sizes = tuple(units.chunk_size for units in self.units)
        self._mlps = {
            index: layer.mlp
            for index, layer in enumerate(model.base_model.decoder_layers())
            if index in model.config.continuum_layers
        }
        self._places: dict[str, tuple[int, int, str]] = {}
        parameters = []
        for layer, mlp in self._mlps.items():
            for level in range(len(self.units)):
                for part in mlp.parts:
                    name = f"layers.{layer}.levels.{level}.{part}"
                    read = f"{layer}.{level}.hidden" if part == "down" else f"{layer}.inner"
                    self._places[name] = (layer, level, part)
                    parameters.append(FastParameter(name, level, read))
        self.parameters = tuple(parameters)

    def weight(self, parameter: FastParameter) -> torch.Tensor:
        layer, level, part = self._places[parameter.name]
        units, mlp = self.units[level], self._mlps[layer]
        config = self.model.config
        width = config.mlp_width if part == "down" else config.hidden_size
        model_dtype, model_device = dtype_of(self.model), device_of(self.model)
        weight = matrix_of(mlp.get_submodule(mlp.parts[part]), width, model_dtype, model_device)
        rows = weight[:, units.start : units.stop] if part == "down" else weight[units.start : units.stop]
        return rows.to(self.dtype)

    def own_weight(self, parameter: FastParameter) -> torch.Tensor:
        layer, level, part = self._places[parameter.name]
        units, mlp = self.units[level], self._mlps[layer]
        module = mlp.get_submodule(mlp.parts[part])
        weight = getattr(module, "weight", None)
        if type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
            raise TypeError(
                f"model: its {mlp.parts[part]} of layer {layer} is a {type(module).__name__}, to whose "
                "weight nothing can be added; unload adapters, or merge into a model that is not quantised"
            )
        weight = weight.detach().mT if isinstance(module, Conv1D) else weight.detach()
        return weight[:, units.start : units.stop] if part == "down" else weight[units.start : units.stop]

    def fast_weights(
        self,
        changes: Mapping[str, torch.Tensor],
        inputs: dict[tuple[int, str], torch.Tensor] | None = None,
    ) -> FastWeights:
        """The changes as the model takes them; ``inputs`` as for :class:`FastWeights`."""
        layers: list[LayerFastWeights | None] = [None] * self.model.config.num_hidden_layers
        for index, mlp in self._mlps.items():
            joined = {
                part: torch.cat(
                    [changes[f"layers.{index}.levels.{level}.{part}"] for level in range(len(self.units))],
                    dim=2 if part == "down" else 1,
                )
                for part in mlp.parts
            }
            layers[index] = LayerFastWeights(joined["up"], joined["down"], joined.get("gate"))
        return FastWeights(layers, inputs)

    def run(
        self,
        changes: Mapping[str, torch.Tensor],
        ids: torch.Tensor,
        context: Context,
        *,
        keep_inputs: bool = False,
    ) -> ModelOutput:
        cache = ContinuumCache(self.model.config) if context is None else context.copy()
        read: dict[tuple[int, str], torch.Tensor] | None = {} if keep_inputs else None
        output = self.model(
            input_ids=ids,
            fast_weights=self.fast_weights(changes, read),
            cache=cache,
            use_cache=True,
        )
        inputs: dict[str, torch.Tensor] = {}
        for index in self._mlps if keep_inputs else ():
            inputs[f"{index}.inner"] = read[index, "up"].to(self.dtype)
            for level, units in enumerate(self.units):
                hidden = read[index, "down"][..., units.start : units.stop]
                inputs[f"{index}.{level}.hidden"] = hidden.to(self.dtype)
        return ModelOutput(output.logits, cache, inputs)

    def generate(
        self, changes: Mapping[str, torch.Tensor], ids: torch.Tensor, options: Mapping[str, Any]
    ) -> torch.Tensor:
        cache = ContinuumCache(self.model.config, self.fast_weights(changes))
        options = {"attention_mask": torch.ones_like(ids), **options}
        return self.model.generate(ids, cache=cache, **options)

    def detach(self, context: Context) -> Context:
        cache = context.copy()
        for layer in cache.layers:
            if isinstance(layer, StateCacheLayer):
                layer.map(_plain)
            else:
                layer.keys, layer.values = _plain(layer.keys), _plain(layer.values)
        return cache

    def describe_context(self, context: Context) -> tuple[Any, dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        return context.describe_layers(tensors), tensors

    def rebuild_context(self, description: Any, tensors: Mapping[str, torch.Tensor]) -> Context:
        cache = ContinuumCache(self.model.config)
        cache.rebuild_layers(description, tensors.__getitem__)
        return cache


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous()
