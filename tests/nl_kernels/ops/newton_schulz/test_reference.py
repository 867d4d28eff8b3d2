"""The definition: singular values end in the band, vectors stay; schedules are what they promise."""

import pytest
import torch

from nl_kernels import newton_schulz, optimal_coefficients
from nl_kernels.ops.newton_schulz import MUON_COEFFICIENTS
from nl_kernels.ops.newton_schulz.coefficients import evaluate
from tests.nl_kernels.singular_values import singular_value_band


def matrix_with(singular_values, rows, columns, seed=0):
    """A matrix [rows, columns] in fp64 with these singular values, and its singular vectors."""
    rng = torch.Generator().manual_seed(seed)
    size = len(singular_values)
    u = torch.linalg.qr(torch.randn(rows, size, generator=rng, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, size, generator=rng, dtype=torch.float64))[0]
    return (u * singular_values) @ v.mT, u, v


@pytest.mark.parametrize(("rows", "columns"), [(6, 11), (11, 6), (7, 7)])
@pytest.mark.parametrize("coefficients", ["muon", "optimal"])
def test_the_polynomials_act_on_the_singular_values(coefficients, rows, columns):
    size = min(rows, columns)
    values = torch.logspace(0, -2, size, dtype=torch.float64)
    x, u, v = matrix_with(values, rows, columns)
    y = newton_schulz(3.7 * x, coefficients=coefficients, impl="reference")
    triples = [MUON_COEFFICIENTS] * 5 if coefficients == "muon" else optimal_coefficients(5)
    expected = [s / values.norm().item() for s in values.tolist()]
    for triple in triples:
        expected = [evaluate(triple, s) for s in expected]
    torch.testing.assert_close(u.mT @ y @ v, torch.diag(torch.tensor(expected, dtype=torch.float64)))


def test_an_explicit_loop_over_the_definition():
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    triples = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (3.0, -3.0, 1.0)]
    expected = x / x.norm()
    for a, b, c in triples:
        gram = expected @ expected.mT
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    torch.testing.assert_close(newton_schulz(x, steps=3, coefficients=triples, impl="reference"), expected)


def test_muons_band_is_the_one_in_the_docstring():
    low, high = singular_value_band([MUON_COEFFICIENTS] * 5, 0.002)
    assert 0.68 < low < 0.69
    assert 1.2 < high < 1.21
    assert singular_value_band([MUON_COEFFICIENTS] * 5, 0.001)[0] < 0.5


@pytest.mark.parametrize(("steps", "lower", "within"), [(5, 1e-3, 0.136), (6, 1e-3, 2e-3), (5, 1e-2, 1e-5)])
def test_optimal_schedules_end_near_one_and_before_muons(steps, lower, within):
    low, high = singular_value_band(optimal_coefficients(steps, lower), lower)
    assert 1 - within < low < high < 1 + within
    muon_low, muon_high = singular_value_band([MUON_COEFFICIENTS] * steps, lower)
    assert high - low < muon_high - muon_low


@pytest.mark.parametrize("lower", [0.3, 0.05, 0.03])
def test_the_first_quintic_equioscillates(lower):
    """Four alternating extrema of equal size are what makes it the best (Chebyshev)."""
    (triple,) = optimal_coefficients(1, lower)
    grid = torch.linspace(lower, 1.01, 20_001, dtype=torch.float64)
    error = evaluate(triple, grid) - 1
    size = error.abs().max()
    extrema = error[error.abs() > size * (1 - 1e-6)].sign()
    assert (extrema.diff() != 0).sum() == 3


@pytest.mark.parametrize(("steps", "lower"), [(0, 0.1), (3, 0.0), (3, 1.0)])
def test_bad_schedules_are_refused(steps, lower):
    with pytest.raises(ValueError, match="steps" if steps == 0 else "lower_singular_value"):
        optimal_coefficients(steps, lower)
