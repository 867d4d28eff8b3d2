"""From a training config to a model, its optimiser, and a learning rate that is a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.hope.configuration_hope import RENAMED
from nl_models.optim import M3, DeepMomentum, DeltaMomentum, Muon
from nl_models.training.config import MODELS, TrainConfig

# A first run, of a minute or two on one core: a BPE, and the rate and initial weights of the demo's Hope.
_FIRST_RUN = {
    "vocab_size": 1024,
    "model_options": {"initializer_range": 0.02},
    "steps": 100,
    "batch_size": 4,
    "sequence_length": 256,
    "learning_rate": 8e-3,
    "evaluate_every": 50,
    "position_length": 0,
    "threads": 1,
}
# Maps and memories whose output is a rate, a retention or a momentum.
_MEMORY_GATES = frozenset(
    {"rate", "retention", "rate_proj", "retention_proj", "momentum_proj", "a_proj", "b_proj"}
)
# Kernels of depthwise convolutions: [channels, taps], but no map between channels.
_CONVOLUTION = "convolution"


def preset_options(name: str) -> dict[str, object]:
    """The options of a run that train a Hope of the size :meth:`HopeConfig.preset` gives that name.

    Of "tiny" those of a whole first run.

    Raises:
        ValueError: another name.
    """
    preset = HopeConfig.preset(name)
    options: dict[str, object] = {
        "vocab_size": preset.vocab_size,
        "hidden_size": preset.hidden_size,
        "layers": preset.num_hidden_layers,
        "heads": preset.num_attention_heads,
        "model_options": {"continuum_levels": preset.continuum_levels},
    }
    return options if name != "tiny" else {**options, **_FIRST_RUN}


def hope_config(config: TrainConfig, vocab_size: int, separator_id: int) -> HopeConfig:
    """The model's own config.

    Raises:
        ValueError: sizes that do not fit together, unknown ``model_options``, or states to carry of a model
            with attention layers.
    """
    values: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "layer_types": MODELS[config.model],
        # Documents end, and therefore begin, with the separator.
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
    }
    known = set(HopeConfig.__dataclass_fields__)
    unknown = sorted(set(config.model_options) - known)
    if unknown:
        names = [f"{name} (now {RENAMED[name]})" if name in RENAMED else name for name in unknown]
        raise ValueError(f"model_options: HopeConfig has no {', '.join(names)}")
    made = HopeConfig(**{**values, **config.model_options})
    if config.carry_state and "full_attention" in made.layer_types:
        raise ValueError(
            "carry_state: a model with attention layers has no state of bounded size to carry; leave it out, "
            "or choose another model"
        )
    return made


def build_model(config: TrainConfig, vocab_size: int, separator_id: int) -> PreTrainedModel:
    """A new model with initial weights drawn from ``config.seed``, on the CPU, in fp32."""
    torch.manual_seed(config.seed)
    return HopeForCausalLM(hope_config(config, vocab_size, separator_id))


def levels_hardly_trained(model_config: HopeConfig, sequence_length: int) -> list[int]:
    """Chunk sizes of the continuum's levels of which a training window holds fewer than three.

    What a step does shows in the chunk after it, and what steps add up to after some more: such levels learn
    in use what training has never shown them.
    """
    return [
        level.chunk_size
        for level in model_config.make_continuum_levels()
        if level.chunk_size is not None and level.steps and 3 * level.chunk_size > sequence_length
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """``config.optimizer`` over groups with and without weight decay (see :func:`decays`).

    All but AdamW have the hidden matrices and stacks of them: what decays, but for convolutions and an output
    head of its own, which are left to AdamW with the rest. Delta momentum is preconditioned as AdamW is, and
    as a momentum adds up about 1 / (1 − α) gradients, its groups have that ``"rate_share"`` of the rate.
    """
    # Not by ``module.weight``, which of a DTensor may be this rank's part.
    embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = () if head is None else {id(parameter) for parameter in head.parameters()}
    matrices, decayed, free = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not decays(name, parameter) or id(parameter) in embeddings:
            free.append((name, parameter))
        elif parameter.ndim > 3 or _CONVOLUTION in name.split(".") or id(parameter) in heads:
            decayed.append((name, parameter))
        else:
            matrices.append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": matrices, "rule": "matrix", "weight_decay": config.weight_decay},
        {"params": decayed, "rule": "adamw", "weight_decay": config.weight_decay},
        {"params": free, "rule": "adamw", "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    options: dict[str, Any] = {"lr": config.learning_rate, "adamw_betas": betas}
    if config.optimizer == "delta_momentum":
        options |= {"momentum": config.beta1, "beta2": config.beta2, "preconditioner": "rms"}
        for group in groups:
            group["rate_share"] = 1 - config.beta1 if group["rule"] == "matrix" else 1.0
            group["lr"] = config.learning_rate * group["rate_share"]
    kinds = {"muon": Muon, "m3": M3, "delta_momentum": DeltaMomentum, "deep_momentum": DeepMomentum}
    return kinds[config.optimizer](groups, **options)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, vectors or a memory's gates.

    A gate's zero is a rate (half of its range), not the absence of an effect, so pulling it to zero is no
    regularisation.
    """
    parts = name.split(".")
    return parameter.ndim >= 2 and not any("norm" in part or part in _MEMORY_GATES for part in parts)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The rate of step number ``step`` (counted from 0): linear warm-up, a cosine, then the final share."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = config.decay_steps or config.steps
    progress = (step - config.warmup_steps) / max(1, decay_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1.0 - config.final_learning_rate) * cosine)
