"""The studies behind figures in the docs run, and show what the docs say."""

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import breakdown, gradient_growth

runner = CliRunner()


def test_the_gradient_grows_with_long_inputs_and_shrinks_with_unit_ones():
    grows, shrinks = (gradient_growth.growth_per_chunk(x, 0.02, chunks=20, seed=0) for x in (15.0, 1.0))
    assert grows > 0.1
    assert shrinks < -0.1


@pytest.mark.parametrize("op", ["deep_memory", "self_modifying_memory"])
def test_a_breakdown_tells_calls_apart(op):
    app = typer.Typer()
    app.command()(breakdown.main)
    sizes = ["--tokens", "32", "--heads", "1", "--width", "8", "--chunk-size", "8"]
    result = runner.invoke(app, [op, *sizes])
    assert result.exit_code == 0, result.output
    rows = {line.split()[1]: line.split() for line in result.output.splitlines() if line.startswith("│")}
    assert int(rows["products"][5]) > 10
    assert int(rows["element-wise"][5]) > 10
