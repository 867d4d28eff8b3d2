"""Long context: every answer by reading the stream again, and questions that change nothing."""

import pytest
import torch

from evaluations.models import at_equal_parameters
from evaluations.task import IGNORED
from evaluations.tasks import long_context
from evaluations.tasks.long_context import ASK, GENERATORS, KEYS, SHORT, VALUES, VOCABULARY, LongContext


def read(name, tokens):
    """Values of each key by what the row says, in order."""
    held, tokens = {}, iter(tokens)
    for first in tokens:
        if first in KEYS:
            second = next(tokens)
            held[first] = [*held.get(first, []), second] if second in VALUES else held[second]
    return {key: values if name == "multi-value" else values[-1:] for key, values in held.items()}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("length", [SHORT, 512])
def test_answers_are_what_the_row_says(name, length):
    rng = torch.Generator().manual_seed(1)
    ids, targets = long_context.draw(GENERATORS[name](20, rng), rng, length)
    assert ids.shape == (20, length)
    assert ids.max() < VOCABULARY
    for row, asked in zip(ids.tolist(), targets.tolist()):
        held = read(name, row[: length // 2])
        places = [t for t, answers in enumerate(asked) if answers[0] != IGNORED]
        assert {row[t] for t in places} == held.keys()
        assert len(places) == len(held) * (length // SHORT)
        for t in places:
            assert row[t - 1] == ASK
            assert sorted(asked[t]) == sorted(held[row[t]])


@pytest.mark.parametrize("name", GENERATORS)
def test_streams_say_the_same_at_even_depths(name):
    rng = torch.Generator().manual_seed(2)
    facts = GENERATORS[name](5, rng)
    ids = long_context.streams(facts, 100, rng)
    count = facts.statements.shape[1]
    places = long_context.depth_places(count, 100)
    assert places[0] == 0
    assert places[-1] >= 95
    for b, row in enumerate(ids.tolist()):
        held = read(name, row)
        for q, key in enumerate(facts.keys[b].tolist()):
            assert sorted(facts.answers[b, q].tolist()) == sorted(held[key])
        for index, place in enumerate(places):
            assert row[place : place + 2] == facts.statements[b, index].tolist()
    if name in ("needle", "multi-value", "changing facts"):
        told = facts.statements[..., 1].gather(1, facts.told.flatten(1)).view(facts.told.shape)
        assert torch.equal(told, facts.answers)


def test_a_value_is_right_among_as_many_as_are_asked_for():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    assert long_context.right(logits, torch.tensor([2, 1])).tolist() == [True, True]
    assert long_context.right(logits, torch.tensor([3, 1])).tolist() == [False, True]
    assert long_context.right(logits, torch.tensor([2])).tolist() == [False]


@pytest.mark.parametrize("name", ["hope", "attention"])
def test_each_question_is_put_to_a_copy_of_the_state(name, monkeypatch):
    monkeypatch.setattr(long_context, "PIECE", 16)
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 1, "heads": 2, "head": "tied"}
    model = at_equal_parameters(name, VOCABULARY, VOCABULARY, **sizes).eval()
    rng = torch.Generator().manual_seed(3)
    facts = long_context.needle(2, rng)
    ids = long_context.streams(facts, 50, rng)
    with torch.no_grad():
        logits = long_context.ask(model, ids, facts.keys)
        for q in range(4):
            question = torch.stack([torch.full((2,), ASK), facts.keys[:, q]], 1)
            alone = model(torch.cat([ids, question], 1))[:, -1]
            torch.testing.assert_close(logits[:, q], alone, atol=1e-4, rtol=1e-4)


def test_scores_have_lengths_and_depths_and_end_where_nothing_is_found(monkeypatch):
    task = LongContext("needle", lengths=("512", "2K", "8K"))
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 1, "heads": 2, "head": "tied"}
    model = at_equal_parameters("gated_delta_net", VOCABULARY, VOCABULARY, **sizes).eval()
    values = torch.zeros(16, 4, VOCABULARY)

    def knows_the_last(model, ids, keys):
        if ids.shape[1] > 512:
            return values
        last = torch.nn.functional.one_hot(ids[:, -3], VOCABULARY).float()
        return last[:, None].expand(-1, keys.shape[1], -1)

    monkeypatch.setattr(long_context, "ask", knows_the_last)
    scores = task.evaluate(model, final=True)
    assert scores["512"] == 0.25
    assert [scores[f"512@{depth}"] for depth in ("0.00", "0.33", "0.67", "1.00")] == [0, 0, 0, 1]
    assert scores["2K"] == 0
    assert "8K" not in scores
    with pytest.raises(ValueError, match=r"name: expected one of needle, .*, got 'haystack'"):
        LongContext("haystack")


def test_the_loss_is_least_where_all_values_are_as_likely():
    task = LongContext("multi-value")
    targets = torch.full((1, 2, 3), IGNORED)
    targets[0, 1] = torch.tensor([48, 50, 60])
    logits = torch.full((1, 2, VOCABULARY), -30.0)
    logits[0, 1, [48, 50, 60]] = 0.0
    assert task.loss(logits, targets).item() == pytest.approx(torch.tensor(3.0).log().item())
