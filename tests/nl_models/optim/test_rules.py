"""Every rule, for every option, equals its plain fp64 form over 20 steps."""

import pytest
import torch

from nl_kernels.testing import relative_error
from nl_models.optim import M3, Muon
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
