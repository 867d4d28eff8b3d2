"""Sequences of a learner go on alone, side by side, or anew."""

import pytest
import torch

from nl_models.continual import ContinuumLearner, StepRule
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.continual import test_hope
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model

RULE = StepRule(rule="momentum", rate=0.02)
MODELS = {
    "llama": lambda: convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS),
    "hope": test_hope.make_model,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def stream(length: int, rows: int = 1, seed: int = 4) -> torch.Tensor:
    high = min(VOCABULARY, test_hope.VOCABULARY)
    return torch.randint(high, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(learner, row, other, other_row=0):
    for name, change in learner.state.changes.items():
        torch.testing.assert_close(change[row], other.state.changes[name][other_row], rtol=0, atol=1e-9)


def test_sequences_leave_and_join(model):
    tokens = stream(30, rows=3)
    together = ContinuumLearner(model, RULE, batch_size=3)
    together.learn(tokens[:, :14])
    left = together.fork([2, 0])
    left.learn(tokens[[2, 0], 14:])
    other = ContinuumLearner(model, RULE)
    other.learn(stream(6, seed=5))  # 5 and 13 tokens: the same place in chunks of 8
    with pytest.raises(ValueError, match="learners: at different places"):
        ContinuumLearner.join([together, other])
    again = ContinuumLearner.join([together.fork([1]), together.fork([True, False, False])])
    again.learn(tokens[[1, 0], 14:])
    for row in range(3):
        alone = ContinuumLearner(model, RULE)
        alone.learn(tokens[row : row + 1])
        for learner, order in ((left, [2, 0]), (again, [1, 0])):
            if row in order:
                assert_close(learner, order.index(row), alone)


def test_a_sequence_that_has_not_stepped_joins_one_that_has(model):
    first, second = (ContinuumLearner(model, RULE, context_length=4) for _ in range(2))
    first.learn([stream(9), stream(5)])  # a step of every level, and four tokens more
    second.learn(stream(5))
    joined = ContinuumLearner.join([first, second])
    for learner in (first, second, joined):
        learner.learn(stream(12, seed=6).expand(learner.batch_size, -1))
    assert_close(joined, 0, first)
    assert_close(joined, 1, second)


def test_rows_forget_what_they_learned(model):
    learner, tokens = ContinuumLearner(model, RULE, batch_size=2), stream(20, rows=2)
    learner.learn(tokens)
    before, fresh = learner.state, ContinuumLearner(model, RULE)
    learner.reset([1])
    assert all(not change[1].any() and torch.equal(change[0], before.changes[n][0])
               for n, change in learner.state.changes.items())  # fmt: skip
    text = stream(9, rows=2, seed=6)
    torch.testing.assert_close(learner.loss(text)[1:], fresh.loss(text[1:]), rtol=0, atol=1e-9)
    learner.rollback()
    assert learner.state is before
    learner.reset()
    learner.learn(tokens)
    for name, change in learner.state.changes.items():
        torch.testing.assert_close(change, before.changes[name], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="rows: expected at least one index"):
        learner.reset([2])


def test_rates_go_along_with_their_rows(model):
    rates = torch.tensor([0.01, 0.03, 0.0], dtype=torch.float64)
    learner = ContinuumLearner(model, StepRule(rate=rates), batch_size=3)
    assert learner.fork([1, 2]).rules[0].rate.tolist() == rates[[1, 2]].tolist()
    with pytest.raises(ValueError, match="learners: with different rates"):
        ContinuumLearner.join([learner.fork([0, 1]), learner.fork([0, 2])])
    with pytest.raises(ValueError, match="learners: of different nested"):
        ContinuumLearner.join([ContinuumLearner(model, RULE, nested=n) for n in (True, False)])
