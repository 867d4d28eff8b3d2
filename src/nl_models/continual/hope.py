"""The fast parameters of Hope: levels of its continuum memories, or the weights that they start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nl_kernels import ContinuumLevelState
from nl_models.continual.fast_parameters import Context, FastParameter, FastParameters, ModelOutput
from nl_models.hope import HopeForCausalLM
from nl_models.hope.cache_hope import STATE_TYPES, HopeCache
from nl_models.layers.continuum import ContinuumMemory
from nl_models.layers.state import describe_state, rebuild_state
from nl_models.module_views import with_parameters

INITIAL_CHUNK_SIZE = 64
"""Tokens between two steps of the weights that levels start from, unless told otherwise."""


class HopeParameters(FastParameters):
    """See :class:`FastParameters`; each sequence has weights of its own.

    Levels that have a chunk size and ``max_rate=0`` are the learner's alone. In a Hope without any, as by
    default, its levels learn by themselves within a text, from initial weights and, as far as they forget,
    back to them. Then these initial weights, of all levels, are what the learner steps, as one slower level:
    what the levels have learned within the text goes on top of them, and is a constant in the gradient.

    Args:
        chunk_size: of that level; ``None``: :data:`INITIAL_CHUNK_SIZE`.

    Raises:
        ValueError: a chunk size for levels that have their own.
    """

    def __init__(self, model: HopeForCausalLM, chunk_size: int | None = None):
        self.model = model
        levels = model.config.make_continuum_levels()
        places = [i for i, level in enumerate(levels) if level.chunk_size is not None and not level.steps]
        self.initial = not places
        if self.initial:
            places = list(range(len(levels)))
            self.chunk_sizes = (INITIAL_CHUNK_SIZE if chunk_size is None else chunk_size,)
        elif chunk_size is not None:
            raise ValueError("chunk_size: the model's levels for the learner have chunk sizes of their own")
        else:
            self.chunk_sizes = tuple(levels[place].chunk_size for place in places)
        # A level that steps by itself starts all sequences from the same weights.
        self._one_by_one = self.initial and any(level.steps for level in levels)
        self.nested = model.config.continuum_variant == "nested"
        self._names: dict[str, str] = {}
        parameters = []
        for layer, block in enumerate(model.model.layers):
            for index, place in enumerate(places):
                level = 0 if self.initial else index
                memory = block.continuum.levels[place]
                for part in ("up", "down", "gate"):
                    if getattr(memory, part) is None:
                        continue
                    name = f"layers.{layer}.levels.{index}.{part}"
                    read = f"{layer}.{place}.{'hidden' if part == 'down' else 'inner'}"
                    self._names[name] = f"model.layers.{layer}.continuum.levels.{place}.{part}"
                    parameters.append(FastParameter(name, level, read))
        self.parameters = tuple(parameters)

    def weight(self, parameter: FastParameter) -> torch.Tensor:
        return self.model.get_parameter(self._names[parameter.name]).to(self.dtype)

    def own_weight(self, parameter: FastParameter) -> torch.Tensor:
        return self.model.get_parameter(self._names[parameter.name]).detach()

    def weights(self, changes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of every level with the changes ``[B, out, in]``; of one sequence ``[out, in]``, as the
        model has them, so that products round as its own do."""
        own = {name: self.model.get_parameter(path) for name, path in self._names.items()}
        changed = {self._names[n]: (weight + changes[n]).to(weight.dtype) for n, weight in own.items()}
        return {n: w[0] if len(w) == 1 else w for n, w in changed.items()}

    def run(
        self,
        changes: Mapping[str, torch.Tensor],
        ids: torch.Tensor,
        context: Context,
        *,
        keep_inputs: bool = False,
    ) -> ModelOutput:
        rows = len(next(iter(changes.values())))
        if self._one_by_one and rows > 1:
            return self._run_one_by_one(changes, ids, context, keep_inputs)
        shared = len(ids) // rows
        weights = self.weights(changes)
        if shared > 1 and not self._one_by_one:
            weights = {n: w.repeat_interleave(shared, 0) if w.ndim == 3 else w for n, w in weights.items()}
        cache = HopeCache(self.model.config)
        if context is not None:
            for layer, before in zip(cache.layers, context.layers, strict=True):
                layer.commit(before.state, before.seen)
                layer.padding = before.padding
            self.move_levels(cache, weights, 1)
        view = with_parameters(self.model, weights)
        inputs: dict[str, torch.Tensor] = {}
        if keep_inputs:
            self._watch(view, inputs)
        output = view(input_ids=ids, cache=cache)
        self.move_levels(cache, weights, -1)
        return ModelOutput(output.logits, cache, inputs)

    def _run_one_by_one(
        self, changes: Mapping[str, torch.Tensor], ids: torch.Tensor, context: Context, keep_inputs: bool
    ) -> ModelOutput:
        shared, outputs = len(ids) // len(next(iter(changes.values()))), []
        for row, piece in enumerate(ids.split(shared)):
            own = {name: change[row : row + 1] for name, change in changes.items()}
            places = list(range(row * shared, (row + 1) * shared))
            before = None if context is None else context.select(places)
            outputs.append(self.run(own, piece, before, keep_inputs=keep_inputs))
        inputs = {name: torch.cat([o.inputs[name] for o in outputs]) for name in outputs[0].inputs}
        cache = HopeCache.join([output.context for output in outputs])
        return ModelOutput(torch.cat([output.logits for output in outputs]), cache, inputs)

    def move_levels(self, cache: HopeCache, weights: Mapping[str, torch.Tensor], sign: int) -> None:
        """Add ``sign`` times ``weights``, by the model's names, to what the levels that step have, in place.

        With −1 a cache has what they learned within the text, and with 1 their weights again.
        """
        if not self.initial or cache.get_seq_length() == 0:
            return
        for index, layer in enumerate(cache.layers):
            entries = list(layer.state.continuum)
            for place, entry in enumerate(entries):
                if isinstance(entry, ContinuumLevelState):
                    path = f"model.layers.{index}.continuum.levels.{place}."
                    parts = {p: weights[path + p] for p in ("up", "down", "gate") if path + p in weights}
                    entries[place] = entry._replace(
                        **{part: getattr(entry, part) + sign * weight for part, weight in parts.items()}
                    )
            layer.state = layer.state._replace(continuum=tuple(entries))

    def view(self, changes: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model with the changes ``[1, out, in]`` of one sequence."""
        return with_parameters(self.model, self.weights(changes))

    def _watch(self, view: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        """Put hooks on a view that compute what the matrices of every level multiply, by input name."""
        for index, block in enumerate(view.model.layers):

            def watch(module: ContinuumMemory, arguments, index=index):
                for place, inner, hidden in _level_inputs(module, arguments[0]):
                    inputs[f"{index}.{place}.inner"] = inner.to(self.dtype)
                    inputs[f"{index}.{place}.hidden"] = hidden.to(self.dtype)

            block.continuum.register_forward_pre_hook(watch)

    def generate(
        self, changes: Mapping[str, torch.Tensor], ids: torch.Tensor, options: Mapping[str, Any]
    ) -> torch.Tensor:
        shared = len(ids) // len(next(iter(changes.values())))
        mask = options.get("attention_mask", torch.ones_like(ids))
        rows = []
        for row, (row_ids, row_mask) in enumerate(zip(ids.split(shared), mask.split(shared), strict=True)):
            view = self.view({name: change[row : row + 1] for name, change in changes.items()})
            rows.append(view.generate(row_ids, **{**options, "attention_mask": row_mask}))
        longest = max(row.shape[1] for row in rows)
        padding = options.get("pad_token_id", self.model.generation_config.pad_token_id) or 0
        return torch.cat([F.pad(row, (0, longest - row.shape[1]), value=padding) for row in rows])

    def detach(self, context: Context) -> Context:
        for layer in context.layers:
            layer.map(lambda tensor: tensor.detach().contiguous())
        return context

    def describe_context(self, context: Context) -> tuple[Any, dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        description = [
            [layer.seen, describe_state(layer.state, str(index), tensors)]
            for index, layer in enumerate(context.layers)
        ]
        return description, tensors

    def rebuild_context(self, description: Any, tensors: Mapping[str, torch.Tensor]) -> Context:
        get: Callable[[str], torch.Tensor] = tensors.__getitem__
        cache = HopeCache(self.model.config)
        for layer, (seen, state) in zip(cache.layers, description, strict=True):
            layer.commit(rebuild_state(state, get, STATE_TYPES), seen)
        return cache


def _level_inputs(memory: ContinuumMemory, x: torch.Tensor):
    """Place, input of the block and of its last layer, for every level up to the last that does not step.

    The chain is run once more as plain MLPs: the op keeps these values to itself.
    """
    for place, level in enumerate(memory.levels):
        if level.config.steps:
            raise ValueError(
                "rule='dgd': a level that steps by itself stands among the learner's; its output is not known"
            )
        inner = F.rms_norm(x, x.shape[-1:], level.norm, memory.norm_eps)
        hidden = inner @ level.up.mT
        hidden = F.gelu(hidden) if level.gate is None else F.silu(inner @ level.gate.mT) * hidden
        yield place, inner, hidden
        if memory.variant != "independent":
            x = x + hidden @ level.down.mT
