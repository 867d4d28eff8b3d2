"""Users join a batch, leave it and start over; each gets what he gets alone."""

import pytest
import torch

from nl_models import HopeCache, HopeForCausalLM
from nl_models.surgery import ContinuumCache, convert_attention, convert_mlp_to_continuum
from tests.nl_models.surgery.models import make_model, random_fast_weights
from tests.nl_models.test_generation import MODELS, make, make_cache, tokens

LEVELS = [{"fraction": 0.5, "chunk_size": 4}]
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
TIGHT = {"rtol": 0, "atol": 1e-9}


def kind_of_cache(model):
    return HopeCache if isinstance(model, HopeForCausalLM) else ContinuumCache


def read(model, ids, **options):
    cache = make_cache(model)
    with torch.no_grad():
        logits = model(ids, cache=cache, **options).logits
    return cache, logits[:, -1].argmax(-1)


def alone(model, prompt, steps):
    """What a user gets who has the model for himself."""
    cache, token = read(model, prompt)
    written = [token]
    for _ in range(steps - 1):
        with torch.no_grad():
            written.append(model(written[-1][:, None], cache=cache).logits[:, -1].argmax(-1))
    return torch.cat(written).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_users_join_and_leave_a_batch(name):
    """Continuous batching: at most three at a time, of unequal prompts, who write unequally much."""
    model = make(name)
    users = [(tokens(1, 3 + 4 * (u % 3), seed=u), 3 + 5 * (u % 2) + u) for u in range(6)]
    waiting, written, batch, cache = list(range(6)), {u: [] for u in range(6)}, [], None
    widest, steps = 0, 0
    while waiting or batch:
        while waiting and len(batch) < 3:
            user = waiting.pop(0)
            own, token = read(model, users[user][0])
            cache = own if cache is None else type(own).join([cache, own])
            batch.append(user)
            written[user].append(int(token))
        ids = torch.tensor([[written[user][-1]] for user in batch])
        with torch.no_grad():
            found = model(ids, cache=cache).logits[:, -1].argmax(-1)
        for user, token in zip(batch, found.tolist()):
            written[user].append(token)
        widest, steps = max(widest, len(batch)), steps + 1
        ready = [row for row, user in enumerate(batch) if len(written[user]) >= users[user][1]]
        if ready:
            cache = cache.remove(ready) if len(ready) < len(batch) else None
            batch = [user for row, user in enumerate(batch) if row not in ready]
    assert widest == 3
    assert steps < sum(count for _, count in users)
    for user, (prompt, count) in enumerate(users):
        assert written[user] == alone(model, prompt, count), f"user {user}"


@pytest.mark.parametrize("name", MODELS)
def test_rows_start_over(name):
    model, ids, further = make(name), tokens(3, 9), tokens(3, 5, seed=6)
    cache, _ = read(model, ids)
    cache.reset([1], model)
    with torch.no_grad():
        logits = model(further[:, :2], cache=cache).logits
        logits = torch.cat([logits, model(further[:, 2:], cache=cache).logits], 1)
        fresh = model(further[1:2], use_cache=False).logits
        whole = model(torch.cat([ids, further], 1), use_cache=False).logits[:, 9:]
    torch.testing.assert_close(logits[1:2], fresh, **TIGHT)
    torch.testing.assert_close(logits[[0, 2]], whole[[0, 2]], **TIGHT)
    with pytest.raises(ValueError, match="model: expected the model of this cache"):
        cache.reset([1])
    cache.reset()
    torch.testing.assert_close(model(further, cache=cache).logits, model(further, use_cache=False).logits)


