"""Other module objects round the same tensors, so that a call changes no module that others use too.

Evaluation mode, other weights or hooks for one call belong to a view, which is made for the call: another
thread may run the model meanwhile.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def copy_module(module: nn.Module) -> nn.Module:
    """A module of the same class with the same tensors and children, in registries of its own.

    Raises:
        ValueError: ``module`` has a forward from outside, which would run ``module`` itself.
    """
    if is_patched(module):
        raise ValueError(
            f"model: a {type(module).__name__} has a forward that was put on it from outside; take it away: "
            "other weights, or another mode, for one call do not reach it"
        )
    view = object.__new__(type(module))
    for name, value in vars(module).items():
        vars(view)[name] = value.copy() if isinstance(value, (dict, set, list)) else value
    # Bound to the module that they were made from.
    for bound in ("_compiled_call_impl", "forward"):
        vars(view).pop(bound, None)
    return view


def is_patched(module: nn.Module) -> bool:
    """Whether ``module`` has a forward that was put on it from outside, beside that of its class."""
    own = vars(module).get("forward")  # what accelerate leaves when its hooks are removed is no patch
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def copy_tree(module: nn.Module, copies: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """The same with all its children; a child that has several places keeps them."""
    copies = {} if copies is None else copies
    if module not in copies:
        view = copies[module] = copy_module(module)
        for name, child in module._modules.items():
            view._modules[name] = None if child is None else copy_tree(child, copies)
    return copies[module]


def with_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A view of ``module`` in which ``tensors`` stand for the parameters of their names.

    Modules on the way to one are new, so that they may get hooks too; all others are those of ``module``.
    """
    view, below = copy_module(module), {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = tensor
        else:
            view._parameters[name] = tensor
    for child, inner in below.items():
        view._modules[child] = with_parameters(view._modules[child], inner)
    return view


def in_evaluation(module: nn.Module) -> nn.Module:
    """``module`` if no part of it is in training mode, else a view of it of which none is.

    Raises:
        ValueError: a part in training mode, and one that has a forward from outside.
    """
    if not any(part.training for part in module.modules()):
        return module
    for name, part in module.named_modules():
        if is_patched(part):
            raise ValueError(
                f"model: it is in training mode, and {name or 'the model'} ({type(part).__name__}) has a "
                "forward that was put on it from outside (offloading, a patch); call model.eval() first"
            )
    view = copy_tree(module)
    for part in view.modules():
        part.training = False
    return view


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """What ``module`` computes in: the dtype of its first parameter of at least two bytes, if it has one."""
    # Quantised weights are bytes, or tensors that say the dtype that they stand for.
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1), None)


def device_of(module: nn.Module) -> torch.device | None:
    """Where ``module`` computes, if it has a tensor that says so; an offloaded one where it is executed."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
    if device is not None:
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    executed = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(place) for place in executed if place is not None), None)


def input_device(model: nn.Module) -> torch.device | None:
    """Where a language model takes its tokens."""
    return device_of(model.get_input_embeddings()) or device_of(model)


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """All weights by name, quantised ones as what they stand for; ``None`` where that cannot be said."""
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)):  # a quantised module of torch, which has no parameters
            weights[f"{name}.weight"] = module.weight()
    for name, weight in weights.items():
        if hasattr(weight, "quant_state"):  # bitsandbytes packs its 4 bits anew when it is called
            yield name, None
            continue
        quantised = weight.is_quantized or is_traceable_wrapper_subclass(weight)
        yield name, (weight.dequantize() if quantised else weight).detach()


def weights_digest(model: nn.Module) -> str:
    """A digest of every value of all weights and saved buffers, with names, shapes and dtypes.

    It is equal on every device. Of weights that bitsandbytes has packed in 4 bits the names alone count.
    """
    digest = hashlib.sha256()
    buffers = (
        (f"{name}.{key}", buffer)
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    )
    for name, weight in itertools.chain(named_weights(model), buffers):
        if weight is None:
            digest.update(f"{name}\n".encode())
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
