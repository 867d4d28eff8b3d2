"""Weight decay goes to matrices only; the learning rate is a function of the step."""

import pytest
import torch
from torch import nn

from nl_models.training.config import TrainConfig
from nl_models.training.optimizer import build_optimizer, learning_rate_at


def test_norms_biases_embeddings_and_gates_are_not_decayed():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "linear": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "rate_proj": nn.Linear(4, 2),
        }
    )
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3))
    decayed = [id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]]
    assert decayed == [id(model["linear"].weight)]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_the_learning_rate_warms_up_then_follows_a_cosine_to_its_final_share():
    config = TrainConfig(steps=101, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [learning_rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_no_warm_up_starts_at_the_peak():
    config = TrainConfig(steps=3, warmup_steps=0, learning_rate=1.0, final_learning_rate=0.0)
    assert [learning_rate_at(step, config) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])


def test_a_frozen_parameter_is_left_out():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    groups = build_optimizer(model, TrainConfig()).param_groups
    assert [p for g in groups for p in g["params"]] == [model.weight]
    assert isinstance(build_optimizer(model, TrainConfig()), torch.optim.AdamW)