@pytest.mark.parametrize("name", MODELS)
def test_rows_with_padding_join(name):
    """A batch that was read with padding, and one that was not; all go on with masks of new columns alone."""
    model, ids, further = make(name), tokens(2, 8), tokens(3, 4, seed=6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = (
        {} if isinstance(model, HopeForCausalLM) else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    )
    padded, _ = read(model, ids, attention_mask=mask, **options)
    short, _ = read(model, tokens(1, 3, seed=7))
    cache = kind_of_cache(model).join([padded, short])
    new = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        logits = model(further, attention_mask=new, cache=cache).logits
        for row, past in enumerate((ids[:1, 3:], ids[1:], tokens(1, 3, seed=7))):
            real = new[row].bool()
            whole = model(torch.cat([past, further[row : row + 1, real]], 1), use_cache=False).logits
            torch.testing.assert_close(logits[row, real], whole[0, -int(real.sum()) :], **TIGHT)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "levels-llama"])
def test_a_joined_batch_generates_on(name):
    model = make(name)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    caches, expected = [], []
    for user, length in enumerate((7, 3)):
        cache = make_cache(model)
        first = model.generate(tokens(1, length, seed=user), cache=cache, **options)
        caches.append(cache)
        history = torch.cat([first, tokens(1, 2, seed=9)], 1)
        expected.append(model.generate(history, use_cache=False, **options)[:, -5:])
    cache = kind_of_cache(model).join(caches)
    found = model.generate(tokens(1, 2, seed=9).expand(2, -1), cache=cache, new_tokens_only=True, **options)
    assert torch.equal(found[:, -5:], torch.cat(expected))


def test_a_joined_cache_is_saved(tmp_path):
    model = make("full_attention")
    cache = HopeCache.join([read(model, tokens(1, 7))[0], read(model, tokens(2, 3))[0]]).select([2, 0])
    cache.save(tmp_path / "c.safetensors")
    loaded, further = HopeCache.load(tmp_path / "c.safetensors", model.config), tokens(2, 4, seed=6)
    assert torch.equal(model(further, cache=loaded).logits, model(further, cache=cache).logits)


def test_columns_that_nobody_has_read_are_left_out():
    for name in ("full_attention", "hybrid-llama", "levels-llama"):
        model = make(name)
        long, short = read(model, tokens(1, 9))[0], read(model, tokens(1, 4))[0]
        cache = kind_of_cache(model).join([long, short]).remove([0])
        layer = cache.layers[1]
        assert (layer.keys if name != "full_attention" else layer.state.mixer.keys).shape[2] == 4


def test_sliding_windows_of_unequal_length_join(monkeypatch):
    from tests.nl_models.surgery.models import CONFIGS

    for name, value in {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]}.items():
        monkeypatch.setattr(CONFIGS["qwen2"], name, value)
    model = convert_mlp_to_continuum(make_model("qwen2", torch.float64), LEVELS)
    prompts, further = [tokens(1, 9), tokens(1, 2), tokens(1, 5)], tokens(3, 6, seed=6)
    cache = ContinuumCache.join([read(model, prompt)[0] for prompt in prompts])
    with torch.no_grad():
        steps = [model(further[:, i : i + 1], cache=cache).logits for i in range(3)]
        cache = cache.remove([0])
        steps = torch.cat([step[1:] for step in steps], 1)
        steps = torch.cat([steps, model(further[1:, 3:], cache=cache).logits], 1)
        for row in (1, 2):
            whole = model(torch.cat([prompts[row], further[row : row + 1]], 1), use_cache=False).logits
            torch.testing.assert_close(steps[row - 1], whole[0, -6:], **TIGHT)


