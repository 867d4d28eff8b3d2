"""What many GPUs could reach at best, from plans."""

import dataclasses
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nl_models.parallel.mesh import Mesh
from nl_models.profiling.dry_run import RunPlan
from nl_models.profiling.plan import Plan
from nl_models.profiling.scale import Machine, bounds, main, spread
from nl_models.training.config import TrainConfig, load_config

RECIPE = Path(__file__).parents[3] / "recipes/340m.yaml"


def test_the_steps_stay_as_large_on_any_number_of_gpus():
    config = load_config(RECIPE)
    meshes = {}
    for gpus in (1, 8, 64, 512):
        spread_out, meshes[gpus] = spread(config, gpus)
        assert spread_out.tokens_per_step == config.tokens_per_step
        assert spread_out.batch_size // meshes[gpus].data <= config.batch_size
    assert meshes == {1: Mesh(1), 8: Mesh(8), 64: Mesh(64), 512: Mesh(128, 4)}
    with pytest.raises(ValueError, match="gpus: 96 do not share out the 128 windows"):
        spread(config, 96)


def test_the_bounds():
    config = TrainConfig(batch_size=16, sequence_length=64)
    rank = Plan(parameters=0, gradients=0, optimizer=0, peak=0, calls=10, moved=300, sent=200)
    machine = Machine(flops=100, memory=10, launch=2, inside=20, across=5)
    plan = RunPlan(config, Mesh(data=8), parameters=1, rank=rank, flops=50, idle=0)
    assert bounds(plan, machine) == {
        "compute": 8 * 100 / 50,
        "memory": 1024 / 30,
        "launches": 1024 / 20,
        "network": 1024 / 10,
    }
    apart = dataclasses.replace(plan, mesh=Mesh(data=16), idle=0.5)
    assert bounds(apart, machine)["network"] == 1024 / 40 / 2
    alone = dataclasses.replace(plan, mesh=Mesh(), rank=dataclasses.replace(rank, sent=0))
    assert bounds(alone, machine)["network"] == float("inf")


def test_the_command(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        '{"hidden_size": 32, "layers": 1, "heads": 2, "batch_size": 2,'
        '"sequence_length": 32, "vocab_size": 99, "model": "gated_delta_net",'
        '"model_options": {"continuum_levels": [{"hidden_size": 9}]}}'
    )
    app = typer.Typer()
    app.command()(main)
    printed = CliRunner().invoke(app, [str(recipe), "--gpus", "1", "--gpus", "4"])
    assert printed.exit_code == 0, printed.output
    rows = printed.output.splitlines()
    assert rows[2].startswith("| data=1,sequence=1 | 2 × 32 | 1 | 0 | ")
    assert rows[3].startswith("| data=2,sequence=2 | 1 × 16 | 1 | 0 | ")
    assert "| – |" in rows[2]
    assert all(row.count("|") == 10 for row in rows)
