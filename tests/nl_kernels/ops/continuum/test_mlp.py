"""The MLP with weights of each sequence, against the definition in fp64."""

import pytest
import torch
from torch.nn import functional as F

from nl_kernels import continuum_mlp
from nl_kernels.ops.continuum import eager


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


def test_reduced_precision_keeps_sums_in_fp32():
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
    for wanted in (True, False):
        torch.library.opcheck(
            torch.ops.nl_kernels.continuum_mlp_backward,
            (made["x"], *tensors, wanted, "eager"),
            test_utils=tests[:2],
        )
    compiled = torch.compile(continuum_mlp, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**made).sum(), tensors)
    for f, e in zip(found, torch.autograd.grad(continuum_mlp(**made).sum(), tensors)):
        torch.testing.assert_close(f, e)


def test_the_comparison_notices_a_broken_implementation(monkeypatch):
    original = eager.evaluate

    def broken(*args):
        made = original(*args)
        return made._replace(slopes=tuple(torch.ones_like(s) for s in made.slopes))

    monkeypatch.setattr(eager, "evaluate", broken)
    with pytest.raises(AssertionError):
        test_equals_the_definition(True, False)


def also(**changes):
    return lambda made: made.update(changes)


BAD_CALLS = {
    "x: expected a tensor": (TypeError, also(x=1.0)),
    r"x: expected \[B, T, D\]": (ValueError, also(x=torch.ones(2, 6).double())),
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
