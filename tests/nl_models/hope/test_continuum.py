"""A Hope with every variant and rule of the continuum: state, saving, gradients."""

import json

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from nl_models import HopeCache, HopeForCausalLM
from nl_models.layers.state import state_tensors

# every rule, plain and gated, with and without projected keys, restored norms
LEVELS = [
    {"hidden_size": 12, "chunk_size": 3, "rule": "momentum", "key_projection": False},
    {"hidden_size": 10, "chunk_size": 6, "gated": True, "rule": "muon", "restore_norms": True},
    {"hidden_size": 8, "chunk_size": 12, "rule": "dgd"},
    {"hidden_size": 14},
]
VARIANTS = ["sequential", "nested", "independent"]


RESTING = [LEVELS[0], {**LEVELS[1], "rule": "sgd", "max_rate": 0.0}, *LEVELS[2:]]
"""With a level of rate 0, which the nested variant must count too."""


@pytest.fixture(params=[*((variant, LEVELS) for variant in VARIANTS), ("nested", RESTING)])
def model(request, make_model):
    variant, levels = request.param
    return make_model("full_attention", continuum_levels=levels, continuum_variant=variant)


@torch.no_grad()
def test_any_cut_and_padding_change_nothing(model, tokens):
    ids = tokens(2, 17)
    expected = model(ids).logits
    for cut in (1, 4, 11, 12):
        cache = HopeCache(model.config)
        parts = [model(piece, cache=cache).logits for piece in (ids[:, :cut], ids[:, cut:])]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    found = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_models_and_conversations_are_saved(model, tokens, tmp_path):
    ids, cache = tokens(2, 20), HopeCache(model.config)
    model.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-10)
    model(ids[:, :16], cache=cache)
    assert any(t.abs().sum() > 0 for t in state_tensors(cache.layers[0].state.continuum[0].up_momentum))
    cache.save(tmp_path / "conversation")
    resumed = HopeCache.load(tmp_path / "conversation", loaded.config)
    expected = model(ids[:, 16:], cache=cache).logits
    found = loaded(ids[:, 16:], cache=resumed).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_conversation_saved_without_momenta_is_read(make_model, tokens, tmp_path):
    """The file format from before levels had momenta: six parts."""
    model = make_model("full_attention", continuum_levels=[{"hidden_size": 8, "chunk_size": 3}])
    cache, path = HopeCache(model.config), tmp_path / "conversation"
    model(tokens(1, 5), cache=cache)
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    structure = json.loads(metadata["structure"])
    for layer in structure:
        for level in layer["parts"][2]:
            assert level["parts"][6:] == [None, None, None]
            del level["parts"][6:]
    save_file(tensors, path, {**metadata, "structure": json.dumps(structure)})
    following = tokens(1, 4, seed=1)
    resumed = HopeCache.load(path, model.config)
    expected = model(following, cache=cache).logits
    assert torch.equal(model(following, cache=resumed).logits, expected)


@pytest.mark.parametrize("detached", [False, True])
def test_what_can_learn_does(make_model, tokens, detached):
    model = make_model(
        "full_attention",
        continuum_levels=LEVELS,
        continuum_variant="independent",
        continuum_detach_updates=detached,
    )
    ids = tokens(2, 26)
    model(ids, labels=ids).loss.backward()
    still = {"key", "value", "rate_logit", "retention_logit"} if detached else set()
    for name, parameter in model.model.layers[0].continuum.named_parameters():
        learns = name.rsplit(".", 1)[-1] not in still
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name


def test_what_the_backward_keeps_changes_no_gradient(make_model, tokens):
    ids, found = tokens(2, 26), []
    for every in (None, 2):
        model = make_model("full_attention", continuum_levels=LEVELS, continuum_checkpoint_every=every)
        assert model.model.layers[0].continuum.checkpoint_every == every
        model(ids, labels=ids).loss.backward()
        found.append((model.config.fingerprint(), [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    for kept, again in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=1e-12)
