"""Every rule, for every option, equals its plain fp64 form over 20 steps."""

import pytest
import torch

from nl_kernels.doctor import relative_error
from nl_models.optim import M3, DeepMomentum, DeltaMomentum, Muon
from tests.nl_models.optim.problems import PLAIN, PlainAdamW, groups_of, parameters, set_gradients

OPTIONS = [
    (Muon, {}),
    (Muon, {"nesterov": False}),
    (Muon, {"momentum": 0.0}),
    (Muon, {"momentum": 0.8, "rms": 1.0, "weight_decay": 0.0}),
    (Muon, {"ns_steps": 7, "ns_coefficients": "optimal"}),
    (Muon, {"ns_steps": 2, "ns_coefficients": [[2.0, -1.5, 0.5], [1.5, -0.5, 0.0]], "ns_eps": 1e-3}),
    (Muon, {"adamw_betas": (0.5, 0.9), "adamw_eps": 1e-2, "weight_decay": 0.3}),
    (M3, {}),
    (M3, {"frequency": 1}),
    (M3, {"frequency": 3, "betas": (0.5, 0.6, 0.7), "alpha": 1.5}),
    (M3, {"frequency": 4, "alpha": 0.0}),
    (M3, {"frequency": 4, "second_moment": True}),
    (M3, {"frequency": 4, "second_moment": True, "eps": 0.1, "rms": 1.0, "weight_decay": 0.0}),
    (M3, {"frequency": 4, "literal": True}),
    (M3, {"frequency": 5, "literal": True, "betas": (0.1, 0.2, 0.3), "alpha": 2.0, "eps": 1e-3}),
    (M3, {"frequency": 2, "ns_steps": 3, "ns_coefficients": "optimal", "adamw_betas": (0.0, 0.5)}),
    (DeltaMomentum, {}),
    (DeltaMomentum, {"momentum": 0.5, "erase": 1.4, "weight_decay": 0.3, "adamw_lr": 0.2}),
    (DeltaMomentum, {"erase": 0.0}),
    (DeltaMomentum, {"preconditioner": "rms"}),
    (DeltaMomentum, {"preconditioner": "rms", "beta2": 0.5, "eps": 0.1}),
    (DeltaMomentum, {"literal": True}),
    (DeltaMomentum, {"literal": True, "momentum": 0.3, "preconditioner": "rms"}),
    (DeepMomentum, {}),
    (DeepMomentum, {"hidden": 1, "momentum": 0.0, "weight_decay": 0.0}),
    (DeepMomentum, {"hidden": 7, "momentum": 0.5, "memory_lr": 0.7, "adamw_betas": (0.5, 0.9)}),
    (DeepMomentum, {"objective": "regression"}),
    (DeepMomentum, {"objective": "regression", "hidden": 3, "memory_lr": 0.05}),
    (DeepMomentum, {"literal": True, "memory_lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_twenty_steps_equal_the_plain_form(kind, options):
    matrices, others = parameters()
    optimizer = kind(groups_of(matrices, others), lr=0.05, **options)
    plain = {p: PLAIN[kind](optimizer.param_groups[0]) for p in matrices}
    plain |= {p: PlainAdamW(optimizer.param_groups[1]) for p in others}
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        set_gradients(plain, rng)
        expected = {p: rule.step(p.detach().clone(), p.grad) for p, rule in plain.items()}
        optimizer.step()
        for p in plain:
            torch.testing.assert_close(p.detach(), expected[p], rtol=1e-9, atol=1e-9)


def test_the_adamw_rule_is_pytorchs_bit_for_bit():
    _, ours = parameters(torch.float32)
    _, theirs = parameters(torch.float32)
    options = {"lr": 0.05, "weight_decay": 0.2}
    first = Muon([{"params": ours, "rule": "adamw"}], adamw_betas=(0.8, 0.9), **options)
    second = torch.optim.AdamW(theirs, betas=(0.8, 0.9), fused=True, **options)
    for seed in range(5):
        set_gradients(ours, torch.Generator().manual_seed(seed))
        set_gradients(theirs, torch.Generator().manual_seed(seed))
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_delta_momentum_without_erasing_is_sgd_with_momentum():
    (ours, _), (theirs, _) = parameters(), parameters()
    first = DeltaMomentum(ours, lr=0.05, momentum=0.8, erase=0.0, weight_decay=0.0)
    second = torch.optim.SGD(theirs, lr=0.05, momentum=0.8)
    for seed in range(10):
        set_gradients(ours, torch.Generator().manual_seed(seed))
        set_gradients(theirs, torch.Generator().manual_seed(seed))
        first.step()
        second.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_delta_momentum_forgets_what_it_held_along_a_gradient():
    """With erase = α and a gradient of rank one, nothing of the old momentum is left along it."""
    w = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = DeltaMomentum([w], lr=1.0, momentum=0.9, erase=0.9)
    rng = torch.Generator().manual_seed(0)
    w.grad = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    optimizer.step()
    held = optimizer.state[w]["momentum"].clone()
    left, right = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (3, 4))
    w.grad = 1e-9 * torch.outer(left, right)
    optimizer.step()
    held, right = optimizer.state[w]["momentum"], right / right.norm()
    assert (held @ right).norm() < 1e-8 < 0.1 < held.norm()


def test_printed_delta_momentum_diverges_where_the_bounded_one_does_not():
    norms = {}
    for literal in (True, False):
        w = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        optimizer = DeltaMomentum([w], lr=1.0, momentum=0.9, literal=literal, erase=1.8)
        for _ in range(200):
            w.grad = 1.45 * torch.eye(2, dtype=torch.float64)  # ‖G‖₂² = 2.1 > 1 + α
            optimizer.step()
        norms[literal] = optimizer.state[w]["momentum"].norm()
    assert norms[True] > 1e6
    assert norms[False] < 10


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize(("kind", "options"), [(DeltaMomentum, {"lr": 0.0}), (DeepMomentum, {"lr": 0.1})])
def test_the_unit_of_the_gradient_does_not_matter(kind, options, scale):
    """Squares of fp32 gradients under- and overflow. (The write of delta momentum does scale with it.)"""
    found = []
    for factor in (1.0, scale):
        matrices, _ = parameters(torch.float32)
        optimizer = kind(matrices, **options)
        if kind is DeltaMomentum:
            for p in matrices:
                optimizer.state[p] = {"momentum": p.detach().clone()}
        rng = torch.Generator().manual_seed(0)
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=rng) * factor
        optimizer.step()
        found.append([p.detach().clone() for p in matrices])
    for a, b in zip(*found):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["dot", "regression"])
