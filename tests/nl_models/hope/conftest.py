"""A tiny Hope of any kind, with every option small enough to cross chunk boundaries several times."""

import pytest
import torch

from nl_models import HopeConfig, HopeForCausalLM

VOCABULARY = 37


@pytest.fixture
def make_config():
    def make(layer_types="self_modifying_titans", **options):
        widths = {"vocab_size": VOCABULARY, "hidden_size": 16}
        sizes = {**widths, "num_hidden_layers": 2, "num_attention_heads": 2}
        # Chunks of 4 and 2, and of 3 and 6: no two clocks strike together, and all do several times.
        memory = {"memory_hidden_size": 6, "memory_chunk_size": 4, "memory_generator_chunk_size": 2}
        levels = [
            {"hidden_size": 12, "chunk_size": 3},
            {"hidden_size": 10, "chunk_size": 6, "gated": True, "rule": "sgd"},
            {"hidden_size": 14},
        ]
        sizes = {**sizes, **memory, "continuum_levels": levels}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
        return HopeConfig(layer_types=layer_types, **{**sizes, **special, **options})

    return make


@pytest.fixture
def make_model(make_config):
    """A model in evaluation mode whose parameters are all far from their special initial values."""

    def make(layer_types="self_modifying_titans", dtype=torch.float64, noise=0.2, **options):
        torch.manual_seed(0)
        model = HopeForCausalLM(make_config(layer_types, **options)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def tokens():
    def make(batch, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, VOCABULARY, (batch, length), generator=generator)

    return make
