"""Updates in place: the eager implementation against the definition."""

import pytest
import torch

from nl_kernels import continuum_update
from nl_kernels.ops.continuum import update
from nl_kernels.ops.continuum.registration import Update, implementation

SHAPES = [(3, 5, 7), (3, 7, 5), (2, 4)]


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def call(
    *,
    momentum,
    norms,
    copies,
    where=False,
    sources=False,
    retention=False,
    dtype=torch.float64,
    copy_dtype=torch.float16,
    shapes=SHAPES,
):
    """Arguments; norms of each row in turn and shared by the sequences, as sources; every other one steps."""
    weights = [random(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    rows = [
        w.norm(dim=-1) if i % 2 else w.norm(dim=-1).flatten()[: w.shape[-2]] for i, w in enumerate(weights)
    ]
    return {
        "weights": weights,
        "gradients": [random(*s, seed=10 + i, dtype=dtype) for i, s in enumerate(shapes)],
        "momenta": [random(*s, seed=20 + i, dtype=dtype) for i, s in enumerate(shapes)] if momentum else None,
        "norms": rows if norms else None,
        "copies": [torch.full(s, float("nan"), dtype=copy_dtype) for s in shapes] if copies else None,
        "momentum_decay": 0.8,
        "sources": [random(*s[i % 2 and len(s) - 2 :], seed=30 + i) for i, s in enumerate(shapes)]
        if sources
        else None,
        "where": [torch.arange(w[..., 0, 0].numel()).view(w.shape[:-2]) % 2 == 0 for w in weights]
        if where
        else None,
        "initial": [random(*s[(i + 1) % 2 and len(s) - 2 :], seed=40 + i) for i, s in enumerate(shapes)]
        if retention
        else None,
        "retention": [torch.tensor(0.5 + 0.1 * i, dtype=dtype) for i, _ in enumerate(shapes)]
        if retention
        else None,
    }


def stepped(arguments, impl="eager"):
    """Take the steps of these arguments."""
    options = {("decay" if name == "momentum_decay" else name): part for name, part in arguments.items()}
    with torch.no_grad():
        implementation("update_in_place", impl)(Update(**options))


def written(arguments):
    return [x for name in ("weights", "momenta", "copies") for x in arguments[name] or ()]


OPTIONS = [
    {"momentum": False, "norms": False, "copies": False},
    {"momentum": True, "norms": False, "copies": True},
    {"momentum": False, "norms": True, "copies": True},
    {"momentum": True, "norms": True, "copies": True},
    {"momentum": True, "norms": True, "copies": True, "where": True},
    {"momentum": False, "norms": False, "copies": False, "sources": True},
    {"momentum": True, "norms": True, "copies": True, "sources": True, "where": True},
    {"momentum": False, "norms": False, "copies": False, "retention": True},
    {"momentum": True, "norms": True, "copies": True, "sources": True, "where": True, "retention": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_definition(options):
    found, expected = call(**options), call(**options)
    stepped(found)
    stepped(expected, "reference")
    for f, e in zip(written(found), written(expected)):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-12)


def test_is_the_update_that_is_not_in_place():
    arguments = call(momentum=True, norms=True, copies=False, retention=True)
    names = ("weights", "gradients", "momenta", "norms", "initial", "retention")
    expected = [
        continuum_update(
            w, g, rule="momentum", momentum=m, momentum_decay=0.8, norms=n, initial=i, retention=r
        )
        for w, g, m, n, i, r in zip(*(arguments[k] for k in names))
    ]
    stepped(arguments)
    for i, (new, momentum) in enumerate(expected):
        torch.testing.assert_close(arguments["weights"][i], new, rtol=0, atol=1e-12)
        torch.testing.assert_close(arguments["momenta"][i], momentum, rtol=0, atol=1e-12)


def test_the_comparison_notices_a_broken_implementation(monkeypatch):
    monkeypatch.setattr(update, "with_row_norms", lambda weight, norms: weight)
    with pytest.raises(AssertionError):
        test_equals_the_definition(OPTIONS[2])


def test_rows_of_zeros_stay():
    weights = [torch.ones(2, 3)]
    implementation("update_in_place", "eager")(
        Update(weights, [torch.ones(2, 3)], None, 0.0, [torch.ones(2)], None)
    )
    assert torch.equal(weights[0], torch.zeros(2, 3))
