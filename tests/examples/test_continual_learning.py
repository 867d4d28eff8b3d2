"""The example runs from training to plots, at sizes that mean nothing; its readers and its comparison."""

import json

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from examples import continual_report
from examples.continual_learning import READERS, AdamWReader, Level, Reader, main
from nl_models.continual import ContinuumLearner, StepRule
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.surgery.models import VOCABULARY, make_model


def run(*arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def random_tokens(*shape, seed):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def test_the_example_runs(tmp_path):
    result = run("--small", "--streams", "2", "--readers", "AdamW; CMS, 2 levels", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("frozen", "AdamW", "CMS, 2 levels", "results.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    settings = continual_report.settings_of(records)
    assert list(settings) == ["frozen", "AdamW", "CMS, 2 levels"]
    (frozen,) = settings.pop("frozen")
    for reader in settings.values():
        assert len(reader) == 4
        for setting in reader:
            assert [record["stream"] for record in setting] == [0, 1]
            for record in setting:
                # All start from the frozen model, and what learns moves.
                assert record["code"][0] == pytest.approx(frozen[0]["code"][0], abs=1e-5)
                assert record["code"][-1] < record["code"][0]
                assert record["as_read"] < frozen[record["stream"]]["as_read"]
                assert record["tokens"] == [0, 2048, 4096]
    for name in ("continual-learning.png", "continual-learning-streams.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_it_explains_itself_and_refuses_other_readers():
    shown = run("--help")
    assert shown.exit_code == 0
    assert "--readers" in shown.output
    refused = run("--readers", "SGD;CMS")
    assert refused.exit_code != 0
    assert "'CMS' is none of SGD" in " ".join(refused.output.replace("│", " ").split())


def test_every_reader_has_as_many_settings():
    assert {len(level.rates) for levels in READERS.values() for level in levels} == {4}


def test_rows_of_a_reader_are_a_learner_for_each_setting_and_stream():
    model = make_model("llama", torch.float64)
    levels = (Level(0.5, 4, "sgd", (0.05, 0.1)), Level(0.5, 8, "muon", (0.02, 0.03)))
    tokens, windows = random_tokens(2, 18, seed=0), random_tokens(3, 9, seed=1)
    reader = Reader(model, levels, streams=2)
    losses = reader.read(tokens.repeat(2, 1))
    held_out = reader.held_out(windows)
    sizes = [{"fraction": level.fraction, "chunk_size": level.chunk_size} for level in levels]
    for row, (setting, stream) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        rules = [StepRule(rule=level.rule, rate=level.rates[setting], momentum_decay=0.0) for level in levels]
        alone = ContinuumLearner(convert_mlp_to_continuum(model, sizes), rules, nested=True)
        assert float(losses[row]) == pytest.approx(float(alone.learn([tokens[stream]]).loss), abs=1e-7)
        assert float(held_out[row]) == pytest.approx(float(alone.loss(windows).mean()), abs=1e-7)


def test_adamw_is_that_of_torch_on_the_models_own_parameters():
    model = make_model("llama", torch.float64)
    tokens, windows = random_tokens(2, 10, seed=0), random_tokens(3, 4, seed=1)
    reader = AdamWReader(model, (Level(1.0, 3, "adamw", (1e-2, 3e-2)),), streams=2)
    reader.learner.context_length = 3  # nothing is carried from piece to piece but the weights
    losses = reader.read(tokens.repeat(2, 1))
    held_out = reader.held_out(windows)
    fork = reader.fork()
    fork.read(tokens.repeat(2, 1))
    assert torch.equal(held_out, reader.held_out(windows))
    assert not torch.equal(held_out, fork.held_out(windows))
    for row, (rate, stream) in enumerate([(1e-2, 0), (1e-2, 1), (3e-2, 0), (3e-2, 1)]):
        plain = make_model("llama", torch.float64)
        mlps = [plain.get_parameter(name) for name, _ in plain.named_parameters() if ".mlp." in name]
        mlps = [weight for weight in mlps if weight.ndim == 2]  # biases have no levels
        optimizer = torch.optim.AdamW(mlps, lr=rate, weight_decay=0.0)
        found = []
        for start in (0, 3, 6):
            piece = tokens[stream, start : start + 4]
            loss = F.cross_entropy(plain(piece[None, :-1]).logits[0], piece[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        assert float(losses[row]) == pytest.approx(sum(found) / 3, abs=1e-5)
        logits = plain(windows[:, :-1]).logits
        assert float(held_out[row]) == pytest.approx(
            float(F.cross_entropy(logits.mT, windows[:, 1:]).detach()), abs=1e-5
        )


def test_the_least_rise_at_equal_gain():
    def setting(code, prose):
        return [{"code": [9.0, code], "prose": [9.0, prose]}]

    frozen = setting(5.0, 4.0)
    settings = [setting(4.8, 4.1), setting(4.6, 4.5), setting(4.7, 4.2)]
    rise = continual_report.least_rise
    assert rise(settings, frozen, "code", 0.1) == pytest.approx(0.05)
    assert rise(settings, frozen, "code", 0.3) == pytest.approx(0.2)  # the last, not the line before it
    assert rise(settings, frozen, "code", 0.4) == pytest.approx(0.5)
    assert rise(settings, frozen, "code", 0.41) is None
