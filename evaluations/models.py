"""The models that are compared, at equal parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nl_models import HopeConfig, HopeForCausalLM, HopeModel

# A continuum as by default: of one level, all of which learns.
LEARNING = {"chunk_size": 32, "key_projection": False}

# What each is, as fields of HopeConfig; an LSTM is not Hope's. `hope` sets the number of parameters.
MODELS: dict[str, dict[str, object]] = {
    "hope": {},
    "hope_continuum": {},
    "hope_two_layer": {"memory_hidden_size": 16},
    "hope_attention": {"layer_types": "full_attention"},
    "hope_writes_nothing": {"memory_rate_max": 0.0},
    "titans": {"layer_types": "titans"},
    "gated_delta_net": {"layer_types": "gated_delta_net"},
    "gated_delta_net_continuum": {"layer_types": "gated_delta_net"},
    "attention": {
        "layer_types": "full_attention",
        "use_short_convolution": False,
        "attention_output_gate": False,
    },
    "lstm": {},
    "titans_continuum": {"layer_types": "titans"},
    # Parts of Hope's memories, each changed or left out, as in the paper's ablation.
    "no_erase_continuum": {"memory_rule": {"erase": "none"}},
    "no_decay_continuum": {"memory_retention_bias": 20.0},
    "momentum_continuum": {"memory_momentum": True},
    "writes_nothing_continuum": {"memory_rate_max": 0.0},
}
TITLES = {
    "hope": "Hope, linear memories",
    "hope_continuum": "Hope, linear memories and continuum",
    "hope_writes_nothing": "Hope, nothing written",
    "hope_two_layer": "Hope, two-layer memories",
    "hope_attention": "Hope-Attention",
    "titans": "Titans",
    "gated_delta_net": "Gated DeltaNet",
    "gated_delta_net_continuum": "Gated DeltaNet and continuum",
    "attention": "Transformer",
    "lstm": "LSTM",
    "titans_continuum": "Titans and continuum (no inner projections)",
    "no_erase_continuum": "no erase (no DGD)",
    "no_decay_continuum": "no decay of the memories",
    "momentum_continuum": "with momentum",
    "writes_nothing_continuum": "nothing written by the memories",
    # Ways to learn from a stream, of evaluations.learners.
    "frozen": "Transformer, learns nothing",
    "in_context": "Transformer, in context",
    "fine_tuning": "Fine-tuning (AdamW)",
    "ewc": "EWC",
    "replay": "Replay",
    "joint": "Fine-tuning, all parts at once",
    "hope_1_level": "Continuum, 1 level",
    "hope_2_levels": "Continuum, 2 levels",
    "hope_3_levels": "Continuum, 3 levels",
    "hope_small_file": "Continuum, 2 levels, small file",
    "starts_over": "Continuum, 2 levels, starts over",
    "other_project": "Continuum, 2 levels, other project",
    "hope_reads": "Hope, reads on",
    "hope_reads_anew": "Hope, a fresh state every part",
}


class Reader(nn.Module):
    """Ids [B, T] to logits [B, T, outputs]."""

    def __init__(self, backbone: nn.Module, width: int, outputs: int, head: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooled = pooled = head == "pooled"
        layers = [nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()] * 2 if pooled else []
        self.head = nn.Sequential(*map(copy.deepcopy, layers), nn.Linear(width, outputs))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.backbone(ids)
        if self.pooled:  # MAD's decoder: what was said last, and a position
            x = x[:, -1:] + positions(x.shape[1], x.shape[2])
        return self.head(x)


def positions(length: int, width: int) -> torch.Tensor:
    """Sines and cosines [length, width] of wavelengths from 2π to 20,000π."""
    rates = 10_000.0 ** (-torch.arange(width // 2) / (width // 2 - 1))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class _Hope(nn.Module):
    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.model = HopeModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).last_hidden_state


class LanguageModel(nn.Module):
    """The same of ``hope``, whose output layer is its embedding."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.hope = HopeForCausalLM(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hope(input_ids=ids, use_cache=False).logits


class _LSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embedding(ids))[0])


def make(
    name: str,
    vocabulary: int,
    outputs: int,
    *,
    width: int,
    layers: int,
    heads: int,
    inner: int,
    head: str = "linear",
    options: dict[str, object] | None = None,
) -> Reader | LanguageModel:
    """A model with MLPs (of an LSTM: hidden states) of width ``inner``.

    Args:
        name: of :data:`MODELS`.
        head: "linear"; "pooled": all positions are answered from what the model says at the last one; or
            "tied": the embedding, of a language model.
        options: further fields of HopeConfig.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    if name == "lstm":
        if options or head == "tied":
            raise ValueError(f"options, head: an LSTM has none of these, got {options}, {head!r}")
        return Reader(_LSTM(vocabulary, width, layers, inner), width, outputs, head)
    learns = name.endswith("continuum") or name == "hope_attention"
    levels = [{"hidden_size": inner, **(LEARNING if learns else {})}]
    config = HopeConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **{"continuum_levels": levels, **MODELS[name], **(options or {})},
    )
    return LanguageModel(config) if head == "tied" else Reader(_Hope(config), width, outputs, head)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def at_equal_parameters(
    name: str, *sizes: int, widening: int = 2, options: dict[str, object] | None = None, **shape: int
) -> Reader | LanguageModel:
    """A model with as many parameters as ``hope`` with MLPs ``widening`` times as wide as the stream, to 2 %.

    Its inner width is what is chosen. Other arguments are those of :func:`make`.

    Raises:
        ValueError: no inner width gives as many.
    """

    def count(name: str, inner: int, options: dict[str, object] | None) -> int:
        with torch.device("meta"):
            return parameters(make(name, *sizes, inner=inner, options=options, **shape))

    wanted = count("hope", widening * shape["width"], None)
    low, high = 4, 4
    while count(name, high, options) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(name, middle, options) <= wanted else (low, middle)
    inner = min((low, high), key=lambda inner: abs(count(name, inner, options) - wanted))
    found = count(name, inner, options)
    if abs(found - wanted) > 0.02 * wanted:
        raise ValueError(
            f"{name}: no inner width has {wanted:,} parameters to 2 %; the nearest has {found:,}"
        )
    return make(name, *sizes, inner=inner, options=options, **shape)
