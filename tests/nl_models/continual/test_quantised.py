"""Learners on models whose layers are quantised, without parameters of their own, or out of memory."""

import copy

import pytest
import torch
from torch import nn

from nl_models.continual import ContinuumLearner, StepRule
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model

RULES = {
    "sgd": StepRule(rate=0.05),
    "dgd": StepRule(rule="dgd", rate=0.05),
    "norms": StepRule(rule="muon", rate=0.05, restore_norms=True),
}


def stream():
    return torch.randint(VOCABULARY, (21,), generator=torch.Generator().manual_seed(3))


class CodedLinear(nn.Module):
    """A layer whose weight is bytes: it has no parameter, and no dtype, of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def decoded(self, like):
        return self.codes.to(like.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.decoded(x), self.bias)


def coded(model):
    """The model with bytes for weights, and one with the same values as ordinary parameters."""
    plain = copy.deepcopy(model)
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and name != "lm_head":
            layer = CodedLinear(part)
            model.set_submodule(name, layer)
            plain.get_submodule(name).weight.data = layer.decoded(part.weight)
    return model, plain


def assert_learns_the_same(quantised, plain, rule, tolerance):
    learners = [ContinuumLearner(convert_mlp_to_continuum(m, LEVELS), rule) for m in (quantised, plain)]
    losses = [learner.learn(stream()).loss for learner in learners]
    torch.testing.assert_close(*losses, atol=tolerance, rtol=0)
    for name, change in learners[1].state.changes.items():
        assert change.abs().max() > 1e-4
        torch.testing.assert_close(learners[0].state.changes[name], change, atol=tolerance, rtol=1e-3)
    return learners


@pytest.mark.parametrize("order", ["quantised first", "converted first"])
@pytest.mark.parametrize("rule", RULES)
def test_layers_without_parameters_learn_as_their_matrices_would(rule, order, tmp_path):
    model = make_model("qwen2", torch.float64)
    if order == "quantised first":
        quantised, plain = coded(model)
        learner, _ = assert_learns_the_same(quantised, plain, RULES[rule], 1e-8)
    else:
        quantised, plain = coded(convert_mlp_to_continuum(model, LEVELS))
        learner, other = ContinuumLearner(quantised, RULES[rule]), ContinuumLearner(plain, RULES[rule])
        torch.testing.assert_close(learner.learn(stream()).loss, other.learn(stream()).loss)
    learner.save(tmp_path / "memory.safetensors")
    twin = ContinuumLearner(learner.model, RULES[rule]).load(tmp_path / "memory.safetensors")
    assert torch.equal(twin.learn(stream()).loss, learner.learn(stream()).loss)


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_torchao_quantised(rule, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    model, plain = make_model("llama"), make_model("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    for name, part in plain.named_modules():
        if isinstance(part, nn.Linear):
            part.weight.data = model.get_submodule(name).weight.dequantize().detach()
    learner, _ = assert_learns_the_same(model, plain, RULES[rule], 2e-4)
    learner.save(tmp_path / "memory.safetensors")
    twin = ContinuumLearner(learner.model, RULES[rule]).load(tmp_path / "memory.safetensors")
    assert torch.equal(twin.learn(stream()).loss, learner.learn(stream()).loss)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("parts", ["all", "MLPs"])
def test_layers_that_let_no_gradient_through_are_refused(parts):
    model = make_model("llama")
    for layer in model.model.layers if parts == "MLPs" else [model]:
        part = layer if parts == "all" else layer.mlp
        torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, inplace=True)
    converted = convert_mlp_to_continuum(model, LEVELS)
    with pytest.raises(ValueError, match=r"_proj \(torch.ao.nn.quantized.*lets no gradient through"):
        ContinuumLearner(converted, RULES["sgd"])


@pytest.mark.parametrize("kind", ["hope", "converted"])
def test_an_offloaded_model_is_refused(kind):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    if kind == "hope":
        levels = [{"hidden_size": 32, "chunk_size": 4, "max_rate": 0.0}]
        config = HopeConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, continuum_levels=levels
        )
        model = HopeForCausalLM(config)
    else:
        model = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is on the meta device .*remove_hook_from_submodules"):
        ContinuumLearner(model, RULES["sgd"])
    accelerate.hooks.remove_hook_from_submodules(model)
    assert ContinuumLearner(model, RULES["sgd"]).learn(stream()).loss.isfinite()


def test_fast_weights_of_a_model_in_bytes_are_of_its_dtype():
    for dtype in (torch.float64, torch.bfloat16):
        converted = convert_mlp_to_continuum(coded(make_model("llama", dtype))[0], LEVELS)
        fast = converted.initial_fast_weights()
        assert fast.layers[0].up.dtype == torch.promote_types(dtype, torch.float32)
        assert ContinuumLearner(converted, RULES["sgd"]).state.changes["layers.0.levels.0.up"].dtype == (
            fast.layers[0].up.dtype
        )
