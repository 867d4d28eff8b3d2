"""Language modelling: what is asked, on which text, and which scores a model gets."""

import math

import pytest
import torch

from evaluations.models import at_equal_parameters
from evaluations.tasks import language_modelling
from evaluations.tasks.language_modelling import LanguageModelling
from evaluations.training import train


@pytest.fixture
def task(monkeypatch, tmp_path):
    """A corpus of counting, in windows of 32."""
    corpus = tmp_path / "sympy"
    corpus.mkdir()
    for number in range(60):
        words = " ".join(str((number + i) % 100) for i in range(400))
        (corpus / f"{number}.txt").write_text(words)
    sizes = {"VOCABULARY": 300, "WINDOW": 32, "BEYOND": 64, "VALIDATION_WINDOWS": 4, "TEST_TOKENS": 512}
    for name, value in {**sizes, "DATA": tmp_path / "data"}.items():
        monkeypatch.setattr(language_modelling, name, value)
    monkeypatch.setattr(LanguageModelling, "vocabulary", 300)
    monkeypatch.setattr(
        language_modelling.importlib.util,
        "find_spec",
        lambda name: type("Spec", (), {"origin": str(corpus / "__init__.py")}),
    )
    language_modelling.load.cache_clear()
    yield LanguageModelling("sympy")
    language_modelling.load.cache_clear()


def model(name):
    torch.manual_seed(0)
    return at_equal_parameters(name, 300, 300, width=16, layers=1, heads=2, head="tied")


def test_targets_are_the_tokens_that_follow(task):
    text = language_modelling.load("sympy").train.tolist()
    ids, targets = task.batch(3, seed=1_000_003 + 2)  # the third batch of seed 1
    assert ids.shape == targets.shape == (3, 31)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    joined = ",".join(map(str, text))
    for row, last in zip(ids.tolist(), targets[:, -1].tolist()):
        assert ",".join(map(str, [*row, last])) in joined
    assert torch.equal(task.batch(3, seed=1_000_003 + 2)[0], ids)
    for seed in (2, 1_000_003 + 1):
        assert not torch.equal(task.batch(3, seed=seed)[0], ids)


def test_an_untrained_model_is_at_chance_and_attention_has_no_carried_state(task):
    hope = task.evaluate(model("hope_continuum").eval(), final=True)
    assert tuple(hope) == task.scores
    assert hope == pytest.approx(dict.fromkeys(task.scores, math.log(300)), abs=0.6)
    assert tuple(task.evaluate(model("attention").eval(), final=True)) == ("windows",)


def test_what_is_learned_shows_in_the_test_text_which_is_not_that_of_the_choice(task):
    trained = model("gated_delta_net")
    options = {"batch_size": 4, "learning_rate": 2e-2, "weight_decay": 0.0, "every": 30, "seed": 0}
    outcome = train(trained, task, steps=60, **options)
    assert outcome["scores"]["windows"] < math.log(300) - 2
    assert outcome["scores"]["windows"] != outcome["curve"][-1][2]["windows"]
    assert outcome["curve"][-1][2]["windows"] < outcome["curve"][0][2]["windows"]


def test_another_corpus_is_refused():
    with pytest.raises(ValueError, match="name: expected one of standard library, sympy, got 'web'"):
        LanguageModelling("web")
