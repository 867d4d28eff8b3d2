"""A conversion takes over every part as it is, or refuses it by name before anything is built."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from nl_models.surgery import convert_attention, convert_mlp_to_continuum
from tests.nl_models.surgery.models import LEVELS, make_model

UP = "model.layers.0.mlp.up_proj"


class ScaledAttention(LlamaAttention):
    def forward(self, *arguments, **options):
        output, *rest = super().forward(*arguments, **options)
        return 2 * output, *rest


class ScaledMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledLayer(LlamaDecoderLayer):
    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_part(name, make):
    """A function that puts ``make(part)`` in the place of a part of a model."""

    def change(model):
        model.set_submodule(name, make(model.get_submodule(name)))
        return model

    return change


def of_class(name, cls):
    def change(model):
        model.get_submodule(name).__class__ = cls
        return model

    return change


def called_with_hidden_states(model):
    model(torch.ones(1, 2, dtype=torch.int64), output_hidden_states=True)
    return model


EXACT = {
    "dynamic int8": quantised,
    "int8 in one MLP": lambda m: torch.ao.quantization.quantize_dynamic(
        m, {UP: torch.ao.quantization.default_dynamic_qconfig}
    ),
    "another norm": with_part("model.layers.1.input_layernorm", lambda _: nn.LayerNorm(16)),
    "another last norm": with_part("model.norm", lambda _: nn.LayerNorm(16)),
    "another activation": with_part("model.layers.1.mlp.act_fn", lambda _: nn.ReLU()),
    "another output layer": with_part("lm_head", lambda old: nn.Sequential(old, nn.Softplus())),
    "a subclass of the attention": of_class("model.layers.0.self_attn", ScaledAttention),
    "hidden states were recorded": called_with_hidden_states,
    "another epsilon": lambda m: setattr(m.model.norm, "variance_epsilon", 0.5) or m,
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", EXACT)
def test_a_part_of_another_kind_goes_over_exactly(kind, tokens):
    model = EXACT[kind](make_model("llama"))
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True)
        before = {name: type(part) for name, part in model.named_modules()}
        converted = convert_mlp_to_continuum(model, LEVELS)
        assert not any(p.is_meta for p in (*converted.parameters(), *converted.buffers()))
        for fast in (None, converted.initial_fast_weights(3)):
            got = converted(tokens, output_hidden_states=True, fast_weights=fast)
            assert torch.equal(got.logits, expected.logits)
            assert len(got.hidden_states) == len(expected.hidden_states)
        assert {name: type(part) for name, part in model.named_modules()} == before
        assert torch.equal(model(tokens).logits, expected.logits)


@pytest.mark.parametrize("convert", ["mlp", "attention"])
def test_weights_that_torchao_quantised_go_over(convert, tokens):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    model, plain = make_model("llama"), make_model("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        if convert == "mlp":
            converted = convert_mlp_to_continuum(model, LEVELS)
            assert torch.equal(converted(tokens).logits, model(tokens).logits)
        else:  # the new memory has the matrices that the quantised projections apply
            converted = convert_attention(model, [0])
            own = convert_attention(plain, [0]).model.layers[0].self_attn.memory.q_proj.weight
            taken = converted.model.layers[0].self_attn.memory.q_proj.weight
            assert 0 < (taken - own).abs().max() < 0.02
            assert converted(tokens).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_memories_take_over_quantised_projections(tokens):
    model = make_model("llama")
    own = convert_attention(model, [0]).model.layers[0].self_attn.memory
    converted = convert_attention(quantised(model), [0])
    taken = converted.model.layers[0].self_attn.memory
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(own, name).weight
        assert 0 < (getattr(taken, name).weight - weight).abs().max() < 0.02 * weight.abs().max()
    assert converted(tokens).logits.isfinite().all()


def on(name, change):
    """``change`` of a part of a model."""

    def changed(model):
        change(model.get_submodule(name))
        return model

    return changed


def hooked(registration):
    def register(model):
        part = model.get_submodule("model.layers.1.mlp")
        part.remedy = getattr(part, registration)(lambda *arguments: None)
        return model

    return register


def unhook(model):
    model.get_submodule("model.layers.1.mlp").remedy.remove()


def patch(part):
    part.forward = functools.partial(type(part).forward, part)


MLP = r"model.layers.1.mlp \(LlamaMLP\)"
# What was done to a model, what the message says, and what its remedy does (None: convert first).
REFUSED = {
    "pruned": (
        on(UP, lambda p: prune.l1_unstructured(p, "weight", 0.5)),
        rf"model: its {UP} \(Linear\) is pruned.*prune.remove",
        on(UP, lambda p: prune.remove(p, "weight")),
    ),
    "weight norm": (
        on(UP, weight_norm),
        rf"model: its {UP} \(WeightNorm|{UP} \(Linear\) is weight-normed.*remove_weight_norm",
        on(UP, remove_weight_norm),
    ),
    "parametrised": (
        on(UP, parametrizations.weight_norm),
        rf"its {UP} \(ParametrizedLinear\) has a parametrised weight.*remove_parametrizations",
        on(UP, lambda p: parametrize.remove_parametrizations(p, "weight")),
    ),
    "forward hook": (
        hooked("register_forward_hook"),
        r"model.layers.1.mlp \(LlamaMLP\) has a forward hook",
        unhook,
    ),
    "forward pre-hook": (
        hooked("register_forward_pre_hook"),
        r"mlp \(LlamaMLP\) has a forward pre hook",
        unhook,
    ),
    "backward hook": (hooked("register_full_backward_hook"), r"mlp \(LlamaMLP\) has a backward hook", unhook),
    "hook of the model": (
        lambda m: m.register_forward_hook(lambda *_: None) and m,
        r"the LlamaForCausalLM has a forward hook .* remove it, convert, and register",
        None,
    ),
    "patched": (
        on("lm_head", patch),
        r"lm_head \(Linear\) has a forward that was put on it",
        lambda m: delattr(m.lm_head, "forward"),
    ),
    "compiled": (
        on("model.layers.0", lambda p: p.compile(backend="eager")),
        r"model.layers.0 \(LlamaDecoderLayer\) is compiled.*convert first",
        None,
    ),
    "another MLP": (
        of_class("model.layers.0.mlp", ScaledMLP),
        r"its model.layers.0.mlp \(ScaledMLP\) is no LlamaMLP",
        of_class("model.layers.0.mlp", LlamaMLP),
    ),
    "another layer": (
        of_class("model.layers.1", ScaledLayer),
        r"its model.layers.1 \(ScaledLayer\) is no LlamaDecoderLayer",
        of_class("model.layers.1", LlamaDecoderLayer),
    ),
}


def share(name):
    """The first layer's part in the second layer too."""

    def shared(model):
        model.set_submodule(f"model.layers.1{name}", model.get_submodule(f"model.layers.0{name}"))
        return model

    def unshared(model):
        name_there = f"model.layers.1{name}"
        model.set_submodule(name_there, copy.deepcopy(model.get_submodule(name_there)))

    return shared, unshared


