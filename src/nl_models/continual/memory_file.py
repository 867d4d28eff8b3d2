"""What was learned as a dictionary and as a file: a few MB beside a model that stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from nl_kernels.checks import check_positive_int
from nl_models.continual.fast_parameters import FastParameters
from nl_models.continual.rules import StepRule
from nl_models.continual.stream import GROUPS, StreamState, gram_name
from nl_models.files import write_bytes
from nl_models.module_views import named_weights

FORMAT = "nl_models.ContinuumLearner.3"
_SAMPLED = "nl_models.ContinuumLearner.2"  # whose digest of the model saw a few values of each weight
_SAMPLES = 16
CONVERSATION = "conversation"
"""Of a file, what :mod:`nl_models.conversation` adds: the state of what was said, which no learner reads."""
_COUNTERS = ("learned", "read", "documents", "context_tokens")


class MemoryFileError(ValueError):
    """A saved memory is truncated, damaged, foreign, or of another model or other options."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FileOptions(NamedTuple):
    """What of a memory a file keeps, and how; see :meth:`nl_models.continual.ContinuumLearner.save`."""

    dtype: torch.dtype | None = None
    rank: int | None = None
    momenta: bool = True
    chunks: bool = True

    def check(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for what cannot be."""
        if self.dtype not in (None, *DTYPES.values()):
            raise ValueError(f"dtype: expected torch.bfloat16, float16, float32 or None, got {self.dtype}")
        if self.rank is not None:
            check_positive_int("rank", self.rank)

    def description(self) -> dict[str, Any]:
        """These options as JSON; :meth:`of_file` reads them."""
        names: dict[torch.dtype | None, str] = {dtype: name for name, dtype in DTYPES.items()}
        return {**self._asdict(), "dtype": names.get(self.dtype)}

    @classmethod
    def of_file(cls, header: Mapping[str, Any]) -> FileOptions:
        """The options by which a file was written; those of older files are not known, and the defaults."""
        kept = header.get("kept", {})
        return cls(**{**kept, "dtype": DTYPES.get(kept.get("dtype"))})

    def low_rank(self, shape: torch.Size) -> bool:
        """Whether a change of this shape ``[B, out, in]`` is kept as two factors, which are smaller."""
        return self.rank is not None and self.rank * (shape[1] + shape[2]) < shape[1] * shape[2]

    def changes(self, changes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that stand for ``changes`` in a file, by name."""
        found = {}
        for name, change in changes.items():
            if not self.low_rank(change.shape):
                found[f"changes/{name}"] = change
                continue
            left, sizes, right = torch.linalg.svd(change.detach(), full_matrices=False)
            found[f"left/{name}"] = left[..., : self.rank] * sizes[:, None, : self.rank]
            found[f"right/{name}"] = right[:, : self.rank]
        return found

    def num_bytes(
        self, model: FastParameters, rules: Sequence[StepRule], changes: Mapping[str, torch.Tensor]
    ) -> int:
        """Bytes of what is learned in a file, once every level has stepped and stands within a chunk."""
        numbers, grams = 0, {}
        for parameter in model.parameters:
            shape, rule = changes[parameter.name].shape, rules[parameter.level]
            low = self.rank if self.low_rank(shape) else None
            numbers += shape.numel() if low is None else shape[0] * low * (shape[1] + shape[2])
            numbers += shape.numel() * ((self.momenta and rule.has_momentum) + self.chunks) * rule.steps
            if self.chunks and rule.rule == "dgd":
                grams[gram_name(parameter)] = shape[0] * shape[2] ** 2
        itemsize = (model.dtype if self.dtype is None else self.dtype).itemsize
        return itemsize * (numbers + sum(grams.values()))


def pack(
    state: StreamState,
    model: FastParameters,
    options: Mapping[str, Any],
    fingerprint: str,
    keep: FileOptions,
) -> dict[str, Any]:
    """The state as ``{"header": JSON, "tensors": by name}``."""
    tensors = keep.changes(state.changes)
    groups = ["momenta"] * keep.momenta + ["gradients", "grams"] * keep.chunks
    tensors |= {f"{group}/{name}": t for group in groups for name, t in getattr(state, group).items()}
    if keep.dtype is not None:
        tensors = {name: tensor.to(keep.dtype) for name, tensor in tensors.items()}
    description = None
    if keep.chunks and state.context is not None:
        description, context = model.describe_context(state.context)
        tensors |= {f"context/{name}": tensor for name, tensor in context.items()}
    if keep.chunks and state.waiting is not None:
        tensors["waiting"] = state.waiting
    counters = {name: getattr(state, name) for name in _COUNTERS}
    if not keep.chunks:
        counters["context_tokens"] = 0
    header = {
        "format": FORMAT,
        "config": fingerprint,
        "tokens_per_level": [state.learned // size * size for size in model.chunk_sizes],
        "options": dict(options),
        "counters": counters,
        "context": description,
        "kept": keep.description(),
    }
    # Copies: safetensors writes no views, and no two names for the same memory.
    return {
        "header": header,
        "tensors": {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
        },
    }


def unpack(
    packed: Mapping[str, Any],
    state: StreamState,
    model: FastParameters,
    options: Mapping[str, Any],
    fingerprint: Callable[[], str],
    source: str,
    allow_other_model: bool = False,
) -> StreamState:
    """The inverse of :func:`pack`; ``state`` is any state of the same learner, for its shapes.

    Raises:
        MemoryFileError: the memory is not one of this learner.
    """
    try:
        header = packed["header"]
        # Read inside of torch.inference_mode(), they could have no gradient.
        tensors = {n: t.clone() if t.is_inference() else t for n, t in packed["tensors"].items()}
        if header["format"] not in (FORMAT, _SAMPLED):
            raise MemoryFileError(f"{source}: format {header['format']!r}, expected {FORMAT!r}")
        for name, value in options.items():
            if header["options"].get(name) != value:
                raise MemoryFileError(
                    f"{source}: saved with {name} = {header['options'].get(name)!r}, "
                    f"this learner has {value!r}"
                )
        found = sampled_digest(model.model) if header["format"] == _SAMPLED else fingerprint()
        foreign = header["config"] != found
        if foreign and not allow_other_model:
            raise MemoryFileError(
                f"{source}: was learned with another model, or other values of its weights; "
                "allow_other_model=True (--allow-other-model) uses it with this one all the same"
            )
        groups: dict[str, Any] = {name: {} for name in (*GROUPS, "context", "left", "right", CONVERSATION)}
        waiting = tensors.pop("waiting", None)
        for name, tensor in tensors.items():
            group, rest = name.split("/", 1)
            groups[group][rest] = tensor
        left, right, _ = groups.pop("left"), groups.pop("right"), groups.pop(CONVERSATION)
        for name, factor in left.items():
            groups["changes"][name] = factor.to(model.dtype) @ right[name].to(model.dtype)
        context, described = groups.pop("context"), header["context"]
        counters: dict[str, Any] = {name: int(header["counters"][name]) for name in _COUNTERS}
        if foreign:  # what another model made of the text says nothing to this one
            groups["gradients"], groups["grams"], described, waiting = {}, {}, None, None
            counters["context_tokens"] = 0
        _check_changes(groups["changes"], state.changes, source)
        for group in groups.values():
            for name in group:
                like = state.changes.get(name)
                device = model.device if like is None else like.device
                group[name] = group[name].to(device, model.dtype)
        return StreamState(
            **groups,
            **counters,
            context=None
            if described is None
            else model.rebuild_context(described, {n: t.to(model.device) for n, t in context.items()}),
            waiting=None if waiting is None else waiting.to(model.device),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise MemoryFileError(f"{source}: damaged or no saved memory ({error!r})") from error


def check_folder(name: str, path: str | os.PathLike) -> None:
    """Check that a file of this path can lie somewhere."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{name}: {os.fspath(path)!r} has no folder to lie in; make it first")


def write(path: str | os.PathLike, packed: Mapping[str, Any]) -> None:
    """Write a packed state; the file appears whole, in place of what was there, or not at all."""
    path = Path(path)
    check_folder("path", path)
    metadata = {"header": json.dumps(packed["header"]), "sha256": _digest(packed)}
    write_bytes(path, safetensors.torch.save(packed["tensors"], metadata))


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Read what :func:`write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        MemoryFileError: truncated, damaged, or no file of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {
                "header": json.loads(metadata["header"]),
                "tensors": {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise MemoryFileError(f"{path}: truncated, or no saved memory ({error})") from error
    if metadata.get("sha256") != _digest(packed):
        raise MemoryFileError(f"{path}: its content was altered (SHA-256 differs)")
    return packed


def sampled_digest(model: nn.Module) -> str:
    """The digest in older files: of names, shapes and a few values of all weights."""
    digest = hashlib.sha256()
    for name, weight in named_weights(model):
        if weight is None:
            digest.update(f"{name}\n".encode())
            continue
        values = weight.flatten()
        places = torch.linspace(0, values.numel() - 1, min(_SAMPLES, values.numel()), dtype=torch.float64)
        sample = values[places.long().to(values.device)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)} {sample.tolist()}\n".encode())
    return digest.hexdigest()


def _digest(packed: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(packed["header"]).encode())
    for name, tensor in sorted(packed["tensors"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_changes(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: str
) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise MemoryFileError(f"{source}: has other fast weights than this learner, such as {name}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise MemoryFileError(
                f"{source}: of a model of other sizes: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {expected[name].dtype} {tuple(expected[name].shape)}"
            )
