"""What was learned as a dictionary and as a file: a few MB beside a model that stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nl_models.continual.fast_parameters import FastParameters
from nl_models.continual.stream import GROUPS, StreamState
from nl_models.files import write_bytes

FORMAT = "nl_models.ContinuumLearner.2"
_SAMPLES = 16
_COUNTERS = ("learned", "read", "documents", "context_tokens")


class MemoryFileError(ValueError):
    """A saved memory is truncated, damaged, foreign, or of another model or other options."""


def pack(
    state: StreamState, model: FastParameters, options: Mapping[str, Any], fingerprint: str
) -> dict[str, Any]:
    """The state as ``{"header": JSON, "tensors": by name}``."""
    tensors = {f"{group}/{name}": t for group in GROUPS for name, t in getattr(state, group).items()}
    description = None
    if state.context is not None:
        description, context = model.describe_context(state.context)
        tensors |= {f"context/{name}": tensor for name, tensor in context.items()}
    if state.waiting is not None:
        tensors["waiting"] = state.waiting
    header = {
        "format": FORMAT,
        "config": fingerprint,
        "tokens_per_level": [state.learned // size * size for size in model.chunk_sizes],
        "options": dict(options),
        "counters": {name: getattr(state, name) for name in _COUNTERS},
        "context": description,
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
    fingerprint: str,
    source: str,
) -> StreamState:
    """The inverse of :func:`pack`; ``state`` is any state of the same learner, for its shapes.

    Raises:
        MemoryFileError: the memory is not one of this learner.
    """
    try:
        header = packed["header"]
        # Read inside of torch.inference_mode(), they could have no gradient.
        tensors = {n: t.clone() if t.is_inference() else t for n, t in packed["tensors"].items()}
        if header["format"] != FORMAT:
            raise MemoryFileError(f"{source}: format {header['format']!r}, expected {FORMAT!r}")
        for name, value in options.items():
            if header["options"].get(name) != value:
                raise MemoryFileError(
                    f"{source}: saved with {name} = {header['options'].get(name)!r}, "
                    f"this learner has {value!r}"
                )
        if header["config"] != fingerprint:
            raise MemoryFileError(f"{source}: was learned with another model, or other values of its weights")
        groups: dict[str, dict[str, torch.Tensor]] = {name: {} for name in (*GROUPS, "context")}
        waiting = tensors.pop("waiting", None)
        for name, tensor in tensors.items():
            group, rest = name.split("/", 1)
            groups[group][rest] = tensor
        context = groups.pop("context")
        _check_changes(groups["changes"], state.changes, source)
        for group in groups.values():
            for name in group:
                like = state.changes.get(name)
                group[name] = group[name].to(model.device if like is None else like.device)
        counters = {name: int(header["counters"][name]) for name in _COUNTERS}
        return StreamState(
            **groups,
            **counters,
            context=None
            if header["context"] is None
            else model.rebuild_context(
                header["context"], {n: t.to(model.device) for n, t in context.items()}
            ),
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


def model_fingerprint(model: nn.Module) -> str:
    """A digest of the names, shapes and a few values of all weights: equal on every device."""
    digest = hashlib.sha256()
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)):  # a quantised module of torch, which has no parameters
            weights[f"{name}.weight"] = module.weight()
    for name, weight in weights.items():
        if hasattr(weight, "quant_state"):  # bitsandbytes packs its 4 bits anew when it is called
            digest.update(f"{name}\n".encode())
            continue
        quantised = weight.is_quantized or is_traceable_wrapper_subclass(weight)
        values = (weight.dequantize() if quantised else weight).detach().flatten()
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
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise MemoryFileError(
                f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{expected[name].dtype} {tuple(expected[name].shape)}"
            )
