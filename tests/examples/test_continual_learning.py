"""The example runs from training to plot, at sizes that mean nothing."""

import json

import typer
from safetensors import safe_open
from typer.testing import CliRunner

from examples.continual_learning import METHODS, main


def run(*arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def test_the_example_runs(tmp_path):
    result = run("--small", "--rates", "1e-3,1e-2", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("frozen", "plain", "CMS", "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["method"] for run in results["runs"][: len(METHODS)]] == list(METHODS)
    assert len(results["search"]) == 2 * len(METHODS)
    for run_result in results["runs"]:
        # All methods start from the frozen model, and what learns moves.
        assert run_result["code"][0] == results["runs"][0]["code"][0]
        assert run_result["code"][-1] < run_result["code"][0]
        assert 500 < run_result["tokens"][-1] <= 700  # less where Python's files are few or short
    assert (tmp_path / "continual-learning.png").stat().st_size > 10_000
    memories = list(tmp_path.glob("memory-*.safetensors"))
    assert len(memories) == len(results["runs"])
    with safe_open(memories[0], framework="pt") as file:
        assert "tokens_per_level" in file.metadata()["header"]


def test_it_explains_itself():
    shown = run("--help")
    assert shown.exit_code == 0
    assert "--rates" in shown.output
