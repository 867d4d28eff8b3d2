"""One step of one weight by each rule, against closed forms in fp64."""

import pytest
import torch

from nl_kernels import continuum_update
from nl_kernels.ops.continuum.state import RULES
from nl_kernels.ops.newton_schulz import MUON_COEFFICIENTS
from tests.nl_kernels.singular_values import singular_value_band

SHAPES = [(4, 7), (7, 4), (5, 5)]


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chunk(out, width, tokens=3, batch=(2,)):
    """A weight, and the output gradients, inputs, rates of a chunk's tokens."""
    rates = normal(*batch, tokens, seed=4).abs()
    return (
        normal(*batch, out, width, seed=1),
        normal(*batch, tokens, out, seed=2),
        normal(*batch, tokens, width, seed=3),
        rates,
    )


def gradient_of(signals, inputs, rates):
    return torch.einsum("...t,...to,...ti->...oi", rates, signals, inputs)


def test_sgd_is_a_step_down_the_gradient():
    weight, signals, inputs, rates = chunk(4, 7)
    gradient = gradient_of(signals, inputs, rates)
    new, momentum = continuum_update(weight, gradient, rule="sgd")
    assert torch.equal(new, weight - gradient)
    assert momentum is None


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_dgd_minimises_its_proximal_problem(tokens):
    """½‖V − W‖² + Σ η (δᵀVx + ½‖Vx‖²) is stationary at the new weight."""
    weight, signals, inputs, rates = chunk(3, 4, tokens)
    gradient = gradient_of(signals, inputs, rates)
    gram = gradient_of(inputs, inputs, rates)
    new, none = continuum_update(weight, gradient, rule="dgd", gram=gram)
    assert none is None
    stationary = new - weight + gradient + new @ gram
    assert stationary.abs().max() < 1e-12
    assert (new - weight).abs().max() > 1e-2


