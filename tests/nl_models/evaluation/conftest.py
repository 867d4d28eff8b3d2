"""A tiny model whose writes matter, and a text for it."""

import pytest
import torch

from nl_models import HopeConfig, HopeForCausalLM

LEVELS = [{"hidden_size": 12, "chunk_size": 3}, {"hidden_size": 10, "chunk_size": 6}, {"hidden_size": 14}]


@pytest.fixture
def make_model():
    """All parameters are far from their special initial values."""

    def make(layer_types="self_modifying_titans", **options):
        torch.manual_seed(0)
        config = HopeConfig(
            **{
                "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "layer_types": layer_types, "memory_chunk_size": 4, "continuum_levels": LEVELS, **options,
            }
        )  # fmt: skip
        model = HopeForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def text():
    return torch.randint(0, 37, (48,), generator=torch.Generator().manual_seed(1))
