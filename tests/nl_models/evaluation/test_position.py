"""Losses by position against plain loops, for every kind of mixer and continuum."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nl_models import HopeCache
from nl_models.evaluation.generation import conversation_by_turn, generation_by_position
from nl_models.evaluation.position import bucket_edges, loss_by_position
from nl_models.evaluation.token_losses import token_losses
from nl_models.evaluation.writes_off import without_writes

WINDOW = 8
LENGTH = 48
MEMORIES = ("self_modifying_titans", "titans", "gated_delta_net")


def token_by_token(model, rows):
    """Nats ``[B, S]`` of ``rows [B, S + 1]``, one token at a time from the cache."""
    cache, losses = HopeCache(model.config), []
    with torch.no_grad():
        for token, following in itertools.pairwise(rows.unbind(1)):
            logits = model(input_ids=token[:, None], cache=cache, use_cache=True).logits
            losses.append(F.cross_entropy(logits[:, 0], following, reduction="none"))
    return torch.stack(losses, dim=1)


def by_the_window(model, stream):
    """The same of ``stream [S + 1]`` with a fresh state for each window."""
    windows = [stream[i : i + WINDOW + 1] for i in range(0, LENGTH, WINDOW)]
    return token_by_token(model, torch.stack(windows)).flatten()


def rotated(text, start):
    """``text`` from ``start`` on, once round, and its first token again."""
    return torch.cat([text[start:], text[:start], text[start : start + 1]])


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("mixer", MEMORIES)
def test_losses_are_those_of_plain_loops(make_model, text, mixer, variant):
    model = make_model(mixer, continuum_variant=variant).eval()
    found = loss_by_position(model, text, window=WINDOW, streams=3, piece=5)
    assert found.starts == (0, 16, 32)
    assert found.length == LENGTH
    streams = torch.stack([rotated(text, start) for start in found.starts])
    torch.testing.assert_close(found.carried, token_by_token(model, streams), atol=1e-4, rtol=0)
    for losses, stream in zip(found.fresh, streams):
        torch.testing.assert_close(losses, by_the_window(model, stream), atol=1e-4, rtol=0)
    assert (found.carried - found.fresh)[:, :WINDOW].abs().max() < 1e-4
    assert (found.carried - found.fresh)[:, WINDOW:].abs().mean() > 1e-2  # state does something here


def test_what_is_over_after_the_last_window_is_left_out(make_model, text):
    model = make_model()
    cut = loss_by_position(model, text[:43], window=WINDOW, streams=2)
    whole = loss_by_position(model, text[:40], window=WINDOW, streams=2)
    assert torch.equal(cut.carried, whole.carried)
    assert cut.starts == (0, 16)


def test_as_many_streams_as_windows_read_every_window_at_every_distance(make_model, text):
    """The mean over streams of what does not depend on the past is then the same at every distance."""
    found = loss_by_position(make_model(), text, window=WINDOW, streams=LENGTH // WINDOW)
    windows = found.fresh.unflatten(1, (-1, WINDOW)).sum(2)
    torch.testing.assert_close(windows.mean(0), windows.mean().expand(LENGTH // WINDOW))
    assert windows.std(0).min() > 0.1
    buckets = found.buckets()
    assert max(b.fresh for b in buckets) - min(b.fresh for b in buckets) < 1e-5
    assert buckets[0].difference == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("mixer", MEMORIES)
def test_without_writes_is_a_model_built_with_rates_of_zero(make_model, text, mixer):
    model = make_model(mixer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    silent = without_writes(model)
    levels = [{**level, "max_rate": 0.0} for level in model.config.continuum_levels]
    built = make_model(mixer, memory_rate_max=0.0, continuum_levels=levels)
    values = model.state_dict()
    built.load_state_dict({name: values[name] for name in built.state_dict()})
    with torch.no_grad():
        wanted = built.eval()(text[None]).logits
        assert torch.equal(silent(text[None]).logits, wanted)
        assert not torch.allclose(model.eval()(text[None]).logits, wanted, atol=1e-2)
    torch.set_rng_state(generator)
    found = loss_by_position(model, text, window=WINDOW, streams=1)
    off = by_the_window(built, rotated(text, 0))
    torch.testing.assert_close(found.writes_off[0], off, atol=1e-4, rtol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_writes_nothing_is_carried(make_model, text):
    """But for the convolution: streamed or by the window, memories at their initial state are the same."""
    model = without_writes(make_model(use_short_convolution=False))
    with torch.no_grad():
        whole = token_losses(model, text[None])
        cache = HopeCache(model.config)
        parts = [token_losses(model, text[None, i : i + 9], cache) for i in range(0, 40, 8)]
        alone = [token_losses(model, text[None, i : i + 9]) for i in range(0, 40, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :40], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(alone, 1), whole[:, :40], atol=1e-5, rtol=0)


def test_a_model_without_writes_has_no_control(make_model, text):
    for mixer in ("gated_delta_net", "full_attention"):
        model = make_model(mixer, continuum_levels=[{"hidden_size": 14}])
        assert without_writes(model) is None
        found = loss_by_position(model, text, window=WINDOW, streams=2)
        assert found.writes_off is None
        assert any(note.startswith("writes off:") for note in found.notes)
        assert found.buckets()[0].writes_off is None


def test_parameters_that_are_not_the_configs_are_refused(make_model):
    model = make_model()
    model.model.layers[0].mixer.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"has besides \['model.layers.0.mixer.adapter.bias'"):
        without_writes(model)
    model = make_model()
    del model.model.layers[1].continuum.levels[0].up
    with pytest.raises(ValueError, match=r"lacks \['model.layers.1.continuum.levels.0.up'\]"):
        without_writes(model)


@pytest.mark.parametrize("mixer", ["full_attention", ["self_modifying_titans", "full_attention"]])
def test_attention_is_carried_through_the_first_window_only(make_model, text, mixer):
    model = make_model(mixer)
    found = loss_by_position(model, text, window=WINDOW, streams=2, piece=3)
    assert found.carried.shape == (2, WINDOW)
    torch.testing.assert_close(found.carried, found.fresh[:, :WINDOW], atol=1e-4, rtol=0)
    assert any(note.startswith("carried:") for note in found.notes)
    first, *later = found.buckets()
    assert first.difference == pytest.approx(0, abs=1e-5)
    assert all(b.carried is b.difference is b.standard_error is None for b in later)
    assert all(b.fresh and b.writes_off for b in later)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_stays_in_its_own_mode(make_model, text, fails):
    model = make_model().train()
    model.model.layers[0].norm.eval()
    expected = loss_by_position(make_model().eval(), text, window=12, streams=2).carried
    modes = {name: module.training for name, module in model.named_modules()}
    seen, read = [], []

    def look(module, *_):
        read.append(module.training)
        seen.append({name: part.training for name, part in model.named_modules()} == modes)
        if fails:
            raise RuntimeError("stop")

    model.model.layers[1].mixer.register_forward_hook(look)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            loss_by_position(model, text, window=12, streams=2)
    else:
        assert torch.equal(loss_by_position(model, text, window=12, streams=2).carried, expected)
    generation = {"tokens": 8, "window": 8, "samples": 2}
    if not fails:
        generation_by_position(model, text[:9], **generation)
        conversation_by_turn(model, [text[:5], text[5:9]], reply_tokens=4, window=8, samples=1)
    assert seen
    assert all(seen)
    assert not any(read)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_an_offloaded_model_writes_but_has_no_control(make_model, text):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    model = make_model().eval()
    options = {"tokens": 8, "window": 8, "samples": 2}
    expected = generation_by_position(model, text[:9], **options).tokens
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(generation_by_position(model, text[:9], **options).tokens, expected)
    with pytest.raises(ValueError, match=r"on the meta device .*remove_hook"):
        loss_by_position(model, text, window=12, streams=2)


def test_logits_never_exist_for_more_than_a_piece(make_model, text, monkeypatch):
    monkeypatch.setattr("nl_models.evaluation.token_losses._LOGITS_AT_ONCE", 37 * 4)
    model = make_model()
    most = []
    model.lm_head.register_forward_hook(lambda module, args, logits: most.append(logits.numel()))
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: most.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    small = loss_by_position(model, text, window=WINDOW, streams=3, piece=WINDOW)
    assert max(most) <= 37 * 4
    monkeypatch.undo()
    assert torch.allclose(small.carried, loss_by_position(model, text, window=WINDOW, streams=3).carried)


def test_buckets_are_powers_of_two_of_the_window(make_model, text):
    assert bucket_edges(8, 48) == [0, 8, 16, 32, 48]
    assert bucket_edges(8, 64) == [0, 8, 16, 32, 64]
    assert bucket_edges(8, 8) == [0, 8]
    found = loss_by_position(make_model(), text, window=WINDOW, streams=4)
    bucket = found.buckets()[2]
    assert (bucket.start, bucket.stop) == (16, 32)
    assert bucket.carried == pytest.approx(found.carried[:, 16:32].mean().item(), abs=1e-5)
    assert bucket.writes_off == pytest.approx(found.writes_off[:, 16:32].mean().item(), abs=1e-5)
    streams = (found.carried - found.fresh)[:, 16:32].mean(1)
    assert bucket.difference == pytest.approx(streams.mean().item(), abs=1e-5)
    assert bucket.standard_error == pytest.approx(streams.std().item() / 2, rel=1e-3)


def test_bad_input_is_refused_by_name(make_model, text):
    model = make_model()
    with pytest.raises(TypeError, match="model: expected a HopeForCausalLM"):
        loss_by_position(torch.nn.Linear(2, 2), text, window=WINDOW)
    with pytest.raises(TypeError, match="tokens: expected token ids"):
        loss_by_position(model, text.float(), window=WINDOW)
    with pytest.raises(TypeError, match="tokens: expected token ids"):
        loss_by_position(model, "text", window=WINDOW)
    with pytest.raises(ValueError, match="tokens: expected one row"):
        loss_by_position(model, text[None], window=WINDOW)
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 36"):
        loss_by_position(model, text + 1, window=WINDOW)
    with pytest.raises(ValueError, match="tokens: expected at least 7 windows of 8"):
        loss_by_position(model, text, window=WINDOW, streams=7)
    for name in ("window", "streams", "piece"):
        with pytest.raises(ValueError, match=name):
            loss_by_position(model, text, **{"window": WINDOW, name: 0})
