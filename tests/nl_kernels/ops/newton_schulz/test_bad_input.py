"""Every refusal names the argument."""

import pytest
import torch

from nl_kernels import newton_schulz


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor"),
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "x: expected one of"),
        ({"x": torch.ones(3)}, ValueError, r"x: expected shape \[..., m, n\]"),
        ({"x": torch.ones(2, 2, requires_grad=True)}, ValueError, "x: newton_schulz has no derivative"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.0}, TypeError, "steps"),
        ({"coefficients": "moun"}, ValueError, "coefficients: expected 'muon', 'optimal'"),
        ({"coefficients": [(1.0, 2.0)]}, ValueError, "coefficients: expected triples"),
        ({"coefficients": [(1.0, 2.0, float("nan"))]}, ValueError, "coefficients: expected triples"),
        ({"coefficients": [(1.0, 2.0, 3.0)] * 3}, ValueError, "expected 1 triple or steps = 5"),
        ({"coefficients": "optimal", "lower_singular_value": 1.0}, ValueError, "lower_singular_value"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"compute_dtype": torch.int32}, TypeError, "compute_dtype"),
        ({"impl": "cuda"}, ValueError, "impl"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        newton_schulz(**{"x": torch.ones(2, 2), **options})


def test_triton_does_not_compute_in_fp64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="float64; use impl='eager'"):
        newton_schulz(torch.ones(2, 2, dtype=torch.float64), impl="triton")


def test_a_parameter_is_taken_where_no_gradient_is_recorded():
    with torch.no_grad():
        assert not newton_schulz(torch.ones(2, 2, requires_grad=True)).requires_grad
