"""A tiny model and corpus for the training loop."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nl_models.data.prepare import prepare_data
from nl_models.training.config import TrainConfig
from nl_models.training.loop import Trainer, create_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(
            f"file {i}: " + "the quick brown fox jumps over the dog. " * (i + 3)
        )
    return folder


@pytest.fixture
def config(corpus):
    return TrainConfig(
        corpus=str(corpus), tokenizer="bytes", validation_fraction=0.2, steps=12, batch_size=2,
        sequence_length=16, gradient_accumulation=2, learning_rate=1e-2, warmup_steps=2, evaluate_every=4,
        validation_windows=3, checkpoint_every=5, device="cpu", threads=1, seed=7,
    )  # fmt: skip


def tiny_model(config: TrainConfig, dropout: float = 0.1) -> LlamaForCausalLM:
    """Any transformers model will do. Dropout draws random numbers in every step, so that they matter."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            attention_dropout=dropout, tie_word_embeddings=True, attn_implementation="eager",
        )
    )  # fmt: skip


@pytest.fixture
def make_trainer():
    """``make_trainer(folder, config)``: the trainer of a new or existing run."""

    def make(folder, config):
        if not folder.exists():
            create_run(folder, config)
        data = prepare_data(config, folder / "data")
        return Trainer(folder, config, tiny_model(config), data)

    return make
