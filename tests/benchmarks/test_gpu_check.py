"""One stage's failure or time limit neither hides nor stops the others; every stage starts."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import gpu_check, training_step
from benchmarks.gpu_check import STAGES, Stage, run_stage
from nl_models.profiling.plan import Plan


def test_a_stage_says_how_it_ended_and_keeps_what_it_printed(tmp_path):
    stages = {
        "passed": "print('seen', '{output}', '{device}')",
        "failed": "print('seen'); raise SystemExit(3)",
        "out of time": "import time; print('seen'); time.sleep(60)",
    }
    for state, code in stages.items():
        limit = 60 if state != "out of time" else 4
        outcome = run_stage(Stage(state, ("-c", code), 60), tmp_path, "cuda", limit)
        assert outcome.state == state
        assert outcome.seconds < 60
        assert (tmp_path / f"{state}.log").read_text().startswith("seen")
    assert f"{tmp_path} cuda" in (tmp_path / "passed.log").read_text()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_stages_fit_ten_minutes():
    assert sum(stage.limit for stage in STAGES) <= 600


@pytest.mark.slow
def test_a_dry_run_on_the_cpu_passes_every_stage(tmp_path):
    app = typer.Typer()
    app.command()(gpu_check.main)
    result = CliRunner().invoke(
        app, ["--device", "cpu", "--seconds", "3600", "--output", str(tmp_path / "check")]
    )
    rows = rows_of(tmp_path / "check/outcomes.jsonl")
    assert {row["name"]: row["state"] for row in rows} == {stage.name: "passed" for stage in STAGES}
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "check").rglob("*") if path.is_file()}
    assert written >= {"doctor.jsonl", "speed.jsonl", "profile.json", "environment.json"}
    planned, first, second = rows_of(tmp_path / "check/step.jsonl")
    assert planned["planned_peak_bytes"] > 0
    assert first["seconds"] > 0
    assert second["tokens_per_second"] == 2 * 64 / second["seconds"]
    assert second["peak_by_plan"] == second["peak_bytes"] / planned["planned_peak_bytes"]
    factors = rows_of(tmp_path / "check/factor.jsonl")
    assert {row["kernel"] for row in factors} >= {"solve_chunks", "state_gradients", "learn", "learn_adjoint"}
    for row in factors:
        assert row["predicted_s"] == max(row["bytes_s"], row["issue_s"]) > 0
        assert min(row["bytes"], row["instructions"], row["launches"]) > 0


def test_without_a_gpu_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(gpu_check.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "--device cpu is a dry run" in result.output


def test_a_step_takes_the_first_way_whose_planned_peak_fits(monkeypatch):
    """Checkpointing before fewer sequences."""

    def plan(config, *, batch, length, block_checkpoints, kernels):
        return Plan(0, 0, 0, peak=batch * (2 if block_checkpoints else 10), calls=1, moved=0, sent=0)

    monkeypatch.setattr(training_step, "plan_training_step", plan)
    found = [training_step.fitting_step(None, 8, 64, memory, kernels=True) for memory in (81, 80, 16, 11, 3)]
    ways = [(way["batch"], way["block_checkpoints"]) for way in found]
    assert ways == [(8, False), (8, True), (4, True), (4, True), (1, True)]
    with pytest.raises(RuntimeError, match="a step of one sequence of 64 tokens takes"):
        training_step.fitting_step(None, 8, 64, 2, kernels=True)
