"""The recipes: each says the size that it is named after, is planned, and trains where it is made small."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nl_models.cli import app
from nl_models.training.config import TrainConfig, load_config
from nl_models.training.metrics import read_metrics
from nl_models.training.model import hope_config, preset_options

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALL = [
    "--vocab-size", "300", "--hidden-size", "32", "--layers", "2", "--heads", "2", "--sequence-length", "32",
    "--batch-size", "2", "--gradient-accumulation", "2", "--steps", "2", "--warmup-steps", "1",
    "--validation-windows", "2", "--device", "cpu", "--threads", "1", "--position-length", "0",
    "--model-option", 'continuum_levels=[{"hidden_size": 32, "chunk_size": 16}, {"hidden_size": 32}]',
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox jumps over the dog. " * (i + 3))
    return str(folder)


def test_there_is_one_for_each_size_of_the_paper():
    assert [recipe.stem for recipe in RECIPES] == ["1.3b", "340m", "760m"]


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=() if path is RECIPES[0] else pytest.mark.slow) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_is_planned_and_trains(recipe, corpus, tmp_path):
    config = load_config(recipe)
    sizes = preset_options(recipe.stem)
    assert hope_config(config, 32_000, 0) == hope_config(TrainConfig(**sizes), 32_000, 0)
    assert config.tokens_per_step == 2**19
    given = ["train", "--config", str(recipe), "--corpus", corpus, *SMALL]
    planned = CliRunner().invoke(app, [*given, "--dry-run", "--mesh", "data=2"])
    assert planned.exit_code == 0, planned.output
    assert "a checkpoint a block" in planned.output
    trained = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "run")])
    assert trained.exit_code == 0, trained.output
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3
    assert (tmp_path / "run" / "model").is_dir()
