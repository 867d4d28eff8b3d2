"""Updates in place: the eager implementation against the definition, bad input, tracing."""

import pytest
import torch

from nl_kernels import continuum_update, continuum_update_
from nl_kernels.ops.continuum import update

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
    continuum_update_(**found)
    continuum_update_(**expected, impl="reference")
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
    continuum_update_(**arguments)
    for i, (new, momentum) in enumerate(expected):
        torch.testing.assert_close(arguments["weights"][i], new, rtol=0, atol=1e-12)
        torch.testing.assert_close(arguments["momenta"][i], momentum, rtol=0, atol=1e-12)


def test_the_comparison_notices_a_broken_implementation(monkeypatch):
    monkeypatch.setattr(update, "with_row_norms", lambda weight, norms: weight)
    with pytest.raises(AssertionError):
        test_equals_the_definition(OPTIONS[2])


def test_rows_of_zeros_stay():
    weights = [torch.ones(2, 3)]
    continuum_update_(weights, [torch.ones(2, 3)], norms=[torch.ones(2)])
    assert torch.equal(weights[0], torch.zeros(2, 3))


def test_no_matrices_are_nothing_to_do():
    continuum_update_([], [])


def test_opcheck_and_compile():
    arguments = call(momentum=True, norms=True, copies=True)
    lists = [arguments[k] for k in ("weights", "gradients", "momenta")]
    more = call(momentum=True, norms=True, copies=True, sources=True, where=True)
    more |= {k: call(**OPTIONS[-1])[k] for k in ("initial", "retention")}
    for extra in (None,) * 4, tuple(more[k] for k in ("sources", "where", "initial", "retention")):
        rest = (0.8, arguments["norms"], arguments["copies"], *extra, "eager")
        torch.library.opcheck(torch.ops.nl_kernels.continuum_update_, (*lists, *rest))
    found, expected = (call(momentum=True, norms=True, copies=True) for _ in range(2))
    torch.compile(continuum_update_, fullgraph=True, backend="aot_eager")(**found)
    continuum_update_(**expected)
    assert all(torch.equal(f, e) for f, e in zip(written(found), written(expected)))


def also(**changes):
    return lambda arguments: arguments.update(changes)


BAD_CALLS = {
    "weights: expected a sequence": (TypeError, also(weights=torch.ones(2, 2))),
    r"weights\[0\]: expected a tensor": (TypeError, also(weights=[1.0], gradients=[1.0])),
    r"weights\[0\]: expected float32 or float64": (TypeError, also(weights=[torch.ones(3, 5).half()])),
    r"weights\[0\]: expected shape": (ValueError, also(weights=[torch.ones(3)])),
    r"weights\[0\]: expected a contiguous": (ValueError, also(weights=[torch.ones(5, 3).mT])),
    "gradients: expected one for each of 1": (ValueError, also(gradients=[])),
    r"gradients\[0\]: expected shape": (ValueError, also(gradients=[torch.ones(5, 3)])),
    r"gradients\[0\]: expected one of": (TypeError, also(gradients=[torch.ones(3, 5).double()])),
    r"momenta\[0\]: expected shape": (ValueError, also(momenta=[torch.ones(3)])),
    r"norms\[0\]: expected shape": (ValueError, also(norms=[torch.ones(5)])),
    r"copies\[0\]: expected one of": (TypeError, also(copies=[torch.ones(3, 5).double()])),
    r"sources\[0\]: expected shape": (ValueError, also(sources=[torch.ones(5)])),
    r"where\[0\]: expected a tensor of torch.bool": (TypeError, also(where=[torch.ones(())])),
    r"where\[0\]: expected shape": (ValueError, also(where=[torch.ones(3, dtype=torch.bool)])),
    "retention: expected together with initial": (ValueError, also(retention=[torch.tensor(0.5)])),
    r"initial\[0\]: expected shape": (
        ValueError,
        also(initial=[torch.ones(5)], retention=[torch.tensor(0.5)]),
    ),
    r"retention\[0\]: expected (values|a number|a value)": (
        ValueError,
        also(initial=[torch.ones(3, 5)], retention=[torch.tensor(1.5)]),
    ),
    r"retention\[0\]: expected torch.float32": (
        TypeError,
        also(initial=[torch.ones(3, 5)], retention=[torch.tensor(0.5).double()]),
    ),
    "momentum_decay": (ValueError, also(momentum_decay=-0.1)),
    "weights: an update in place": (ValueError, also(weights=[torch.ones(3, 5, requires_grad=True)])),
    "impl": (ValueError, also(impl="cuda")),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named_and_nothing_changes(message):
    error, change = BAD_CALLS[message]
    arguments = {"weights": [torch.ones(3, 5)], "gradients": [torch.ones(3, 5)]}
    change(arguments)
    kept = arguments["weights"][0].clone() if isinstance(arguments["weights"][0], torch.Tensor) else None
    with pytest.raises(error, match=message):
        continuum_update_(**arguments)
    assert kept is None or torch.equal(arguments["weights"][0], kept)
