"""Conversion of pre-trained transformers: the model's own weights become the first state of new memories."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn
from transformers import PreTrainedModel

from nl_models.module_views import copy_tree, device_of, dtype_of
from nl_models.surgery.families import FAMILIES
from nl_models.surgery.levels import DEFAULT_LEVELS, ConversionLevel, check_layers, make_levels
from nl_models.surgery.mixers import MemoryMixer, check_kind, projections, take_over
from nl_models.surgery.parts import check_parts, check_widths

INPUT_HOOKS = ("_require_grads_hook", "_require_grads_hooks")
"""Where a model of transformers keeps the handles of ``enable_input_require_grads``."""


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

    Norms, activations, attention and linear modules go over as they are, whatever they are by now: replaced
    or quantised too. What would only seem to go over is refused before anything is built: hooks, adapters,
    pruned or parametrised weights, offloading, decoder layers or MLPs of another class or that several layers
    share, and MLPs of another width than the config's. ``model`` stays as it is.

    Args:
        model: a Llama, Qwen2, Qwen3, GPT-NeoX or GPT-2 language model of transformers, of any size and dtype.
            Convert before adding adapters.
        levels: fast to slow, as :class:`ConversionLevel` or their options.
        layers: indices of the decoder layers to convert; ``None`` for all.

    Returns:
        A new model of a registered subclass that *shares* the parameters of ``model``. It is saved and loaded
        as any other, by the auto classes too once :func:`nl_models.register` was called.

    Raises:
        TypeError: a model of another class or with parts that cannot be converted, or levels that are none.
        ValueError: levels or layers that do not fit (see :func:`nl_models.surgery.levels.make_levels`).
    """
    converted_class = _converted_class(model)
    check_parts(model, converted_class)
    if getattr(model.config, "continuum_levels", None) is not None:
        raise TypeError("model: expected one whose MLPs are not converted yet")
    levels = [asdict(level) for level in make_levels(levels)]
    chosen = check_layers("layers", layers, model.config)
    check_widths(model, converted_class, chosen)
    return _rebuild(model, continuum_levels=levels, continuum_layers=chosen)


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
        TypeError: a model of another class, or with parts that cannot be converted.
        ValueError: layers that there are not, another kind, or a chunk size where there are no chunks.
    """
    if kind == "self_modifying_titans" and chunk_size is None:
        chunk_size = 16
    check_kind(kind, chunk_size)
    options = {"kind": kind}
    if kind == "self_modifying_titans":
        options |= {"chunk_size": chunk_size, "error_at": "anchor"}
    converted_class = _converted_class(model)
    check_parts(model, converted_class)
    chosen = check_layers("layers", layers, model.config)
    replaced = dict(getattr(model.config, "memory_layers", None) or {})
    if set(map(str, chosen)) & set(replaced):
        raise ValueError(f"layers: {chosen} are to get a memory, but {sorted(replaced)} have one already")
    backbone_class = converted_class.backbone_class
    decoder_layers = getattr(model.base_model, backbone_class.layers_name)
    attentions = {index: getattr(decoder_layers[index], backbone_class.attention_name) for index in chosen}
    dtype, device = dtype_of(model), device_of(model)
    taken = {index: projections(source, model.config, dtype, device) for index, source in attentions.items()}
    converted = _rebuild(model, memory_layers={**replaced, **{str(index): options for index in chosen}})
    for index, source in attentions.items():
        mixer = MemoryMixer(converted.config, index, **options)
        mixer.to(device_of(source) or device, dtype_of(source) or dtype).train(source.training)
        take_over(mixer, taken[index])
        converted.base_model.replace_attention(index, mixer)
    return converted


def _converted_class(model: object) -> type[PreTrainedModel]:
    converted_class = type(model) if type(model) in FAMILIES.values() else FAMILIES.get(type(model))
    if converted_class is None:
        known = ", ".join(cls.__name__ for cls in FAMILIES)
        raise TypeError(f"model: expected one of {known}, got {type(model).__name__}")
    return converted_class


def _rebuild(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    """The converted class of ``model``'s family with the same parameters and ``fields`` in its config.

    Every module below the backbone is a copy of that of ``model`` with the same tensors.
    """
    converted_class = _converted_class(model)
    options = model.config.to_dict()
    for derived in ("model_type", "architectures", "transformers_version"):
        options.pop(derived, None)
    config = converted_class.config_class(**{**options, **fields})
    config._attn_implementation = model.config._attn_implementation
    # transformers notes at construction what it knows about a class. On the meta device nothing is allocated:
    # everything below is replaced.
    with torch.device("meta"):
        converted = converted_class(config)
    copies: dict[nn.Module, nn.Module] = {}
    for target, source in ((converted.base_model, model.base_model), (converted, model)):
        copies[source] = target
        for name, child in source._modules.items():
            target._modules[name] = None if child is None else copy_tree(child, copies)
        target._parameters.update(source._parameters)
        target._buffers.update(source._buffers)
        for name, value in vars(source).items():  # how it was quantised, where it lies
            known = name in vars(target) or hasattr(type(target), name)
            if not known and name not in ("_output_capturing_hooks_installed", *INPUT_HOOKS):
                setattr(target, name, value)
        target.training = source.training
        for setting in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if setting in vars(source):
                setattr(target, setting, getattr(source, setting))
    for source, copied in copies.items():
        if vars(source).get("config") is model.config:
            copied.config = config
        copied._forward_hooks = OrderedDict()  # see RENEWED_HOOKS
    converted.base_model.adopt_layers()
    if vars(model).get("_require_grads_hooks"):
        converted.enable_input_require_grads()
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted
