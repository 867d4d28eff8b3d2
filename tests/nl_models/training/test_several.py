"""Trainings side by side in processes of their own: the same runs, and how they end early."""

import dataclasses
import io
import multiprocessing
import os
import re
import signal
import threading
import time

import pytest
import torch
from rich.console import Console

from nl_models.data.prepare import prepare_data
from nl_models.training.checkpoint import list_checkpoints
from nl_models.training.loop import DivergedError, Trainer, create_run
from nl_models.training.metrics import read_metrics
from nl_models.training.model import build_model
from nl_models.training.several import Job, train_several


@pytest.fixture
def jobs(tmp_path, config):
    """Two short runs on the same data."""
    config = dataclasses.replace(
        config, model="attention", hidden_size=16, layers=1, heads=2, gradient_accumulation=1, steps=6
    )
    prepare_data(config, tmp_path / "data")
    return [
        Job(
            f"seed {seed}",
            tmp_path / f"seed-{seed}",
            dataclasses.replace(config, seed=seed),
            tmp_path / "data",
        )
        for seed in (1, 2)
    ]


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def console():
    return Console(file=io.StringIO(), force_terminal=False, width=100)


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_run_is_what_it_is_alone(jobs, tmp_path, at_once):
    shown = console()
    seconds = train_several(jobs, at_once=at_once, console=shown)
    assert set(seconds) == {"seed 1", "seed 2"}
    assert all(s > 0 for s in seconds.values())
    torch.set_num_threads(1)
    for job in jobs:
        alone = tmp_path / "alone" / job.name
        create_run(alone, job.config)
        data = prepare_data(job.config, job.data)
        model = build_model(job.config, data.tokenizer.vocab_size, data.tokenizer.separator_id)

        class Silent:
            advance = note = lambda *_, **__: None

        Trainer(alone, job.config, model, data).run(Silent())
        assert losses(job.folder) == losses(alone)
        assert (job.folder / "model" / "model.safetensors").exists()
        assert f"{job.name}  6/6  validation " in shown.file.getvalue()
    assert losses(jobs[0].folder) != losses(jobs[1].folder)


def test_on_a_terminal_the_runs_have_bars(jobs):
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    train_several(jobs, at_once=2, console=shown)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.file.getvalue())  # without colours and movements
    for job in jobs:
        assert re.search(rf"{job.name} .*6/6", text)


def test_a_run_that_diverges_ends_all_with_its_error(jobs):
    wild = dataclasses.replace(jobs[0].config, learning_rate=1e30, warmup_steps=0, clip_norm=1e30, steps=1000)
    with pytest.raises(DivergedError, match="Lower the learning rate"):
        train_several([dataclasses.replace(jobs[0], config=wild), jobs[1]], at_once=1, console=console())
    assert not jobs[1].folder.exists()


def test_a_folder_that_is_taken_is_refused_and_left_alone(jobs):
    jobs[0].folder.mkdir()
    (jobs[0].folder / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        train_several(jobs[:1], at_once=1, console=console())
    assert [p.name for p in jobs[0].folder.iterdir()] == ["mine"]


def test_a_signal_stops_the_runs_after_a_saved_step(jobs):
    long = [dataclasses.replace(j, config=dataclasses.replace(j.config, steps=100_000)) for j in jobs]

    def interrupt():
        while not all((job.folder / "metrics.jsonl").exists() for job in long):
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train_several(long, at_once=2, console=console())
    thread.join()
    for job in long:
        last = read_metrics(job.folder / "metrics.jsonl")[-1]["step"]
        assert list_checkpoints(job.folder / "checkpoints")[-1].name == f"step-{last:08d}"


def test_a_process_that_dies_is_reported(jobs):
    long = dataclasses.replace(jobs[0], config=dataclasses.replace(jobs[0].config, steps=100_000))
    found = []

    def kill():
        while not (long.folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        found.extend(multiprocessing.active_children())
        for child in found:
            os.kill(child.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RuntimeError, match="seed 1: its process, or one beside it, ended before its time"):
        train_several([long], at_once=1, console=console())
    thread.join()
    assert found
