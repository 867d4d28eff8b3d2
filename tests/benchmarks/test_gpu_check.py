"""One stage's failure or time limit neither hides nor stops the others; every stage starts."""

import json

import typer
from typer.testing import CliRunner

from benchmarks import gpu_check
from benchmarks.gpu_check import STAGES, Stage, run_stage


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


def test_the_stages_fit_ten_minutes():
    assert sum(stage.limit for stage in STAGES) <= 600


def test_a_dry_run_on_the_cpu_passes_every_stage(tmp_path):
    app = typer.Typer()
    app.command()(gpu_check.main)
    result = CliRunner().invoke(app, ["--device", "cpu", "--output", str(tmp_path / "check")])
    rows = [json.loads(line) for line in (tmp_path / "check/outcomes.jsonl").read_text().splitlines()]
    assert {row["name"]: row["state"] for row in rows} == {stage.name: "passed" for stage in STAGES}
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "check").rglob("*") if path.is_file()}
    assert written >= {"doctor.jsonl", "speed.jsonl", "profile.json", "environment.json"}


def test_without_a_gpu_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(gpu_check.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "--device cpu is a dry run" in result.output
