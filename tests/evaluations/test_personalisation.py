"""Days of one project: what is read when, and what it is scored on."""

import pytest

from evaluations.learners import Levels, Transformer
from evaluations.tasks import personalisation
from tests.evaluations.conftest import documents


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
