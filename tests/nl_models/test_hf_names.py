"""The cache goes by each of the library's names, in and out, and by no name is it ignored."""

import pickle

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.hf_names import CACHE_NAME, CACHE_NAMES, name_cache
from nl_models.surgery import ContinuumCache, convert_attention, convert_mlp_to_continuum

LEVELS = [{"fraction": 0.5, "chunk_size": 4}]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MODES = {"greedy": {}, "beams": {"num_beams": 2}}


def hope():
    return HopeForCausalLM(
        HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


MODELS = {
    "hope": hope,
    "levels": lambda: convert_mlp_to_continuum(llama(), LEVELS),
    "levels-gpt2": lambda: convert_mlp_to_continuum(gpt2(), LEVELS),
    "memories": lambda: convert_attention(llama(), [0], kind="delta_memory"),
    "memories-gpt2": lambda: convert_attention(gpt2(), [1], kind="delta_memory"),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def make_cache(model):
    return HopeCache(model.config) if isinstance(model, HopeForCausalLM) else ContinuumCache(model.config)


def tokens(rows, length):
    return torch.randint(1, 31, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_piece_goes_on_from_a_cache_of_either_name(model, name):
    ids = tokens(2, 9)
    whole = model(ids, use_cache=False).logits
    for part in (model, model.base_model):
        cache = make_cache(model)
        first = part(ids[:, :5], **{name: cache})
        assert first.cache is cache
        assert first.past_key_values is cache
        last = part(ids[:, 5:], **{name: first.cache})[0]
        expected = whole[:, 5:] if part is model else model.base_model(ids, use_cache=False)[0][:, 5:]
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generation_takes_and_returns_either_name(model, name, mode):
    ids, options = tokens(1, 6), {**GREEDY, **MODES[mode], "return_dict_in_generate": True}
    cache = make_cache(model)
    output = model.generate(ids, **{name: cache}, **options)
    assert output.cache is output.past_key_values is cache
    assert torch.equal(output.sequences, model.generate(ids, use_cache=False, **options).sequences)
    longer = torch.cat([output.sequences, tokens(1, 3)], 1)
    if mode == "greedy":
        options = {**GREEDY, "attention_mask": torch.ones_like(longer)}
        again = model.generate(longer, **{name: output.cache}, **options)
        assert torch.equal(again, model.generate(longer, **options))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_inputs_of_a_step_are_prepared_with_either_name(model, name):
    ids, cache = tokens(1, 6), make_cache(model)
    model(ids[:, :5], cache=cache)
    inputs = model.prepare_inputs_for_generation(ids, 1, **{name: cache}, use_cache=True)
    assert inputs[CACHE_NAME] is cache
    step = model(**inputs).logits[:, -1]
    torch.testing.assert_close(step, model(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_fast_weights_of_a_cache_are_used_by_either_name(name):
    torch.manual_seed(0)
    model, ids = MODELS["levels"]().eval(), tokens(1, 9)
    fast = model.initial_fast_weights().map(lambda t: 0.5 * torch.randn_like(t))
    expected = model(ids, fast_weights=fast, use_cache=False).logits
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2)
    torch.testing.assert_close(model(ids, **{name: ContinuumCache(model.config, fast)}).logits, expected)


def test_assisted_generation_is_the_models_own():
    torch.manual_seed(0)
    model, assistant, ids = MODELS["levels"]().eval(), llama().eval(), tokens(1, 6)
    options = {**GREEDY, "max_new_tokens": 8}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
    given = model.generate(ids, assistant_model=assistant, past_key_values=DynamicCache(), **options)
    assert torch.equal(given, expected)


def test_a_name_of_no_meaning_is_refused(model):
    ids, cache = tokens(1, 4), make_cache(model)
    with pytest.raises(TypeError, match="kv_cache"):
        model(ids, kv_cache=cache)
    with pytest.raises(TypeError, match="attention_musk"):
        model(ids, attention_musk=torch.ones_like(ids))
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids, cache=cache, past_key_values=make_cache(model))
    assert cache.get_seq_length() == 0


def test_a_memory_refuses_a_cache_that_it_would_not_see():
    model = MODELS["memories"]()
    with pytest.raises(TypeError, match="kv_cache"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 16), kv_cache=ContinuumCache(model.config))


def test_no_cache_is_no_second_name():
    assert name_cache({"cache": None, "past_key_values": 3, "x": 4}, "cache") == {"cache": 3, "x": 4}
    assert name_cache({"past_key_values": None, "x": 4}, "cache") == {"x": 4}


def test_outputs_can_be_sent_to_another_process(model):
    output = model(tokens(1, 4), use_cache=False)
    assert torch.equal(pickle.loads(pickle.dumps(output)).logits, output.logits)
    assert output.cache is output.past_key_values is None
