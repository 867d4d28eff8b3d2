"""The Triton kernels, interpreted, against the definition in fp64."""

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels import newton_schulz
from nl_kernels.ops.newton_schulz import launch
from nl_kernels.ops.newton_schulz.triton_forward import _triangle, plan_forward
from tests.nl_kernels.budgets import GuardedBuffer, assert_within_budget

pytestmark = pytest.mark.interpreter


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SHAPES = [(1, 1), (3, 5, 7), (40, 33), (2, 3, 16, 70), (97, 131)]


def assert_kernels_within_budget(shape, dtype, **budget):
    x = random(*shape, dtype=dtype)
    options = {"steps": 3, "coefficients": "optimal"}
    assert_within_budget(
        newton_schulz(x, impl="triton", **options),
        newton_schulz(x, impl="eager", **options),
        newton_schulz(x.double(), impl="reference", **options),
        **budget,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_budget(dtype, shape):
    assert_kernels_within_budget(shape, dtype)


def test_several_tiles_of_a_symmetric_product():
    """Mirrored tiles, a partial last tile: fp32 tiles are 64 wide at most."""
    x = random(150, 150)
    actual = newton_schulz(x, steps=1, impl="triton")
    torch.testing.assert_close(actual, newton_schulz(x, steps=1, impl="reference"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_hard_inputs_stay_finite(scale):
    x = random(2, 9, 20) * scale
    y = newton_schulz(x, impl="triton")
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, newton_schulz(x, impl="reference"), rtol=1e-4, atol=1e-6)


def test_long_stacks_are_cut(monkeypatch):
    monkeypatch.setattr(launch, "MAX_MATRICES", 2)
    x = random(5, 6, 8)
    torch.testing.assert_close(
        newton_schulz(x, steps=2, impl="triton"), newton_schulz(x, steps=2, impl="reference")
    )


@pytest.mark.parametrize(("rows", "columns"), [(33, 50), (70, 70)])
def test_every_buffer_is_written_and_nothing_beside_it(rows, columns):
    x = random(2, rows, columns)
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    calls, out = plan_forward(x, [(3.0, -4.0, 2.0), (2.0, -1.5, 0.5)], architecture="sm_90")
    buffers = {id(x): GuardedBuffer.holding(x)}
    for call in calls:
        for tensor in call.arguments.values():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in buffers:
                buffers[id(tensor)] = GuardedBuffer(tensor.shape, dtype=tensor.dtype)
        arguments = {
            name: buffers[id(value)].tensor if id(value) in buffers else value
            for name, value in call.arguments.items()
        }
        call.kernel[call.grid](**arguments, **call.constants)
    for buffer in buffers.values():
        buffer.check()
    assert len(buffers) == 5
    assert torch.equal(buffers[id(x)].tensor, x)
    expected = newton_schulz(x, steps=2, coefficients=[(3.0, -4.0, 2.0), (2.0, -1.5, 0.5)], impl="reference")
    torch.testing.assert_close(buffers[id(out)].tensor, expected, rtol=1e-4, atol=1e-5)


@triton.jit
def _visit(seen, WIDTH: tl.constexpr):
    row, column = _triangle(tl.program_id(0))
    tl.atomic_add(seen + row * WIDTH + column, 1)


@pytest.mark.parametrize("tiles", [1, 2, 7, 40])
def test_every_tile_of_the_triangle_is_visited_once(tiles):
    seen = torch.zeros(tiles, tiles, dtype=torch.int32)
    _visit[(tiles * (tiles + 1) // 2,)](seen, tiles)
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_opcheck_and_compile():
    x = random(2, 6, 9)
    arguments = (x, [3.4445, -4.7750, 2.0315], 1e-7, torch.float32, "triton")
    torch.library.opcheck(torch.ops.nl_kernels.newton_schulz, arguments)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, steps=1, impl="triton"), newton_schulz(x, steps=1, impl="triton"))
