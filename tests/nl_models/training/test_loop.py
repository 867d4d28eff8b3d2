"""The training loop: an interrupted run is the uninterrupted one, and refuses what would make it another."""

import dataclasses
import io
import json
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from nl_models.console import Display
from nl_models.training import loop
from nl_models.training.checkpoint import list_checkpoints
from nl_models.training.distributed import choose_device
from nl_models.training.loop import (
    DivergedError,
    continued_config,
    create_run,
    stop_signal,
)
from nl_models.training.metrics import read_metrics
from nl_models.training.model import hope_config

TIMING = "tokens_per_second"


def run(trainer, stop=lambda: False):
    console = Console(file=io.StringIO())
    return trainer.run(Display(console, total=12, start=trainer.step, label="x"), stop)


def curve(folder):
    return [
        {k: v for k, v in record.items() if k != TIMING} for record in read_metrics(folder / "metrics.jsonl")
    ]


class StopAt:
    """Stands for a signal that arrives during a step; ``as_kill``: an exception nothing may catch."""

    def __init__(self, step, trainer, *, as_kill=False):
        self.step, self.trainer, self.as_kill = step, trainer, as_kill

    def __call__(self):
        if self.as_kill and self.trainer.step >= self.step:
            raise SystemExit("killed")
        return self.trainer.step >= self.step


@pytest.fixture
def uninterrupted(tmp_path, config, make_trainer):
    assert run(make_trainer(tmp_path / "whole", config)) == 12
    return curve(tmp_path / "whole")


def test_a_run_learns_and_records_every_step_and_evaluation(uninterrupted, tmp_path):
    steps = [r["step"] for r in uninterrupted if r["kind"] == "train"]
    assert steps == list(range(1, 13))
    validation = [r for r in uninterrupted if r["kind"] == "validation"]
    assert [r["step"] for r in validation] == [4, 8, 12]
    assert validation[-1]["loss"] < validation[0]["loss"] < 5.6
    # Bytes: every predicted token but the separators is one byte.
    assert validation[0]["bits_per_byte"] == pytest.approx(validation[0]["loss"] / 0.6931, rel=0.05)
    assert (tmp_path / "whole" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "lm_head.weight" not in load_file(tmp_path / "whole" / "model" / "model.safetensors")  # tied


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_a_killed_run_continues_to_the_same_curve(step, uninterrupted, tmp_path, config, make_trainer):
    folder = tmp_path / "killed"
    trainer = make_trainer(folder, config)
    with pytest.raises(SystemExit):
        run(trainer, StopAt(step, trainer, as_kill=True))
    trainer = make_trainer(folder, config)
    assert trainer.resume() == {1: 0, 5: 4, 7: 5, 11: 10}[step]
    assert run(trainer) == 12
    assert curve(folder) == uninterrupted


@pytest.mark.parametrize("optimizer", ["muon", "m3", "delta_momentum", "deep_momentum"])
def test_a_run_with_another_optimizer_continues_to_the_same_curve(optimizer, tmp_path, config, make_trainer):
    config = dataclasses.replace(config, optimizer=optimizer)
    run(make_trainer(tmp_path / "whole", config))
    whole = curve(tmp_path / "whole")
    losses = [r["loss"] for r in whole if r["kind"] == "validation"]
    assert losses[-1] < losses[0]
    trainer = make_trainer(tmp_path / "killed", config)
    with pytest.raises(SystemExit):
        run(trainer, StopAt(11, trainer, as_kill=True))
    trainer = make_trainer(tmp_path / "killed", config)
    assert trainer.resume() == 10
    run(trainer)
    assert curve(tmp_path / "killed") == whole


def test_a_stopped_run_saves_its_last_step(uninterrupted, tmp_path, config, make_trainer):
    folder = tmp_path / "stopped"
    trainer = make_trainer(folder, config)
    assert run(trainer, StopAt(7, trainer)) == 7
    assert list_checkpoints(folder / "checkpoints")[-1].name == "step-00000007"
    trainer = make_trainer(folder, config)
    assert trainer.resume() == 7
    run(trainer)
    assert curve(folder) == uninterrupted


def test_tensorboard_has_every_figure_that_the_log_has(tmp_path, config, make_trainer):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = dataclasses.replace(config, track="tensorboard", steps=4)
    trainer = make_trainer(tmp_path / "run", config)
    run(trainer, StopAt(3, trainer))
    trainer = make_trainer(tmp_path / "run", config)
    trainer.resume()
    run(trainer)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tracker")).Reload()
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        for name, value in record.items():
            if name != "kind":
                found = {event.step: event.value for event in events.Scalars(f"{record['kind']}/{name}")}
                assert found[record["step"]] == pytest.approx(value, rel=1e-6), name


def test_gradient_accumulation_equals_a_larger_batch(tmp_path, config, make_trainer, monkeypatch):
    config = dataclasses.replace(config, steps=3)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, **_: x)
    losses = {}
    for parts in (1, 2, 4):
        one = dataclasses.replace(config, gradient_accumulation=parts, batch_size=4 // parts)
        run(make_trainer(tmp_path / str(parts), one))
        losses[parts] = [r["loss"] for r in curve(tmp_path / str(parts)) if r["kind"] == "train"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1][2] < losses[1][0]


def test_a_diverged_run_stops_and_keeps_its_checkpoints(tmp_path, config, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path / "run", config)
    monkeypatch.setattr(
        loop, "clip_grad_norm_", lambda *_: torch.tensor(float("nan") if trainer.step == 6 else 1.0)
    )
    with pytest.raises(DivergedError, match="step 7: loss"):
        run(trainer)
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000004",
        "step-00000005",
    ]


