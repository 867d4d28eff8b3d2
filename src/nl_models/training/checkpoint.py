"""Checkpoints that are written whole or not at all and prove what they are before they are believed.

A checkpoint is a folder ``step-00000100`` with

* ``model.safetensors``: parameters and persistent buffers, tied weights once;
* ``optimizer.safetensors``: the optimiser's moments and step counts, as ``<parameter name>/<kind>``;
* ``random.safetensors``: the states of PyTorch's random generators;
* ``state.json``: format, step, validation loss at that step if it was evaluated, and the size and SHA-256 of
  each other file.

The order of the data and the learning rate are functions of the step, so the step is all they need.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nl_models.files import new_directory, remove_incomplete

_FORMAT = "nl-models-checkpoint-1"
_STATE = "state.json"
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint is truncated, damaged, foreign, or of another model."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: completed steps, and the validation loss if this very step was evaluated."""

    step: int
    validation_loss: float | None = None


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Write ``folder/step-<step>``; the folder appears only when every file in it is on the disk.

    A checkpoint of the same step is left as it is: training is deterministic, so it holds the same.
    """
    path = Path(folder) / f"step-{progress.step:08d}"
    if path.exists():
        return path
    with new_directory(path) as temporary:
        save_file(_model_tensors(model), temporary / _TENSOR_FILES[0])
        save_file(_optimizer_tensors(model, optimizer), temporary / _TENSOR_FILES[1])
        save_file(_random_states(), temporary / _TENSOR_FILES[2])
        state = {
            "format": _FORMAT,
            "step": progress.step,
            "validation_loss": progress.validation_loss,
            "files": {name: _fingerprint(temporary / name) for name in _TENSOR_FILES},
        }
        (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    return path


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore model, optimiser and random generators, in place, after checking everything.

    Raises:
        CheckpointError: not a checkpoint of this package, a file is missing, truncated or altered, or the
            tensors are those of another model.
    """
    path = Path(path)
    state = _read_state(path)
    tensors, moments, random = (_read_tensors(path, state, name) for name in _TENSOR_FILES)
    targets = _model_tensors(model)
    _check_same_tensors(path, targets, tensors)
    parameters = dict(model.named_parameters())
    grouped: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, kind = key.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(f"checkpoint {path}: optimiser state of the unknown parameter {name}")
        grouped.setdefault(parameters[name], {})[kind] = value

    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    for parameter, values in grouped.items():
        # Fused AdamW keeps its step counts on the device of the parameter; M3 takes its own back to the host.
        optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in values.items()}
    torch.set_rng_state(random["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{index}" in random:
            torch.cuda.set_rng_state(random[f"cuda:{index}"], index)
    return Progress(state["step"], state["validation_loss"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into ``model``, after checking them.

    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    tensors, targets = _read_tensors(path, _read_state(path), _TENSOR_FILES[0]), _model_tensors(model)
    _check_same_tensors(path, targets, tensors)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss (the oldest of equals), if any was evaluated."""
    losses = {path: _read_state(path)["validation_loss"] for path in list_checkpoints(folder)}
    evaluated = {path: loss for path, loss in losses.items() if loss is not None}
    return min(evaluated, key=evaluated.__getitem__) if evaluated else None


def prune_checkpoints(folder: Path, *, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints and the best one."""
    remove_incomplete(folder)
    checkpoints = list_checkpoints(folder)
    kept = {*checkpoints[-keep:], best_checkpoint(folder)}
    for path in checkpoints:
        if path not in kept:
            # First out of sight under one atomic rename, so that a kill leaves no half checkpoint behind.
            doomed = path.with_name(f".incomplete-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _read_state(path: Path) -> dict:
    try:
        state = json.loads((path / _STATE).read_text())
        if state["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint {path}: format {state['format']!r}, expected {_FORMAT!r}")
        if not isinstance(state["step"], int) or set(state["files"]) != set(_TENSOR_FILES):
            raise KeyError("step, files")
        _ = state["validation_loss"]
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: no {_STATE}; not a checkpoint of nl_models") from error
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {_STATE} is damaged or foreign ({error})") from error
    return state


def _read_tensors(path: Path, state: dict, name: str) -> dict[str, torch.Tensor]:
    if not (path / name).is_file():
        raise CheckpointError(f"checkpoint {path}: {name} is missing")
    expected, found = state["files"][name], _fingerprint(path / name)
    if found["bytes"] != expected["bytes"]:
        raise CheckpointError(
            f"checkpoint {path}: {name} has {found['bytes']:,} bytes, "
            f"expected {expected['bytes']:,} (truncated?)"
        )
    if found != expected:
        raise CheckpointError(f"checkpoint {path}: the content of {name} was altered (SHA-256 differs)")
    try:
        return load_file(path / name)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: unreadable tensors ({error})") from error


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file) -> hashlib._Hash:
    """``hashlib.file_digest`` for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones under their first name) and persistent buffers."""
    tensors = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: value for name, value in model.state_dict().items() if name not in every}
    return {name: value.detach() for name, value in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{kind}": value.detach()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _check_same_tensors(
    path: Path, targets: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    missing, unknown = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint {path}: of another model (lacks {missing[:3] or 'nothing'}, "
            f"has besides {unknown[:3] or 'nothing'})"
        )
    for name, target in targets.items():
        if tensors[name].shape != target.shape or tensors[name].dtype != target.dtype:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, "
                f"the model has {target.dtype} {tuple(target.shape)}"
            )
