"""A Hope on the Triton kernels is the same model: it trains and decodes as on the eager path."""

import pytest
import torch

from nl_models import HopeCache, HopeForCausalLM

KINDS = {
    "self-modifying, linear": ("self_modifying_titans", {"memory_hidden_size": None}),
    "self-modifying, two-layer": ("self_modifying_titans", {}),
    "titans": ("titans", {"memory_momentum": False, "memory_rule": {"erase": "none"}}),
    "gated delta net": ("gated_delta_net", {}),
}


# The others take minutes under the interpreter.
QUICK = [kind for kind in KINDS if kind not in ("self-modifying, two-layer", "titans")]


@pytest.fixture
def make_pair(make_config):
    """The same initial model twice, on kernels and eager."""

    def make(kind):
        layer, options = KINDS[kind]
        models = []
        for implementation in ("triton", "eager"):
            torch.manual_seed(0)
            config = make_config(layer, num_hidden_layers=1, memory_impl=implementation, **options)
            models.append(HopeForCausalLM(config))
        return models

    return make


def losses(model, ids, steps, rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        batch = ids[step % len(ids)][None]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def check_training(pair, ids, steps):
    pairs = list(zip(*(losses(model, ids, steps, 3e-3) for model in pair)))
    assert pairs[-1][1] < pairs[0][1]
    # Rounding differs, and training lets differences grow; in 200 steps the loss falls by more than 1.
    for found, expected in pairs:
        assert abs(found - expected) < 1e-3


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", QUICK)
def test_training_follows_the_eager_losses(make_pair, tokens, kind):
    check_training(make_pair(kind), tokens(1, 7), 2)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_the_eager_losses_for_200_steps(make_pair, tokens, kind):
    """Under the interpreter 6 minutes (gated delta net) to 80 (two-layer memories) on one core."""
    check_training(make_pair(kind), tokens(1, 7), 200)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_kernels_is_the_forward(make_pair, tokens, kind):
    kernels, eager = (model.eval() for model in make_pair(kind))
    ids = tokens(1, 7)
    with torch.no_grad():
        expected = eager(ids, use_cache=False).logits
        cache = HopeCache(kernels.config)
        parts = [kernels(ids[:, :5], cache=cache).logits]
        parts += [kernels(ids[:, t : t + 1], cache=cache).logits for t in range(5, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.interpreter
def test_levels_on_kernels_are_those_of_eager(make_config, tokens):
    """Logits and gradients; one level that learns every 4 tokens, one every 8."""
    levels = [{"hidden_size": 12, "chunk_size": 4}, {"hidden_size": 12, "chunk_size": 8, "rule": "momentum"}]
    found = []
    for implementation in ("triton", "eager"):
        torch.manual_seed(0)
        options = {"continuum_levels": levels, "continuum_detach_updates": True}
        config = make_config("full_attention", num_hidden_layers=1, continuum_impl=implementation, **options)
        model = HopeForCausalLM(config)
        logits = model(tokens(2, 11)).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(found[0]) == len(found[1]) > 8
    for kernels, eager in zip(*found):
        torch.testing.assert_close(kernels, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device")
def test_an_explicit_choice_never_falls_back(make_config, tokens, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for layer in ("self_modifying_titans", "titans", "gated_delta_net"):
        model = HopeForCausalLM(make_config(layer, memory_impl="triton"))
        with pytest.raises(RuntimeError, match="impl='triton'"):
            model(tokens(1, 3))
    model = HopeForCausalLM(
        make_config("full_attention", continuum_impl="triton", continuum_detach_updates=True)
    )
    with pytest.raises(RuntimeError, match="impl='triton'"):
        model(tokens(1, 3))
