"""What every cache with states can do: it is saved and copied; rows join a batch, leave it and start over."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from nl_models.files import write_bytes
from nl_models.layers.state import row_indices, state_tensors
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.module_views import input_device

Self = TypeVar("Self", bound="StatefulCache")


class StatefulCache:
    """Rows of a cache; it stands before ``Cache`` among the bases of a class.

    A row is a user: all that he has read. Rows of one batch may have read unequally much.

    Attributes:
        fingerprint: of the config of the models that can use it.
    """

    file_format: ClassVar[str]
    fingerprint: str

    def copy(self: Self) -> Self:
        """Another cache that goes on from here by itself.

        Its tensors are those of this one, until either reads on: none is ever changed in place.
        """
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    @classmethod
    def initial(cls: type[Self], model: torch.nn.Module, batch_size: int = 1) -> Self:
        """The cache of rows of ``model`` that have read nothing, as one that others can join."""
        cache, ids = cls(model.config), torch.zeros(batch_size, 1, dtype=torch.int64)
        ids = ids.to(input_device(model))
        model(input_ids=ids, attention_mask=ids, cache=cache, use_cache=True)  # padding writes nothing
        cache._forget_columns()
        return cache

    @classmethod
    def join(cls: type[Self], caches: Sequence[Self]) -> Self:
        """The rows of several caches in one, in order, as when users join a batch.

        Rows that have read less count as padded on the left. A mask of all columns has to say so too; none,
        or one of the new columns alone, is enough.

        Raises:
            TypeError: another kind of cache.
            ValueError: no cache, one before its first token (see :meth:`initial`), or of another model.
        """
        caches = list(caches)
        if not caches or any(type(cache) is not cls for cache in caches):
            given = [type(cache).__name__ for cache in caches]
            raise TypeError(f"caches: expected one or more of {cls.__name__}, got {given}")
        if any(cache.batch_size < 1 for cache in caches):
            raise ValueError(
                f"caches: one has no rows yet; begin it with {cls.__name__}.initial(model), or leave it out"
            )
        joined = caches[0].copy()
        joined._join(caches)
        return joined

    def select(self: Self, rows: torch.Tensor | Sequence[int]) -> Self:
        """The rows ``rows`` in that order, in a cache of their own: indices, with repeats, or bool ``[B]``.

        Raises:
            ValueError: no such rows, or none.
        """
        chosen = self.copy()
        chosen.batch_select_indices(row_indices(rows, self.batch_size))
        return chosen

    def remove(self: Self, rows: torch.Tensor | Sequence[int]) -> Self:
        """The rows that are not among ``rows``, in a cache of their own.

        Raises:
            ValueError: no such rows, or none would be left.
        """
        left = torch.ones(self.batch_size, dtype=torch.bool)
        left[row_indices(rows, self.batch_size)] = False
        return self.select(left)

    def reset(
        self, rows: torch.Tensor | Sequence[int] | None = None, model: torch.nn.Module | None = None
    ) -> None:
        """Put the rows ``rows`` back before their first token, in place; ``None``: empty the whole cache.

        Args:
            rows: indices, or bool ``[B]``.
            model: whose cache it is; its parameters are where memories start.

        Raises:
            ValueError: no such rows, or rows without a model.
        """
        if rows is None:
            super().reset()
            return
        if model is None:
            raise ValueError("model: expected the model of this cache, whose parameters are where rows start")
        rows = row_indices(rows, self.batch_size)
        begun = type(self).initial(model, len(rows))
        order = torch.arange(self.batch_size)
        order[rows] = self.batch_size + torch.arange(len(rows))
        vars(self).update(vars(type(self).join([self, begun]).select(order)))

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file; the file appears whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        described = {name: json.dumps(value) for name, value in self._describe(tensors).items()}
        metadata = {"format": self.file_format, "fingerprint": self.fingerprint, **described}
        write_bytes(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike,
        config: PreTrainedConfig,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a cache that :meth:`save` wrote.

        Args:
            path: the file.
            config: of the model that will use the cache.
            device: where its tensors go.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is no saved cache, or was made for another config.
        """
        path, kind = Path(path), cls.__name__
        if not path.is_file():
            raise FileNotFoundError(f"path: no such file: {path}")
        cache = cls(config)
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.pop("format", None) != cls.file_format:
                    raise ValueError(f"path: {path} is no saved {kind}")
                if metadata.pop("fingerprint") != cache.fingerprint:
                    raise ValueError(f"path: {path} was saved from a model of another config")
                described = {name: json.loads(value) for name, value in metadata.items()}
                cache._rebuild(described, file.get_tensor)
        except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} is truncated or no saved {kind}: {error}") from error
        return cache

    def num_bytes(self) -> int:
        """Bytes that everything occupies that was read."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer_tensors(layer))

    def _forget_columns(self) -> None:
        """Rows that have read nothing but padding have read nothing."""
        for layer in self.layers:
            if isinstance(layer, StateCacheLayer):
                layer.forget_columns()


def layer_tensors(layer: CacheLayerMixin) -> list[torch.Tensor]:
    """What a layer of a cache holds."""
    if isinstance(layer, StateCacheLayer):
        return list(state_tensors(layer.state))
    return [layer.keys, layer.values] if layer.is_initialized else []
