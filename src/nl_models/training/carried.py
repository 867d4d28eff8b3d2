"""The state that each stream carries from one training window to the next, without its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.hope.cache_hope import STATE_TYPES
from nl_models.layers.state import (
    State,
    describe_state,
    join_states,
    map_state,
    rebuild_state,
    select_state,
)


class CarriedStates:
    """Truncated backpropagation through time: states go on from window to window, gradients do not.

    Args:
        model: a Hope without attention layers.
        streams: for each forward pass of a step the numbers of this process's streams, ``B`` of them.
    """

    def __init__(self, model: HopeForCausalLM, streams: Sequence[range]) -> None:
        self._model = model
        self._streams = streams
        self._states: list[list[State] | None] = [None] * len(streams)  # of each pass, for each block

    def before(self, part: int, begins: torch.Tensor, *, anew: bool) -> HopeCache:
        """The cache for a pass's next windows.

        Args:
            part: which of the step's passes.
            begins: ``[B]`` bool, the streams that begin anew: at the model's own initial state, through which
                gradients flow to what it is made of.
            anew: whether some of all processes' streams do.
        """
        cache = HopeCache(self._model.config)
        states = self._states[part]
        if states is None:
            return cache
        if anew:
            # A column of padding writes nothing: the state after it is the initial one. All processes run
            # the model equally often, as sharding needs it.
            fresh = HopeCache(self._model.config)
            column = torch.zeros(len(begins), 1, dtype=torch.int64, device=begins.device)
            self._model(input_ids=column, attention_mask=column, cache=fresh, use_cache=True)
            rows = torch.arange(len(begins), device=begins.device) + len(begins) * begins
            both = (join_states([old, new.state]) for new, old in zip(fresh.layers, states))
            states = [select_state(state, rows) for state in both]
        for layer, state in zip(cache.layers, states):
            layer.commit(state, 1)
        return cache

    def after(self, part: int, cache: HopeCache) -> None:
        """Keep what the cache holds now, cut from its graph."""
        self._states[part] = [layer.state for layer in cache.detach().layers]

    def describe(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The structure of a stream's state as JSON, and the tensors of this process's streams by name."""
        structure, tensors = None, {}
        for streams, states in zip(self._streams, self._states):
            for row, stream in enumerate(streams):
                own: dict[str, torch.Tensor] = {}
                kept = [map_state(lambda x, row=row: x[row : row + 1], state) for state in states]
                structure = describe_state(tuple(kept), "", own)
                tensors |= {f"carried/{stream}{name}": value for name, value in own.items()}
        return structure, tensors

    def owns(self, key: str) -> bool:
        """Whether a tensor of a checkpoint belongs to a stream of this process."""
        kind, _, rest = key.partition("/")
        return kind == "carried" and any(int(rest.split(".")[0]) in streams for streams in self._streams)

    def restore(self, structure: Any, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of :meth:`describe`."""
        for part, streams in enumerate(self._streams):
            rows = [
                rebuild_state(structure, lambda name, s=stream: tensors[f"carried/{s}{name}"], STATE_TYPES)
                for stream in streams
            ]
            joined = [join_states(blocks) for blocks in zip(*rows)]
            self._states[part] = [map_state(lambda x: x.to(self._model.device), state) for state in joined]