for part in ("", ".mlp"):
    shared, unshared = share(part)
    message = rf"its model.layers.1{part} \(.*\) is also model.layers.0{part}, .*deepcopy"
    REFUSED[f"shared layer{part}"] = (shared, message, unshared)


def adapted(model):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).get_base_model()


def offloaded(model):
    return pytest.importorskip("accelerate", reason="needs accelerate").cpu_offload(
        model, torch.device("cpu")
    )


def brought_back(model):
    __import__("accelerate").hooks.remove_hook_from_submodules(model)


CONVERSIONS = {
    "mlp": lambda model: convert_mlp_to_continuum(model, LEVELS),
    "attention": lambda model: convert_attention(model, [1]),
}
REFUSED["adapted"] = (adapted, rf"its {UP} \(Linear\) is an adapter.*merge it", None)
REFUSED["offloaded"] = (
    offloaded,
    r"is offloaded or dispatched by hooks.*remove_hook_from_submodules",
    brought_back,
)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "convert",
    [lambda m: convert_mlp_to_continuum(m, LEVELS), lambda m: convert_attention(m, [1])],
    ids=["mlp", "attention"],
)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_only_seem_to_go_over_is_refused(kind, convert, tokens):
    change, message, remedy = REFUSED[kind]
    model = change(make_model("llama"))
    with torch.no_grad():
        expected = model(tokens).logits
        before = {name: dict(vars(part)) for name, part in model.named_modules()}
        with pytest.raises(TypeError, match=message):
            convert(model)
        assert {name: dict(vars(part)) for name, part in model.named_modules()} == before
        assert torch.equal(model(tokens).logits, expected)
        if remedy is not None:
            remedy(model)
            expected = model(tokens).logits
            converted = convert(model)
            got = converted(tokens).logits
            assert got.isfinite().all()
            if converted.config.memory_layers is None:
                assert torch.equal(got, expected)


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_an_mlp_of_another_width_is_refused(part, tokens):
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(16, 20, bias=False), nn.Linear(16, 20, bias=False)
    mlp.down_proj = nn.Linear(20, 16, bias=False)
    if part == "down_proj":  # the others do not say their width
        mlp.gate_proj, mlp.up_proj = nn.Sequential(mlp.gate_proj), nn.Sequential(mlp.up_proj)
    with pytest.raises(TypeError, match=rf"its model.layers.0.mlp.{part} .* has 20 hidden units .*leave"):
        convert_mlp_to_continuum(model, LEVELS)
    converted = convert_mlp_to_continuum(model, LEVELS, layers=[1])
    with torch.no_grad():
        fast = converted.initial_fast_weights()
        got = converted(tokens, fast_weights=fast, use_cache=False).logits
        torch.testing.assert_close(got, model(tokens).logits)


