"""A document is read once; every question after it gets what it gets with the whole read anew."""

import os

import pytest
import torch

from nl_models import HopeCache
from nl_models.prefixes import PrefixStore
from nl_models.surgery import ContinuumCache
from tests.nl_models.test_generation import MODELS, make, tokens

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Counted:
    """How many tokens a model reads while it is watched."""

    def __init__(self, model):
        self.read = 0
        model.base_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module, arguments, keywords):
        self.read += (arguments[0] if arguments else keywords["input_ids"]).shape[1]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_only_what_follows_a_document_is_read(name, on_disk, tmp_path):
    model, document = make(name), tokens(1, 23)
    store = PrefixStore(model, 10_000_000, tmp_path / "read" if on_disk else None)
    counted = Counted(model)
    assert store.read(document).get_seq_length() == counted.read == 23
    for question in range(3):
        prompt = torch.cat([document, tokens(1, 3 + question, seed=question)], 1)
        expected = model.generate(prompt, use_cache=False, **OPTIONS)
        counted.read = 0
        assert torch.equal(model.generate(prompt, cache=store.find(prompt), **OPTIONS), expected)
        assert counted.read == expected.shape[1] - 24  # all but the document and the last token
    assert store.find(tokens(1, 30, seed=8)).get_seq_length() == 0
    assert store.find(document).get_seq_length() == 0, "a token is left to be read"
    counted.read = 0
    longer = store.read(torch.cat([document, tokens(1, 4, seed=1)], 1))
    assert longer.get_seq_length() == 27
    assert counted.read == 4
    prompt = torch.cat([document, tokens(1, 4, seed=1), tokens(1, 2, seed=2)], 1)
    assert store.find(prompt[0].tolist()).get_seq_length() == 27, "the longest"
    another_end = torch.cat([document, tokens(1, 7, seed=3)], 1)
    assert store.find(another_end).get_seq_length() == 23


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_least_recently_used_goes(on_disk, tmp_path):
    model, documents = make("titans"), [tokens(1, 9, seed=seed) for seed in range(4)]
    folder = tmp_path if on_disk else None
    all_of_it = PrefixStore(model, 10**9, folder)
    all_of_it.read(documents[0])
    store = PrefixStore(model, int(2.9 * all_of_it.num_bytes()), folder)
    prompts = [torch.cat([document, tokens(1, 1)], 1) for document in documents]
    for document in documents[:2]:
        store.read(document)
    assert store.find(prompts[0]).get_seq_length() == 9  # the other one is the oldest now
    store.read(documents[2])
    assert store.num_bytes() <= store.max_bytes
    assert [store.find(prompt).get_seq_length() for prompt in prompts] == [9, 0, 9, 0]
    store.read(documents[3])
    assert [store.find(prompt).get_seq_length() for prompt in prompts] == [0, 0, 9, 9]
    small = PrefixStore(model, 10)
    assert small.read(documents[0]).get_seq_length() == 9
    assert small.num_bytes() == 0


def test_the_snapshot_of_another_model_is_not_used(tmp_path):
    model, document = make("titans"), tokens(1, 9)
    prompt = torch.cat([document, tokens(1, 2)], 1)
    PrefixStore(model, 10**9, tmp_path).read(document)
    assert PrefixStore(make("titans"), 10**9, tmp_path).find(prompt).get_seq_length() == 9  # another process
    other = make("titans")
    with torch.no_grad():
        other.model.layers[1].norm.weight[-1] += 1e-3
    assert PrefixStore(other, 10**9, tmp_path).find(prompt).get_seq_length() == 0
    name = next(tmp_path.glob("*.safetensors"))
    for victim in (other, make("gated_delta_net")):
        store = PrefixStore(victim, 10**9, tmp_path)
        os.link(name, tmp_path / name.name.replace(name.name[:32], store._name))
    assert (
        PrefixStore(other, 10**9, tmp_path).find(prompt).get_seq_length() == 9
    )  # same config: by its name alone
    with pytest.raises(ValueError, match="another config"):
        store.find(prompt)


def test_snapshots_are_the_callers_own():
    model, document = make("hybrid-llama"), tokens(1, 9)
    store = PrefixStore(model, 10**9)
    store.read(document)
    prompt = torch.cat([document, tokens(1, 2)], 1)
    first = model.generate(prompt, cache=store.find(prompt), **OPTIONS)
    assert torch.equal(model.generate(prompt, cache=store.find(prompt), **OPTIONS), first)


def test_bad_arguments():
    model = make("titans")
    with pytest.raises(TypeError, match="model: expected a Hope or a converted model"):
        PrefixStore(model.model, 10)
    with pytest.raises(ValueError, match="max_bytes: expected an integer of at least 1"):
        PrefixStore(model, 0)
    for ids in (tokens(2, 3), torch.empty(0, dtype=torch.int64), torch.ones(3)):
        with pytest.raises(ValueError, match="ids: expected at least one token"):
            PrefixStore(model, 10).find(ids)
    with pytest.raises(TypeError, match="ids: expected tokens"):
        PrefixStore(model, 10).find("text")


def test_one_token_is_a_document_and_a_prompt():
    store = PrefixStore(make("titans"), 10**9)
    for ids in ([7], tokens(1, 1)):
        assert store.read(ids).get_seq_length() == 1
        assert store.find(ids).get_seq_length() == 0
    assert store.find([7, 8]).get_seq_length() == 1


def test_a_damaged_file_is_read_anew(tmp_path):
    store, document = PrefixStore(make("titans"), 10**9, tmp_path), tokens(1, 9)
    store.read(document)
    path = next(tmp_path.glob("*.safetensors"))
    prompt, whole = torch.cat([document, tokens(1, 2)], 1), path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert store.find(prompt).get_seq_length() == 0
    store.read(document)
    assert store.find(prompt).get_seq_length() == 9


def test_a_file_that_is_too_large_with_its_header_puts_nothing_else_out(tmp_path):
    model = make("titans")
    store = PrefixStore(model, 10**9, tmp_path)
    cache = store.read([1, 2])
    assert cache.num_bytes() < store.num_bytes() - 50
    small = PrefixStore(model, store.num_bytes() - 50, tmp_path)
    small.read([3, 4])
    assert store.find([1, 2, 3]).get_seq_length() == 2


def test_a_cache_of_a_converted_model_is_a_file(tmp_path):
    for name in ("hybrid-gpt2", "levels-llama"):
        model, further = make(name), tokens(2, 3, seed=6)
        caches = [ContinuumCache(model.config) for _ in range(2)]
        with torch.no_grad():
            model(tokens(1, 9), cache=caches[0])
            model(tokens(1, 4), cache=caches[1])
        cache = ContinuumCache.join(caches)
        if name == "levels-llama":
            cache.fast_weights = model.initial_fast_weights(2).map(lambda t: torch.full_like(t, 0.01))
        path = tmp_path / f"{name}.safetensors"
        cache.save(path)
        loaded = ContinuumCache.load(path, model.config)
        assert torch.equal(model(further, cache=loaded).logits, model(further, cache=cache).logits)
        with pytest.raises(ValueError, match="no saved HopeCache"):
            HopeCache.load(path, make("titans").config)
        with pytest.raises(ValueError, match="another config"):
            ContinuumCache.load(path, make("hybrid-llama").config)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match="truncated or no saved ContinuumCache"):
            ContinuumCache.load(path, model.config)
    with pytest.raises(ValueError, match="it has read nothing"):
        ContinuumCache(model.config).save(path)
