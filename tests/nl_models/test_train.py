"""The training command: options, errors, and a process that is killed without warning."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nl_models.files import locked
from nl_models.train import main
from nl_models.training.metrics import read_metrics
from tests.nl_models.full_disk import small_files

APP = typer.Typer()
APP.command()(main)
TINY = [
    "--model", "attention", "--tokenizer", "bytes", "--hidden-size", "16", "--layers", "1", "--heads", "2",
    "--batch-size", "2", "--sequence-length", "16", "--steps", "40", "--warmup-steps", "3",
    "--evaluate-every",
    "13", "--validation-windows", "2", "--checkpoint-every", "7", "--device", "cpu", "--threads", "1",
]  # fmt: skip
PATIENCE = 600  # seconds for a process to start or to end on a busy machine; none takes 20 of its own
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox jumps over the dog. " * (i + 3))
    return folder


def call(*arguments):
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def curve(run):
    timing = {"tokens_per_second"}
    return [{k: v for k, v in r.items() if k not in timing} for r in read_metrics(run / "metrics.jsonl")]


def test_help_lists_every_option_with_its_default():
    words = call("--help").output.replace("│", " ").split()
    for expected in ("--learning-rate", "--resume", "--config", "--model-option", "--threads", "1000."):
        assert expected in words


# Runs the command, and kills its own process at the n-th step recorded or file flushed.
DYING = """
import os, signal, sys, typer
from nl_models import files, train
from nl_models.console import Display
left = int(sys.argv.pop(1))
def dying(function):
    def wrapped(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped
files._flush = dying(files._flush)
Display.advance = dying(Display.advance)
typer.run(train.main)
"""


def test_a_killed_process_continues_to_the_same_curve(corpus, tmp_path):
    whole = call("--output", tmp_path / "whole", "--corpus", corpus, *TINY)
    assert whole.exit_code == 0, whole.output
    assert "bits per byte" in whole.output

    killed = tmp_path / "killed"
    # Making the run's folder takes three flushes; 40 steps with their checkpoints more than 100 events.
    events = (random.randint(4, 60), random.randint(1, 25))
    options = ["--output", killed, "--corpus", corpus, *TINY]
    for event in events:
        command = [sys.executable, "-c", DYING, str(event), *options]
        assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == -signal.SIGKILL
        assert not (killed / "model").exists()
        options = ["--output", killed, "--resume"]

    resumed = call("--output", killed, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert curve(killed) == curve(tmp_path / "whole"), f"killed at events {events}"
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (killed, tmp_path / "whole")]
    assert weights[0] == weights[1]
    assert not list(killed.rglob(".incomplete-*"))

    again = call("--output", killed, "--resume")
    assert again.exit_code == 0
    assert "is complete" in again.output


def test_ctrl_c_saves_and_says_how_to_continue(corpus, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "nl_models.train", "--output", run, "--corpus", corpus, *TINY]
    with subprocess.Popen(
        [*command, "--steps", "100000"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            # Sent earlier, it would interrupt an import.
            while not (run / "metrics.jsonl").exists():
                assert process.poll() is None, f"it ended with status {process.returncode}"
                assert time.monotonic() < deadline, "it has not begun to train"
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=PATIENCE)[0]
        finally:
            process.kill()  # if one of these has failed: the 100,000 steps would be waited for
    assert process.returncode == 130
    assert f"python -m nl_models.train --output {run} --resume" in " ".join(output.split())
    last = max(record["step"] for record in read_metrics(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step-{last:08d}" / "state.json").is_file()


def test_the_command_line_wins_over_the_file(corpus, tmp_path):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"steps": 5, "learning_rate": 0.5, "model_options": {"rope_theta": 7.0}}))
    result = call(
        "--output",
        tmp_path / "run",
        "--config",
        file,
        "--corpus",
        corpus,
        *TINY,
        "--steps",
        3,
        "--warmup-steps",
        1,
    )
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["steps"], saved["learning_rate"]) == (3, 0.5)
    assert saved["model_options"]["rope_theta"] == 7.0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("options", "expected"), [((60,), 6), ((60, "--warmup-steps", 9), 9), ((5000,), 100)]
)
def test_a_short_run_warms_up_for_a_tenth_of_it(options, expected, tmp_path, monkeypatch):
    seen = []

    def stopped(folder, config, **_):
        seen.append(config.warmup_steps)
        return 0

    monkeypatch.setattr("nl_models.train.train", stopped)
    call("--output", tmp_path / "run", "--steps", *options)
    assert seen == [expected]


def test_the_smallest_preset_is_a_whole_first_run(corpus, tmp_path, monkeypatch):
    seen = []

    def stopped(folder, config, **_):
        seen.append(config)
        return 0

    monkeypatch.setattr("nl_models.train.train", stopped)
    call("--output", tmp_path / "run", "--preset", "tiny", "--steps", 7)
    (first,) = seen
    assert (first.tokenizer, first.vocab_size, first.hidden_size, first.steps) == ("bpe", 1024, 128, 7)
    assert first.model_options["initializer_range"] == 0.02


@pytest.mark.parametrize(("chunk_size", "noted"), [(5, False), (6, True)])
def test_a_level_that_windows_are_too_short_for_is_noted(chunk_size, noted, corpus, tmp_path):
    levels = json.dumps([{"hidden_size": 8, "chunk_size": chunk_size}])
    options = [*TINY, "--steps", 1, "--warmup-steps", 0, "--model-option", f"continuum_levels={levels}"]
    result = call("--output", tmp_path / "run", "--corpus", corpus, *options)
    assert result.exit_code == 0, result.output
    assert ("windows of 16 tokens hold fewer than three chunks" in " ".join(result.output.split())) == noted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "/nowhere"], "the folder /nowhere does not exist"),
        (["--learning-rate", "-1"], "learning_rate: expected a positive number"),
        (["--model", "rnn"], "model: expected one of"),
        (["--tokenizer", "words"], "tokenizer: expected one of ('bytes', 'bpe'), or a folder"),
        (["--heads", "3"], "num_attention_heads: expected a divisor of hidden_size=16"),
        (["--model-option", "rope_thet=3"], "HopeConfig has no rope_thet"),
        (["--model-option", "rope_theta"], "expected NAME=VALUE"),
        (["--config", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--resume"], "is not a training run"),
        (["--carry-state"], "carry_state: a model with attention layers has no state"),
        (["--fsdp"], "fsdp: needs processes to shard over"),
        (["--track", "nothing"], "track: expected one of"),
        (["--model", "titans", "--carry-state", "--batch-size", "5000"], "fewer than the 5,000 streams"),
        (["--sequence-length", "100000"], "are too few for windows of 100,000"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(options, message, corpus, tmp_path, capfd):
    corpus_options = [] if "--corpus" in options else ["--corpus", corpus]
    result = call("--output", tmp_path / "run", *corpus_options, *TINY, *options)
    assert result.exit_code == 2
    assert message in " ".join((result.output + capfd.readouterr().err).split())
    # Also what only a reading of the corpus shows: a folder would stand in the way of the next try.
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_neither_overwritten_nor_changed(corpus, tmp_path):
    short = ["--corpus", corpus, *TINY, "--steps", "4"]
    assert call("--output", tmp_path / "run", *short).exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refused = call("--output", tmp_path / "run", *short)
    assert refused.exit_code == 2
    assert "--resume" in refused.output
    changed = call("--output", tmp_path / "run", "--resume", "--learning-rate", "0.5")
    assert changed.exit_code == 2
    assert "learning_rate (0.002 → 0.5)" in " ".join(changed.output.split())
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_two_processes_cannot_train_in_one_folder(corpus, tmp_path):
    run = tmp_path / "run"
    assert call("--output", run, "--corpus", corpus, *TINY, "--steps", "4").exit_code == 0
    with locked(run / ".lock", "as another process does"):
        refused = call("--output", run, "--resume", "--steps", "5")
    assert refused.exit_code == 2
    assert "another process is training in this folder" in " ".join(refused.output.split())
    assert call("--output", run, "--resume", "--steps", "5").exit_code == 0


def test_one_process_goes_on_with_a_run_that_was_begun_sharded(corpus, tmp_path):
    run = tmp_path / "run"
    assert call("--output", run, "--corpus", corpus, *TINY, "--steps", "4").exit_code == 0
    options = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**options, "fsdp": True}))
    refused = call("--output", run, "--resume", "--steps", "5")
    assert refused.exit_code == 2
    assert "or say --no-fsdp" in " ".join(refused.output.split())
    assert call("--output", run, "--resume", "--steps", "5", "--no-fsdp").exit_code == 0


def test_options_of_a_continued_run_are_checked_with_its_own(corpus, tmp_path):
    """Not with the defaults, whose warm-up is longer than this run."""
    run = tmp_path / "run"
    assert call("--output", run, "--corpus", corpus, *TINY, "--steps", "4").exit_code == 0
    again = call("--output", run, "--resume", "--steps", "4", "--checkpoint-every", "2")
    assert (again.exit_code, "is complete" in again.output) == (0, True), again.output
    shorter = call("--output", run, "--resume", "--steps", "3")
    assert shorter.exit_code == 2
    assert "steps (4 → 3)" in " ".join(shorter.output.split())
    assert "unknown option" not in shorter.output


def test_a_finished_run_is_given_more_steps(corpus, tmp_path):
    """The first steps stay as they were, the schedule too; the model is that of the last step."""
    options = ["--corpus", corpus, *TINY, "--steps", "4", "--warmup-steps", "1"]
    assert call("--output", tmp_path / "run", *options).exit_code == 0
    before, position = curve(tmp_path / "run"), (tmp_path / "run" / "position.json").read_bytes()
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert call("--output", tmp_path / "run", "--resume", "--steps", "6").exit_code == 0
    after = curve(tmp_path / "run")
    assert after[: len(before)] == before
    assert [r["step"] for r in after if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert {r["learning_rate"] for r in after[-3:-1]} == {before[-2]["learning_rate"]}
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != weights
    assert (tmp_path / "run" / "position.json").read_bytes() != position
    planned = call("--output", tmp_path / "planned", *options, "--steps", "6", "--decay-steps", "4")
    assert planned.exit_code == 0
    assert [r for r in curve(tmp_path / "planned") if r["kind"] == "train"] == [
        r for r in after if r["kind"] == "train"
    ]
    assert "all 6 steps are done" in " ".join(call("--output", tmp_path / "run", "--resume").output.split())


def test_a_run_begins_with_the_weights_of_another(corpus, tmp_path):
    options = ["--corpus", corpus, *TINY, "--position-length", "0"]
    assert call("--output", tmp_path / "first", *options).exit_code == 0
    second = call(
        "--output",
        tmp_path / "second",
        *options,
        "--init-from",
        tmp_path / "first",
        "--steps",
        "1",
        "--warmup-steps",
        "0",
    )
    assert second.exit_code == 0, second.output
    first_loss = curve(tmp_path / "second")[0]["loss"]
    assert first_loss < curve(tmp_path / "first")[20]["loss"] < curve(tmp_path / "first")[0]["loss"]
    for changed, message in (
        (["--hidden-size", "32"], "has a model of other sizes"),
        (["--tokenizer", "bpe", "--vocab-size", "300"], "has another tokenizer"),
        (["--init-from", "/nowhere"], "init_from: no folder /nowhere"),
    ):
        refused = call("--output", tmp_path / "third", *options, "--init-from", tmp_path / "first", *changed)
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())
        assert not (tmp_path / "third").exists()


def test_what_the_disk_refuses_is_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = call("--output", tmp_path / "file" / "run", "--corpus", corpus, *TINY)
    assert below.exit_code == 2
    assert "a file stands where a folder should; choose another place" in " ".join(below.output.split())
    nowhere = call("--output", "/proc/nowhere/run", "--corpus", corpus, *TINY)
    assert nowhere.exit_code == 2
    assert "/proc/nowhere" in nowhere.output

    run = tmp_path / "run"
    with small_files(16_000):  # room for the tokens, and for no checkpoint
        full = call("--output", run, "--corpus", corpus, *TINY)
    assert full.exit_code == 2
    assert "File too large; choose a place on a disk that takes larger files" in " ".join(full.output.split())
    assert call("--output", run, "--resume").exit_code == 0
    with small_files(1_000):  # not even for the tokens
        assert call("--output", tmp_path / "second", "--corpus", corpus, *TINY).exit_code == 2
    assert not (tmp_path / "second").exists()


def test_lines_have_80_columns_but_for_paths(corpus, tmp_path):
    result = call("--output", tmp_path / "run", "--corpus", corpus, *TINY, "--steps", "20")
    assert result.exit_code == 0
    lines = [line for line in result.output.splitlines() if str(tmp_path) not in line]
    assert len(lines) > 6
    assert max(map(len, lines)) <= 80


def test_weights_to_begin_with_outlast_a_kill_before_the_first_checkpoint(corpus, tmp_path):
    given = ["--corpus", corpus, *TINY, "--steps", "3", "--warmup-steps", "0"]
    assert call("--output", tmp_path / "old", *given).exit_code == 0
    new = [*given, "--init-from", tmp_path / "old", "--tokenizer", tmp_path / "old" / "model"]
    assert call("--output", tmp_path / "whole", *new).exit_code == 0
    command = [sys.executable, "-c", DYING, "5", "--output", tmp_path / "killed", *new]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "config.json").is_file()
    assert not list(tmp_path.glob("killed/checkpoints/step-*"))
    assert call("--output", tmp_path / "killed", "--resume").exit_code == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
