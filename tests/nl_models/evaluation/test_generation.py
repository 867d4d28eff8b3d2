"""What a model writes and how it is judged, against plain loops."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from nl_models import HopeCache
from nl_models.evaluation.generation import (
    GenerationLosses,
    conversation_by_turn,
    distinct_share,
    generation_by_position,
)

WINDOW = 8


def losses(model, row, cache=None):
    """Nats of ``row [S + 1]`` by one forward pass."""
    with torch.no_grad():
        logits = model(input_ids=row[None, :-1], cache=cache, use_cache=cache is not None).logits[0]
    return F.cross_entropy(logits, row[1:], reduction="none")


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "full_attention"])
def test_it_writes_with_its_state_and_is_judged_with_a_fresh_one(make_model, text, mixer):
    model = make_model(mixer).eval()
    found = generation_by_position(model, text[:11], 20, window=WINDOW, samples=3, temperature=0.7, seed=5)
    generator, cache = torch.Generator().manual_seed(5), HopeCache(model.config)
    last, drawn = text[:11].expand(3, -1), []
    for _ in range(20):
        with torch.no_grad():
            logits = model(input_ids=last, cache=cache, use_cache=True).logits[:, -1]
        last = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        drawn.append(last)
    assert torch.equal(found.tokens, torch.cat(drawn, 1))
    for sample in range(3):
        whole = torch.cat([text[10:11], found.tokens[sample]])
        wanted = [losses(model, whole[i : i + WINDOW + 1]) for i in range(0, 20, WINDOW)]
        torch.testing.assert_close(found.judge[sample], torch.cat(wanted), atol=1e-4, rtol=0)
    assert [(b.start, b.stop) for b in found.buckets()] == [(0, 8), (8, 16), (16, 20)]
    assert found.buckets()[1].judge == pytest.approx(found.judge[:, 8:16].mean().item(), abs=1e-5)
    assert found.buckets()[-1].distinct is None  # less than a window
    again = generation_by_position(model, text[:11], 20, window=WINDOW, samples=3, temperature=0.7, seed=6)
    assert not torch.equal(again.tokens, found.tokens)


def test_a_text_that_repeats_itself_has_few_distinct_4_grams():
    varied, repeated = torch.arange(16), torch.tensor([1, 2] * 8)
    assert distinct_share(torch.stack([varied, repeated])).tolist() == pytest.approx([1, 2 / 13])
    tokens = torch.cat([varied, repeated])[None]
    first, second = GenerationLosses(16, tokens, torch.zeros(1, 32)).buckets()
    assert (first.distinct, second.distinct) == pytest.approx((1, 2 / 13))
    assert first.standard_error is None


def test_a_conversation_has_one_state(make_model, text):
    model = make_model().eval()
    turns = [text[:5], text[5:8], text[8:16]]
    found = conversation_by_turn(model, turns, reply_tokens=4, window=WINDOW, samples=2, seed=3)
    # The replies again, from the same seed: 2 conversations side by side.
    generator, cache = torch.Generator().manual_seed(3), HopeCache(model.config)
    said = torch.empty(2, 0, dtype=torch.long)
    for turn, piece in enumerate(turns):
        new = piece.expand(2, -1)
        context = torch.cat([said, new], 1)
        for sample, before in enumerate(said):
            row = torch.cat([before, piece])
            fresh = losses(model, row[-WINDOW - 1 :])[-min(len(piece), len(row) - 1) :]
            assert found.read_fresh[sample, turn] == pytest.approx(fresh.mean().item(), abs=1e-4)
            carried = losses(model, row, HopeCache(model.config))[-min(len(piece), len(row) - 1) :]
            assert found.read_carried[sample, turn] == pytest.approx(carried.mean().item(), abs=1e-4)
        unread = context[:, cache.get_seq_length() :]
        for _ in range(4):
            with torch.no_grad():
                logits = model(input_ids=unread, cache=cache, use_cache=True).logits[:, -1]
            unread = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            context = torch.cat([context, unread], 1)
        said = context
        for sample, row in enumerate(said):
            judged = losses(model, row[-WINDOW - 1 :])[-4:]
            assert found.judge[sample, turn] == pytest.approx(judged.mean().item(), abs=1e-4)
    assert (found.read_carried - found.read_fresh)[:, 2].abs().min() > 1e-3
    assert [(b.first, b.last) for b in found.buckets()] == [(1, 1), (2, 2), (3, 3)]
    figures = dataclasses.asdict(found.buckets()[1])
    assert figures["judge"] == pytest.approx(found.judge[:, 1].mean().item(), abs=1e-5)


def test_turns_are_shown_in_powers_of_two(make_model, text):
    found = conversation_by_turn(
        make_model(), [text[i : i + 2] for i in range(6)], reply_tokens=4, window=WINDOW, samples=1
    )
    ranges = [(b.first, b.last) for b in found.buckets()]
    assert ranges == [(1, 1), (2, 2), (3, 4), (5, 6)]
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(ranges))


def test_bad_input_is_refused_by_name(make_model, text):
    model = make_model()
    for name, value, message in (
        ("tokens", 0, "tokens: expected at least 1"),
        ("window", 0, "window: expected at least 1"),
        ("samples", 0, "samples: expected at least 1"),
        ("temperature", 0.0, "temperature: expected a positive number"),
        ("prompt", text + 100, "prompt: expected ids from 0 to 36"),
    ):
        with pytest.raises(ValueError, match=message):
            generation_by_position(model, **{"prompt": text, "tokens": 4, "window": WINDOW, name: value})
    for name, value, message in (
        ("turns", [], "turns: expected at least one"),
        ("turns", [text[:1]], r"turns\[0\]: expected 2 to 8"),
        ("turns", [text[:4], text[:9]], r"turns\[1\]: expected 1 to 8 \(window\) token ids, got 9"),
        ("reply_tokens", 3, "reply_tokens: expected 4 to 8"),
        ("reply_tokens", 9, "reply_tokens: expected 4 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation_by_turn(
                model, **{"turns": [text[:4]], "reply_tokens": 4, "window": WINDOW, name: value}
            )
