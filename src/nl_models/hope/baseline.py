"""The baselines of a Hope model: another mixer and a plain MLP, as many parameters."""

from __future__ import annotations

import torch

from nl_models.hope import HopeConfig, HopeForCausalLM

TOLERANCE = 0.01


def parameter_count(config: HopeConfig) -> int:
    """Parameters of a model of ``config``, tied ones once, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in HopeForCausalLM(config).parameters())


def mixer_baseline(
    config: HopeConfig, mixer: str = "full_attention", *, same_blocks: bool = True
) -> HopeConfig:
    """Another mixer in the place of every memory, one plain MLP in the place of the continuum.

    The MLP's width is what makes the parameter counts equal (within 1 %), so that the parameters of the
    memories buy the baseline a wider MLP.

    Args:
        mixer: of ``HopeConfig.layer_types``: softmax attention by default.
        same_blocks: everything else stays, short convolution and output gate included (Hope-Attention with a
            static continuum). Otherwise the blocks are those of a plain transformer, without either.

    Raises:
        ValueError: no width gives as many parameters, as the Hope model is too small.
    """
    wanted = parameter_count(config)
    values = {
        name: getattr(config, name)
        for name in HopeConfig.__annotations__.keys() & config.to_dict().keys()
        if not name.startswith(("memory_", "continuum_"))
    }
    values["layer_types"] = mixer
    if not same_blocks:
        values |= {"use_short_convolution": False, "attention_output_gate": False}

    def with_width(width: int) -> HopeConfig:
        return HopeConfig(**values, continuum_levels=[{"hidden_size": width, "chunk_size": None}])

    narrow = parameter_count(with_width(8))
    per_column = (parameter_count(with_width(16)) - narrow) / 8
    width = 8 + round((wanted - narrow) / per_column)
    baseline = with_width(max(width, 8))
    count = parameter_count(baseline)
    if abs(count - wanted) > TOLERANCE * wanted:
        raise ValueError(
            f"no {mixer} baseline of {wanted:,} parameters: the nearest has {count:,}, more than 1 % away"
        )
    return baseline