def test_the_deep_memory_settles_at_a_step_against_the_gradient(objective):
    w = torch.nn.Parameter(torch.zeros(100, 100))
    optimizer = DeepMomentum([w], lr=0.0, objective=objective)
    for seed in range(100):
        w.grad = torch.randn(100, 100, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    a, b = optimizer.state[w]["memory"]
    u = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    m = (b * torch.tanh(a * u[:, None])).mean(1)
    assert (m * u < -0.1).all()
    if objective == "dot":
        torch.testing.assert_close(m, -1.08 * torch.tanh(0.77 * u), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", [Muon, M3])
def test_steps_have_the_root_mean_square_of_adamws(kind):
    rng = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(40, 90))
    optimizer = kind([w], lr=1.0, weight_decay=0.0, ns_coefficients="optimal", ns_steps=8)
    w.grad = torch.randn(40, 90, generator=rng)
    optimizer.step()
    assert w.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "options"), [(Muon, {}), (M3, {"frequency": 2}), (M3, {"frequency": 2, "second_moment": True})]
)
def test_equal_shapes_and_transposes_share_one_call(kind, options, monkeypatch):
    from nl_models.optim import orthogonalise

    calls = []
    original = orthogonalise.newton_schulz
    monkeypatch.setattr(
        orthogonalise, "newton_schulz", lambda x, **o: calls.append(tuple(x.shape)) or original(x, **o)
    )
    matrices, others = parameters()
    groups = [{"params": matrices[:1]}, {"params": matrices[1:]}, *groups_of([], others)[1:]]
    optimizer = kind(groups, **options)
    for step in range(3):
        set_gradients(matrices, torch.Generator().manual_seed(step))
        optimizer.step()
    per_step = [(3, 4, 7), (1, 5, 5), (2, 3, 6)]
    # M3 orthogonalises its slow momentum in the third step, when the first window has ended.
    assert sorted(calls) == sorted(per_step * (4 if kind is M3 else 3))


@pytest.mark.parametrize("kind", [Muon, M3])
def test_the_dtype_of_the_products_is_an_option(kind):
    results = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        matrices, _ = parameters(torch.float32)
        before = [p.detach().clone() for p in matrices]
        options = {"frequency": 2} if kind is M3 else {}
        optimizer = kind(matrices, lr=0.05, weight_decay=0.0, ns_dtype=dtype, **options)
        for seed in range(4):
            for p in matrices:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results[dtype] = torch.cat([(p.detach() - old).flatten() for p, old in zip(matrices, before)])
        if kind is M3:
            assert {s["slow_direction"].dtype for s in optimizer.state.values()} == {dtype or torch.float32}
    assert torch.equal(results[None], results[torch.float32])  # the CPU's default
    assert 1e-4 < relative_error(results[torch.bfloat16], results[None]) < 3e-2
