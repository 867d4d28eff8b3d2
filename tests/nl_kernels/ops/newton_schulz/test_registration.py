"""The operator under PyTorch's transformations."""

import pytest
import torch

from nl_kernels import newton_schulz


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 4), (2, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, shape):
    arguments = (torch.randn(shape).to(dtype), [3.4445, -4.7750, 2.0315] * 2, 1e-7, torch.float32, "eager")
    torch.library.opcheck(torch.ops.nl_kernels.newton_schulz, arguments)
    torch.library.opcheck(torch.ops.nl_kernels.newton_schulz, (arguments[0].mT, *arguments[1:]))


@pytest.mark.parametrize("coefficients", ["muon", "optimal", ((2.0, -1.5, 0.5),)])
def test_compile_without_a_graph_break(coefficients):
    x = torch.randn(2, 6, 9)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    actual = compiled(x, steps=3, coefficients=coefficients)
    assert torch.equal(actual, newton_schulz(x, steps=3, coefficients=coefficients))


def test_vmap():
    x = torch.randn(3, 4, 5, 2)
    actual = torch.func.vmap(newton_schulz, in_dims=3)(x)
    expected = torch.stack([newton_schulz(x[..., i]) for i in range(2)])
    torch.testing.assert_close(actual, expected)


def test_autocast_does_not_round_the_products():
    x = torch.randn(2, 20, 30)
    expected = newton_schulz(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = newton_schulz(x)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
