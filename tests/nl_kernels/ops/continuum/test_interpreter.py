"""The kernels, interpreted, against the definition in fp64."""

import pytest
import torch

from nl_kernels import continuum_mlp
from nl_kernels.ops.continuum import launch, triton_chunk, triton_update
from nl_kernels.ops.continuum.registration import Update
from nl_kernels.ops.continuum.triton_backward import plan_backward
from nl_kernels.ops.continuum.triton_forward import plan_forward
from nl_kernels.ops.continuum.triton_update import plan_update
from tests.nl_kernels.budgets import GuardedBuffer, assert_within_budget
from tests.nl_kernels.continuum_levels import STEPS, ExactProducts, random_tensor, step_arguments, step_sums
from tests.nl_kernels.ops.continuum.test_mlp import arguments, with_gradients
from tests.nl_kernels.ops.continuum.test_update_in_place import OPTIONS, call, stepped, written

pytestmark = pytest.mark.interpreter

# odd widths, one row, more rows than a tile has, rows wider than a tile
SHAPES = [(3, 50, 33), (3, 33, 50), (1, 1), (2, 3, 2100), (130, 16)]


def run(impl, options, dtype=torch.float32, copy_dtype=torch.float16):
    arguments = call(**options, dtype=dtype, shapes=SHAPES, copy_dtype=copy_dtype)
    stepped(arguments, impl)
    return written(arguments)


@pytest.mark.parametrize("options", OPTIONS)
def test_error_budget(options):
    results = run("triton", options), run("eager", options), run("eager", options, torch.float64)
    for i, (found, eager, exact) in enumerate(zip(*results)):
        assert_within_budget(found, eager, exact, name=str(i))


def test_every_buffer_is_written_and_nothing_beside_it():
    arguments = call(momentum=True, norms=True, copies=True, dtype=torch.float32, shapes=SHAPES)
    expected = call(momentum=True, norms=True, copies=True, dtype=torch.float32, shapes=SHAPES)
    stepped(expected, "eager")
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
    stepped(found, "triton")
    stepped(expected, "eager")
    for f, e in zip(written(found), written(expected)):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-5)


def test_rows_of_zeros_stay():
    weights = [torch.ones(2, 3)]
    triton_update.update_in_place(Update(weights, [torch.ones(2, 3)], None, 0.0, [torch.ones(2)], None))
    assert torch.equal(weights[0], torch.zeros(2, 3))


# one token; odd widths; more rows, hidden units and columns than a tile has
SIZES = [
    {"batch": 1, "tokens": 1, "width": 3, "hidden": 5},
    {"batch": 2, "tokens": 7, "width": 9, "hidden": 33},
    {"batch": 2, "tokens": 70, "width": 66, "hidden": 130},
]


def doubled(made):
    return {n: None if t is None else t.double() for n, t in made.items()}


@pytest.mark.parametrize(
    ("gated", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.float16)]
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_budget_of_the_mlp(size, gated, dtype):
    made = arguments(gated=gated, dtype=dtype, **size)
    found, eager = (with_gradients(made, impl) for impl in ("triton", "eager"))
    exact = with_gradients(doubled(made), "reference")
    for i, results in enumerate(zip(found, eager, exact)):
        assert_within_budget(*results, name=str(i))


@pytest.mark.parametrize(
    ("gated", "bound", "dtype"), [*((*case, torch.float32) for case in STEPS), (True, 0.3, torch.float16)]
)
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_error_budget_of_the_sums_of_a_step(size, gated, bound, dtype):
    made = step_arguments(gated=gated, dtype=dtype, **size)
    found, eager = (step_sums(made, bound, products) for products in (triton_chunk, ExactProducts))
    exact = step_sums(doubled(made), bound, ExactProducts)
    for i, parts in enumerate(zip(found, eager, exact, strict=True)):
        assert_within_budget(*parts, name=str(i), factor=3.0)


def test_weights_of_all_sequences():
    made = arguments(gated=True, shared=True, dtype=torch.float32)
    for found, expected in zip(with_gradients(made, "triton"), with_gradients(made, "eager")):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_every_buffer_of_the_mlp_is_written_and_nothing_beside_it(gated):
    made = arguments(gated=gated, dtype=torch.float32, **SIZES[1])
    made["error"] = random_tensor(*made["x"].shape, seed=4).float()
    leaves = [
        None if (t := made[n]) is None else t.clone().requires_grad_() for n in ("x", "up", "down", "gate")
    ]
    expected = continuum_mlp(*leaves, impl="eager")
    wanted = torch.autograd.grad(expected, [t for t in leaves if t is not None], made["error"])
    weights = [made[n] for n in ("up", "down", "gate")]
    forward, y = plan_forward(made["x"], *weights, architecture="sm_90")
    backward, grads = plan_backward(made["error"], made["x"], *weights, True, architecture="sm_90")
    given = {id(t) for t in made.values()}
    buffers = {id(t): GuardedBuffer.holding(t) for t in made.values() if t is not None}
    for one in (*forward, *backward):
        for tensor in one.arguments.values():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in buffers:
                buffers[id(tensor)] = GuardedBuffer(tensor.shape, dtype=tensor.dtype)
        moved = {
            name: buffers[id(value)].tensor if isinstance(value, torch.Tensor) else value
            for name, value in one.arguments.items()
        }
        one.kernel[one.grid](**moved, **one.constants)
    for key, buffer in buffers.items():
        buffer.check("given" if key in given else "made")
    torch.testing.assert_close(buffers[id(y)].tensor, expected.detach(), rtol=1e-5, atol=1e-5)
    for grad, one in zip([g for g in grads if g is not None], wanted, strict=True):
        torch.testing.assert_close(buffers[id(grad)].tensor, one, rtol=1e-4, atol=1e-4)


def test_fp64_is_refused():
    with pytest.raises(NotImplementedError, match="got float64"):
        continuum_mlp(**arguments(gated=False), impl="triton")
