"""The demo at its smallest: through the command, twice."""

import json

import pytest
import typer
from typer.testing import CliRunner

from nl_models.demo import fresh_folder, main
from nl_models.hope import HopeConfig
from nl_models.hope.baseline import mixer_baseline, parameter_count

APP = typer.Typer()
APP.command()(main)
SMALLEST = [
    "--vocab-size", "280", "--hidden-size", "16", "--layers", "1", "--heads", "2", "--steps", "2",
    "--batch-size", "1",
    "--sequence-length", "32", "--longest", "64", "--longest-decode", "2", "--sample-tokens", "3",
    "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        (corpus / f"{i}.txt").write_text(f"file {i}: " + "the quick <brown> fox jumps. " * (i + 3))
    output = tmp_path_factory.mktemp("runs") / "demo"
    result = CliRunner().invoke(APP, ["--output", str(output), "--corpus", str(corpus), *SMALLEST])
    assert result.exit_code == 0, (result.output, result.exception)
    return output, result.output


def test_all_models_are_trained_on_the_same_tokens_with_as_many_parameters(demo):
    output, printed = demo
    result = json.loads((output / "demo.json").read_text())
    assert [model["name"] for model in result["models"]] == [
        "gated-delta-net",
        "hope-attention",
        "transformer",
        "hope",
    ]
    hope = result["models"][-1]
    for model in result["models"]:
        assert model["tokens"] == 2 * 32
        assert abs(model["parameters"] / hope["parameters"] - 1) < 0.01
        assert f"{model['validation_loss']:.4f}" in printed
        assert model["name"] in printed
    assert result["sample"]["tokens"] == 3
    assert all(m["status"] == "ok" for m in result["measurements"])
    lines = [line for line in printed.splitlines() if str(output) not in line]
    assert max(map(len, lines)) <= 80
    assert "…" not in printed


def test_the_reports_are_complete_and_the_html_needs_no_other_file(demo):
    output, _ = demo
    page = (output / "report.html").read_text()
    text = (output / "report.md").read_text()
    for name in ("loss.png", "position.png", "profile.png"):
        assert (output / name).stat().st_size > 1000
        assert f"]({name})" in text
        assert name not in page
    assert page.count("data:image/png;base64,") == 3
    for content in (page, text):
        assert "validation loss" in content
        assert "carried − fresh" in content
        assert "python -m nl_models.demo" in content
        assert "transformers" in content


def test_a_second_demo_gets_a_folder_of_its_own(tmp_path):
    assert fresh_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert fresh_folder(tmp_path / "demo") == tmp_path / "demo-2"
    (tmp_path / "demo-2").write_text("mine")
    assert fresh_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_help_and_bad_options():
    assert "--hope-learning-rate" in CliRunner().invoke(APP, ["--help"]).output
    assert CliRunner().invoke(APP, ["--corpus", "/nowhere", "--output", "/tmp/never-made"]).exit_code == 2
    below = CliRunner().invoke(APP, ["--output", f"{__file__}/demo"])
    assert below.exit_code == 2
    assert "a file stands where a folder should" in " ".join(below.output.split())


def test_the_baseline_has_as_many_parameters_over_many_sizes():
    for hidden, layers, heads in ((32, 1, 2), (64, 3, 4), (128, 2, 2)):
        config = HopeConfig(
            vocab_size=500, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            memory_hidden_size=16,
        )  # fmt: skip
        for same_blocks in (True, False):
            baseline = mixer_baseline(config, same_blocks=same_blocks)
            assert set(baseline.layer_types) == {"full_attention"}
            assert baseline.use_short_convolution == baseline.attention_output_gate == same_blocks
            assert abs(parameter_count(baseline) / parameter_count(config) - 1) < 0.01
