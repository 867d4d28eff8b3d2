"""Measurements: the figures mean what they say, and a failing one stays alone."""

import io
import json
import math
import multiprocessing

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from nl_models.profile import main, progress_printer
from nl_models.profiling.flops import Moves
from nl_models.profiling.measure import Measurement, Work, measure
from nl_models.profiling.memory import PeakMemory
from nl_models.profiling.process import OVER_TIME, measure_alone
from nl_models.profiling.report import load_profile, plot_profile, profile_table, save_profile
from nl_models.profiling.run import ProfileSettings, profile_models
from nl_models.profiling.subjects import ConfiguredModel

TINY = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "layer_types": "full_attention", "continuum_levels": [{"hidden_size": 32}],
}  # fmt: skip
RECURRENT = {**TINY, "layer_types": "gated_delta_net"}


def work(config=TINY, **changes):
    source = ConfiguredModel(config)
    return Work(
        **{
            "name": "tiny",
            "source": source,
            "mode": "prefill",
            "context": 96,
            "enough_seconds": 0.0,
            **changes,
        }
    )


def test_peak_memory_sees_what_was_freed_again():
    peak = PeakMemory(torch.device("cpu"))
    quiet = peak.bytes()
    block = torch.ones(16 * 2**20)  # 64 MiB
    del block
    assert quiet < 8 * 2**20
    assert 60 * 2**20 < peak.bytes() < 80 * 2**20


@pytest.mark.parametrize("config", [TINY, RECURRENT], ids=["attention", "recurrent"])
@pytest.mark.parametrize("mode", ["prefill", "training", "decode"])
def test_every_mode_gives_consistent_figures(mode, config):
    result = measure(work(mode=mode, config=config, segment=40, decode_tokens=3))
    assert result.status == "ok"
    per_repeat = {"prefill": 96, "training": 96, "decode": 1}[mode]
    assert result.tokens_per_second == pytest.approx(per_repeat / result.seconds)
    assert result.peak_bytes >= 0
    assert (result.state_bytes is None) == (mode == "training")
    low, high = result.quartiles
    assert 0 < low <= result.seconds <= high
    assert result.flops_per_second == result.flops / result.seconds
    assert result.bytes_per_second == result.moved.bytes / result.seconds
    assert result.moved.calls > 10


def test_the_state_of_attention_grows_and_the_recurrent_one_does_not():
    def state(config, mode, context):
        return measure(work(config=config, mode=mode, context=context, decode_tokens=1)).state_bytes

    # Keys and values of one layer: 2 × context × width × 4 bytes, computed in prefill and filled in for
    # decode.
    grown = state(TINY, "prefill", 80) - state(TINY, "prefill", 16)
    assert grown == state(TINY, "decode", 80) - state(TINY, "decode", 16) == 2 * 64 * 16 * 4
    assert state(RECURRENT, "decode", 1) == state(RECURRENT, "decode", 80)


def test_a_point_in_its_own_process_is_ended_at_the_time_limit():
    assert measure_alone(work(), time_limit=120).status == "ok"
    slow = measure_alone(work(mode="training", context=200_000), time_limit=0.5)
    assert (slow.status, slow.seconds) == (OVER_TIME, None)


def test_a_failure_is_reported_and_a_death_recognised(monkeypatch):
    failed = measure_alone(work(config={**TINY, "hidden_size": 15}), time_limit=120)
    assert failed.status.startswith("failed: num_attention_heads")

    class Killed:
        exitcode = -9

        def start(self): ...
        def join(self): ...
        def kill(self): ...

    contexts = type(multiprocessing.get_context("forkserver"))
    monkeypatch.setattr(contexts, "Process", lambda *_, **__: Killed())
    assert measure_alone(work(), time_limit=5).status == "out of memory"


def test_after_a_failure_longer_contexts_are_left_out(monkeypatch):
    def fake(work, *, time_limit):
        status = "ok" if work.context < 32 or work.name == "b" else OVER_TIME
        figures = {"seconds": 1.0, "tokens_per_second": 2.0, "peak_bytes": 3} if status == "ok" else {}
        return Measurement(work.name, work.mode, work.context, status, **figures)

    monkeypatch.setattr("nl_models.profiling.run.measure_alone", fake)
    settings = ProfileSettings(modes=("prefill",), lengths=(64, 16, 32))
    seen = []
    results = profile_models(
        {"a": {}, "b": {}}, settings, report=lambda done, total, m: seen.append((done, total))
    )
    assert [(m.model, m.context, m.status.split(":")[0]) for m in results] == [
        ("a", 16, "ok"), ("b", 16, "ok"), ("a", 32, OVER_TIME), ("b", 32, "ok"),
        ("a", 64, "left out"), ("b", 64, "ok"),
    ]  # fmt: skip
    assert seen == [(i, 6) for i in range(1, 7)]
    rows = profile_table(results)
    assert rows.row_count == 1 + 6  # the mode's heading