def test_a_damaged_checkpoint_stops_the_resume(tmp_path, config, make_trainer):
    folder = tmp_path / "run"
    run(make_trainer(folder, config))
    newest = list_checkpoints(folder / "checkpoints")[-1]
    (newest / "__0_0.distcp").write_bytes((newest / "__0_0.distcp").read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        make_trainer(folder, config).resume()


def test_an_existing_folder_is_never_overwritten(tmp_path, config):
    folder = tmp_path / "run"
    folder.mkdir()
    create_run(folder, config)  # an empty folder holds nothing to lose
    with pytest.raises(ValueError, match="--resume"):
        create_run(folder, config)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        create_run(tmp_path / "file", config)


def test_a_continuation_keeps_what_defines_the_result(tmp_path, config):
    create_run(tmp_path / "run", config)
    assert continued_config(tmp_path / "run", {"steps": 12, "keep_checkpoints": 9}).keep_checkpoints == 9
    with pytest.raises(ValueError, match=r"steps \(12 → 11\)"):
        continued_config(tmp_path / "run", {"steps": 11})
    with pytest.raises(ValueError, match=r"learning_rate \(0.01 → 0.5\)"):
        continued_config(tmp_path / "run", {"learning_rate": 0.5})
    with pytest.raises(ValueError, match="not a training run"):
        continued_config(tmp_path, {})
    (tmp_path / "run" / "config.json").write_text(json.dumps({"unknown": 1}))
    with pytest.raises(ValueError, match="unknown option"):
        continued_config(tmp_path / "run", {})


def test_a_continued_run_keeps_its_form_of_momentum(tmp_path, config):
    """A run folder names it; one that does not is of a version that had the sum alone."""
    given = {"memory_momentum": True}
    create_run(tmp_path / "run", dataclasses.replace(config, model_options=given))
    options = continued_config(tmp_path / "run", {"model_options": given}).model_options
    assert options["memory_rule"] == {"error_at": "anchor", "momentum": "average"}
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_options": given}))
    older = continued_config(tmp_path / "run", {}).model_options
    assert older["memory_rule"] == {"error_at": "snapshot", "momentum": "sum"}
    assert older["memory_values"] == "unit"
    with pytest.raises(ValueError, match="model_options"):
        continued_config(tmp_path / "run", {"model_options": given})


def test_a_run_of_version_0_1_is_continued_by_todays_names(tmp_path, config):
    create_run(tmp_path / "run", config)
    file = tmp_path / "run" / "config.json"
    old = {"memory_implementation": "auto", "continuum_implementation": "eager"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_options": old}))
    options = continued_config(tmp_path / "run", {}).model_options
    older = {"memory_rule": {"error_at": "snapshot"}, "memory_values": "unit"}
    assert options == {"memory_impl": None, "continuum_impl": "eager", **older}
    with pytest.raises(ValueError, match=r"has no continuum_implementation \(now continuum_impl\)"):
        hope_config(dataclasses.replace(config, model_options=old), 256, 0)


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stop_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        choose_device("cuda:1")
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match="device: expected"):
            choose_device(name)