def test_fast_weights_join_with_their_rows():
    model = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    fast, prompts, further = random_fast_weights(model, 2), tokens(3, 6), tokens(3, 3, seed=6)
    own = ContinuumCache(model.config, fast)
    none = ContinuumCache(model.config)
    with torch.no_grad():
        model(prompts[:2], cache=own)
        model(prompts[2:, :4], cache=none)
        cache = ContinuumCache.join([none.copy(), own]).select([2, 0])
        logits = model(further[[1, 2]], cache=cache).logits
        whole = torch.cat([prompts[1:2], further[1:2]], 1)
        expected = model(whole, fast_weights=fast.select(torch.tensor([1])), use_cache=False).logits
        torch.testing.assert_close(logits[:1], expected[:, -3:], **TIGHT)
        expected = model(torch.cat([prompts[2:, :4], further[2:]], 1), use_cache=False).logits
        torch.testing.assert_close(logits[1:], expected[:, -3:], **TIGHT)
        shared = ContinuumCache(model.config, fast.select(torch.tensor([1])))  # of both rows
        model(prompts[:2], cache=shared)
        logits = model(further[[2, 0, 1]], cache=ContinuumCache.join([none, shared])).logits
        torch.testing.assert_close(logits[:1], expected[:, -3:], **TIGHT)
        expected = model(whole, fast_weights=fast.select(torch.tensor([1])), use_cache=False).logits
        torch.testing.assert_close(logits[2:], expected[:, -3:], **TIGHT)
    weights = type(fast).join([fast.reset([0]), fast.remove([0])])
    assert weights.batch_size == 3
    up, before = weights.layers[0].up, fast.layers[0].up
    assert not up[0].any()
    assert torch.equal(up[1], before[1])
    assert torch.equal(up[2], before[1])


@pytest.mark.parametrize("name", ["self_modifying_titans", "hybrid-llama", "levels-llama"])
def test_a_cache_of_a_call_that_ended_midway_is_refused(name, tmp_path):
    """As by Ctrl-C, or where memory ran out: some layers have read what others have not."""
    model, ids = make(name), tokens(2, 6)
    cache, _ = read(model, ids)
    before = cache.copy()
    before.activate_past_recording()
    torn = before.copy()

    def stop(*arguments):
        raise KeyboardInterrupt

    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    hook = layers[1].register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids[:, :2], cache=torn)
    hook.remove()
    for refused in (
        lambda: model(ids[:, :2], cache=torn),
        lambda: model.generate(ids[:, :2], cache=torn, max_new_tokens=2),
        lambda: torn.save(tmp_path / "c.safetensors"),
        lambda: torn.select([0]),
        lambda: type(torn).join([torn, cache]),
    ):
        with pytest.raises(ValueError, match=r"cache: a call of the model has ended midway, .* read 6 to 8"):
            refused()
    assert not any(tmp_path.iterdir())
    with torch.no_grad():
        found = model(ids[:, :2], cache=before).logits
        torch.testing.assert_close(found, model(ids[:, :2], cache=cache).logits, rtol=0, atol=0)


def test_what_cannot_be_joined_or_selected_is_refused():
    model, other = make("self_modifying_titans"), make("titans")
    cache, _ = read(model, tokens(2, 4))
    with pytest.raises(ValueError, match="different configs"):
        HopeCache.join([cache, read(other, tokens(1, 4))[0]])
    with pytest.raises(ValueError, match=r"HopeCache\.initial"):
        HopeCache.join([cache, HopeCache(model.config)])
    with pytest.raises(TypeError, match="expected one or more of HopeCache"):
        HopeCache.join([])
    for rows in ([2], [-1], [], [True], torch.ones(3, dtype=torch.bool), [0.0], None, "0", slice(1)):
        with pytest.raises(ValueError, match="rows: expected at least one index from 0 to 1"):
            cache.select(rows)
    with pytest.raises(ValueError, match="rows: none of 2 would be left"):
        cache.remove([0, 1])
    for refused in (HopeCache.select, HopeCache.remove, lambda empty, rows: empty.reset(rows, model)):
        with pytest.raises(ValueError, match=r"rows: there are none yet; begin with HopeCache\.initial"):
            refused(HopeCache(model.config), [0])
    hybrid = convert_attention(make_model("llama"), [0], kind="delta_memory")
    memories = convert_attention(make_model("llama"), [0, 1], kind="delta_memory")
    with pytest.raises(ValueError, match="different kinds of layers"):
        ContinuumCache.join([read(hybrid, tokens(1, 4))[0], read(memories, tokens(1, 4))[0]])
