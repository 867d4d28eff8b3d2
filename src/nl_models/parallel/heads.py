"""Tensor parallelism: the heads of every token mixer shared out over ranks, everything else on all of them.

Parameters become DTensors on the mesh, so that optimisers, gradient clipping and
``torch.distributed.checkpoint`` treat them as they treat those of FSDP2. Layers compute on the local part.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from nl_models.hope import HopeForCausalLM


def parallelize_heads(model: HopeForCausalLM, mesh: DeviceMesh) -> HopeForCausalLM:
    """Give each rank its part of the heads, in place; all ranks are then called with the same tokens.

    Projections are split by what they make, the output projection by what it takes, initial memories and
    gates by head. The input of a mixer is whole on every rank; what the ranks' heads add to its output is
    summed, and backward the gradient of the input: two all-reduces of ``[B, T, d]`` a block and pass.

    Args:
        model: with equal weights on all ranks, before its optimiser is made. States that it hands out are of
            the rank's own heads.
        mesh: of one dimension.

    Returns:
        ``model``. Its parameters are DTensors, and so are their gradients.

    Raises:
        TypeError: another model.
        ValueError: a mesh of several dimensions, heads that do not share out equally, or weights that are
            sharded already.
    """
    if not isinstance(model, HopeForCausalLM):
        raise TypeError(f"model: expected a HopeForCausalLM, got {type(model).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}; pass one of them, mesh['heads']")
    heads = model.config.num_attention_heads
    if heads % mesh.size():
        raise ValueError(f"mesh: expected a divisor of the {heads} heads as its size, got {mesh.size()}")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("model: expected whole weights on every rank, got sharded ones")
    split: dict[nn.Parameter, Placement] = {}
    summed: set[nn.Parameter] = set()
    for block in model.model.layers:
        for name, parameter in block.mixer.named_parameters():
            if "norm" in name.split("."):
                summed.add(parameter)  # all heads have it, and each rank the gradient of its own heads
            else:
                split[parameter] = Shard(1) if name == "output.o_proj.weight" else Shard(0)
        block.mixer.num_heads //= mesh.size()
        block.mixer.register_forward_pre_hook(lambda _, args: (_enter(args[0], mesh), *args[1:]))
        block.mixer.register_forward_hook(lambda _, args, output: (_leave(output[0], mesh), *output[1:]))
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays one
    for module in model.modules():
        parts = {}
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                placement = split.get(parameter, Replicate())
                tensor = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
                made[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                if parameter in summed and parameter.requires_grad:
                    made[parameter].register_hook(lambda g: g.redistribute(placements=[Replicate()]))
            module.register_parameter(name, made[parameter])
            parts[name] = _local_part(name, [Partial()] if parameter in summed else None)
        if parts:  # as FSDP2 does, a class of its own
            module.__class__ = type(type(module).__name__, (type(module),), parts)
    return model


def _local_part(name: str, gradients: list[Placement] | None) -> property:
    """What a layer sees where it has a DTensor as a parameter."""
    return property(lambda layer: layer._parameters[name].to_local(grad_placements=gradients))


def _enter(x: Any, mesh: DeviceMesh) -> Any:
    """``x``, whose gradient is the sum of those of all ranks."""
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def _leave(y: Any, mesh: DeviceMesh) -> Any:
    """The sum of ``y`` over the ranks."""
    return DTensor.from_local(y, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()
