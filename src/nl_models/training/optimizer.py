"""AdamW with decay where it belongs, and a learning rate that is a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from nl_models.training.config import TrainConfig

# Maps and memories whose output is a rate, a retention or a momentum.
_MEMORY_GATES = frozenset(
    {"rate", "retention", "rate_proj", "retention_proj", "momentum_proj", "a_proj", "b_proj"}
)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over two groups, with and without weight decay (see :func:`decays`)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = decays(name, parameter) and id(parameter) not in embeddings
            (decayed if keep else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, vectors or a memory's gates.

    A gate's zero is a rate (half of its range), not the absence of an effect, so pulling it to zero is no
    regularisation.
    """
    parts = name.split(".")
    return parameter.ndim >= 2 and not any("norm" in part or part in _MEMORY_GATES for part in parts)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The rate of step number ``step`` (counted from 0): linear warm-up, then a cosine to the final share."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine)
