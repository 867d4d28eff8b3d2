"""The loss through the steps has the learner's value, and gradients that finite differences confirm."""

import copy

import pytest
import torch

from nl_models import HopeConfig, HopeForCausalLM
from nl_models.continual import ContinuumLearner, StepRule, next_token_loss_through_steps
from nl_models.surgery import convert_attention, convert_mlp_to_continuum
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model

RULES = {
    "sgd": {"rate": 0.3},
    "dgd": {"rule": "dgd", "rate": 0.05},
    "momentum": {"rule": "momentum", "rate": 0.2},
    "muon": {"rule": "muon", "rate": 0.1},
    "norms": {"rate": 0.3, "restore_norms": True},
}


def stream(rows: int = 2, length: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


def make_hope(**options) -> HopeForCausalLM:
    torch.manual_seed(1)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_types": ["titans", "full_attention"],
        "memory_chunk_size": 4,
        "memory_impl": "reference",
        "continuum_levels": [
            {"hidden_size": 12, "chunk_size": 4, "max_rate": 0.0, "gated": True},
            {"hidden_size": 12, "chunk_size": 8, "max_rate": 0.0},
            {"hidden_size": 8},
        ],
    }
    config = HopeConfig(**{**defaults, **options})
    model = HopeForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("kind", "rule"), [*(("gpt2", rule) for rule in RULES), ("llama", "dgd"), ("hope", "dgd")]
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_value_is_the_learners(kind, rule, nested):
    model = (
        make_hope() if kind == "hope" else convert_mlp_to_continuum(make_model(kind, torch.float64), LEVELS)
    )
    # Long enough for a slow level's weights to serve several pieces after its first step.
    tokens = stream(2, 26)
    options = {"nested": nested, "context_length": 20}
    loss = next_token_loss_through_steps(model, tokens, StepRule(**RULES[rule]), **options)
    learner = ContinuumLearner(model, StepRule(**RULES[rule]), batch_size=2, **options)
    atol = 3e-6 if kind == "llama" else 1e-9  # Llama's norms round to fp32 inside
    torch.testing.assert_close(loss.detach(), learner.learn(tokens).loss.mean(), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("kind", "rule"), [*(("gpt2", rule) for rule in RULES), ("hope", "sgd"), ("hope", "dgd")]
)
def test_the_gradient_goes_through_the_steps(kind, rule):
    if kind == "hope":
        model = make_hope()
        level = model.model.layers[0].continuum.levels[0]
        chosen = [level.up, level.down, model.model.layers[1].continuum.levels[1].up]
    else:
        model = convert_mlp_to_continuum(make_model(kind, torch.float64), LEVELS)
        chosen = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[1].mlp.c_proj.weight]
    chosen.append(model.get_input_embeddings().weight)
    rate = torch.tensor(RULES[rule]["rate"], dtype=torch.float64, requires_grad=True)
    options = {**RULES[rule], "rate": rate}

    def loss():
        return next_token_loss_through_steps(model, stream(2, 11), StepRule(**options))

    gradients = torch.autograd.grad(loss(), [*chosen, rate])
    generator = torch.Generator().manual_seed(6)
    for parameter, gradient in zip([*chosen, rate], gradients, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        step = 1e-5 / direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(float(loss().detach()))
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * float(step))
        analytic = float((gradient * direction).sum())
        assert analytic == pytest.approx(numeric, rel=2e-4, abs=2e-6)
        assert abs(analytic) > 1e-5


def test_initial_states_are_learned_that_learn_well():
    """Meta-training on a family of streams lowers their loss by more than the steps did before."""
    model = convert_mlp_to_continuum(make_model("gpt2"), LEVELS)
    rate = torch.nn.Parameter(torch.tensor(0.02))
    optimizer = torch.optim.AdamW([*model.parameters(), rate], lr=3e-3)
    generator = torch.Generator().manual_seed(7)

    def streams():
        # Every stream repeats four symbols of its own.
        symbols = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:4] for _ in range(4)])
        return symbols.repeat(1, 6)

    losses = []
    for _ in range(25):
        loss = next_token_loss_through_steps(model, streams(), StepRule(rate=rate))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0] - 0.3
    held_out = streams()
    with_steps, without = (
        ContinuumLearner(model, StepRule(rate=value), batch_size=4).learn(held_out).loss.mean()
        for value in (rate.item(), 0.0)
    )
    assert with_steps < without - 0.1


def test_what_cannot_be_differentiated_is_refused():
    model = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    with pytest.raises(ValueError, match="input_ids: expected shape"):
        next_token_loss_through_steps(model, stream(2, 1), StepRule(rate=0.1))
    checkpointed = copy.deepcopy(model).train()
    checkpointed.base_model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing keeps no context"):
        next_token_loss_through_steps(checkpointed, stream(), StepRule(rate=0.1))
    with pytest.raises(ValueError, match="memory_impl"):
        next_token_loss_through_steps(make_hope(memory_impl="eager"), stream(), StepRule(rate=0.1))
    hybrid = convert_attention(model, [1], "delta_memory")
    with pytest.raises(ValueError, match="the op of GatedDeltaNet"):
        next_token_loss_through_steps(hybrid, stream(), StepRule(rate=0.1))
    hybrid.model.layers[1].self_attn.memory.impl = "reference"
    next_token_loss_through_steps(hybrid, stream(), StepRule(rate=0.1)).backward()
