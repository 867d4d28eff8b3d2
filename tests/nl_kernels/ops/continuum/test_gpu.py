"""What only a GPU can tell of the kernels."""

import dataclasses

import pytest
import torch

from nl_kernels import ContinuumLevel, continuum_memory, continuum_mlp
from nl_kernels.ops.continuum.registration import Update, products
from tests.nl_kernels.budgets import assert_within_budget
from tests.nl_kernels.continuum_levels import ExactProducts, step_arguments, step_sums
from tests.nl_kernels.ops.continuum.test_update_in_place import stepped

pytestmark = pytest.mark.gpu

SHAPES = [(4, 341, 256), (4, 256, 341), (2, 4096, 1024), (2, 1024, 4096)]


def call(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(s, generator=generator).to("cuda", dtype) for s in SHAPES] for _ in range(3)]
    return {
        "weights": made[0],
        "gradients": made[1],
        "momenta": made[2],
        "momentum_decay": 0.9,
        "norms": [w[0].norm(dim=-1) for w in made[0]],
        "copies": [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in SHAPES],
    }


def written(arguments):
    return [x for name in ("weights", "momenta", "copies") for x in arguments[name]]


def test_error_budget():
    found, eager, exact = call(), call(), call(torch.float64)
    stepped(found, "triton")
    stepped(eager)
    stepped(exact)
    for i, results in enumerate(zip(*map(written, (found, eager, exact)))):
        assert_within_budget(*results, name=str(i))


def test_deterministic():
    first, second = call(), call()
    stepped(first, "triton")
    stepped(second, "triton")
    assert all(torch.equal(a, b) for a, b in zip(written(first), written(second)))


def test_in_a_graph_without_waiting_for_the_device():
    static, expected = call(), call()
    stepped(static, "triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepped(static, "triton")
    graph.replay()
    for _ in range(2):
        stepped(expected, "triton")
    assert all(torch.equal(a, b) for a, b in zip(written(static), written(expected)))


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    count = 2**31 // (1024 * 1024) + 2
    weights = torch.ones(count, 1024, 1024, device="cuda")
    products("triton").update_in_place(
        Update([weights], [torch.full_like(weights, 0.25)], None, 0.0, None, None)
    )
    assert weights[-1].eq(0.75).all()
    assert weights[0].eq(0.75).all()


SIZES = [(2, 64, 256, 341), (4, 1024, 1024, 1360), (1, 1, 72, 200)]


def mlp_call(dtype, size, gated):
    batch, tokens, width, hidden = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to("cuda", dtype)

    return {
        "x": normal(batch, tokens, width),
        "up": normal(batch, hidden, width, scale=width**-0.5),
        "down": normal(batch, width, hidden, scale=hidden**-0.5),
        "gate": normal(batch, hidden, width, scale=width**-0.5) if gated else None,
    }


def doubled(made):
    return {n: None if t is None else t.double() for n, t in made.items()}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget_of_the_mlp(dtype, gated, size):
    made = mlp_call(dtype, size, gated)
    assert_within_budget(
        continuum_mlp(**made),
        continuum_mlp(**made, impl="eager"),
        continuum_mlp(**doubled(made)),
        # three-pass tf32 loses two bits of fp32's 24
        factor=8.0 if dtype == torch.float32 else 2.0,
        token_dim=1,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_of_the_sums_of_a_step(dtype, gated, size):
    sizes = dict(zip(("batch", "tokens", "width", "hidden"), size))
    made = step_arguments(gated=gated, dtype=dtype, device="cuda", **sizes)
    found = step_sums(made, 1.0, products("triton"))
    exact = step_sums(doubled(made), 1.0, ExactProducts)
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.float32
        assert (f.double() - e).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-4) * e.norm()


def results_of_the_mlp(made):
    leaves = {name: x.detach().requires_grad_() for name, x in made.items()}
    y = continuum_mlp(**leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), made["x"])]


def test_the_mlp_is_deterministic_and_captured():
    made = mlp_call(torch.bfloat16, SIZES[0], True)
    first = results_of_the_mlp(made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of_the_mlp(made)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured))


def memory_levels(dtype, *, width=256, gated=False, rule="sgd", device="cuda"):
    """Chunks of 32 and 64; keys as read, and of their own."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

    made = []
    for chunk, hidden, keyed in ((32, 341, False), (64, 512, True)):
        made.append(
            ContinuumLevel(
                norm=torch.ones(width, device=device, dtype=dtype),
                up=normal(hidden, width),
                down=normal(width, hidden),
                gate=normal(hidden, width) if gated else None,
                key=normal(width, width) if keyed else None,
                value=normal(width, width),
                chunk_size=chunk,
                rate=0.5 / width / chunk,
                rule=rule,
                restore_norms=gated,
            )
        )
    return made


def stream(dtype, batch=2, length=200, width=256):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)


def memory_results(x, levels, impl, **options):
    """y, the last weights, and the gradients of x and of the initial weights."""
    x = x.clone().requires_grad_()
    levels = [
        dataclasses.replace(lv, up=lv.up.clone().requires_grad_(), down=lv.down.clone().requires_grad_())
        for lv in levels
    ]
    y, state = continuum_memory(x, levels, detach_updates=True, output_final_state=True, impl=impl, **options)
    leaves = [x, *(w for lv in levels for w in (lv.up, lv.down))]
    return [y, *(w for s in state for w in (s.up, s.down)), *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_of_the_memory(dtype, gated, variant):
    x, rule = stream(dtype), "momentum" if gated else "sgd"
    levels = memory_levels(dtype, gated=gated, rule=rule)
    mask = torch.ones(2, 200, dtype=torch.bool, device="cuda")
    mask[0, 50:70] = False
    names = ("norm", "up", "down", "gate", "key", "value")
    double = [
        dataclasses.replace(lv, **{n: getattr(lv, n).double() for n in names if getattr(lv, n) is not None})
        for lv in levels
    ]
    for options in ({}, {"mask": mask}):
        found = memory_results(x, levels, None, variant=variant, **options)
        exact = memory_results(x.double(), double, "eager", variant=variant, **options)
        for i, (f, e) in enumerate(zip(found, exact)):
            assert f.isfinite().all()
            assert (f.double() - e).norm() <= (3e-2 if dtype == torch.bfloat16 else 1e-3) * e.norm(), i


def test_the_memory_is_deterministic_and_waits_for_nothing():
    levels, x = memory_levels(torch.bfloat16), stream(torch.bfloat16)
    with torch.no_grad():
        first, _ = continuum_memory(x, levels, impl="triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            again, _ = continuum_memory(x, levels, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = continuum_memory(x, levels, impl="triton")
        graph.replay()
    assert torch.equal(first, again)
    assert torch.equal(first, captured)


def test_memory_of_inference_does_not_grow_with_the_tokens():
    """Above input, output and some tensors of their size: the fast weights, their copies, a chunk's sums."""
    levels = memory_levels(torch.bfloat16, width=1024)
    numbers = 4 * 1024 * (341 + 512) * 2  # of both levels, four sequences
    for length in (256, 1024):
        x = stream(torch.bfloat16, 4, length, 1024)
        with torch.no_grad():
            continuum_memory(x, levels)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            continuum_memory(x, levels)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= (4 + 2 + 4) * numbers + 24 * x.nbytes + 2**24
