"""Checkpoints that are written whole or not at all and prove what they are before they are believed.

A checkpoint is a folder ``step-00000100`` that ``from_pretrained`` opens: the model's weights, config and
tokenizer. Beside them lies one of ``torch.distributed.checkpoint``: each process writes its own part of

* ``optimizer/<parameter>/<kind>``: the optimiser's moments and step counts;
* ``carried/<stream>.…``: the state that each stream carries to its next window, where a run carries it;

and any number of processes reads it. ``state.json`` has the format, the step, the validation loss at that
step if it was evaluated, the structure of a carried state, and the size and SHA-256 of each other file.

The order of the data, the learning rate and random numbers are functions of the step, so it is all they need.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nl_models.console import without_progress_bars
from nl_models.data.tokenizer import Tokenizer
from nl_models.files import new_directory, remove_incomplete, write_json
from nl_models.training.carried import CarriedStates
from nl_models.training.distributed import grouped, on_first

_FORMAT = "nl-models-checkpoint-3"
_STATE = "state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    carried: CarriedStates | None = None,
    *,
    validation_loss: float | None = None,
) -> Path:
    """Write ``folder/step-<step>``, all processes together; it appears when every file in it is on the disk.

    A checkpoint of the same step is left as it is: training is deterministic, so it holds the same.
    """
    path = Path(folder) / f"step-{step:08d}"
    if path.exists():
        return path
    gathered = get_model_state_dict(model, options=_WHOLE)  # by all processes together, for the first
    tensors = {
        f"optimizer/{name}/{kind}": value.detach()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    structure, states = (None, {}) if carried is None else carried.describe()
    with ExitStack() as whole:

        def begin() -> Path:
            place = whole.enter_context(new_directory(path))
            with without_progress_bars():
                model.save_pretrained(place, state_dict=_once(gathered, model))
            tokenizer.save(place)
            return place

        def end() -> None:
            state = {
                "format": _FORMAT,
                "step": step,
                "validation_loss": validation_loss,
                "carried": structure,
                "files": {file.name: _fingerprint(file) for file in sorted(place.iterdir())},
            }
            write_json(place / _STATE, state)
            whole.close()

        place = on_first(begin)
        _run_dcp(dcp.save, tensors | states, place)
        on_first(end)
    return path


def load_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    carried: CarriedStates | None = None,
) -> int:
    """Restore model, optimiser and carried states, in place, after checking everything; returns the step.

    Raises:
        ValueError: not a checkpoint of this package, a file is missing, truncated or altered, or the
            tensors are those of another model.
    """
    path = Path(path)
    on_first(lambda: check_files(path))
    state, weights = _read_state(path), _checked_weights(path, model)
    if carried is not None and state.get("carried") is None:
        raise ValueError(f"checkpoint {path}: holds no carried states")
    parameters = dict(model.named_parameters())
    targets: dict[str, torch.Tensor] = {}
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for key, about in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
        size, options = about.size, {"dtype": about.properties.dtype}
        if carried is not None and carried.owns(key):
            targets[key] = torch.empty(size, **options)
        elif key.startswith("optimizer/"):
            name, kind = key.removeprefix("optimizer/").rsplit("/", 1)
            parameter = parameters[name]
            # Fused AdamW keeps its step counts on the parameter's device; M3 takes its own back to the host.
            options["device"] = parameter.device
            sharded = isinstance(parameter, DTensor) and size == parameter.shape
            place = (
                torch.empty_like(parameter.detach(), **options) if sharded else torch.empty(size, **options)
            )
            targets[key] = moments.setdefault(parameter, {})[kind] = place
    _run_dcp(dcp.load, targets, path)
    set_model_state_dict(model, weights, options=_WHOLE)
    optimizer.state.update(moments)
    if carried is not None:
        carried.restore(state["carried"], targets)
    return state["step"]


def export_model(path: Path, target: Path) -> None:
    """Put what ``from_pretrained`` opens of a checkpoint at ``target``, in place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    training = shutil.ignore_patterns("*.distcp", ".metadata", _STATE)
    with new_directory(target) as temporary:
        shutil.copytree(path, temporary, ignore=training, dirs_exist_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(Path(folder).glob("step-[0-9]*"), key=lambda path: int(path.name.removeprefix("step-")))


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss (the oldest of equals), if any was evaluated."""
    losses = validation_losses(folder)
    return min(losses, key=losses.__getitem__, default=None)


def validation_losses(folder: Path) -> dict[Path, float]:
    """The losses that were measured at the checkpoints in ``folder``, oldest first."""
    losses = {path: _read_state(path)["validation_loss"] for path in list_checkpoints(folder)}
    return {path: loss for path, loss in losses.items() if loss is not None}


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


def _run_dcp(function: Any, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save or load; what the disk refuses is the ``OSError`` that it was."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            function(tensors, checkpoint_id=path, no_dist=not grouped())
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_text())
        if state["format"] == _FORMAT:
            _ = state["validation_loss"], int(state["step"])
            _ = [(int(about["bytes"]), about["sha256"]) for about in state["files"].values()]
    except OSError as error:
        raise ValueError(f"checkpoint {path}: no {_STATE}; not a checkpoint of nl_models") from error
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {_STATE} is damaged or foreign ({error})") from error
    if state["format"] != _FORMAT:
        older = (
            "; finish the run with the version that began it" if "nl-models" in str(state["format"]) else ""
        )
        raise ValueError(f"checkpoint {path}: format {state['format']!r}, expected {_FORMAT!r}{older}")
    return state


def check_files(path: Path) -> None:
    """Raise ``ValueError`` unless every file of a checkpoint is there as it was written."""
    for name, expected in _read_state(path)["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path}: {name} is missing")
        found = _fingerprint(path / name)
        if found["bytes"] != expected["bytes"]:
            raise ValueError(
                f"checkpoint {path}: {name} has {found['bytes']:,} bytes, "
                f"expected {expected['bytes']:,} (truncated?)"
            )
        if found != expected:
            raise ValueError(f"checkpoint {path}: the content of {name} was altered (SHA-256 differs)")


def _fingerprint(path: Path) -> dict[str, object]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _once(state: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors, tied ones under their first name alone."""
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}


def _checked_weights(path: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint has for the tensors of ``model``: all of them, and no others."""
    own = _once(model.state_dict(), model)
    found = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    if differing := sorted(own.keys() ^ found.keys()):
        raise ValueError(f"checkpoint {path}: of another model (only one of them has {differing[:3]})")
    for name, target in own.items():
        value = found[name]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise ValueError(
                f"checkpoint {path}: {name} is {value.dtype} {tuple(value.shape)}, "
                f"the model has {target.dtype} {tuple(target.shape)}"
            )
    return found
