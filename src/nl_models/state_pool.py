"""A thousand users' memories in one set of tensors, of which a step takes some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from nl_kernels import ContinuumLevelState
from nl_kernels.checks import check_positive_int
from nl_models.hope.cache_hope import BlockState
from nl_models.layers.state import AttentionState, State, map_state, row_indices, state_tensors, with_pending
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.prefixes import cache_class
from nl_models.stateful_cache import StatefulCache


class StatePool:
    """The states of ``slots`` users, each in a row of the same tensors, which never move.

    ``cache = pool.gather(slots)``, a call of the model, ``pool.scatter(slots, cache)``. Every slot begins
    before its first token.

    Args:
        model: a Hope or a converted model of which no layer is attention, whose keys and values would grow.
        slots: how many.

    Raises:
        TypeError: a model of another kind.
        ValueError: a model with attention, or ``slots`` that is no positive integer.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, slots: int):
        check_positive_int("slots", slots)
        self.slots = slots
        self._empty = cache_class(model)(model.config)
        self._levels = getattr(model.config, "make_continuum_levels", list)()
        begun = type(self._empty).initial(model)
        if any(_grows(layer) for layer in begun.layers):
            raise ValueError("model: its attention keeps every token; a pool is for states of one size")
        self._begun = [self._with_room(layer.state) for layer in begun.layers]
        self._held = [
            map_state(lambda t: t.expand(slots, *t.shape[1:]).clone(), state) for state in self._begun
        ]
        self.seen = torch.zeros(slots, dtype=torch.int64)

    def gather(self, slots: torch.Tensor | Sequence[int]) -> StatefulCache:
        """A cache whose rows are the users in ``slots``, in that order; a copy.

        Raises:
            ValueError: no such slots, or none.
        """
        slots, cache = row_indices(slots, self.slots), self._empty.copy()
        for layer, held in zip(cache.layers, self._held):
            layer.commit(map_state(lambda t: t[slots.to(t.device)], held), int(self.seen[slots].max()))
        return cache

    @torch.no_grad()
    def scatter(self, slots: torch.Tensor | Sequence[int], cache: StatefulCache) -> None:
        """Write what the model made of a gathered cache back into its slots, in place.

        Raises:
            ValueError: no such slots, one of them twice, another number than the cache has rows, or a cache
                of another model, or with tokens that were written or taken back and that nothing has read.
        """
        if not self._empty.is_for_same_models(cache):
            raise ValueError("cache: expected one for the model of this pool, such as gather gives")
        slots = row_indices(slots, self.slots)
        if len(set(slots.tolist())) < len(slots) or cache.batch_size != len(slots):
            raise ValueError(
                f"slots: expected a different one for each of {max(cache.batch_size, 0)} rows, got "
                f"{slots.tolist()}"
            )
        cache.end_recording()
        if cache.layers[0].unread is not None:
            raise ValueError(
                "cache: its last token was written by generate and not read; call the model on it"
            )
        self.seen[slots] += cache.layers[0].seen - self.seen[slots].max()
        for held, layer in zip(self._held, cache.layers, strict=True):
            self._write(slots, held, self._with_room(layer.state))

    @torch.no_grad()
    def reset(self, slots: torch.Tensor | Sequence[int]) -> None:
        """Put slots back before their first token, in place, for the next users."""
        slots = row_indices(slots, self.slots)
        self.seen[slots] = 0
        for held, begun in zip(self._held, self._begun):
            self._write(slots, held, begun)

    def num_bytes(self) -> int:
        """Bytes that all slots occupy."""
        return sum(t.numel() * t.element_size() for state in self._held for t in state_tensors(state))

    def _with_room(self, state: State) -> State:
        """With room for every token that may wait for a level's step."""
        if not isinstance(state, BlockState):
            return state
        levels = (
            with_pending(held, level.chunk_size - 1) if isinstance(held, ContinuumLevelState) else held
            for held, level in zip(state.continuum, self._levels, strict=True)
        )
        return state._replace(continuum=tuple(levels))

    @staticmethod
    def _write(slots: torch.Tensor, held: State, new: State) -> None:
        for into, rows in zip(state_tensors(held), state_tensors(new), strict=True):
            into[slots.to(into.device)] = rows.to(into)


def _grows(layer: CacheLayerMixin) -> bool:
    state = getattr(layer, "state", None)
    mixer = state.mixer if isinstance(state, BlockState) else state
    return not isinstance(layer, StateCacheLayer) or isinstance(mixer, AttentionState)
