"""What every cache with states can do: it is saved and copied; rows join a batch, leave it and start over;
tokens are taken back.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

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
    _checkpoint: StatefulCache | None = None  # where `crop` goes back to
    _pieces: tuple[dict[str, Any], ...] = ()  # arguments of the calls since then
    _pending: tuple[dict[str, Any], ...] = ()  # those that were taken back with others, to be read again

    def copy(self: Self) -> Self:
        """Another cache that goes on from here by itself.

        Its tensors are those of this one, until either reads on: none is ever changed in place.
        """
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def activate_past_recording(self) -> None:
        """From here on :meth:`crop` can take back what is read.

        That costs the tokens and one state, the one here, whatever is read; ``crop`` moves it on.
        """
        if self._has_states():
            self._check_nothing_pends()
            self._checkpoint, self._pieces = None, ()
            self._checkpoint = self.copy()
        elif hasattr(super(), "activate_past_recording"):
            super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back: ``-n`` removes n of them; a positive number is how many stay.

        The state goes back to where :meth:`activate_past_recording` or the last ``crop`` was; what came
        between and stays is read again with the next call of the model.

        Raises:
            ValueError: more than was recorded.
        """
        if not self._has_states():
            super().crop(tokens_to_remove)
            return
        length = self.get_seq_length()
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if not remove:
            if self._checkpoint is not None and not self._pending:
                self.activate_past_recording()
            return
        checkpoint, pieces = self._checkpoint, self._pending or self._pieces
        recorded = sum(map(_columns, pieces))
        if checkpoint is None or remove > recorded:
            raise ValueError(
                f"crop: a state cannot forget its last {remove} tokens, of which {recorded} were recorded; "
                "call activate_past_recording() before what may be taken back is read, or keep a copy()"
            )
        vars(self).update(vars(checkpoint.copy()))
        self._checkpoint, self._pieces = checkpoint, ()
        self._pending = _first_columns(pieces, recorded - remove)
        if self._pending:
            for layer in self.layers:
                if isinstance(layer, StateCacheLayer):
                    layer.unread = None  # it is among the first of those

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can take back what is read next."""
        return self._checkpoint is not None if self._has_states() else super().is_croppable

    def read_pending(self, model: torch.nn.Module) -> None:
        """Read again what :meth:`crop` took back with other tokens; every call of the model begins with it.

        Args:
            model: the model without its output layer.
        """
        self._check_whole()
        if self._pending:
            pieces, self._pending, self._checkpoint = self._pending, (), None
            for piece in pieces:
                model(**piece, cache=self, use_cache=True)
            self.activate_past_recording()

    def record(self, arguments: Mapping[str, Any]) -> None:
        """Keep the arguments of a call of the model that is done, so that a part of it can be read again."""
        if self._checkpoint is not None:
            given = {name: value for name, value in arguments.items() if value is not None}
            self._pieces = (*self._pieces, given)

    def end_recording(self) -> None:
        """Forget what :meth:`crop` could have gone back to."""
        self._check_nothing_pends()
        self._checkpoint, self._pieces = None, ()

    def get_seq_length(self, *args, **kwargs) -> int:
        """Number of columns that were read, those included that are to be read again."""
        return super().get_seq_length(*args, **kwargs) + sum(map(_columns, self._pending))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the row ``beam_idx[i]`` of before."""
        self.end_recording()
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self.end_recording()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` that follow one another."""
        self.end_recording()
        super().batch_repeat_interleave(repeats)

    def _has_states(self) -> bool:
        return any(isinstance(layer, StateCacheLayer) for layer in self.layers)

    def is_for_same_models(self, cache: StatefulCache) -> bool:
        """Whether the models that can use ``cache`` can use this one, too."""
        if type(cache) is not type(self):
            return False
        return cache._config is self._config or cache.fingerprint == self.fingerprint

    def _check_whole(self) -> None:
        """Raise ``ValueError`` where some layers have read more than others."""
        lengths = {layer.get_seq_length() for layer in self.layers}
        if len(lengths) > 1:
            raise ValueError(
                f"cache: a call of the model has ended midway, its layers have read {min(lengths)} to "
                f"{max(lengths)} columns; go on from a copy() or a file of before"
            )

    def _rows(self, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
        if self.batch_size < 1:
            raise ValueError(f"rows: there are none yet; begin with {type(self).__name__}.initial(model, n)")
        return row_indices(rows, self.batch_size)

    def _check_nothing_pends(self) -> None:
        self._check_whole()
        if self._pending:
            raise ValueError(
                f"cache: {sum(map(_columns, self._pending))} tokens wait to be read again after crop; call "
                "read_pending(model.base_model) first"
            )

    @classmethod
    def initial(cls: type[Self], model: torch.nn.Module, batch_size: int = 1) -> Self:
        """The cache of rows of ``model`` that have read nothing, as one that others can join."""
        cache, ids = cls(model.config), torch.zeros(batch_size, 1, dtype=torch.int64)
        ids = ids.to(input_device(model))
        model(input_ids=ids, attention_mask=ids, cache=cache, use_cache=True)  # padding writes nothing
        cache.forget_columns()
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
        for cache in caches:
            cache._check_nothing_pends()
        joined = caches[0].copy()
        joined.end_recording()
        joined._join(caches)
        return joined

    def select(self: Self, rows: torch.Tensor | Sequence[int]) -> Self:
        """The rows ``rows`` in that order, in a cache of their own: indices, with repeats, or bool ``[B]``.

        Raises:
            ValueError: no such rows, or none.
        """
        chosen = self.copy()
        chosen.batch_select_indices(self._rows(rows))
        return chosen

    def remove(self: Self, rows: torch.Tensor | Sequence[int]) -> Self:
        """The rows that are not among ``rows``, in a cache of their own.

        Raises:
            ValueError: no such rows, or none would be left.
        """
        gone = self._rows(rows)
        left = torch.ones(self.batch_size, dtype=torch.bool)
        left[gone] = False
        if not left.any():
            raise ValueError(f"rows: none of {self.batch_size} would be left; drop the cache, or reset() it")
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
            self._checkpoint, self._pieces, self._pending = None, (), ()
            super().reset()
            return
        if model is None:
            raise ValueError("model: expected the model of this cache, whose parameters are where rows start")
        rows = self._rows(rows)
        begun = type(self).initial(model, len(rows))
        order = torch.arange(self.batch_size)
        order[rows] = self.batch_size + torch.arange(len(rows))
        vars(self).update(vars(type(self).join([self, begun]).select(order)))

    def save(self, path: str | os.PathLike, *, weights: str | None = None) -> None:
        """Write the cache to a safetensors file; the file appears whole or not at all.

        ``weights``: what tells the model's weights from others, such as ``module_views.weights_digest``, for
        :meth:`load` to ask for.
        """
        self._check_nothing_pends()
        tensors: dict[str, torch.Tensor] = {}
        described = {name: json.dumps(value) for name, value in self.describe(tensors).items()}
        metadata = {"format": self.file_format, "fingerprint": self.fingerprint, **described}
        if weights is not None:
            metadata["weights"] = weights
        write_bytes(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike,
        config: PreTrainedConfig,
        device: torch.device | str = "cpu",
        *,
        weights: str | None = None,
    ) -> Self:
        """Read a cache that :meth:`save` wrote.

        Args:
            path: the file.
            config: of the model that will use the cache.
            device: where its tensors go.
            weights: of that model, as :meth:`save` got them; ``None``, and where it got none: not compared.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is no saved cache, or is of another config or other weights.
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
                saved = metadata.pop("weights", None)
                if weights is not None and saved not in (None, weights):
                    raise ValueError(
                        f"path: {path} was saved from a model with other weights; weights=None "
                        "(--allow-other-model) uses it with this one all the same"
                    )
                described = {name: json.loads(value) for name, value in metadata.items()}
                cache.rebuild(described, file.get_tensor)
        except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} is truncated or no saved {kind}: {error}") from error
        return cache

    def num_bytes(self) -> int:
        """Bytes that everything occupies that was read."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer_tensors(layer))

    def forget_columns(self) -> None:
        """What was read counts as not read: no mask has to speak of it."""
        for layer in self.layers:
            if isinstance(layer, StateCacheLayer):
                layer.forget_columns()


def layer_tensors(layer: CacheLayerMixin) -> list[torch.Tensor]:
    """What a layer of a cache holds."""
    if isinstance(layer, StateCacheLayer):
        return list(state_tensors(layer.state))
    return [layer.keys, layer.values] if layer.is_initialized else []


def _columns(piece: Mapping[str, Any]) -> int:
    ids = piece.get("input_ids")
    return (piece["inputs_embeds"] if ids is None else ids).shape[1]


def _first_columns(pieces: Sequence[dict[str, Any]], count: int) -> tuple[dict[str, Any], ...]:
    """The first ``count`` columns of what was read, in as few pieces as there can be."""
    joined: list[dict[str, Any]] = []
    for piece in pieces:
        kept = min(count, _columns(piece))
        if not kept:
            break
        count -= kept
        cut = {n: x[:, :kept] if isinstance(x, torch.Tensor) else x for n, x in piece.items()}
        if joined and joined[-1].keys() == cut.keys():
            before = joined.pop()
            if all(isinstance(x, torch.Tensor) or before[n] is x for n, x in cut.items()):
                cut = {
                    n: torch.cat([before[n], x], 1) if isinstance(x, torch.Tensor) else x
                    for n, x in cut.items()
                }
            else:
                joined.append(before)
        joined.append(cut)
    return tuple(joined)
