"""The update kernel, interpreted, against the definition in fp64."""

import pytest
import torch

from nl_kernels import continuum_update_
from nl_kernels.ops.continuum import launch
from nl_kernels.ops.continuum.triton_update import plan_update
from nl_kernels.testing import GuardedBuffer, assert_within_budget
from tests.nl_kernels.ops.continuum.test_update_in_place import OPTIONS, call, written

pytestmark = pytest.mark.interpreter

# odd widths, one row, more rows than a tile has, rows wider than a tile
SHAPES = [(3, 50, 33), (3, 33, 50), (1, 1), (2, 3, 2100), (130, 16)]


def run(impl, options, dtype=torch.float32):
    arguments = call(**options, dtype=dtype, shapes=SHAPES, copy_dtype=torch.float16)
    continuum_update_(**arguments, impl=impl)
    return written(arguments)


@pytest.mark.parametrize("options", OPTIONS)
def test_error_budget(options):
    results = run("triton", options), run("eager", options), run("reference", options, torch.float64)
    for i, (found, eager, exact) in enumerate(zip(*results)):
        assert_within_budget(found, eager, exact, name=str(i))


def test_every_buffer_is_written_and_nothing_beside_it():
    arguments = call(momentum=True, norms=True, copies=True, dtype=torch.float32, shapes=SHAPES)
    expected = call(momentum=True, norms=True, copies=True, dtype=torch.float32, shapes=SHAPES)
    continuum_update_(**expected, impl="eager")
    buffers = {
        name: [GuardedBuffer.holding(x) for x in arguments[name]]
        for name in ("weights", "gradients", "momenta", "norms")
    }
    buffers["copies"] = [GuardedBuffer(x.shape, dtype=x.dtype) for x in arguments["copies"]]
    tensors = {name: [b.tensor for b in part] for name, part in buffers.items()}
    (one,) = plan_update(
        tensors["weights"],
        tensors["gradients"],
        tensors["momenta"],
        0.8,
        tensors["norms"],
        tensors["copies"],
    )
    one.run()
    for part in buffers.values():
        for buffer in part:
            buffer.check()
    for found, wanted in zip(written(tensors), written(expected)):
        torch.testing.assert_close(
            found, wanted, rtol=1e-3 if found.dtype == torch.float16 else 1e-5, atol=1e-6
        )
    assert all(torch.equal(f, g) for f, g in zip(tensors["gradients"], arguments["gradients"]))


def test_many_matrices_take_several_launches(monkeypatch):
    monkeypatch.setattr(launch, "MAX_MATRICES", 2)
    found, expected = (call(momentum=True, norms=True, copies=True, dtype=torch.float32) for _ in range(2))
    calls = plan_update(found["weights"], found["gradients"], found["momenta"], 0.8, found["norms"], None)
    assert [c.constants["COUNT"] for c in calls] == [2, 1]
    continuum_update_(**found, impl="triton")
    continuum_update_(**expected, impl="eager")
    for f, e in zip(written(found), written(expected)):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-5)


def test_rows_of_zeros_stay():
    weights = [torch.ones(2, 3)]
    continuum_update_(weights, [torch.ones(2, 3)], norms=[torch.ones(2)], impl="triton")
    assert torch.equal(weights[0], torch.zeros(2, 3))


def test_what_the_kernel_does_not_serve_is_refused():
    weights = [torch.ones(2, 3).double()]
    with pytest.raises(NotImplementedError, match=r"float32, got torch\.float64"):
        continuum_update_(weights, weights, impl="triton")
    weights = [torch.ones(1, launch.MAX_WIDTH + 1)]
    with pytest.raises(NotImplementedError, match="rows of at most"):
        continuum_update_(weights, weights, impl="triton")
