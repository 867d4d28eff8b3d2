"""The tasks of MAD: every answer by another way, and sizes."""

import pytest
import torch

from evaluations.task import TEST_SEED
from evaluations.tasks.mad import GENERATORS, IGNORED, MEMORISED, Mad


def draw(name, count=20, training=False, seed=5):
    ids, targets = Mad(name).draw(count, seed, training)
    return list(zip(ids.tolist(), targets.tolist()))


def test_compression_asks_for_all_of_it():
    for ids, targets in draw("compression"):
        assert ids == targets
        assert len(ids) == 32
        assert ids[-1] == 15
        assert max(ids[:-1]) < 15


def test_in_context_recall_asks_for_values_of_keys_that_were_there():
    for ids, targets in draw("in-context recall"):
        assert len(ids) == 127
        known = {}
        for t in range(0, 127, 2):
            key, answer = ids[t], targets[t]
            assert answer == known.get(key, IGNORED)
            if t < 126:
                assert targets[t + 1] == IGNORED
                assert ids[t + 1] >= 8
                known[key] = ids[t + 1]
        assert targets[126] != IGNORED


def test_in_training_every_next_token_is_asked():
    for name in ("in-context recall", "fuzzy recall"):
        for ids, targets in draw(name, training=True):
            assert targets[:-1] == ids[1:]


def test_fuzzy_recall_asks_for_the_probe_at_the_end():
    for ids, targets in draw("fuzzy recall"):
        assert len(ids) == 128
        last = max(t for t, token in enumerate(ids) if token < 7)  # of the probe's key
        key, answer = ids[last - 2 : last + 1], [x for x in targets[last:] if x != IGNORED]
        assert all(token < 7 for token in key)
        assert 1 <= len(answer) <= 3
        # It was there before, with the same value.
        assert any(
            ids[t : t + 3] == key and ids[t + 3 : t + 3 + len(answer)] == answer for t in range(last - 5)
        )
        assert all(answer == IGNORED or answer >= 7 for answer in targets)


def test_selective_copying_asks_for_the_tokens_in_order():
    for ids, targets in draw("selective copying"):
        assert len(ids) == 256
        place = ids.index(15)
        tokens = [x for x in ids[:place] if x != 14]
        assert targets[place + 1 :] == tokens
        assert len(tokens) == 16
        assert set(ids[place + 1 :]) == {14}
        assert set(targets[: place + 1]) == {IGNORED}


def test_memorisation_has_one_value_for_a_key_whatever_the_seed():
    value_of = {}
    for seed in (1, 2):
        for ids, targets in draw("memorisation", 200, seed=seed):
            for key, insert, nothing, value in zip(ids[::2], ids[1::2], targets[::2], targets[1::2]):
                assert (insert, nothing) == (MEMORISED - 1, IGNORED)
                assert value_of.setdefault(key, value) == value
    assert len(value_of) == len(set(value_of.values())) == 127


@pytest.mark.parametrize("name", GENERATORS)
def test_the_score_of_what_knows_and_of_what_does_not(name):
    task = Mad(name)
    _, targets = task.draw(500, TEST_SEED, training=False)
    answers = iter(targets.clamp(min=0).split(125))
    knows = task.evaluate(lambda ids: torch.eye(task.outputs)[next(answers)], final=True)
    assert knows == {"accuracy": 1.0}
    silent = task.evaluate(lambda ids: torch.zeros(*ids.shape, task.outputs), final=True)
    assert silent["accuracy"] < 0.2
