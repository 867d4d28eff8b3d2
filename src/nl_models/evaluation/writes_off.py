"""The control for what a model learns in context: the same weights, and nothing is ever written."""

from __future__ import annotations

import copy

import torch

from nl_models.hope import HopeForCausalLM
from nl_models.layers.continuum import ContinuumBlock

_READ = ("norm", "up", "gate", "down")
_WRITTEN = ("self_modifying_titans", "titans")


def without_writes(model: HopeForCausalLM) -> HopeForCausalLM | None:
    """A second model with the parameters of ``model``, whose memories and continuum never change.

    The rates are 0: every memory stays at its learned initial state, every level of the continuum is a plain
    MLP. Attention and Gated DeltaNet layers stay as they are: they have no learned state to fall back to.
    The parameters are shared, not copied; ``model`` is not touched.

    Returns:
        The model, in evaluation mode; ``None`` where ``model`` has nothing that could be switched off.

    Raises:
        ValueError: the parameters are not those of the config (an adapter, a quantised layer, ...),
            or are not in memory.
    """
    config = copy.deepcopy(model.config)
    writes = config.memory_rate_max > 0 and set(config.layer_types) & set(_WRITTEN)
    steps = any(level.steps for level in config.make_continuum_levels())
    if not (writes or steps):
        return None
    config.memory_rate_max = 0.0
    config.continuum_levels = [{**level, "max_rate": 0.0} for level in config.continuum_levels]
    with torch.device("meta"):
        silent = type(model)(config)
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise ValueError(
            f"model: {offloaded} is on the meta device (offloaded, or not loaded), so that a second model "
            "cannot share it; accelerate.hooks.remove_hook_from_submodules(model) brings it back"
        )
    tensors, wanted = model.state_dict(), silent.state_dict()
    only_written = {
        f"{name}.{parameter}"
        for name, block in model.named_modules()
        if isinstance(block, ContinuumBlock) and block.config.steps
        for parameter, _ in block.named_parameters()
        if parameter not in _READ
    }
    lacking = sorted(wanted.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - wanted.keys() - only_written)
    if lacking or foreign:
        raise ValueError(
            f"model: its parameters are not those of its config (lacks {lacking[:3] or 'nothing'}, has "
            f"besides {foreign[:3] or 'nothing'}); merge adapters and convert nothing before it is measured"
        )
    silent.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    return silent.requires_grad_(False).eval()
