"""Classes that come in parts: what is read, and what a course measures."""

import torch

from evaluations import streams
from evaluations.learners import Transformer, make_base
from evaluations.studies import CLASSES
from evaluations.tasks import class_incremental


def test_digits_are_split_apart_and_all_of_a_part_is_read():
    course = class_incremental.ClassIncremental("digits")
    data = course.data
    assert course.parts == ("0–1", "2–3", "4–5", "6–7", "8–9")
    assert [len(x) for x in data.read] == [80] * 10
    assert all(len(v) >= 5 for v in (*data.validation, *data.test))
    read = course.documents(2, seed=1)
    assert {int(d[-1]) - data.symbols for d in read} == {4, 5}
    assert len(read) == 160
    assert not torch.equal(read[0], course.documents(2, seed=2)[0])
    batch = course.base_batch(torch.Generator().manual_seed(0))
    assert batch.shape == (8, course.context)
    assert batch.max() < course.vocabulary

    class Knows(Transformer):
        def logits(self, ids):
            logits = torch.zeros(*ids.shape, course.vocabulary)
            logits[..., data.symbols + 4] = 1
            return logits

    model = Knows(make_base(course.vocabulary, 16, 64))
    assert course.score(model, 2, True) == 0.5  # all of one class of two
    assert course.score(model, 0, True) == 0


def test_a_course_learns_and_tests_every_part(monkeypatch, tmp_path):
    monkeypatch.setattr(streams, "BASES", tmp_path)
    monkeypatch.setattr(class_incremental.ClassIncremental, "base_steps", 2)
    study = CLASSES
    run = streams.Run("digits", "fine_tuning", study.settings["fine_tuning"][0], 0)
    row = study.perform(run, lambda *_: None)
    assert len(row["matrix"]) == 6
    assert set(row["scores"]) == {"average", "backward", "forward", "forgetting"}
    assert [seen for seen, _, _ in row["curve"]] == [1, 2, 3, 4, 5]
    assert row["scores"] == streams.measures(row["matrix"])
    joint = study.perform(streams.Run("digits", "joint", {"rate": 1e-3}, 0), lambda *_: None)
    assert joint["scores"] == {"average": sum(joint["matrix"][-1]) / 5}
