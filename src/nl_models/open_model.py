"""A model and its tokenizer from whatever folder holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import nl_models
from nl_models.console import without_progress_bars
from nl_models.data.prepare import PreparedData
from nl_models.data.tokenizer import AnyTokenizer, ReadyTokenizer, load_tokenizer
from nl_models.training.checkpoint import best_checkpoint, check_files, list_checkpoints

_COMPARED_TOKENS = 1000


class OpenedModel(NamedTuple):
    """A language model in evaluation mode, its tokenizer, and the folder they came from."""

    model: PreTrainedModel
    tokenizer: AnyTokenizer
    source: Path


def open_model(path: str | Path, device: torch.device | str = "cpu") -> OpenedModel:
    """Open a model.

    Args:
        path: the folder of a training run (its final model, or its best checkpoint), a checkpoint in one, or
            a folder that ``save_pretrained`` wrote, of Hope, of a converted model, or of any other.

    Raises:
        ValueError: no such folder, or none of these.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"model: no folder {path}")
    if (path / "model" / "config.json").is_file():
        path = path / "model"
    elif (path / "checkpoints").is_dir():
        found = list_checkpoints(path / "checkpoints")
        if not found:
            raise ValueError(f"model: the run {path} has no checkpoint yet")
        path = best_checkpoint(path / "checkpoints") or found[-1]
    if (path / "state.json").is_file():
        check_files(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: {path} is no training run, no checkpoint and no saved model (it has no config.json)"
        )
    nl_models.register()
    with without_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        model.to(device).eval()
    return OpenedModel(model, _tokenizer_of(path), path)


def copy_weights(path: str | Path, model: PreTrainedModel, data: PreparedData) -> None:
    """Put the weights of what :func:`open_model` opens into ``model``, which is to read ``data``.

    Raises:
        ValueError: there is no such model, or one of other sizes or with another tokenizer.
    """
    try:
        opened = open_model(path)
    except ValueError as error:
        raise ValueError(f"init_from: {str(error).removeprefix('model: ')}") from error
    tokenizer = opened.tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = ReadyTokenizer(tokenizer)
    text = data.tokenizer.decode(data.train[:_COMPARED_TOKENS].tolist())
    if tokenizer.encode(text) != data.tokenizer.encode(text):
        raise ValueError(
            f"init_from: {path} has another tokenizer; to begin with its weights, use its own "
            f"(--tokenizer FOLDER, where its tokenizer.json is)"
        )
    own, found = model.state_dict(), opened.model.state_dict()
    other = sorted(
        name for name in own.keys() | found.keys() if name not in own or name not in found
        or own[name].shape != found[name].shape
    )  # fmt: skip
    if other:
        raise ValueError(
            f"init_from: {path} has a model of other sizes: {len(other)} tensors differ, first {other[0]}; "
            "give this run the same model options"
        )
    model.load_state_dict(found)


def _tokenizer_of(folder: Path) -> AnyTokenizer:
    try:
        return load_tokenizer(folder)
    except ValueError as ours:
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError) as error:
            raise ValueError(f"model: {folder} has no tokenizer ({ours}; {error})") from error