def test_momentum_is_the_momentum_of_sgd():
    weight = torch.nn.Parameter(normal(4, 7, seed=0))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.8)
    new, momentum = weight.detach().clone(), None
    for seed in range(4):
        weight.grad = normal(4, 7, seed=seed)
        optimizer.step()
        new, momentum = continuum_update(
            new, weight.grad, rule="momentum", momentum=momentum, momentum_decay=0.8
        )
    torch.testing.assert_close(new, weight.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_evens_out_singular_values_and_keeps_the_norm(shape):
    weight, gradient = normal(2, *shape, seed=0), normal(2, *shape, seed=1)
    new, momentum = continuum_update(weight, gradient, rule="muon")
    step = weight - new
    assert torch.equal(momentum, gradient)
    norms = [torch.linalg.matrix_norm(x) for x in (step, gradient)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
    values = torch.linalg.svdvals(step)
    low, high = singular_value_band((MUON_COEFFICIENTS,) * 5, 0.01)
    assert (values[:, 0] <= high / low * values[:, -1]).all()
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    turned = u.mT @ step @ vh.mT  # the same singular vectors, in the same directions
    assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-10
    assert (turned.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_muon_follows_the_rates_and_accumulates():
    weight, gradient, before = (normal(4, 7, seed=s) for s in range(3))
    new, momentum = continuum_update(weight, gradient, rule="muon", momentum=before, momentum_decay=0.5)
    torch.testing.assert_close(momentum, 0.5 * before + gradient)
    small, _ = continuum_update(
        weight, 1e-3 * gradient, rule="muon", momentum=1e-3 * before, momentum_decay=0.5
    )
    torch.testing.assert_close(weight - small, 1e-3 * (weight - new))
    alone, _ = continuum_update(weight, momentum, rule="muon")
    torch.testing.assert_close(alone, new)


def test_a_rank_one_step_of_muon_is_that_of_sgd():
    weight, gradient = normal(4, 7, seed=0), torch.outer(normal(4, seed=1), normal(7, seed=2))
    new, _ = continuum_update(weight, gradient, rule="muon")
    torch.testing.assert_close(new, weight - gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_learn_changes_nothing(rule):
    weight, zero = normal(4, 7, seed=0), torch.zeros(4, 7, dtype=torch.float64, requires_grad=True)
    new, _ = continuum_update(weight, zero, rule=rule, **extra(rule, zero.new_zeros(7, 7)))
    assert torch.equal(new, weight)
    (slope,) = torch.autograd.grad(new.sum(), zero)
    assert slope.isfinite().all()


def extra(rule, gram):
    return {"gram": gram} if rule == "dgd" else {}


@pytest.mark.parametrize("rule", RULES)
def test_rows_get_their_norms_back(rule):
    weight, signals, inputs, rates = chunk(4, 7)
    gradient, gram = gradient_of(signals, inputs, rates), gradient_of(inputs, inputs, rates)
    free, _ = continuum_update(weight, gradient, rule=rule, **extra(rule, gram))
    for norms in (weight.norm(dim=-1), weight[0].norm(dim=-1)):
        new, _ = continuum_update(weight, gradient, rule=rule, norms=norms, **extra(rule, gram))
        torch.testing.assert_close(new.norm(dim=-1), norms.expand(2, 4), rtol=1e-12, atol=0)
        cosine = torch.cosine_similarity(new, free, dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_retained_goes_back_to_the_initial_weight(rule):
    weight, initial, gradient = (normal(2, 4, 7, seed=s) for s in range(3))
    options = extra(rule, torch.eye(7).double().expand(2, 7, 7))
    free, _ = continuum_update(weight, gradient, rule=rule, **options)
    for retention in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        for start in (initial, initial[0]):
            new, _ = continuum_update(
                weight, gradient, rule=rule, retention=retention, initial=start, **options
            )
            torch.testing.assert_close(new, free - 0.7 * (weight - start), rtol=0, atol=1e-12)
    # nothing left to learn: the distance shrinks by the retention, step by step
    if rule == "sgd":
        for _ in range(3):
            weight, _ = continuum_update(weight, 0 * gradient, rule=rule, retention=0.5, initial=initial)
        torch.testing.assert_close(weight - initial, (normal(2, 4, 7, seed=0) - initial) / 8)


def test_rows_of_zeros_stay():
    weight = normal(3, 4, seed=0)
    new, _ = continuum_update(weight, weight.clone(), rule="sgd", norms=torch.ones(3).double())
    assert torch.equal(new, torch.zeros(3, 4).double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule, shape):
    out, width = shape
    weight, signals, inputs, rates = chunk(out, width, tokens=2, batch=())
    norms, before = normal(out, seed=5).abs(), normal(out, width, seed=6)
    initial, retention = normal(out, width, seed=7), torch.tensor(0.8).double()
    tensors = [
        x.requires_grad_() for x in (weight, signals, inputs, rates, norms, before, initial, retention)
    ]

    def step(weight, signals, inputs, rates, norms, before, initial, retention):
        options = {"momentum": before} if rule in ("momentum", "muon") else {}
        options |= {"initial": initial, "retention": retention}
        gradient = gradient_of(signals, inputs, rates)
        if rule == "dgd":
            options["gram"] = gradient_of(inputs, inputs, rates)
        new, momentum = continuum_update(weight, gradient, rule=rule, norms=norms, **options)
        return new if momentum is None else (new, momentum)

    assert torch.autograd.gradcheck(step, tensors, check_undefined_grad=False)


def test_a_weight_may_be_shared():
    weight, gradient = normal(4, 7, seed=0), normal(3, 4, 7, seed=1)
    new, _ = continuum_update(weight, gradient, rule="sgd")
    assert torch.equal(new, weight[None] - gradient)


@pytest.mark.parametrize("rule", RULES)
def test_sequences_do_not_know_of_each_other(rule):
    weight, signals, inputs, rates = chunk(4, 7, batch=(3,))
    gradient, gram = gradient_of(signals, inputs, rates), gradient_of(inputs, inputs, rates)
    together, _ = continuum_update(weight, gradient, rule=rule, **extra(rule, gram))
    for b in range(3):
        alone, _ = continuum_update(weight[b], gradient[b], rule=rule, **extra(rule, gram[b]))
        torch.testing.assert_close(together[b], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_fp32_errs_by_rounding_only(rule):
    weight, signals, inputs, rates = chunk(24, 40, tokens=64)
    gradient, gram = gradient_of(signals, inputs, rates), gradient_of(inputs, inputs, rates)
    exact, _ = continuum_update(weight, gradient, rule=rule, **extra(rule, gram))
    new, _ = continuum_update(weight.float(), gradient.float(), rule=rule, **extra(rule, gram.float()))
    assert new.dtype == torch.float32
    assert (new.double() - exact).norm() <= 1e-5 * (exact.norm() + gradient.norm())


def good_call():
    return {"weight": normal(2, 3, 4, seed=0), "gradient": normal(2, 3, 4, seed=1), "rule": "sgd"}


def also(**changes):
    return lambda call: call.update(changes)


SQUARE, RATES = torch.eye(4).double().expand(2, 4, 4), torch.ones(2, 5)
BAD_CALLS = {
    "rule: expected one of": (ValueError, also(rule="adam")),
    "weight: expected a tensor": (TypeError, also(weight=1.0)),
    "weight: expected float32 or float64": (TypeError, also(weight=torch.ones(2, 3, 4).bfloat16())),
    "weight: expected shape .*the gradient's": (ValueError, also(weight=torch.ones(2, 3, 5).double())),
    "weight: expected shape .*broadcasts": (ValueError, also(weight=torch.ones(1, 4).double())),
    "gradient: expected shape": (ValueError, also(gradient=torch.ones(4).double())),
    "gradient: expected torch.float64": (TypeError, also(gradient=torch.ones(2, 3, 4))),
    "gram: expected a tensor, got NoneType": (TypeError, also(rule="dgd")),
    r"gram: expected shape \(2, 4, 4\)": (ValueError, also(rule="dgd", gram=SQUARE[0])),
    "gram: of rule 'dgd' only": (ValueError, also(gram=SQUARE)),
    "momentum: of rules": (ValueError, also(momentum=torch.ones(2, 3, 4).double())),
    "momentum: expected shape": (ValueError, also(rule="muon", momentum=torch.ones(3, 4).double())),
    "momentum_decay": (ValueError, also(momentum_decay=1.0)),
    "norms: expected shape": (ValueError, also(norms=torch.ones(2).double())),
    "initial: a retention below 1 needs": (ValueError, also(retention=0.9)),
    "initial: expected a shape": (ValueError, also(retention=0.9, initial=torch.ones(4, 3).double())),
    "retention: expected a number in": (ValueError, also(retention=1.1)),
    "retention: expected a number or": (TypeError, also(retention="some")),
    "retention: expected values": (ValueError, also(retention=torch.tensor(-0.1), initial=SQUARE[:, :3])),
    r"retention: expected shape \(\)": (ValueError, also(retention=RATES, initial=SQUARE[:, :3])),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    error, change = BAD_CALLS[message]
    call = good_call()
    continuum_update(**call)
    change(call)
    with pytest.raises(error, match=message):
        continuum_update(**call)
