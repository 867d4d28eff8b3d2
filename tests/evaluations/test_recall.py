"""Recall: every answer by reading the sequence again, and what models without memory score."""

import pytest
import torch

from evaluations.tasks.recall import IGNORED, SIZES, Recall, draw


@pytest.mark.parametrize("name", SIZES)
def test_the_answer_is_the_last_value_of_the_key(name):
    length, pairs, updates = SIZES[name]
    ids, targets = draw(50, length, pairs, updates, seed=1)
    context = 2 * (pairs + updates)
    for row, asked in zip(ids.tolist(), targets.tolist()):
        last = {}
        for key, value in zip(row[:context:2], row[1:context:2]):
            assert value != last.get(key)
            assert 0 < key < 64 <= value < 128
            last[key] = value
        assert len(last) == pairs
        places = [t for t, answer in enumerate(asked) if answer != IGNORED]
        assert len(places) == pairs
        assert places[0] >= context
        assert {row[t]: asked[t] for t in places} == last


def test_keys_come_again_sooner_than_uniform_places_would():
    _, targets = draw(400, 128, 4, 0, seed=0)
    places = (targets != IGNORED).float().mean(0)[8:]
    assert places[:30].sum() > 2 * places[60:90].sum()


def test_scores():
    task = Recall("forgetting mqar")

    def first_value(ids):
        """Reads right, but never replaces what it has."""
        logits = torch.zeros(*ids.shape, task.outputs)
        for row, tokens in enumerate(ids.tolist()):
            pairs = dict(zip(tokens[0:24:2][::-1], tokens[1:24:2][::-1]))
            for t, token in enumerate(tokens):
                logits[row, t, pairs.get(token, 0)] = 1
        return logits

    scores = task.evaluate(first_value, final=True)
    assert 0.35 < scores["same"] < 0.65  # half of the keys have new values
    with pytest.raises(ValueError, match="length: expected at least 32, got 30"):
        draw(1, 30, 8, 0, 0)
