"""The MLP with weights of each sequence and the gradients of a step, against the definition in fp64."""

import pytest
import torch
from torch.nn import functional as F

from nl_kernels import continuum_mlp, continuum_update
from nl_kernels.ops.continuum import eager

CASES = [(False, None), (True, None), (False, 0.3), (True, 0.3)]


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(
    *, gated, batch=2, tokens=5, width=6, hidden=7, dtype=torch.float64, weight_dtype=None, shared=False
):
    """x, up, down and gate."""
    leading = () if shared else (batch,)
    weights = {
        "up": random(*leading, hidden, width, seed=1) * width**-0.5,
        "down": random(*leading, width, hidden, seed=2) * hidden**-0.5,
        "gate": random(*leading, hidden, width, seed=3) * width**-0.5 if gated else None,
    }
    weights = {n: None if w is None else w.to(weight_dtype or dtype) for n, w in weights.items()}
    return {"x": random(batch, tokens, width, seed=0, dtype=dtype), **weights}


def step_arguments(**options):
    made = arguments(**options)
    made["inputs"] = made.pop("x")
    made["error"] = random(*made["inputs"].shape, seed=4, dtype=made["inputs"].dtype)
    made["rates"] = random(*made["inputs"].shape[:2], seed=5).abs().to(made["inputs"].dtype)
    return made


def gradients(made, bound=None, impl="eager"):
    """Σ_t η_t δ_t x_tᵀ of up, down and gate."""
    names = ("error", "inputs", "up", "down", "gate", "rates")
    made = {**made, "rates": made["rates"].to(torch.promote_types(made["rates"].dtype, torch.float32))}
    return torch.ops.nl_kernels.continuum_mlp_backward(*(made[n] for n in names), bound, False, impl)


def with_gradients(made, impl):
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in made.items()}
    y = continuum_mlp(**leaves, impl=impl)
    cotangent = random(*y.shape, seed=9, dtype=y.dtype)
    given = [t for t in leaves.values() if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, cotangent)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_definition(gated, shared):
    made = arguments(gated=gated, shared=shared)
    for found, expected in zip(with_gradients(made, "eager"), with_gradients(made, "reference")):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_backward_pass_under_autocast_is_the_same():
    x, up, down, _ = (
        t if t is None else t.requires_grad_() for t in arguments(gated=False, dtype=torch.float32).values()
    )
    y = continuum_mlp(x, up, down, impl="eager")
    expected = torch.autograd.grad(y.square().sum(), (x, up, down), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), (x, up, down))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("gated", [False, True])
def test_is_an_mlp_of_linear_layers(gated):
    made = arguments(gated=gated, shared=True)
    up = F.linear(made["x"], made["up"])
    hidden = F.silu(F.linear(made["x"], made["gate"])) * up if gated else F.gelu(up)
    expected = F.linear(hidden, made["down"])
    torch.testing.assert_close(continuum_mlp(**made), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gated", "bound"), CASES)
def test_the_gradients_of_a_step_equal_the_definition(gated, bound):
    made = step_arguments(gated=gated)
    found = gradients(made, bound)
    expected = gradients(made, bound, "reference")
    assert len(found) == 2 + gated
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_they_are_the_gradients_of_the_weighted_loss(gated):
    made = step_arguments(gated=gated)
    weights = [made[n].clone().requires_grad_() for n in ("up", "down", "gate") if made[n] is not None]
    y = continuum_mlp(made["inputs"], *weights)
    loss = (y * made["error"] * made["rates"][..., None]).sum()
    found = gradients(made)
    for f, e in zip(found, torch.autograd.grad(loss, weights)):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-12)
    new, _ = continuum_update(made["up"], found[0], rule="sgd")
    assert (new - made["up"]).abs().max() > 1e-3


def test_a_bound_bounds():
    made = step_arguments(gated=False, tokens=1)
    free, tight = (gradients(made, b) for b in (None, 0.01))
    length = tight[0].norm(dim=(-2, -1)) / made["inputs"].norm(dim=-1)[:, 0] / made["rates"][:, 0]
    torch.testing.assert_close(length, torch.full((2,), 0.01 * 7**0.5).double())
    assert torch.equal(free[1], tight[1])


def test_reduced_precision_keeps_sums_in_fp32():
    made = step_arguments(gated=True, dtype=torch.bfloat16, weight_dtype=torch.float32)
    assert all(g.dtype == torch.float32 for g in gradients(made))
    made = arguments(gated=True, dtype=torch.bfloat16, weight_dtype=torch.float32)
    y, *grads = with_gradients(made, "eager")
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16] + [torch.float32] * 3


def test_only_what_goes_in_is_kept():
    made = {n: t.requires_grad_() for n, t in arguments(gated=True).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        continuum_mlp(**made)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in made.values()}


def test_opcheck_and_compile():
    made = arguments(gated=True)
    tensors = [t.requires_grad_() for t in made.values()]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.nl_kernels.continuum_mlp, (*tensors, "eager"), test_utils=tests[:2])
    step = step_arguments(gated=True)
    packed = [step[n] for n in ("error", "inputs", "up", "down", "gate", "rates")]
    torch.library.opcheck(
        torch.ops.nl_kernels.continuum_mlp_backward, (*packed, 0.3, True, "eager"), test_utils=tests[:2]
    )
    compiled = torch.compile(continuum_mlp, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**made).sum(), tensors)
    for f, e in zip(found, torch.autograd.grad(continuum_mlp(**made).sum(), tensors)):
        torch.testing.assert_close(f, e)


MUTATIONS = {
    "signal not bounded": ("_bounding", lambda signal, bound: None),
    "slope forgotten": ("evaluate", None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices_a_broken_implementation(mutation, monkeypatch):
    name, broken = MUTATIONS[mutation]
    if broken is None:
        original = getattr(eager, name)

        def broken(*args):
            made = original(*args)
            return made._replace(slopes=tuple(torch.ones_like(s) for s in made.slopes))

    monkeypatch.setattr(eager, name, broken)
    with pytest.raises(AssertionError):
        test_the_gradients_of_a_step_equal_the_definition(True, 0.3)


def also(**changes):
    return lambda made: made.update(changes)


BAD_CALLS = {
    "x: expected a tensor": (TypeError, also(x=1.0)),
    "x: expected shape": (ValueError, also(x=torch.ones(2, 6).double())),
    "up: expected a tensor": (ValueError, also(up=None)),
    "up: expected shape": (ValueError, also(up=torch.ones(3, 7, 6).double())),
    "up: expected fp64": (TypeError, also(up=torch.ones(2, 7, 6))),
    "down: expected shape": (ValueError, also(down=torch.ones(2, 7, 6).double())),
    "gate: expected shape": (ValueError, also(gate=torch.ones(2, 6, 7).double())),
    "impl": (ValueError, also(impl="cuda")),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    error, change = BAD_CALLS[message]
    made = arguments(gated=False)
    continuum_mlp(**made)
    change(made)
    with pytest.raises(error, match=message):
        continuum_mlp(**made)
