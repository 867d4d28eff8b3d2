"""What only a GPU can tell of the update kernel."""

import pytest
import torch

from nl_kernels import continuum_update_
from nl_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu

SHAPES = [(4, 341, 256), (4, 256, 341), (2, 4096, 1024), (2, 1024, 4096)]


def call(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(s, generator=generator).to("cuda", dtype) for s in SHAPES] for _ in range(3)]
    return {
        "weights": made[0],
        "gradients": made[1],
        "momenta": made[2],
        "norms": [w[0].norm(dim=-1) for w in made[0]],
        "copies": [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in SHAPES],
    }


def written(arguments):
    return [x for name in ("weights", "momenta", "copies") for x in arguments[name]]


def test_error_budget():
    found, eager, exact = call(), call(), call(torch.float64)
    continuum_update_(**found)
    continuum_update_(**eager, impl="eager")
    continuum_update_(**exact, impl="eager")
    for i, results in enumerate(zip(*map(written, (found, eager, exact)))):
        assert_within_budget(*results, name=str(i))


def test_deterministic():
    first, second = call(), call()
    continuum_update_(**first)
    continuum_update_(**second)
    assert all(torch.equal(a, b) for a, b in zip(written(first), written(second)))


def test_in_a_graph_without_waiting_for_the_device():
    static, expected = call(), call()
    continuum_update_(**static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        continuum_update_(**static)
    graph.replay()
    for _ in range(2):
        continuum_update_(**expected)
    assert all(torch.equal(a, b) for a, b in zip(written(static), written(expected)))


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    count = 2**31 // (1024 * 1024) + 2
    weights = torch.ones(count, 1024, 1024, device="cuda")
    continuum_update_([weights], [torch.full_like(weights, 0.25)])
    assert weights[-1].eq(0.75).all()
    assert weights[0].eq(0.75).all()
