"""The command, on a run of the training command, which measures the same at its end."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from nl_models import position, train
from nl_models.data.corpus import read_folder
from nl_models.data.tokenizer import ByteTokenizer
from nl_models.evaluation.position import loss_by_position
from nl_models.hope import HopeForCausalLM

WINDOW = 16


def call(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        (folder / f"{i}.txt").write_text(
            f"file {i}: " + "the quick brown fox jumps over the dog. " * (i + 20)
        )
    return folder


def training(corpus, output, *options):
    return call(
        train.main, "--output", output, "--corpus", corpus, "--tokenizer", "bytes", "--hidden-size", 16,
        "--layers", 1, "--heads", 2, "--batch-size", 2, "--sequence-length", WINDOW, "--steps", 2,
        "--warmup-steps", 1, "--validation-windows", 2, "--device", "cpu", "--threads", 1, *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = training(corpus, folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_training_ends_with_the_measurement(run):
    folder, printed = run
    read = json.loads((folder / "position.json").read_text())
    assert (read["position"]["window"], read["position"]["length"]) == (WINDOW, 16 * WINDOW)
    assert len(read["position"]["starts"]) == 8
    assert (folder / "position.png").stat().st_size > 5000
    assert "128–256" in printed
    assert str(folder / "position.json") in printed


def test_a_training_measures_as_asked_and_once(corpus, run, tmp_path):
    assert training(corpus, tmp_path / "off", "--position-length", 0).exit_code == 0
    assert not (tmp_path / "off" / "position.json").exists()
    assert training(corpus, tmp_path / "a", "--position-length", 40, "--model", "attention").exit_code == 0
    read = json.loads((tmp_path / "a" / "position.json").read_text())
    assert read["position"]["length"] == 2 * WINDOW
    assert read["position"]["buckets"][1]["carried"] is None
    refused = training(corpus, tmp_path / "b", "--position-length", 5)
    assert refused.exit_code == 2
    assert "position_length: expected 0 (none) or at least" in " ".join(refused.output.split())
    assert not (tmp_path / "b").exists()
    # Stopped between the end of the training and that of the measurement: a continued run makes it.
    folder, _ = run
    before = (folder / "position.json").read_bytes()
    (folder / "position.json").write_text("measured before")
    assert call(train.main, "--output", folder, "--resume").exit_code == 0
    assert (folder / "position.json").read_text() == "measured before"
    (folder / "position.json").unlink()
    assert call(train.main, "--output", folder, "--resume").exit_code == 0
    assert json.loads((folder / "position.json").read_text())["position"] == json.loads(before)["position"]


def test_the_command_measures_any_text(run, tmp_path):
    folder, _ = run
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("Sphinx of black quartz, judge my vow. " * 8)
    (text / "b.txt").write_text("Pack my box with five dozen liquor jugs. " * 8)
    options = ("--text", text, "--length", "512", "--window", 32, "--streams", 4, "--device", "cpu")
    result = call(
        position.main, folder, *options, "--output", tmp_path / "out", "--generate", 40, "--turns", 3
    )
    assert result.exit_code == 0, result.output
    read = json.loads((tmp_path / "out" / "position.json").read_text())
    tokenizer = ByteTokenizer()
    tokens = []
    for document in read_folder(text):
        tokens += [*tokenizer.encode(document.text), tokenizer.separator_id]
    wanted = loss_by_position(
        HopeForCausalLM.from_pretrained(folder / "model"), torch.tensor(tokens[:512]), window=32, streams=4
    )
    assert read["position"] == wanted.to_dict()
    assert (len(read["generation"]["samples"][0]), read["conversation"]["turns"]) == (40, 3)
    for name in ("position.png", "generation.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert "256–512" in result.output
    again = call(position.main, folder, *options, "--output", tmp_path / "out")
    assert again.exit_code == 2
    assert "--overwrite" in again.output


def test_without_a_text_it_reads_what_was_held_out(run, tmp_path):
    folder, _ = run
    result = call(position.main, folder, "--length", 256, "--output", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    ours = json.loads((tmp_path / "position.json").read_text())["position"]
    theirs = json.loads((folder / "position.json").read_text())["position"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "/nowhere"], "the folder /nowhere does not exist"),
        (["--length", "many"], "length: expected numbers such as 512 or 16K, got 'many'"),
        (["--length", "1M"], "tokens, 1,048,576 are asked for"),
        (["--window", "0"], "window: expected at least 1"),
        (["--streams", "1000"], "use a longer text or fewer streams"),
        (["--generate", "-1"], "generate: expected at least 0"),
        (["--turns", "1000"], "turns: the text has"),
        (["--temperature", "0", "--generate", "4"], "temperature: expected a positive number"),
        (["--device", "abacus"], "device: expected 'auto'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(run, options, message, tmp_path, capfd):
    folder, _ = run
    result = call(position.main, folder, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in " ".join((result.output + capfd.readouterr().err).split())
    assert not list((tmp_path / "out").glob("*"))  # refused before minutes of measuring


def test_a_folder_without_a_model_is_explained(run, tmp_path):
    assert "give documents to measure it with" in " ".join(
        call(position.main, run[0] / "model").output.split()
    )
    assert "it has no config.json" in " ".join(call(position.main, tmp_path).output.split())
    (tmp_path / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    result = call(position.main, tmp_path)
    assert result.exit_code == 2
    assert f"python -m nl_models.train --output {tmp_path} --resume" in " ".join(result.output.split())
