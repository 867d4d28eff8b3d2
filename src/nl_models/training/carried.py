"""The state that each stream carries from one training window to the next, without its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nl_models.hope import HopeCache, HopeForCausalLM


class CarriedStates:
    """Truncated backpropagation through time: states go on from window to window, gradients do not.

    Args:
        model: a Hope without attention layers.
        streams: for each forward pass of a step the numbers of this process's streams, ``B`` of them.
    """

    def __init__(self, model: HopeForCausalLM, streams: Sequence[range]) -> None:
        self._model, self._streams = model, streams
        self._caches = [HopeCache(model.config) for _ in streams]  # of each pass

    def before(self, part: int, begins: torch.Tensor, *, anew: bool) -> HopeCache:
        """The cache for a pass's next windows.

        Args:
            part: which of the step's passes.
            begins: ``[B]`` bool, the streams that begin anew: at the model's own initial state, through which
                gradients flow to what it is made of.
            anew: whether some of all processes' streams do.
        """
        cache, count = self._caches[part], len(begins)
        if anew and cache.batch_size > 0:
            # All processes run the model equally often, as sharding needs it.
            both = HopeCache.join([cache, HopeCache.initial(self._model, count)])
            cache = self._caches[part] = both.select(torch.arange(count) + count * begins)
        return cache

    def after(self, part: int) -> None:
        """Cut what the cache holds now from its graph."""
        self._caches[part].detach().forget_columns()

    def describe(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The structure of a stream's state as JSON, and the tensors of this process's streams by name."""
        structure, tensors = None, {}
        for streams, cache in zip(self._streams, self._caches):
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
        """The inverse of :meth:`describe`."""
        for part, streams in enumerate(self._streams):
            rows = [HopeCache(self._model.config) for _ in streams]
            for cache, stream in zip(rows, streams):
                # Versions before began the names in the structure with the point.
                get_tensor = lambda name, s=stream: tensors[f"carried/{s}.{name.lstrip('.')}"]  # noqa: E731
                cache.rebuild({"seen": [0] * len(structure), "structure": structure}, get_tensor)
            self._caches[part] = HopeCache.join(rows).to(self._model.device)
