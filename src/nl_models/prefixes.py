"""Documents that were read once: caches found again by the tokens that they have read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nl_models.files import make_folder
from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.module_views import input_device, weights_digest
from nl_models.stateful_cache import StatefulCache
from nl_models.surgery import ContinuumCache
from nl_models.surgery.modules import ContinuumCausalLM

_PIECE = 2048  # tokens that are read at once

Key = tuple[int, str]
"""How many tokens were read, and their digest."""


class PrefixStore:
    """The caches of a model after some beginnings of prompts, the least recently used of which go.

    ``store.read(document)`` once; ``model.generate(prompt, cache=store.find(prompt))`` then reads only what
    follows the longest beginning that is known.

    Args:
        model: a Hope or a converted model; its weights stay as they are.
        max_bytes: of all that is kept.
        folder: keep everything in files there, which other processes may use too; ``None``: in memory.
            Its files are found by models with the same config and the same weights only.

    Raises:
        TypeError: a model of another kind.
        ValueError: ``max_bytes`` that is no positive integer.
    """

    def __init__(self, model: nn.Module, max_bytes: int, folder: str | os.PathLike | None = None):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes: expected an integer of at least 1, got {max_bytes!r}")
        self.model = model
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder)
        self._kind = cache_class(model)
        self._held: dict[Key, StatefulCache] = {}  # least recently used first
        if self.folder is not None:
            make_folder(self.folder)
            of_model = weights_digest(model) + self._kind(model.config).fingerprint
            self._name = hashlib.sha256(of_model.encode()).hexdigest()[:32]

    def find(self, ids: torch.Tensor | Sequence[int]) -> StatefulCache:
        """A cache that has read the longest beginning of ``ids`` that is known, but never all of them.

        It is the caller's own; ``get_seq_length()`` says how much it has read, 0 for nothing.

        Args:
            ids: ``[T]`` or ``[1, T]``.
        """
        ids = _one_row(ids)
        return self._longest(ids, len(ids) - 1)

    def read(self, ids: torch.Tensor | Sequence[int]) -> StatefulCache:
        """The cache after ``ids``, of which only what is not known is read; it is kept.

        What is larger than ``max_bytes`` alone is read and not kept.
        """
        ids = _one_row(ids)
        cache = self._longest(ids, len(ids))
        rest = ids[cache.get_seq_length() :].to(input_device(self.model))
        with torch.no_grad():
            for piece in rest.split(_PIECE) if len(rest) else ():
                self.model.base_model(input_ids=piece[None], cache=cache, use_cache=True)
        self._keep((len(ids), _digests(ids, [len(ids)])[len(ids)]), cache)
        return cache

    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(self._sizes().values())

    def _longest(self, ids: torch.Tensor, at_most: int) -> StatefulCache:
        known = {key for key in self._sizes() if key[0] <= at_most}
        digests = _digests(ids, sorted({length for length, _ in known}))
        for key in sorted(digests.items(), reverse=True):
            cache = self._load(key) if key in known else None
            if cache is not None:
                return cache
        return self._kind(self.model.config)

    def _load(self, key: Key) -> StatefulCache | None:
        if self.folder is None:
            self._held[key] = self._held.pop(key)
            return self._held[key].copy()
        try:
            _mark_as_used(self._path(key))
            return self._kind.load(self._path(key), self.model.config, input_device(self.model))
        except FileNotFoundError:  # another process needed the room
            return None
        except ValueError as error:
            if error.__cause__ is None:  # whole, and of another model
                raise
            self._path(key).unlink(missing_ok=True)  # damaged: what it was of is read once more
            return None

    def _keep(self, key: Key, cache: StatefulCache) -> None:
        if cache.num_bytes() > self.max_bytes:
            return
        if self.folder is None:
            self._held.pop(key, None)
            self._held[key] = cache.copy()
        else:
            path = self._path(key)
            if not path.exists():
                cache.save(path)
            with contextlib.suppress(FileNotFoundError):  # another process needed the room
                if path.stat().st_size > self.max_bytes:  # with its header
                    path.unlink()
                    return
                _mark_as_used(path)
        for oldest, size in self._sizes().items():
            if self.num_bytes() <= self.max_bytes or not size:
                break
            if self.folder is None:
                del self._held[oldest]
            else:
                self._path(oldest).unlink(missing_ok=True)

    def _sizes(self) -> dict[Key, int]:
        """Bytes of all that is kept, least recently used first."""
        if self.folder is None:
            return {key: cache.num_bytes() for key, cache in self._held.items()}
        found = []
        for path in self.folder.glob(f"{self._name}-*.safetensors"):
            name = re.fullmatch(r"[0-9a-f]{32}-(\d+)-([0-9a-f]{64})", path.stem)
            with contextlib.suppress(FileNotFoundError, TypeError):  # gone by now, or no file of ours
                of_file = path.stat()
                found.append((of_file.st_mtime_ns, (int(name[1]), name[2]), of_file.st_size))
        return {key: size for _, key, size in sorted(found)}

    def _path(self, key: Key) -> Path:
        return self.folder / f"{self._name}-{key[0]}-{key[1]}.safetensors"


def cache_class(model: nn.Module) -> type[StatefulCache]:
    """The cache that ``model`` takes.

    Raises:
        TypeError: it is neither a Hope nor a converted model.
    """
    if isinstance(model, HopeForCausalLM):
        return HopeCache
    if isinstance(model, ContinuumCausalLM):
        return ContinuumCache
    raise TypeError(f"model: expected a Hope or a converted model, got {type(model).__name__}")


def _mark_as_used(path: Path) -> None:
    """By the clock in nanoseconds: the system's own times of files move on every few milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _one_row(ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"ids: expected tokens [T] or [1, T], got {type(ids).__name__}") from error
    row = found.reshape(-1) if found.ndim == 1 or (found.ndim == 2 and len(found) == 1) else found[..., :0]
    if found.is_floating_point() or found.dtype == torch.bool or not row.numel():
        raise ValueError(
            f"ids: expected at least one token, [T] or [1, T], got {found.dtype} {tuple(found.shape)}"
        )
    return row.long()


def _digests(ids: torch.Tensor, lengths: Sequence[int]) -> dict[int, str]:
    """Digests of the first tokens of ``ids [T]``, for increasing ``lengths``."""
    digest, start, found = hashlib.sha256(), 0, {}
    for length in lengths:
        digest.update(ids[start:length].cpu().numpy().tobytes())
        found[length], start = digest.copy().hexdigest(), length
    return found
