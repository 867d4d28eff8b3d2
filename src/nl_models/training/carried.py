"""The state that each stream carries from one training window to the next, without its gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.layers.state import combine_states


class CarriedStates:
    """Truncated backpropagation through time: states go on from window to window, gradients do not.

    What goes on is what was *learned*, the distance from the initial state, which every window adds to the
    initial state of its moment. Levels of the continuum begin at parameters. A state that kept their weights
    would keep those of parameters that the optimiser has moved since, and would hide the parameters from the
    loss: hardly a gradient would reach them (docs/training.md).

    Args:
        model: a Hope without attention layers.
        streams: for each forward pass of a step the numbers of this process's streams, ``B`` of them.
    """

    def __init__(self, model: HopeForCausalLM, streams: Sequence[range]) -> None:
        self._model, self._streams = model, streams
        self._distances: list[HopeCache | None] = [None] * len(streams)  # of each pass

    def before(self, part: int, begins: torch.Tensor) -> HopeCache:
        """The cache for a pass's next windows, to which the model adds its initial state.

        Args:
            part: which of the step's passes.
            begins: ``[B]`` bool, the streams that begin anew: at the initial state.
        """
        with torch.no_grad():
            self._initial, count = HopeCache.initial(self._model, len(begins)), len(begins)
        cache, distances = _combined(torch.sub, self._initial, self._initial), self._distances[part]
        if distances is not None:
            cache = HopeCache.join([distances, cache]).select(torch.arange(count) + count * begins)
        cache.relative = True
        return cache

    def after(self, part: int, cache: HopeCache) -> None:
        """Keep what a pass's windows have left in the cache of :meth:`before`, cut from its graph."""
        cache.detach().forget_columns()
        self._distances[part] = _combined(torch.sub, cache, self._initial)

    def describe(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The structure of a stream's state as JSON, and the tensors of this process's streams by name."""
        structure, tensors = None, {}
        for streams, cache in zip(self._streams, self._distances):
            for row, stream in enumerate(streams):
                own: dict[str, torch.Tensor] = {}
                structure = cache.select([row]).describe(own)["structure"]
                tensors |= {f"carried/{stream}.{name}": value for name, value in own.items()}
        return structure, tensors

    def owns(self, key: str) -> bool:
        """Whether a tensor of a checkpoint belongs to a stream of this process."""
        kind, _, rest = key.partition("/")
        return kind == "carried" and any(int(rest.split(".")[0]) in streams for streams in self._streams)

    def restore(self, structure: Any, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of :meth:`describe`, for the model with the checkpoint's weights."""
        # Versions that began the names in the structure with the point kept the states themselves.
        whole = '".' in json.dumps(structure)
        for part, streams in enumerate(self._streams):
            rows = [HopeCache(self._model.config) for _ in streams]
            for cache, stream in zip(rows, streams):
                get_tensor = lambda name, s=stream: tensors[f"carried/{s}.{name.lstrip('.')}"]  # noqa: E731
                cache.rebuild({"seen": [0] * len(structure), "structure": structure}, get_tensor)
            joined = HopeCache.join(rows).to(self._model.device)
            if whole:
                initial = HopeCache.initial(self._model, len(rows)).detach()
                joined = _combined(torch.sub, joined, initial)
            self._distances[part] = joined


def _combined(function: Callable[..., torch.Tensor], cache: HopeCache, initial: HopeCache) -> HopeCache:
    """:func:`combine_states` of all layers."""
    combined = cache.copy()
    for layer, begun in zip(combined.layers, initial.layers):
        layer.state = combine_states(function, layer.state, begun.state)
    return combined
