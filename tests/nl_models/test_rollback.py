"""Tokens are taken back: what follows is as if they had never been read; so drafts can be tried."""

import copy

import pytest
import torch

from nl_models import HopeCache
from nl_models.surgery import ContinuumCache, convert_mlp_to_continuum
from tests.nl_models.surgery.models import make_model
from tests.nl_models.test_generation import MODELS, PAD, STATEFUL, llama, make, make_cache, tokens
from tests.nl_models.test_prefixes import Counted

TIGHT = {"rtol": 0, "atol": 1e-9}
OPTIONS = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_taken_back_inside_and_across_chunks(name):
    model, ids, further = make(name), tokens(2, 20), tokens(2, 5, seed=6)
    before = make_cache(model)
    with torch.no_grad():
        model(ids[:, :6], cache=before)
        before.activate_past_recording()
        for piece in ids[:, 6:].split([5, 1, 1, 7], dim=1):
            model(piece, cache=before)
        for remove in (1, 8, 14):
            cache = before.copy()
            cache.crop(-remove)
            assert cache.get_seq_length() == 20 - remove
            found = model(further[:, :3], cache=cache).logits
            cache.crop(-2)  # again, and twice
            cache.crop(-1)
            found = torch.cat([found, model(further[:, 3:], cache=cache).logits], 1)
            kept = ids[:, : 20 - remove]
            whole = model(torch.cat([kept, further[:, :3]], 1), use_cache=False).logits[:, -3:]
            torch.testing.assert_close(found[:, :3], whole, **TIGHT)
            whole = model(torch.cat([kept, further[:, 3:]], 1), use_cache=False).logits[:, -2:]
            torch.testing.assert_close(found[:, 3:], whole, **TIGHT)


def test_padding_and_positions_are_read_again_as_they_were():
    for name in ("full_attention", "hybrid-gpt2"):
        model, ids, further = make(name), tokens(2, 9), tokens(2, 3, seed=6)
        mask = torch.ones_like(ids)
        mask[0, 4:6] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = make_cache(model)
        with torch.no_grad():
            model(ids[:, :3], cache=cache)
            cache.activate_past_recording()
            for start, stop in ((3, 7), (7, 9)):
                options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
                model(ids[:, start:stop], cache=cache, **options)
            cache.crop(-1)
            options = {"position_ids": positions[:, 7:8] + torch.arange(1, 4)}
            found = model(further, cache=cache, **options).logits
            for row in range(2):
                real = mask[row, :8].bool()
                alone = torch.cat([ids[row, :8][real], further[row]])[None]
                torch.testing.assert_close(found[row], model(alone).logits[0, -3:], **TIGHT)


def test_what_was_not_recorded_cannot_be_taken_back(tmp_path):
    model, ids = make("titans"), tokens(2, 9)
    cache = HopeCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="cannot forget its last 1 tokens, of which 0 were recorded"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(ids[:, :2], cache=cache)
        with pytest.raises(ValueError, match="its last 3 tokens, of which 2 were recorded"):
            cache.crop(-3)
        cache.crop(-1)
        for refused in (
            lambda: cache.save(tmp_path / "c.safetensors"),
            lambda: cache.select([0]),
            lambda: HopeCache.join([cache, cache]),
            lambda: cache.to("cpu"),
            cache.activate_past_recording,
        ):
            with pytest.raises(ValueError, match="cache: 1 tokens wait to be read again"):
                refused()
        cache.read_pending(model.base_model)
        cache.save(tmp_path / "c.safetensors")
        one = cache.select([0])  # which records nothing any more
        with pytest.raises(ValueError, match="of which 0 were recorded"):
            one.crop(-1)
        model(ids[:, :2], cache=cache)
        cache.crop(11)  # how many stay, as older versions of transformers say it
        assert cache.get_seq_length() == 11


def assistants(name):
    """One that always agrees with ``name``, one that often does, and one that never does."""
    near, far = make(name), make(name)
    with torch.no_grad():
        for assistant, noise in ((near, 0.02), (far, 2.0)):
            for parameter in assistant.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
    return {"itself": make(name), "near": near, "far": far}


@pytest.mark.parametrize("assistant", ["itself", "near", "far"])
@pytest.mark.parametrize("name", MODELS)
def test_assisted_generation_is_greedy_generation(name, assistant):
    model, ids, helper = make(name), tokens(1, 7), assistants(name)[assistant]
    helper.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    helper.generation_config.assistant_confidence_threshold = 0.0
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, assistant_model=helper, **OPTIONS), expected)


def test_a_plain_transformer_helps_a_hope_and_a_hope_a_transformer():
    model, helper, ids = make("self_modifying_titans"), llama().double().eval(), tokens(1, 7)
    for one, other in ((model, helper), (helper, model)):
        options = {**OPTIONS, "attention_mask": torch.ones_like(ids)}
        expected = one.generate(ids, **options)
        assert torch.equal(one.generate(ids, assistant_model=other, **options), expected)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_lookup_is_greedy_generation(name):
    model, ids = make(name), tokens(1, 9).repeat(1, 3)
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **OPTIONS), expected)


def test_a_draft_that_is_right_saves_calls_and_a_prompt_is_read_once():
    model, helper = make("self_modifying_titans"), make("self_modifying_titans")
    helper.generation_config.assistant_confidence_threshold = 0.0
    ids, counted = tokens(1, 200), [Counted(model), Counted(helper)]
    calls = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = model.generate(ids, use_cache=True, **OPTIONS)
    alone, calls[:] = len(calls), []
    for each in counted:
        each.read = 0
    assert torch.equal(model.generate(ids, assistant_model=helper, **OPTIONS), expected)
    assert len(calls) < alone / 3
    lost = [each.read - 200 for each in counted]
    assert all(count < 200 for count in lost), lost
    far = assistants("self_modifying_titans")["far"]
    counted.append(Counted(far))
    counted[0].read = 0
    model.generate(ids, assistant_model=far, **OPTIONS)
    assert counted[0].read < 400
    assert counted[2].read < 600


@pytest.mark.parametrize("name", STATEFUL)
def test_a_conversation_with_drafts_goes_on(name):
    """With new tokens alone after assisted turns, and with drafts after plain ones."""
    model, helper = make(name), assistants(name)["near"]
    cache, history = make_cache(model), torch.empty(1, 0, dtype=torch.int64)
    ways = [{"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}, {}, {"assistant_model": helper}]
    for turn, way in enumerate(ways):
        new = tokens(1, 6, seed=turn)
        history = torch.cat([history, new], 1)
        options = {**OPTIONS, "max_new_tokens": 9, "suppress_tokens": [PAD]}
        expected = model.generate(history, use_cache=False, **options)
        kept = copy.deepcopy(cache)
        found = model.generate(new, cache=cache, new_tokens_only=turn > 0, **way, **options)
        assert torch.equal(found, expected[:, history.shape[1] - 6 :]), turn
        whole = model.generate(history, cache=kept, new_tokens_only=False, **way, **options)
        assert torch.equal(whole, expected), turn
        history = expected


def test_fast_weights_serve_drafts():
    model = convert_mlp_to_continuum(make_model("llama", torch.float64), [{"fraction": 0.5, "chunk_size": 4}])
    ids = tokens(1, 9).repeat(1, 2)
    fast = model.initial_fast_weights(1).map(lambda t: torch.full_like(t, 0.03))
    expected = model.generate(ids, cache=ContinuumCache(model.config, fast), **OPTIONS)
    options = {**OPTIONS, "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(ids, cache=ContinuumCache(model.config, fast), **options), expected)
