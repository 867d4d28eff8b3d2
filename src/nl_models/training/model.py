"""From a training config to a model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.hope.configuration_hope import RENAMED
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
