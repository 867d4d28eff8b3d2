"""What only a GPU can tell."""

import pytest
import torch

from nl_kernels import newton_schulz
from tests.nl_kernels.budgets import assert_within_budget

pytestmark = pytest.mark.gpu


def random(*shape, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(device="cuda", dtype=dtype)


@pytest.mark.parametrize(
    "shape", [(3, 33, 50), (2, 256, 700), (700, 130), (5, 16, 16), (1024, 1024)], ids=str
)
@pytest.mark.parametrize("coefficients", ["muon", "optimal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype, coefficients, shape):
    x = random(*shape, dtype=dtype)
    expected = newton_schulz(x.double(), coefficients=coefficients, impl="reference")
    eager = newton_schulz(x, coefficients=coefficients, impl="eager")
    # Three-pass tf32 loses two bits of fp32's 24.
    factor = 8.0 if dtype == torch.float32 else 2.0
    assert_within_budget(newton_schulz(x, coefficients=coefficients), eager, expected, factor=factor)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_hard_inputs_stay_finite(scale):
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.isfinite(newton_schulz(random(3, 70, 90, dtype=dtype) * scale, steps=12)).all()


def test_deterministic():
    x = random(4, 512, 1500, dtype=torch.bfloat16)
    assert torch.equal(newton_schulz(x), newton_schulz(x))


def test_in_a_graph_without_waiting_for_the_device():
    x = random(2, 128, 256)
    static = x.clone()
    newton_schulz(static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = newton_schulz(static)
    static.copy_(2 * random(2, 128, 256, seed=1))
    graph.replay()
    assert torch.equal(y, newton_schulz(static))


def test_offsets_beyond_32_bits():
    """2^31 elements and more: the last matrix of a stack equals the same matrix alone."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    one = random(1024, 4096, dtype=torch.bfloat16)
    count = 2**31 // one.numel() + 2
    many = newton_schulz(one.expand(count, *one.shape), steps=1)
    alone = newton_schulz(one, steps=1)
    torch.testing.assert_close(many[-1], alone, rtol=2e-2, atol=2e-2)
