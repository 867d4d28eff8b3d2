"""The studies behind figures in the docs run, and show what the docs say."""

import json
import math
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import breakdown, continuum_steps, curvature, gradient_growth, optimizer_step, optimizer_study
from benchmarks.harness import COMPILED

runner = CliRunner()
CURVE = (1.0, 0.5, 1.0)


def test_the_gradient_grows_with_long_inputs_and_shrinks_with_unit_ones():
    grows, shrinks = (gradient_growth.growth_per_chunk(x, 0.02, chunks=20, seed=0) for x in (15.0, 1.0))
    assert grows > 0.1
    assert shrinks < -0.1


def test_the_gradient_grows_where_rates_are_near_two_not_where_they_may_be():
    options = {"length": 1.0, "gate_spread": 0.25, "chunks": 20, "seed": 0, "rate_max": 2.0}
    assert gradient_growth.growth_per_chunk(**options, rate_bias=-1.1) < -0.1
    assert gradient_growth.growth_per_chunk(**options, rate_bias=2.0) > 0.1


def test_models_are_chaotic_with_summed_momentum_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_growth, "MODEL_LENGTHS", (64, 256))
    gradient_growth.study_models(["average", "sum"], tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for averaged, summed in zip(rows[::2], rows[1::2]):
        assert averaged["norms"][1] < averaged["norms"][0]
        assert summed["norms"][1] > 2 * summed["norms"][0]
        assert averaged["moved"] < 1e-5
        assert summed["moved"] > 2 * averaged["moved"]


@pytest.mark.parametrize("op", ["deep_memory", "self_modifying_memory"])
def test_a_breakdown_tells_calls_apart(op):
    app = typer.Typer()
    app.command()(breakdown.main)
    sizes = ["--tokens", "32", "--heads", "1", "--width", "8", "--chunk-size", "8"]
    result = runner.invoke(app, [op, *sizes])
    assert result.exit_code == 0, result.output
    rows = {line.split()[1]: line.split() for line in result.output.splitlines() if line.startswith("│")}
    assert int(rows["products"][5]) > 10
    assert int(rows["element-wise"][5]) > 10


class Quadratic:
    """A task of the optimiser study whose best rate is known: SGD on a quadratic of curvature 1."""

    optimizers = {"sgd": 0.1}  # noqa: RUF012
    steps = 30
    unit = "loss"

    def model(self, seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 1, bias=False)

    def optimizer(self, name, model, learning_rate):
        return torch.optim.SGD(model.parameters(), lr=learning_rate)

    def loss(self, model, step, seed):
        return 0.5 * model.weight.square().sum()

    def evaluate(self, model):
        loss = self.loss(model, 0, 0).item()
        return {"selection": loss, "loss": loss}


def test_the_search_ends_with_the_best_rate_between_others_and_repeats_nothing(tmp_path, monkeypatch):
    results = optimizer_study.Results(tmp_path / "rows.jsonl")
    searched, best = optimizer_study.search(results, "quadratic", Quadratic(), "sgd", budget=7, seeds=2)
    assert len(searched) == 7
    assert min(searched) < best < max(searched)
    assert searched[best] == min(searched.values())
    assert 0.4 <= best <= 1.7
    assert len(results.path.read_text().splitlines()) == 14
    again = optimizer_study.Results(results.path)
    monkeypatch.setattr(optimizer_study, "train", None)  # would fail if it were called
    assert optimizer_study.search(again, "quadratic", Quadratic(), "sgd", budget=7, seeds=2) == (
        searched,
        best,
    )
    frozen = optimizer_study.Results(results.path, frozen=True)
    with pytest.raises(typer.BadParameter, match="has no run of"):
        frozen.run("quadratic", Quadratic(), "sgd", 0.123, 0)


def test_a_run_that_diverges_has_no_loss():
    row = optimizer_study.train(Quadratic(), "sgd", 1e25, 0)
    assert row["selection"] is None
    assert optimizer_study.next_rung({0: 1.0, 1: math.inf, -1: 2.0}) == 2
    assert optimizer_study.next_rung({0: 1.0, 1: math.inf}) == -1


def test_steps_needed_counts_from_the_last_time_above():
    path = [[0, 0, value] for value in (1.0, 1e-4, 1.0, 1e-4, 1e-5)]
    assert curvature.steps_needed(path, 4) == 3
    assert curvature.steps_needed(path[:4], 4) == math.inf  # ended early: diverged
    assert curvature.steps_needed([*path[:4], [0, 0, 1.0]], 4) == math.inf
    assert curvature.descend(CURVE, {"lr": 0.01, "erase": 0.0}, 3)[0][2] == pytest.approx(
        3.5**2 + (-3.5 - 2 + 0.5 * math.sin(-3.5)) ** 2
    )
    counts = {rule: len(curvature.candidates(rule, 5)) for rule in curvature.RULES}
    assert set(counts.values()) == {20}


def test_the_cost_of_a_step_is_measured_for_every_optimiser(tmp_path):
    app = typer.Typer()
    app.command()(optimizer_step.main)
    sizes = ["--hidden-size", "16", "--layers", "1", "--tokens", "16", "--rounds", "1"]
    result = runner.invoke(app, [*sizes, "--output", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 0, result.output
    rows = {row["optimizer"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
    assert rows.keys() == optimizer_step.optimizers().keys()
    bytes_of = {name: row["state_bytes"] for name, row in rows.items()}
    assert bytes_of["DeepMomentum"] < bytes_of["Muon"] < bytes_of["AdamW (fused)"] < bytes_of["M3"]


@pytest.mark.parametrize("name", ["two products", "chunk step"])
def test_plain_lines_compute_what_the_continuum_functions_do(name):
    case = next(c for c in continuum_steps.STEP_CASES if c.name == name and "cpu" in c.devices)
    case = replace(case, shape={"B": 2, "T": 8, "D": 6, "h": 10})
    factories = case.providers(case, torch.device("cpu"))
    found = [make().run() for provider, make in factories.items() if provider != COMPILED]
    assert len(found) == 3
    for outputs in found[:2]:
        torch.testing.assert_close(outputs, found[2])
