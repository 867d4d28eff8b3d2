"""What a model is made of: the parts that a conversion takes over exactly, and those that it refuses."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nl_models.module_views import device_of, dtype_of, in_evaluation, is_patched

RENEWED_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")
"""Where the hooks come from that transformers puts on a converted model anew: those that record outputs, and
those of ``enable_input_require_grads``."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_parts(model: PreTrainedModel, converted_class: type[PreTrainedModel]) -> None:
    """Raise ``TypeError`` for a part of ``model`` that a conversion to ``converted_class`` would change.

    The converted model has module objects of its own round the same tensors. What is bound to the module
    objects of ``model``, or changes its decoder layers and MLPs, would be lost or fail without a word.
    """
    backbone_class = converted_class.backbone_class
    for name, part in model.named_modules():
        obstacle = _obstacle(part)
        if obstacle is not None:
            _refuse(name, part, *obstacle)
    _check_class(model.base_model_prefix, model.base_model, backbone_class)
    places: dict[nn.Module, str] = {}
    for index, layer in enumerate(getattr(model.base_model, backbone_class.layers_name)):
        name = f"{model.base_model_prefix}.{backbone_class.layers_name}.{index}"
        _check_class(name, layer, backbone_class.layer_class)
        _check_class(f"{name}.mlp", layer.mlp, backbone_class.mlp_class)
        for place, part in ((name, layer), (f"{name}.mlp", layer.mlp)):
            first = places.setdefault(part, place)
            if first != place:  # it could not tell whose fast weights are meant
                remedy = "give each layer a copy (copy.deepcopy); parameters may be shared"
                _refuse(place, part, f"is also {first}", remedy)


def check_widths(model: PreTrainedModel, converted_class: type[PreTrainedModel], layers: list[int]) -> None:
    """Raise ``TypeError`` for an MLP of ``layers`` with another number of hidden units than the config."""
    backbone_class, config_class = converted_class.backbone_class, converted_class.config_class
    width = config_class.mlp_width.fget(model.config)
    decoder_layers = getattr(model.base_model, backbone_class.layers_name)
    for index in layers:
        for part, name in backbone_class.mlp_class.parts.items():
            linear = decoder_layers[index].mlp.get_submodule(name)
            names = ("in_features", "nx") if part == "down" else ("out_features", "nf")
            units = next((getattr(linear, n) for n in names if hasattr(linear, n)), width)
            if units != width:
                place = f"{model.base_model_prefix}.{backbone_class.layers_name}.{index}.mlp.{name}"
                what = f"has {units} hidden units where the config has {width}"
                _refuse(place, linear, what, "leave this layer out (layers=…)")


def matrix_of(
    module: nn.Module, width: int, dtype: torch.dtype | None, device: torch.device | None
) -> torch.Tensor:
    """The weight ``[out, in]`` that a linear module applies, adapters and all.

    Args:
        module: ``nn.Linear``, transformers' ``Conv1D``, or whatever took the place of one.
        width: in, where the module does not say it.
        dtype, device: of its input, where none of its parameters says them.
    """
    plain = type(getattr(module, "weight", None)) in (nn.Parameter, torch.Tensor)
    if type(module) is nn.Linear and plain:
        return module.weight
    if type(module) is Conv1D and plain:
        return module.weight.T
    # Whatever it is by now (LoRA, a quantised layer), what it does to the unit vectors is its matrix.
    module = in_evaluation(module)
    vectors = torch.eye(
        getattr(module, "in_features", width),
        dtype=dtype_of(module) or dtype,
        device=device_of(module) or device,
    )
    return (module(vectors) - module(torch.zeros_like(vectors[:1]))).T


def _obstacle(part: nn.Module) -> tuple[str, str] | None:
    """What about ``part`` cannot go over, and what to do about it."""
    if type(part).__module__.partition(".")[0] == "peft":
        return "is an adapter", "merge it (merge_and_unload), or convert first and add adapters afterwards"
    if isinstance(part, torch.jit.ScriptModule):
        return "is compiled by TorchScript", "convert first"
    if parametrize.is_parametrized(part):
        names = ", ".join(part.parametrizations)
        return (
            f"has a parametrised {names}",
            "make it a plain parameter (torch.nn.utils.parametrize.remove_parametrizations)",
        )
    if hasattr(part, "_hf_hook"):
        return (
            "is offloaded or dispatched by hooks of accelerate",
            "take the hooks away (accelerate.hooks.remove_hook_from_submodules), convert, and dispatch "
            "what that gives",
        )
    if is_patched(part):
        return "has a forward that was put on it from outside", "convert first and patch what that gives"
    if part._compiled_call_impl is not None:
        return "is compiled", "convert first and compile what that gives"
    for registry in HOOKS:
        for hook in getattr(part, registry).values():
            if getattr(hook, "__module__", None) in RENEWED_HOOKS:
                continue
            if isinstance(hook, prune.BasePruningMethod):
                return "is pruned", "make it permanent (torch.nn.utils.prune.remove)"
            if isinstance(hook, WeightNorm):
                return "is weight-normed", "make its weight plain (torch.nn.utils.remove_weight_norm)"
            kind = registry.strip("_").removesuffix("s").replace("_", " ")
            shown = getattr(hook, "__qualname__", type(hook).__name__)
            return f"has a {kind} ({shown})", "remove it, convert, and register it on what that gives"
    return None


def _check_class(name: str, part: nn.Module, converted: type[nn.Module]) -> None:
    own = converted.__bases__[-1]
    if type(part) not in (own, converted):
        _refuse(name, part, f"is no {own.__name__}", "put the family's own module in its place")


def _refuse(name: str, part: nn.Module, what: str, remedy: str) -> None:
    where = f"its {name} ({type(part).__name__})" if name else f"the {type(part).__name__}"
    raise TypeError(f"model: {where} {what}, which a conversion cannot take over; {remedy}")
