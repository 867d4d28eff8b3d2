"""Configs say what is wrong with them, survive JSON, and build baselines and hybrids of one model class."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

import nl_models
from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.hope.baseline import parameter_count
from nl_models.hope.configuration_hope import LAYER_TYPES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads: expected a divisor"),
        ({"num_heads": 3}, "num_attention_heads: expected a divisor"),
        ({"hidden_size": 0}, "hidden_size: expected at least 1"),
        ({"hidden_size": 18, "layer_types": "full_attention", "num_attention_heads": 2}, "even head width"),
        ({"layer_types": "mamba"}, "layer_types: expected names of"),
        ({"layer_types": ["titans"] * 3}, "layer_types: expected one per layer, 2, got 3"),
        ({"convolution_window": 1}, "convolution_window: expected at least 2"),
        ({"attention_impl": "fast"}, "attention_impl: expected one of"),
        ({"memory_chunk_size": 0}, "memory_chunk_size: expected at least 1"),
        ({"memory_chunk_size": 6, "memory_generator_chunk_size": 4}, "must be a multiple"),
        ({"memory_read": "late"}, "memory_read: expected"),
        ({"memory_rate_max": 2.5}, r"memory_rate_max: expected a number in \[0, 2\]"),
        ({"memory_impl": "cuda"}, "memory_impl: expected one of"),
        ({"memory_impl": "auto"}, "memory_impl: expected one of .* None\\), got 'auto'"),
        ({"memory_impl": "compiled"}, "memory_impl: expected one of"),
        ({"continuum_impl": "cuda"}, "continuum_impl: expected one of"),
        ({"continuum_checkpoint_every": 0}, "continuum_checkpoint_every: expected at least 1"),
        ({"memory_rule": {"erase": "all"}}, "erase: expected one of"),
        ({"memory_rule": {"momentum": "mean"}}, "momentum: expected one of"),
        ({"memory_rule": {"anchored": "false"}}, "memory_rule: .*anchored: expected a bool"),
        ({"memory_rule": {"forget": True}}, "memory_rule: expected options"),
        ({"memory_chunks": 4}, "memory_chunks: HopeConfig has no such option"),
        ({"continuum_variant": "parallel"}, "continuum_variant: expected one of"),
        ({"continuum_levels": [{"hidden_size": 8, "rule": "adam"}]}, "rule: expected one of"),
        ({"continuum_levels": []}, "continuum_levels: expected at least one"),
        ({"continuum_levels": [{"width": 8}]}, "continuum_levels: expected options"),
        (
            {"continuum_levels": [{"hidden_size": 8}, {"hidden_size": 8, "chunk_size": 4}]},
            r"continuum_levels\[0\].chunk_size: levels that never step .* reorder",
        ),
    ],
)
def test_wrong_options_are_named(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


@pytest.mark.parametrize("value", ["4", 4.0, True])
def test_sizes_of_the_memory_are_whole_numbers(value):
    with pytest.raises(TypeError, match="memory_chunk_size: expected an int, got"):
        HopeConfig(**SMALL, memory_chunk_size=value)


@pytest.mark.parametrize(("name", "millions"), [("340m", 340), ("760m", 760), ("1.3b", 1300)])
def test_presets_have_as_many_parameters_as_their_names_say(name, millions):
    assert parameter_count(HopeConfig.preset(name)) == pytest.approx(millions * 1e6, rel=0.05)


def test_a_preset_takes_any_field():
    config = HopeConfig.preset("340m", hidden_size=512, num_heads=8, memory_hidden_size=64)
    assert (config.num_hidden_layers, config.num_attention_heads, config.memory_hidden_size) == (24, 8, 64)
    assert [level["hidden_size"] for level in config.continuum_levels] == [1280]
    mlp = [{"hidden_size": 64}]
    assert HopeConfig.preset("760m", continuum_levels=mlp).continuum_levels == mlp
    assert HopeConfig.preset("tiny").continuum_levels == HopeConfig(hidden_size=128).continuum_levels


@pytest.mark.parametrize("name", ["7b", "1.3B", None])
def test_a_preset_that_there_is_not(name):
    with pytest.raises(ValueError, match=r"name: expected one of \('tiny', '340m', '760m', '1.3b'\)"):
        HopeConfig.preset(name)


def test_a_config_survives_json(make_config, tmp_path):
    config = make_config(
        list(LAYER_TYPES), num_hidden_layers=4, memory_rule={"erase": "none"}, rope_theta=500.0
    )
    config.save_pretrained(tmp_path)
    nl_models.register()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.layer_types == list(LAYER_TYPES)
    assert loaded.continuum_levels == config.continuum_levels
    assert loaded.fingerprint() == config.fingerprint()
    assert loaded.num_heads == 2


def test_the_library_reads_a_saved_config_without_knowing_hope(make_config, tmp_path):
    """A Trainer that resumes reads it by the base class; files once had the mixers as ``layer_types``."""
    config = make_config(list(LAYER_TYPES), num_hidden_layers=4)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    PreTrainedConfig.from_json_file(file)
    saved = json.loads(file.read_text())
    saved["layer_types"] = saved.pop("mixer_types")
    file.write_text(json.dumps(saved))
    assert HopeConfig.from_pretrained(tmp_path).layer_types == list(LAYER_TYPES)


def test_the_fingerprint_follows_what_shapes_the_state(make_config):
    base = make_config()
    assert make_config(initializer_range=0.5).fingerprint() == base.fingerprint()
    for change in ({"memory_chunk_size": 8}, {"hidden_size": 32}, {"memory_rule": {"erase": "none"}}):
        assert make_config(**change).fingerprint() != base.fingerprint()
    assert make_config(continuum_variant="nested").fingerprint() != base.fingerprint()


OLDER_LEVEL = {
    "initial_rate": 0.5,
    "initial_retention": 1.0,
    "max_rate": 1.0,
    "max_retention": 0.9,
    "error_bound": 1.0,
    "predict_next": False,
}
"""What a level was when files did not say it."""


def test_conversations_saved_before_an_option_existed_still_fit():
    config = HopeConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        continuum_levels=[
            {"hidden_size": 12, "chunk_size": 3, **OLDER_LEVEL},
            {"hidden_size": 14},
        ],
        memory_rule={"error_at": "snapshot"},
        memory_values="unit",
    )
    assert config.fingerprint() == "a82e203867fe341d529f67bd6c3a552f55d965b110732fa341b7e2c1e069b08b"


def test_models_saved_before_retention_keep_everything(make_config, tmp_path):
    levels = [{"hidden_size": 12, "chunk_size": 3}, {"hidden_size": 14}]
    config = make_config(continuum_levels=levels)
    assert [level.get("initial_retention") for level in config.continuum_levels] == [0.9, None]
    assert [level.get("max_rate") for level in config.continuum_levels] == [2.0, None]
    config.save_pretrained(tmp_path)
    assert HopeConfig.from_pretrained(tmp_path).continuum_levels == config.continuum_levels
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "continuum_levels": levels}))
    old = HopeConfig.from_pretrained(tmp_path)
    assert old.continuum_levels == [{**levels[0], **OLDER_LEVEL}, levels[1]]
    assert old.fingerprint() != config.fingerprint()
    assert make_config(continuum_levels=old.continuum_levels).fingerprint() == old.fingerprint()


SMALL = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_models_saved_before_levels_remembered_longer_stay_what_they_were(make_config, tmp_path):
    said = {"max_rate": 2.0, "initial_rate": 0.5, "initial_retention": 0.7, "predict_next": True}
    levels = [{"hidden_size": 12, "chunk_size": 3, **said}]
    make_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "continuum_levels": levels}))
    level = HopeConfig.from_pretrained(tmp_path).make_continuum_levels()[0]
    assert (level.max_retention, level.error_bound) == (0.9, 1.0)
    assert (level.initial_retention, level.initial_rate) == (0.7, 0.5)


@pytest.mark.parametrize("momentum", ["average", "sum"])
def test_a_saved_config_names_the_form_of_momentum(tmp_path, momentum):
    rule = {"erase": "none"} if momentum == "average" else {"erase": "none", "momentum": "sum"}
    config = HopeConfig(**SMALL, memory_momentum=True, memory_rule=rule)
    assert config.make_memory_rule().momentum == momentum
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["memory_rule"]["momentum"] == momentum
    loaded = HopeConfig.from_pretrained(tmp_path)
    assert loaded.make_memory_rule() == dataclasses.replace(config.make_memory_rule(), error_at="snapshot")
    assert loaded.fingerprint() == config.fingerprint()


def test_momentum_saved_before_the_average_existed_is_the_sum(tmp_path):
    learning = {"hidden_size": 16, "chunk_size": 64, **OLDER_LEVEL}
    levels = [learning, {"hidden_size": 32}]
    rule = {"error_at": "snapshot"}
    unit = {"memory_rule": rule, "memory_values": "unit"}
    new = HopeConfig(**SMALL, memory_momentum=True, continuum_levels=levels, **unit)
    new.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["memory_rule"], saved["memory_values"]
    file.write_text(json.dumps(saved))
    old = HopeConfig.from_pretrained(tmp_path)
    assert old.make_memory_rule().momentum == "sum"
    # The digest of caches that its conversations left; those of the average are others.
    assert old.fingerprint() == "a91db05a7ad44effc929572c786b34ed4a3d241abb2ca322b4bfc26589b04152"
    assert new.fingerprint() != old.fingerprint()
    # An override in code is of today.
    del saved["memory_momentum"]
    file.write_text(json.dumps(saved))
    again = HopeConfig.from_pretrained(tmp_path, memory_momentum=True)
    assert again.fingerprint() == new.fingerprint()
    assert again.to_dict()["memory_rule"] == {"error_at": "snapshot", "momentum": "average"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "anchor"),
        ({"memory_hidden_size": 8}, "snapshot"),
        ({"memory_rule": {"erase": "none"}}, "snapshot"),
        ({"memory_rule": {"anchored": False, "error_bound": None}}, "snapshot"),
        ({"memory_rule": {"erase": "none", "error_at": "anchor"}}, "anchor"),
    ],
)
def test_a_saved_config_says_where_errors_are_taken(tmp_path, options, expected):
    """What is not said in a file is of a version that knew the snapshot alone."""
    config = HopeConfig(**SMALL, **options)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["memory_rule"]["error_at"] == expected
    loaded = HopeConfig.from_pretrained(tmp_path)
    assert loaded.fingerprint() == config.fingerprint()
    assert loaded.to_dict() == config.to_dict()
    assert loaded.make_memory_rule().error_bound == config.make_memory_rule().error_bound
    values = "unit" if config.memory_hidden_size else "scaled"
    assert saved["memory_values"] == config.memory_values == values
    del saved["memory_rule"]["error_at"], saved["memory_values"]
    file.write_text(json.dumps(saved))
    old = HopeConfig.from_pretrained(tmp_path)
    assert (old.make_memory_rule().error_at, old.memory_values) == ("snapshot", "unit")
    assert (old.fingerprint() == config.fingerprint()) is (expected == "snapshot" and values == "unit")


def test_two_layers_have_unit_values_and_no_errors_at_the_anchor():
    with pytest.raises(ValueError, match="memory_values: memories of two layers have 'unit' values"):
        HopeConfig(**SMALL, memory_hidden_size=8, memory_values="scaled")
    with pytest.raises(ValueError, match="memory_values: expected one of"):
        HopeConfig(**SMALL, memory_values="long")
    with pytest.raises(ValueError, match=r"memory_rule: .* two layers .* leave error_at out"):
        HopeConfig(**SMALL, memory_hidden_size=8, memory_rule={"error_at": "anchor"})


OLD_NAMES = ["memory_implementation", "continuum_implementation", "attention_implementation"]


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_of_fields_say_the_new(make_config, tmp_path, name):
    new, config = name.replace("implementation", "impl"), make_config()
    said = f"{name}: is called {new} since version 0.2"
    with pytest.raises(TypeError, match=said):
        make_config(**{name: "auto"})
    with pytest.raises(AttributeError, match=said):
        setattr(config, name, "eager")
    config.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=said):
        HopeConfig.from_pretrained(tmp_path, **{name: "eager"})


# As version 0.1 wrote it, but for the fields that every model of transformers has.
OF_VERSION_0_1 = {
    **SMALL,
    "attention_implementation": "auto",
    "attention_output_gate": True,
    "continuum_detach_updates": False,
    "continuum_implementation": "auto",
    "continuum_levels": [{"chunk_size": 64, "hidden_size": 16}, {"hidden_size": 32}],
    "continuum_variant": "sequential",
    "convolution_window": 4,
    "initializer_range": 0.15811388300841897,
    "memory_chunk_size": 16,
    "memory_generator_chunk_size": None,
    "memory_hidden_size": None,
    "memory_implementation": "auto",
    "memory_initializer_range": 0.02,
    "memory_momentum": False,
    "memory_rate_bias": 0.0,
    "memory_rate_max": 1.0,
    "memory_read": "running",
    "memory_retention_bias": 4.0,
    "memory_rule": {},
    "memory_truncate_every": None,
    "mixer_types": ["self_modifying_titans", "full_attention"],
    "model_type": "hope",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "use_short_convolution": True,
}


@pytest.mark.parametrize("choices", [("auto", "auto", "auto"), ("eager", "reference", "sdpa")])
def test_a_model_of_version_0_1_still_loads(tmp_path, tokens, choices):
    level = {"hidden_size": 16, "chunk_size": 64, **OLDER_LEVEL}
    kinds = ["self_modifying_titans", "full_attention"]
    model = HopeForCausalLM(
        HopeConfig(
            **SMALL,
            layer_types=kinds,
            continuum_levels=[level, {"hidden_size": 32}],
            memory_rule={"error_at": "snapshot"},
            memory_values="unit",
        )
    )
    model.eval().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OF_VERSION_0_1 | dict(zip(OLD_NAMES, choices))))
    loaded = HopeForCausalLM.from_pretrained(tmp_path).eval()
    memory, continuum, attention = (None if choice == "auto" else choice for choice in choices)
    first, second = loaded.model.layers
    assert (first.mixer.impl, first.continuum.impl, second.mixer.impl) == (memory, continuum, attention)
    torch.testing.assert_close(loaded(tokens(1, 70)).logits, model(tokens(1, 70)).logits)
    assert loaded.config.fingerprint() == model.config.fingerprint()
    assert not set(OLD_NAMES) & set(loaded.config.to_dict())


def test_a_transformer_is_a_config(make_config, tokens):
    """Attention, no convolution, no output gate, one level that never steps: no fast weights are left."""
    config = make_config(
        "full_attention",
        use_short_convolution=False,
        attention_output_gate=False,
        continuum_levels=[{"hidden_size": 64, "gated": True}],
    )
    model = HopeForCausalLM(config).eval()
    d, layers, vocabulary = 16, 2, config.vocab_size
    expected = vocabulary * d + d + layers * (4 * d * d + d + 3 * 64 * d + d)
    assert model.num_parameters() == expected
    ids = tokens(1, 6)
    cache = HopeCache(config)
    model(ids, cache=cache)
    for layer in cache.layers:
        assert layer.state.convolution is None
        assert layer.state.continuum == (None,)
        assert layer.state.mixer.keys.shape == (1, 2, 6, 8)


def test_arguments_that_contradict_each_other(make_model, tokens):
    model, ids = make_model("titans"), tokens(2, 6)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 6\)"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="expected a batch of one, got 2"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="batch of one"):
        model(ids, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="neither a padding mask nor a cache"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 6]), use_cache=True)
    with pytest.raises(ValueError, match="strictly increasing"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4, 4, 6]))
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)


def test_outputs_follow_the_library(make_model, tokens):
    model, ids = make_model("titans"), tokens(2, 6)
    output = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 6, 16)] * 3
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, output.logits[:, [1, 4]])
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


def test_whole_numbers_are_numbers(make_config):
    assert make_config(memory_rate_max=1, rope_theta=500, memory_retention_bias=3).memory_rate_max == 1


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (4,)])
def test_input_without_tokens_is_refused(make_config, shape):
    model = HopeForCausalLM(make_config())
    with pytest.raises(ValueError, match="input_ids: expected sequences of at least one token"):
        model(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="inputs_embeds: expected sequences of at least one token"):
        model(inputs_embeds=torch.zeros(*shape, 16))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_the_meta_device(kind, impl):
    """Shapes alone, forward and backward: no autocast is asked about a device that has none."""
    options = {"memory_impl": impl, "continuum_impl": impl}
    with torch.device("meta"):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = HopeForCausalLM(HopeConfig(vocab_size=31, layer_types=kind, **sizes, **options))
        ids = torch.ones(2, 20, dtype=torch.long)
        output = model(ids, labels=ids)
        output.loss.backward()
    assert output.logits.device.type == "meta"
    assert output.logits.shape == (2, 20, 31)
    assert all(p.grad.shape == p.shape for p in model.parameters())