def test_what_is_done_to_the_converted_model_does_not_reach_the_source(family, tokens):
    model = make_model(family)
    converted = convert_mlp_to_continuum(model, LEVELS)
    with torch.no_grad():
        expected = model(tokens).logits
        for part in converted.modules():
            part.register_forward_hook(lambda *_: 1 / 0)
        converted.train()
        converted.base_model.decoder_layers()[0].mlp = nn.Identity()
        assert not any(part.training for part in model.modules())
        assert torch.equal(model(tokens).logits, expected)
        assert not hasattr(model.config, "continuum_levels")


def test_inputs_that_require_gradients_do_so_in_the_converted_model_too():
    model = make_model("llama").requires_grad_(False)
    model.enable_input_require_grads()
    converted = convert_mlp_to_continuum(model, LEVELS)
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert converted(ids).logits.requires_grad
    converted.disable_input_require_grads()
    assert not converted(ids).logits.requires_grad
    assert model(ids).logits.requires_grad


def test_attention_without_known_projections_is_refused():
    model = make_model("llama")
    model.model.layers[0].self_attn.q_proj = None
    with pytest.raises(TypeError, match="got LlamaAttention without q_proj; put the family's own"):
        convert_attention(model, [0])


def test_a_converted_model_is_converted_further(tokens):
    model = make_model("llama")
    model.model.norm = nn.LayerNorm(16)
    first = convert_attention(convert_mlp_to_continuum(model, LEVELS), [0])
    second = convert_attention(first, [1])
    assert [layer.has_memory for layer in first.model.layers] == [True, False]
    assert [layer.has_memory for layer in second.model.layers] == [True, True]
    assert type(second.model.norm) is nn.LayerNorm
    fast = second.initial_fast_weights()
    assert torch.equal(second(tokens, fast_weights=fast).logits, second(tokens).logits)
    assert torch.equal(copy.deepcopy(second)(tokens).logits, second(tokens).logits)
