"""Weight decay goes to matrices only; the learning rate is a function of the step."""

import pytest
import torch
from torch import nn

from nl_models.optim import M3, DeepMomentum, DeltaMomentum, Muon
from nl_models.training.config import TrainConfig
from nl_models.training.model import build_model, build_optimizer, learning_rate_at


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("muon", Muon), ("m3", M3), ("delta_momentum", DeltaMomentum), ("deep_momentum", DeepMomentum)],
)
def test_they_have_the_hidden_matrices_and_adamw_the_rest(name, kind):
    config = TrainConfig(model="titans", layers=1, hidden_size=32, heads=2, optimizer=name, weight_decay=0.3)
    optimizer = build_optimizer(build_model(config, 64, 0), config)
    assert isinstance(optimizer, kind)
    rules = {
        parameter.removeprefix("model.layers.0."): (group["rule"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["param_names"]
    }
    assert {n for n, (rule, _) in rules.items() if rule == "matrix"} == {
        "mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight", "mixer.memory.inner",
        "mixer.output.g_proj.weight", "mixer.output.o_proj.weight", "continuum.levels.0.up",
        "continuum.levels.0.down", "continuum.levels.0.value",
    }  # fmt: skip
    assert rules["convolution.weight"] == ("adamw", 0.3)
    assert rules["mixer.q_proj.weight"] == ("matrix", 0.3)
    assert rules["model.embed_tokens.weight"] == ("adamw", 0.0)
    assert rules["mixer.rate_proj.weight"] == ("adamw", 0.0)
    assert kind.__name__ in optimizer.describe()


def test_delta_momentum_has_a_share_of_the_rate_in_matrices_only():
    config = TrainConfig(optimizer="delta_momentum", learning_rate=0.5, beta1=0.8)
    groups = build_optimizer(nn.Linear(4, 4), config).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.5])
    assert [group["rate_share"] for group in groups] == pytest.approx([0.2, 1.0])


def test_an_untied_head_is_left_to_adamw():
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)

        def get_output_embeddings(self):
            return self.head

    groups = build_optimizer(WithHead(), TrainConfig(optimizer="muon")).param_groups
    assert [g["param_names"] for g in groups] == [["hidden.weight"], ["head.weight"], ["hidden.bias"]]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer: expected one of"):
        TrainConfig(optimizer="sgd")