def test_the_command_writes_table_plot_and_json(tmp_path):
    app = typer.Typer()
    app.command()(main)
    arguments = [
        "--output", str(tmp_path), "--models", "gated_delta_net,attention", "--lengths", "32,64",
        "--decode-after", "1,64",
        "--hidden-size", "16", "--layers", "1", "--heads", "2", "--vocab-size", "64", "--segment", "32",
        "--device", "cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    content = json.loads((tmp_path / "profile.json").read_text())
    assert set(content) == {"format", "machine", "settings", "measurements"}
    described = {"device", "platform", "python", "torch", "transformers", "nl_kernels"}
    ceilings = {"matmul_flops_per_second", "copy_bytes_per_second"}
    assert described | ceilings == set(content["machine"])
    for name in ("TFLOP/s", "GB/s", "calls", "large copy"):
        assert name in result.output
    assert len(content["measurements"]) == 2 * (2 + 2 + 2)
    measurements, settings = load_profile(tmp_path / "profile.json")
    assert all(m.status == "ok" and math.isfinite(m.tokens_per_second) for m in measurements)
    assert settings["lengths"] == [32, 64]
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "--overwrite" in CliRunner().invoke(app, ["--help"]).output


def test_lines_and_the_table_have_80_columns():
    """Of the demo's longest name, a million tokens and terabytes."""
    points = [
        Measurement(
            "hope-attention",
            "training",
            2**20,
            "ok",
            1.0,
            1234567.0,
            2**37,
            2**36,
            5,
            1,
            (0.9, 1.1),
            10**15,
            Moves(10**12, 123456),
        ),
        Measurement("hope-attention", "training", 2**21, OVER_TIME),
        Measurement("hope-attention", "training", 2**22, "left out: a shorter context failed"),
        Measurement("hope-attention", "training", 2**23, f"failed: {'many words ' * 20}"),
    ]
    out = io.StringIO()
    console = Console(file=out, width=80)
    for number, point in enumerate(points):
        progress_printer(console)(number, 100, point)
    console.print(profile_table(points, 2e15, 4e12))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "[0/100] hope-attention training 1,048,576: 1,234,567 tokens/s, 131,072.0 MiB" in lines
    assert not any("…" in line for line in lines)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("nl_models.profile.profile_models", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("mine")
    app = typer.Typer()
    app.command()(main)
    refused = CliRunner().invoke(app, ["--output", str(tmp_path / "file" / "profile"), "--device", "cpu"])
    assert refused.exit_code == 2
    assert "a file stands where a folder should" in " ".join(refused.output.split())


def test_bad_settings_and_files_are_refused(tmp_path):
    for name, options in (
        ("modes", {"modes": ("sleep",)}),
        ("lengths", {"lengths": ()}),
        ("lengths", {"lengths": (1,)}),
        ("batches", {"batches": (0,)}),
        ("decode_after", {"decode_after": (0,)}),
        ("segment", {"segment": 0}),
        ("threads", {"threads": 0}),
        ("time_limit", {"time_limit": 0.0}),
    ):
        with pytest.raises(ValueError, match=f"^{name}:"):
            ProfileSettings(**options)
    with pytest.raises(ValueError, match=r"^mode:"):
        work(mode="sleep")
    with pytest.raises(ValueError, match=r"^context:"):
        work(context=0)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not a profile"):
        load_profile(tmp_path / "x.json")


def test_a_profile_without_some_points_is_still_plotted_and_saved(tmp_path):
    points = [
        Measurement("a", "decode", 1, "ok", 0.5, 2.0, 100, 50, 1),
        Measurement("a", "decode", 9, "out of memory"),
        Measurement("a", "prefill", 9, "out of memory"),
    ]
    plot_profile(points, tmp_path / "plot.png", title="t")
    save_profile(tmp_path / "p.json", points, settings={}, machine={})
    assert load_profile(tmp_path / "p.json")[0] == points
