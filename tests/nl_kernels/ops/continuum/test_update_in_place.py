"""Updates in place: what the kernel is compared with, against the public function."""

import pytest
import torch

from nl_kernels import continuum_update
from nl_kernels.ops.continuum.registration import Update, products
from tests.nl_kernels.continuum_levels import update_in_place

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
    take = products("triton").update_in_place if impl == "triton" else update_in_place
    with torch.no_grad():
        take(Update(**options))


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
def test_is_the_update_that_is_not_in_place(options):
    made, found = call(**options), call(**options)
    stepped(found)
    names = {"momenta": "momentum", "norms": "norms", "initial": "initial", "retention": "retention"}
    for i, weight in enumerate(made["weights"]):
        given = {new: made[name][i] for name, new in names.items() if made[name] is not None}
        old = weight if made["sources"] is None else made["sources"][i].expand_as(weight)
        rule = {"rule": "momentum" if options["momentum"] else "sgd", "momentum_decay": 0.8}
        new, momentum = continuum_update(old, made["gradients"][i], **rule, **given)
        if made["where"] is not None:
            steps = made["where"][i][..., None, None]
            new = torch.where(steps, new, old)
            momentum = momentum if momentum is None else torch.where(steps, momentum, given["momentum"])
        torch.testing.assert_close(found["weights"][i], new, rtol=0, atol=1e-12)
        if momentum is not None:
            torch.testing.assert_close(found["momenta"][i], momentum, rtol=0, atol=1e-12)
        if made["copies"] is not None:
            assert torch.equal(found["copies"][i], found["weights"][i].to(made["copies"][i].dtype))
