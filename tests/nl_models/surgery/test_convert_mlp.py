"""A converted model is its source until something is learned, and then has weights for each sequence."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import nl_models
from nl_models.surgery import ContinuumCache, FastWeights, convert_mlp_to_continuum
from nl_models.surgery.families import FAMILIES
from tests.nl_models.surgery.models import (
    CONFIGS,
    LEVELS,
    make_model,
    random_fast_weights,
    with_weights_of,
)

SAMPLING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logit_changes_by_a_bit(family, dtype, tokens):
    model = make_model(family, dtype)
    converted = convert_mlp_to_continuum(model, LEVELS)
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(converted(tokens).logits, expected)
        untouched = converted.initial_fast_weights(len(tokens))
        assert torch.equal(converted(tokens, fast_weights=untouched).logits, expected)


def test_each_sequence_is_served_by_weights_of_its_own(family, tokens):
    converted = convert_mlp_to_continuum(make_model(family, torch.float64), LEVELS)
    fast = random_fast_weights(converted, len(tokens))
    logits = converted(tokens, fast_weights=fast).logits
    for row in range(len(tokens)):
        merged = with_weights_of(converted, fast, row)
        torch.testing.assert_close(logits[row], merged(tokens[row : row + 1]).logits[0], atol=1e-10, rtol=0)
    assert (logits - converted(tokens).logits).abs().max() > 1e-2


def test_parameters_are_shared_and_fast_weights_are_none(family):
    model = make_model(family)
    converted = convert_mlp_to_continuum(model, LEVELS)
    ours, theirs = dict(converted.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert dict(converted.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert not any(t.is_meta for t in (*converted.parameters(), *converted.buffers()))
    assert type(model) in FAMILIES
    assert type(model.base_model) is type(make_model(family).base_model)


def test_only_the_chosen_layers_are_converted(tokens):
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS, layers=[1])
    fast = random_fast_weights(converted, len(tokens))
    assert fast.layers[0] is None
    merged = with_weights_of(converted, fast, 2)
    logits = converted(tokens, fast_weights=fast).logits
    torch.testing.assert_close(logits[2], merged(tokens[2:]).logits[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", SAMPLING)
def test_generation_without_fast_weights_is_that_of_the_source(family, mode, tokens):
    model = make_model(family)
    converted = convert_mlp_to_continuum(model, LEVELS)
    results = []
    for candidate in (model, converted):
        torch.manual_seed(5)
        results.append(candidate.generate(tokens, max_new_tokens=8, **SAMPLING[mode]))
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_generation_reads_each_sequence_with_its_fast_weights(family, mode, tokens):
    converted = convert_mlp_to_continuum(make_model(family, torch.float64), LEVELS)
    fast = random_fast_weights(converted, len(tokens))
    cache = ContinuumCache(converted.config, fast)
    together = converted.generate(tokens, cache=cache, max_new_tokens=8, **SAMPLING[mode])
    for row in range(len(tokens)):
        merged = with_weights_of(converted, fast, row)
        alone = merged.generate(tokens[row : row + 1], max_new_tokens=8, **SAMPLING[mode])
        assert torch.equal(together[row : row + 1], alone)


def test_a_cut_sequence_equals_the_uncut_one(family, tokens):
    converted = convert_mlp_to_continuum(make_model(family, torch.float64), LEVELS)
    fast = random_fast_weights(converted, len(tokens))
    whole = converted(tokens, fast_weights=fast).logits
    for cut in (1, 5, 10):
        first = converted(tokens[:, :cut], fast_weights=fast, use_cache=True)
        assert isinstance(first.cache, ContinuumCache)
        # The cache carries the fast weights on.
        second = converted(tokens[:, cut:], cache=first.cache)
        pieces = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(pieces, whole, atol=1e-10, rtol=0)


def test_left_padding_changes_nothing(family, tokens):
    converted = convert_mlp_to_continuum(make_model(family, torch.float64), LEVELS)
    fast = random_fast_weights(converted, len(tokens))
    padded = torch.cat([torch.zeros(len(tokens), 4, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long().expand_as(padded)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = converted(padded, attention_mask=mask, position_ids=positions, fast_weights=fast).logits[:, 4:]
    torch.testing.assert_close(logits, converted(tokens, fast_weights=fast).logits, atol=1e-10, rtol=0)
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = converted.generate(tokens, cache=ContinuumCache(converted.config, fast), **options)
    cache = ContinuumCache(converted.config, fast)
    shifted = converted.generate(padded, attention_mask=mask, cache=cache, **options)
    assert torch.equal(shifted[:, 4:], plain)


def test_one_memory_serves_a_whole_batch(tokens):
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    fast = random_fast_weights(converted, 1)
    logits = converted(tokens, fast_weights=fast).logits
    repeated = fast.select(torch.zeros(len(tokens), dtype=torch.int64))
    torch.testing.assert_close(logits, converted(tokens, fast_weights=repeated).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_are_reordered_take_their_fast_weights_along(shared, tokens):
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    fast = random_fast_weights(converted, 2 if shared else 4)
    ids = tokens[[0, 1, 2, 0]]
    order = torch.tensor([1, 1, 3, 2] if shared else [3, 0, 0, 2])
    cache = converted(ids[:, :6], fast_weights=fast, use_cache=True).cache
    cache.reorder_cache(order)
    after = converted(ids[order, 6:], cache=cache).logits
    whole = converted(ids, fast_weights=fast).logits
    torch.testing.assert_close(after, whole[order, 6:], atol=1e-10, rtol=0)
    if shared:
        cache = converted(ids, fast_weights=fast, use_cache=True).cache
        with pytest.raises(ValueError, match="change places among themselves"):
            cache.reorder_cache(torch.tensor([0, 2, 1, 3]))


def test_it_loads_as_what_it_is(family, tokens, tmp_path):
    nl_models.register()
    converted = convert_mlp_to_continuum(make_model(family), LEVELS, layers=[0])
    converted.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        type(converted).from_pretrained(tmp_path),
    ):
        assert type(loaded) is type(converted)
        assert loaded.config.continuum_levels == converted.config.continuum_levels
        assert loaded.config.continuum_layers == [0]
        fast = random_fast_weights(converted, len(tokens))
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, converted(tokens).logits)
            assert torch.equal(
                loaded(tokens, fast_weights=fast).logits, converted(tokens, fast_weights=fast).logits
            )
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is type(converted.base_model)
    assert torch.equal(
        backbone(tokens).last_hidden_state, converted(tokens, output_hidden_states=True).hidden_states[-1]
    )


def test_embeddings_stay_tied():
    model = make_model("gpt2")
    converted = convert_mlp_to_continuum(model, LEVELS)
    assert converted.lm_head.weight is converted.transformer.wte.weight
    fresh = type(converted)(converted.config)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its only name in 5.6
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_checkpointing_gives_the_same_gradients(family, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(family, torch.float64).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        converted = convert_mlp_to_continuum(model, LEVELS)
        assert converted.base_model.gradient_checkpointing is checkpointing
        fast = random_fast_weights(converted, len(tokens)).map(torch.Tensor.requires_grad_)
        converted(tokens, labels=tokens, fast_weights=fast).loss.backward()
        found = [p.grad for p in converted.parameters()]
        found += [t.grad for layer in fast.layers for t in layer if t is not None]
        assert all(g is not None and g.abs().sum() > 0 for g in found)
        gradients.append(found)
    for plain, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, replayed, atol=1e-12, rtol=0)


def test_checkpointing_with_a_cache_is_refused(family, tokens):
    converted = convert_mlp_to_continuum(make_model(family), LEVELS).train()
    fast = random_fast_weights(converted, len(tokens))
    first = converted(tokens, fast_weights=fast)  # without checkpointing
    converted.gradient_checkpointing_enable()
    for cache in (first.past_key_values, ContinuumCache(converted.config, fast)):
        with pytest.raises(ValueError, match=r"cache: .* leave it out in training with activation check"):
            converted(tokens, cache=cache)
    converted(tokens, fast_weights=fast).logits.sum().backward()
    converted.eval()
    assert converted(tokens, cache=first.past_key_values).logits.isfinite().all()


def test_a_converted_model_can_be_trained_and_copied(family, tokens):
    converted = convert_mlp_to_continuum(make_model(family), LEVELS)
    twin = copy.deepcopy(converted)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    before = converted(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    assert converted(tokens, labels=tokens).loss < before
    assert torch.equal(twin(tokens, labels=tokens).loss, before)


def test_adapters_stay_in_force(tokens):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    fast = random_fast_weights(converted, len(tokens))
    without = converted(tokens, fast_weights=fast).logits
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(converted, peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(adapted(tokens, fast_weights=fast).logits, without, atol=1e-12, rtol=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted(tokens, labels=tokens, fast_weights=fast).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_" in name)
    logits = adapted(tokens, fast_weights=fast).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens, fast_weights=fast).logits, logits, atol=1e-10, rtol=0)
    assert (logits - without).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("levels", "layers", "message"),
    [
        ([], None, "levels: expected at least one with a chunk_size"),
        ([{"fraction": 0.5}], None, "levels: expected at least one with a chunk_size"),
        ([{"fraction": 0.5, "chunk_size": 8}, {"fraction": 0.5, "chunk_size": 12}], None, "multiple of 8"),
        ([{"fraction": 0.6, "chunk_size": 8}, {"fraction": 0.5}], None, "sum to at most 1"),
        ([{"fraction": 0.0, "chunk_size": 8}], None, "fraction: expected more than 0"),
        ([{"fraction": 0.01, "chunk_size": 8}], None, "of 24 hidden units is none"),
        ([{"fraction": 0.5, "chunk_size": 8}], [2], "^layers: expected distinct indices below 2"),
        ([{"fraction": 0.5, "chunk_size": 8}], [], "^layers: expected distinct indices"),
    ],
)
def test_levels_that_do_not_fit_are_refused(levels, layers, message):
    with pytest.raises(ValueError, match=message):
        convert_mlp_to_continuum(make_model("llama"), levels, layers=layers)


def test_arguments_of_other_types_are_refused(tokens):
    model = make_model("llama")
    converted = convert_mlp_to_continuum(model, LEVELS)
    with pytest.raises(TypeError, match="model: expected one whose MLPs are not converted yet"):
        convert_mlp_to_continuum(converted, LEVELS)
    with pytest.raises(TypeError, match="model: expected one of LlamaForCausalLM"):
        convert_mlp_to_continuum(model.model, LEVELS)
    with pytest.raises(TypeError, match=r"model: expected one of LlamaForCausalLM.*, got str"):
        convert_mlp_to_continuum("gpt2", LEVELS)
    with pytest.raises(TypeError, match="levels: expected a sequence"):
        convert_mlp_to_continuum(model, "fast")
    with pytest.raises(TypeError, match=r"levels\[0\]: expected \['fraction', 'chunk_size'\], got"):
        convert_mlp_to_continuum(model, [{"share": 0.5}])
    with pytest.raises(TypeError, match="fast_weights: expected FastWeights"):
        converted(tokens, fast_weights={})
    with pytest.raises(ValueError, match="fast_weights: those of 2 sequences cannot serve a batch of 3"):
        converted(tokens, fast_weights=converted.initial_fast_weights(2))
    with pytest.raises(ValueError, match="fast_weights: expected those of 2 layers"):
        converted(tokens, fast_weights=FastWeights(converted.initial_fast_weights(3).layers[:1]))


def test_an_ordinary_cache_is_the_source_models(tokens):
    model = make_model("llama")
    converted = convert_mlp_to_continuum(model, LEVELS)
    assert type(converted(tokens, use_cache=True).cache) is DynamicCache
    assert set(CONFIGS) == {cls.config_class.model_type for cls in FAMILIES}
