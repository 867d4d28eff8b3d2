"""The associative-recall task: answers are right, hidden, and not to be guessed."""

import pytest
import torch

from nl_models.data.associative_recall import IGNORED, AssociativeRecall, recall_accuracy


@pytest.mark.parametrize(
    "task",
    [
        AssociativeRecall(pairs=4),
        AssociativeRecall(pairs=1, keys=1, values=1),
        AssociativeRecall(pairs=5, keys=6, values=7, queries=2, fillers=9),
    ],
    ids=["plain", "single", "fillers"],
)
def test_every_query_is_answered_by_its_binding_and_no_answer_is_shown(task):
    input_ids, labels = task.batch(8, seed=1)
    assert input_ids.shape == labels.shape == (8, task.sequence_length)
    assert input_ids.min() >= 0
    assert input_ids.max() < task.vocab_size
    first_filler = task.keys + task.values
    for ids, targets in zip(input_ids.tolist(), labels.tolist()):
        assert ids[-1] == task.vocab_size - 1
        body = [i for i in ids[:-1] if i < first_filler]
        pairs = body[: 2 * task.pairs]
        bindings = dict(zip(pairs[::2], pairs[1::2]))
        assert len(bindings) == len(set(bindings.values())) == task.pairs
        assert all(key < task.keys <= value for key, value in bindings.items())
        queries = body[2 * task.pairs :]
        assert len(set(queries)) == len(queries) == task.asked
        answers = [(ids[t], targets[t + 1]) for t in range(len(ids) - 1) if targets[t + 1] != IGNORED]
        assert answers == [(query, bindings[query]) for query in queries]
        assert len(ids) - 1 - len(body) == task.fillers
        # A key is never separated from its value.
        assert all(ids[ids.index(key) + 1] == value for key, value in bindings.items())


def test_the_seed_determines_the_batch():
    task = AssociativeRecall(pairs=4, fillers=3)
    assert all(torch.equal(a, b) for a, b in zip(task.batch(4, seed=5), task.batch(4, seed=5)))
    assert not torch.equal(task.batch(4, seed=5)[0], task.batch(4, seed=6)[0])


def test_a_guess_among_the_values_seen_scores_chance_and_the_answer_scores_one():
    task = AssociativeRecall(pairs=4)
    input_ids, labels = task.batch(2000, seed=0)
    logits = torch.zeros(*input_ids.shape, task.vocab_size)
    # Always answer with the value of the first pair.
    logits.scatter_(2, input_ids[:, 1:2, None].expand(-1, input_ids.shape[1], 1), 1.0)
    assert recall_accuracy(logits, labels) == pytest.approx(task.chance, abs=0.02)
    perfect = torch.nn.functional.one_hot(labels.clamp_min(0).roll(-1, dims=1), task.vocab_size).float()
    assert recall_accuracy(perfect, labels) == 1.0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pairs": 0}, "pairs"),
        ({"pairs": 9, "keys": 8}, "keys"),
        ({"pairs": 9, "values": 8}, "values"),
        ({"pairs": 2, "queries": 3}, "queries"),
        ({"pairs": 2, "fillers": -1}, "fillers"),
        ({"pairs": 2, "filler_ids": 0}, "filler_ids"),
    ],
)
def test_impossible_sizes_are_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        AssociativeRecall(**options)
