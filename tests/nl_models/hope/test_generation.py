"""``generate`` with the recurrent state does what the definition of each decoding method says."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.data.tokenizer import ByteTokenizer
from nl_models.hope.configuration_hope import LAYER_TYPES


@pytest.fixture(params=LAYER_TYPES)
def kind(request):
    return request.param


def greedy(model, ids, steps, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=steps, **options)


def test_greedy_is_the_argmax_of_full_forwards(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(2, 9)
    expected = ids
    with torch.no_grad():
        for _ in range(7):
            logits = model(expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, ids, 7), expected)
    assert torch.equal(greedy(model, ids, 7, use_cache=False), expected)
    assert torch.equal(greedy(model, ids, 7, prefill_chunk_size=4), expected)


def test_left_padding_does_not_change_the_continuation(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(2, 8)
    ids[1, :5] = model.config.pad_token_id
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    together = greedy(model, ids, 6, attention_mask=mask)
    assert torch.equal(together[:1], greedy(model, ids[:1], 6))
    assert torch.equal(together[1:, 8:], greedy(model, ids[1:, 5:], 6)[:, 3:])


def test_sampling_follows_the_seed(make_model, tokens):
    model, ids = make_model("self_modifying_titans"), tokens(1, 5)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(model.generate(ids, do_sample=True, max_new_tokens=8, use_cache=use_cache))
    assert torch.equal(*samples)


def test_beam_search_with_the_state_equals_beam_search_without(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(2, 6)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_reordering_the_state_is_reordering_the_sequences(make_model, tokens, kind):
    model, ids, following = make_model(kind), tokens(3, 7), tokens(4, 3, seed=1)
    order = torch.tensor([2, 0, 0, 1])
    cache = HopeCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.reorder_cache(order)
        logits = model(following, cache=cache).logits
        expected = model(torch.cat([ids[order], following], 1)).logits[:, 7:]
    assert cache.batch_size == 4
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_selecting_and_repeating_sequences(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(3, 7)
    cache = HopeCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        logits = model(ids[[0, 0, 2, 2], :2], cache=cache).logits
        expected = model(torch.cat([ids, ids[:, :2]], 1)).logits[[0, 0, 2, 2], 7:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_a_conversation_goes_on_from_a_returned_cache(make_model, tokens, kind):
    model, ids, turn = make_model(kind), tokens(1, 6), tokens(1, 4, seed=1)
    first = greedy(model, ids, 5, return_dict_in_generate=True)
    history = torch.cat([first.sequences, turn], 1)
    assert torch.equal(greedy(model, history, 5, cache=first.cache), greedy(model, history, 5))


def test_embeddings_may_start_a_generation(make_model, tokens):
    model, ids = make_model("self_modifying_titans"), tokens(2, 6)
    from_embeddings = greedy(model, None, 5, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(from_embeddings, greedy(model, ids, 5)[:, 6:])


def test_foreign_caches_are_refused(make_model, make_config, tokens):
    model, ids = make_model("gated_delta_net"), tokens(1, 4)
    with pytest.raises(ValueError, match="expected a HopeCache, got DynamicCache"):
        model(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="another config"):
        model(ids, cache=HopeCache(make_config("full_attention")))
    with pytest.raises(ValueError, match="cache_implementation"):
        greedy(model, ids, 2, cache_implementation="static")
    cache = model(tokens(3, 4), use_cache=True).cache
    with pytest.raises(ValueError, match="holds 3 sequences"):
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[3] / "docs/model.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/model.md", "exec"), {})
    assert "torch.Size([2, 80]) 79" in capsys.readouterr().out


def unmasked(model, ids, steps):
    """transformers takes a padding id among the tokens for padding where it is told nothing."""
    return greedy(model, ids, steps, attention_mask=torch.ones_like(ids))


def test_a_conversation_goes_on_with_new_tokens_alone(make_model, tokens, kind, tmp_path):
    model, cache = make_model(kind), None
    history = torch.empty(2, 0, dtype=torch.int64)
    for turn, length in enumerate((6, 4, 3)):
        new = tokens(2, length, seed=turn)
        history = torch.cat([history, new], 1)
        out = greedy(model, new, 5, cache=cache, return_dict_in_generate=True)
        expected = unmasked(model, history, 5)
        assert torch.equal(out.sequences, expected[:, history.shape[1] - length :])
        history = expected
        out.cache.save(tmp_path / f"{turn}.safetensors")
        cache = HopeCache.load(tmp_path / f"{turn}.safetensors", model.config)


def test_new_tokens_with_padding_on_the_left_after_padding(make_model, tokens, kind):
    model, first, second = make_model(kind), tokens(2, 6), tokens(2, 5, seed=1)
    masks = [torch.ones_like(first), torch.ones_like(second)]
    for ids, mask, row, padding in ((first, masks[0], 1, 2), (second, masks[1], 0, 3)):
        ids[row, :padding], mask[row, :padding] = model.config.pad_token_id, 0
    cache = HopeCache(model.config)
    start = greedy(model, first, 4, attention_mask=masks[0], cache=cache)
    together = greedy(model, second, 4, attention_mask=masks[1], cache=cache)
    for row in range(2):
        read = start[row, first.shape[1] - masks[0][row].sum() :]
        alone = torch.cat([read, second[row, masks[1][row].bool()]])[None]
        assert torch.equal(together[row, 5:], unmasked(model, alone, 4)[0, alone.shape[1] :])


def test_rows_that_ended_early_go_on_where_they_ended(make_model, tokens):
    model, ids, turn = make_model("self_modifying_titans"), tokens(2, 6), tokens(2, 3, seed=1)
    plain = greedy(model, ids, 6)
    end = int(plain[0, 7])  # the first row ends after two tokens, the second if it says the same
    cache = HopeCache(model.config)
    ended = greedy(model, ids, 6, eos_token_id=end, cache=cache)
    together = greedy(model, turn, 4, cache=cache)
    for row in range(2):
        said = ended[row]
        if end in said[6:].tolist():
            said = said[: 6 + said[6:].tolist().index(end) + 1]
        alone = torch.cat([said, turn[row]])[None]
        assert torch.equal(together[row, 3:], unmasked(model, alone, 4)[0, alone.shape[1] :])


def test_more_new_tokens_than_were_read(make_model, tokens):
    model, ids, turn = make_model("titans"), tokens(1, 3), tokens(1, 20, seed=1)
    first = greedy(model, ids, 2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="do not begin with the 4 that the cache has read"):
        greedy(model, turn, 3, cache=first.cache)
    history = torch.cat([first.sequences, turn], 1)
    new = greedy(model, turn, 3, cache=first.cache, new_tokens_only=True)
    assert torch.equal(new[:, 20:], unmasked(model, history, 3)[:, 25:])


def test_new_tokens_after_a_forward_pass(make_model, tokens):
    """Nothing that was written is left to read then."""
    model, ids, turn = make_model("gated_delta_net"), tokens(1, 7), tokens(1, 3, seed=1)
    cache = HopeCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    history = torch.cat([ids, turn], 1)
    assert torch.equal(greedy(model, turn, 4, cache=cache), unmasked(model, history, 4)[:, 7:])


def test_what_is_unread_follows_its_row(make_model, tokens):
    model, ids, turn = make_model("titans"), tokens(3, 6), tokens(2, 3, seed=1)
    cache = HopeCache(model.config)
    first = greedy(model, ids, 4, cache=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    history = torch.cat([first[[2, 0]], turn], 1)
    assert torch.equal(greedy(model, turn, 4, cache=cache), unmasked(model, history, 4)[:, 10:])


def test_a_chat_template_goes_on_from_the_cache():
    """The whole conversation is rendered anew each turn; of it only what is new is read."""
    tokenizer = ByteTokenizer().for_transformers()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = HopeForCausalLM(HopeConfig(vocab_size=257, **sizes)).double().eval()
    letters = {"prefix_allowed_tokens_fn": lambda row, ids: range(ord("a"), ord("z") + 1)}
    cache, messages, seen = HopeCache(model.config), [], 0
    for said in ("hello", "and who are you?", "so"):
        messages.append({"role": "user", "content": said})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        found = greedy(model, ids, 12, cache=cache, **letters)
        assert torch.equal(found, greedy(model, ids, 12, use_cache=False, **letters))
        assert cache.get_seq_length() == ids.shape[1] + 11 > seen
        seen = cache.get_seq_length()
        messages.append({"role": "assistant", "content": tokenizer.decode(found[0, ids.shape[1] :])})
    ids = found.clone()
    ids[0, 3] += 1  # other words than those that the cache has read
    with pytest.raises(ValueError, match="pass new_tokens_only=True"):
        greedy(model, ids, 2, cache=cache)
