"""Conversion of pre-trained transformers: the model's own weights become the first state of new memories."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

from nl_models.surgery.families import FAMILIES
from nl_models.surgery.levels import DEFAULT_LEVELS, ConversionLevel, make_levels


def convert_mlp_to_continuum(
    model: PreTrainedModel,
    levels: Sequence[ConversionLevel | Mapping] = DEFAULT_LEVELS,
    *,
    layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """A model whose MLPs are continuum memory systems that start as the MLPs of ``model``.

    The hidden units of each MLP are shared out among the levels, fast to slow from the first unit on:
    ``y = Σ_ℓ down_ℓ σ(up_ℓ x)``, the independent form (Nested Learning, arXiv 2512.24695, Eq. 74) with the
    pre-trained weights as the first states (§7.3). Units that no level takes stay as they are. Which hidden
    units belong together is arbitrary in a trained MLP, so that a level is a share of it like any other.

    Without fast weights the converted model runs the family's own code: its logits are those of ``model``,
    bit for bit. Fast weights are arguments of a call or part of its cache, never parameters or buffers.

    Args:
        model: a Llama, Qwen2, Qwen3, GPT-NeoX or GPT-2 language model of transformers, of any size and dtype.
            Convert before adding adapters.
        levels: fast to slow, as :class:`ConversionLevel` or their options.
        layers: indices of the decoder layers to convert; ``None`` for all.

    Returns:
        A new model of a registered subclass that *shares* the parameters of ``model``. It is saved and loaded
        as any other, by the auto classes too once :func:`nl_models.register` was called.

    Raises:
        TypeError: a model of another class, or levels that are none.
        ValueError: levels or layers that do not fit (see :func:`nl_models.surgery.levels.make_levels`).
    """
    return _rebuild(
        model,
        continuum_levels=[asdict(level) for level in make_levels(levels)],
        continuum_layers=None if layers is None else list(layers),
    )


def _rebuild(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    """The converted class of ``model``'s family with the same parameters and ``fields`` in its config."""
    converted_class = FAMILIES.get(type(model))
    if converted_class is None:
        known = ", ".join(cls.__name__ for cls in FAMILIES)
        raise TypeError(f"model: expected one of {known}, got {type(model).__name__}")
    options = model.config.to_dict()
    for derived in ("model_type", "architectures", "transformers_version"):
        options.pop(derived, None)
    config = converted_class.config_class(**options, **fields)
    config._attn_implementation = model.config._attn_implementation
    # On the meta device: nothing is allocated, since every tensor is replaced by one of the source.
    with torch.device("meta"):
        converted = converted_class(config)
    for name, source in model.named_modules():
        target = converted.get_submodule(name)
        target._parameters.update(source._parameters)
        target._buffers.update(source._buffers)
        target.training = source.training
        for setting in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if setting in vars(source):
                setattr(target, setting, getattr(source, setting))
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted
