"""Conversion of pre-trained transformers: the model's own weights become the first state of new memories."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

from nl_models.surgery.families import FAMILIES
from nl_models.surgery.levels import DEFAULT_LEVELS, ConversionLevel, check_layers, make_levels
from nl_models.surgery.mixers import MemoryMixer, check_kind, projections, take_over


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
    _converted_class(model)
    if getattr(model.config, "continuum_levels", None) is not None:
        raise TypeError("model: expected one whose MLPs are not converted yet")
    return _rebuild(
        model,
        continuum_levels=[asdict(level) for level in make_levels(levels)],
        continuum_layers=check_layers("layers", layers, model.config),
    )


def convert_attention(
    model: PreTrainedModel,
    layers: Sequence[int],
    kind: str = "self_modifying_titans",
    *,
    chunk_size: int | None = None,
) -> PreTrainedModel:
    """A model in which memories take the place of some layers' softmax attention.

    Unlike a conversion of MLPs this changes the outputs: the model is to be trained on. Projections of
    queries, keys, values and outputs go over where they are of the model's width, keys and values that heads
    share repeated for each; biases and rotary positions are left behind, gates and first states are new. The
    state of a memory has one size, whatever the context; layers with attention keep their keys and values
    beside it in the same cache (:class:`nl_models.surgery.ContinuumCache`).

    Args:
        model: as for :func:`convert_mlp_to_continuum`, or what that gave.
        layers: indices of the decoder layers whose attention is replaced.
        kind: ``"self_modifying_titans"`` (:class:`nl_models.layers.SelfModifyingTitans`) or
            ``"delta_memory"`` (:class:`nl_models.layers.GatedDeltaNet`).
        chunk_size: of self-modifying memories; ``None``: 16.

    Returns:
        A new model that shares all other parameters of ``model``; new ones are drawn at random.

    Raises:
        TypeError: a model of another class.
        ValueError: layers that there are not, another kind, or a chunk size where there are no chunks.
    """
    if kind == "self_modifying_titans" and chunk_size is None:
        chunk_size = 16
    check_kind(kind, chunk_size)
    options = {"kind": kind} if chunk_size is None else {"kind": kind, "chunk_size": chunk_size}
    _converted_class(model)
    chosen = check_layers("layers", layers, model.config)
    replaced = dict(getattr(model.config, "memory_layers", None) or {})
    if set(map(str, chosen)) & set(replaced):
        raise ValueError(f"layers: {chosen} are to get a memory, but {sorted(replaced)} have one already")
    converted = _rebuild(model, memory_layers={**replaced, **{str(index): options for index in chosen}})
    backbone = converted.base_model
    for index in chosen:
        name = backbone.attention_name
        source = getattr(getattr(model.base_model, backbone.layers_name)[index], name)
        like = next(source.parameters())
        mixer = MemoryMixer(converted.config, index, **options).to(like.device, like.dtype)
        take_over(mixer, projections(source, model.config))
        setattr(backbone.decoder_layers()[index], name, mixer.train(source.training))
    return converted


def _converted_class(model: object) -> type[PreTrainedModel]:
    converted_class = type(model) if type(model) in FAMILIES.values() else FAMILIES.get(type(model))
    if converted_class is None:
        known = ", ".join(cls.__name__ for cls in FAMILIES)
        raise TypeError(f"model: expected one of {known}, got {type(model).__name__}")
    return converted_class


def _rebuild(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    """The converted class of ``model``'s family with the same parameters and ``fields`` in its config.

    Modules that one of the two does not have stay as they are built, without storage.
    """
    converted_class = _converted_class(model)
    options = model.config.to_dict()
    for derived in ("model_type", "architectures", "transformers_version"):
        options.pop(derived, None)
    config = converted_class.config_class(**{**options, **fields})
    config._attn_implementation = model.config._attn_implementation
    # On the meta device: nothing is allocated, since every tensor is replaced by one of the source.
    with torch.device("meta"):
        converted = converted_class(config)
    targets = dict(converted.named_modules())
    for name, source in model.named_modules():
        target = targets.get(name)
        if target is None:
            continue
        target._parameters.update(source._parameters)
        target._buffers.update(source._buffers)
        target.training = source.training
        for setting in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if setting in vars(source):
                setattr(target, setting, getattr(source, setting))
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted
