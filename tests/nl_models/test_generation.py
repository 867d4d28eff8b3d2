"""A row that has ended writes nothing to the state, and what the state has read is not masked afterwards."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.hope.configuration_hope import LAYER_TYPES
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.surgery import ContinuumCache, convert_attention, convert_mlp_to_continuum

PAD = 0
VOCABULARY = 61


def hope(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "memory_chunk_size": 4}
    return HopeForCausalLM(HopeConfig(vocab_size=VOCABULARY, layer_types=kind, **sizes))


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1, **sizes))


def gpt_neox():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **sizes))


MODELS = {
    **{kind: lambda kind=kind: hope(kind) for kind in LAYER_TYPES},
    "hybrid-llama": lambda: convert_attention(llama(), [0], chunk_size=4),
    "memories-llama": lambda: convert_attention(llama(), [0, 1], kind="delta_memory"),
    "hybrid-gpt2": lambda: convert_attention(gpt2(), [1], kind="delta_memory"),
    "hybrid-gpt_neox": lambda: convert_attention(gpt_neox(), [1], kind="delta_memory"),
    "levels-llama": lambda: convert_mlp_to_continuum(llama(), [{"fraction": 0.5, "chunk_size": 4}]),
}
STATEFUL = [name for name in MODELS if name != "levels-llama"]


def make(name):
    torch.manual_seed(1)
    return MODELS[name]().double().eval()


def tokens(rows, length, seed=5):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class AfterTokens(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return self.lengths <= input_ids.shape[1]


def continue_by_hand(model, output, mask):
    """Logits of a further turn from the returned cache, and of the whole read at once."""
    s = output.sequences
    full = torch.cat([s, tokens(len(s), 5, seed=9)], 1)
    mask = torch.cat([mask, torch.ones_like(full[:, mask.shape[1] :])], 1)
    seen = output.cache.get_seq_length()
    options = {}
    if not isinstance(model, HopeForCausalLM):
        options = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    expected = model(full, attention_mask=mask, use_cache=False, **options).logits[:, -5:]
    options = {name: p[:, seen:] for name, p in options.items()}
    return model(full[:, seen:], attention_mask=mask, cache=output.cache, **options).logits[:, -5:], expected


@pytest.mark.parametrize("left_padding", [0, 3])
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_have_ended_write_nothing(name, sampling, left_padding):
    model, ids = make(name), tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :left_padding] = 0
    ids[0, :left_padding] = PAD
    options = {"max_new_tokens": 9, "do_sample": sampling, "suppress_tokens": [PAD], "attention_mask": mask}
    torch.manual_seed(2)
    free = model.generate(ids, eos_token_id=None, pad_token_id=PAD, **options)[:, 8:]
    rows = range(3)
    others = {
        i: free[(i + 1) % 3] if (free[i] != free[(i + 1) % 3]).any() else free[(i + 2) % 3] for i in rows
    }
    eos = next(int(t) for i in rows for t in free[i, :8] if t not in others[i])  # not of every row
    torch.manual_seed(2)
    output = model.generate(ids, eos_token_id=eos, pad_token_id=PAD, return_dict_in_generate=True, **options)
    generated = output.sequences[:, 8:] != PAD
    assert not generated.all(), "no row ended early"
    got, expected = continue_by_hand(model, output, torch.cat([mask, generated.long()], 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["self_modifying_titans", "full_attention", "hybrid-llama"])
def test_whatever_stops_a_row(name):
    model, ids = make(name), tokens(2, 6)
    stop = StoppingCriteriaList([AfterTokens([9, 14])])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [PAD, 60]}
    options |= {"stopping_criteria": stop, "return_dict_in_generate": True}
    output = model.generate(ids, eos_token_id=60, **options)  # which never comes
    mask = (output.sequences != PAD).long()
    assert mask.sum(1).tolist() == [9, 14]
    got, expected = continue_by_hand(model, output, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)

    output = model.generate(ids, eos_token_id=None, **options)  # nothing to fill up with: the row goes on
    assert (output.sequences != PAD).all()
    got, expected = continue_by_hand(model, output, torch.ones_like(output.sequences))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["self_modifying_titans", "hybrid-llama"])
def test_beams_that_end_early_are_those_of_generation_without_a_cache(name):
    model, ids = make(name), tokens(2, 6)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 60}
    early = 0
    for last in range(30, 60, 6):
        ends = list(range(last - 8, last))
        got = model.generate(ids, eos_token_id=ends, **options)
        early += int((got[:, 6:] == 60).any())
        assert torch.equal(got, model.generate(ids, eos_token_id=ends, use_cache=False, **options))
    assert early, "no row ended early"


def make_cache(model):
    return HopeCache(model.config) if isinstance(model, HopeForCausalLM) else ContinuumCache(model.config)


def padded(rows, length):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :2] = 0
    return mask


@pytest.mark.parametrize("read_with", ["padding", "no padding", "no mask"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_mask_that_contradicts_the_state_is_refused(name, read_with):
    model, ids, further = make(name), tokens(3, 8), tokens(3, 2, seed=6)
    cache, ones = make_cache(model), torch.ones(3, 10, dtype=torch.long)
    right = {"padding": padded(3, 10), "no padding": ones, "no mask": ones}[read_with]
    model(ids, attention_mask=None if read_with == "no mask" else right[:, :8], cache=cache)
    other_row, other_place = ones.clone(), right.clone()
    other_row[1, :2] = 0
    other_place[0, :4] = torch.tensor([1, 0, 1, 0])
    wrong = [other_row, other_place, ones if read_with == "padding" else padded(3, 10)]
    memory = next(layer for layer in cache.layers if isinstance(layer, StateCacheLayer))
    before = memory.padding
    for mask in wrong:
        with pytest.raises(ValueError, match="attention_mask: the past columns of row"):
            model(further, attention_mask=mask, cache=cache)
    assert cache.get_seq_length() == 8
    assert memory.padding is before
    step = model(further[:, :1], attention_mask=right[:, :9], cache=cache).logits
    last = model(further[:, 1:], attention_mask=right, cache=cache).logits
    whole = model(torch.cat([ids, further], 1), attention_mask=right, use_cache=False).logits
    torch.testing.assert_close(torch.cat([step, last], 1)[1:], whole[1:, -2:], rtol=0, atol=1e-8)


@pytest.mark.parametrize("eos", [None, 60])
@pytest.mark.parametrize("name", STATEFUL)
def test_generation_with_a_mask_that_contradicts_the_state_is_refused(name, eos):
    model, ids, mask = make(name), tokens(1, 8), padded(1, 8)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": PAD, "eos_token_id": eos}
    cache = make_cache(model)
    model(ids, attention_mask=mask, cache=cache)
    further, ones = torch.cat([ids, tokens(1, 2, seed=6)], 1), torch.ones(1, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask: the past columns of row 0"):
        model.generate(further, attention_mask=ones, cache=cache, **options)
    assert cache.get_seq_length() == 8
    model.generate(further, attention_mask=padded(1, 10), cache=cache, **options)


def test_what_was_padding_goes_along_with_the_rows(tmp_path):
    model, ids, further = make("self_modifying_titans"), tokens(3, 8), tokens(3, 2, seed=6)
    cache, mask = HopeCache(model.config), padded(3, 10)
    model(ids, attention_mask=mask[:, :8], cache=cache)
    cache.save(tmp_path / "c.safetensors")
    loaded = HopeCache.load(tmp_path / "c.safetensors", model.config)
    order = torch.tensor([1, 0, 2])
    loaded.reorder_cache(order)
    with pytest.raises(ValueError, match="row 0"):
        model(further, attention_mask=mask, cache=loaded)
    model(further, attention_mask=mask[order], cache=loaded)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="row 1"):
        model(tokens(4, 2), attention_mask=mask[[0, 2, 2, 2]], cache=cache)
    model(tokens(4, 2), attention_mask=mask[[0, 0, 2, 2]], cache=cache)
    loaded.reset()
    model(further, cache=loaded)
    model(further, attention_mask=torch.ones(3, 4), cache=loaded)
