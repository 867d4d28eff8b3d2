"""Every parameter has a gradient at every length and behind a carried state: zeros where it is not used."""

import math

import pytest
import torch

from nl_kernels import MemoryRule
from nl_kernels.zero_gradients import with_zero_gradients
from nl_models.layers import Attention, GatedDeltaNet, SelfModifyingTitans, ShortConvolution, Titans
from nl_models.layers.continuum import ContinuumMemory, LevelConfig
from nl_models.layers.state import map_state

WIDTH = 8
NOT_ANCHORED = MemoryRule(anchored=False)


def continuum(variant, **options):
    levels = [
        LevelConfig(hidden_size=6, chunk_size=4),
        LevelConfig(hidden_size=6, chunk_size=8, gated=True, rule="momentum"),
        LevelConfig(hidden_size=6),
    ]
    return ContinuumMemory(WIDTH, levels, variant=variant, **options)


LAYERS = {
    "attention": lambda: Attention(WIDTH, 2),
    "convolution": lambda: ShortConvolution(WIDTH),
    "gated delta net": lambda: GatedDeltaNet(WIDTH, 2),
    **{
        f"continuum, {variant}, {detach_updates}": lambda v=variant, d=detach_updates: continuum(
            v, detach_updates=d
        )
        for variant in ("sequential", "nested", "independent")
        for detach_updates in (False, True)
    },
    "continuum, reference": lambda: continuum("nested", impl="reference"),
    **{
        f"{cls.__name__}, {options}": lambda c=cls, o=options: c(WIDTH, 2, chunk_size=4, **o)
        for cls in (Titans, SelfModifyingTitans)
        for options in (
            {},
            {"memory_hidden_size": 6, "momentum": True},
            {"rule": NOT_ANCHORED},
            {"memory_hidden_size": 6, "read": "snapshot", "rule": NOT_ANCHORED},
            {"rate_max": 0.0},
            {"read": "snapshot", "impl": "reference"},
        )
    },
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_every_parameter_has_a_gradient(make):
    torch.manual_seed(0)
    layer, state = make(), None
    for length in (1, 2, 9, 1, 3, 9):
        layer.zero_grad()
        y, state = layer(torch.randn(2, length, WIDTH), state, output_state=True)
        y.square().sum().backward()
        missing = [n for n, p in layer.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, f"{length} tokens: {missing}"
        state = map_state(torch.Tensor.detach, state)


def test_what_is_used_too_keeps_its_gradient():
    """Behind two chunks of a continuum memory, and beside an infinite parameter."""
    torch.manual_seed(0)
    layer, x = continuum("sequential"), torch.randn(2, 9, WIDTH)
    layer(x)[0].square().sum().backward()
    numbers = ("rate_logit", "retention_logit")
    assert all(
        p.grad.any() for level in layer.levels for name, p in level.named_parameters() if name not in numbers
    )
    x = torch.ones(3, requires_grad=True)
    used, unused = (torch.full((2,), math.inf, requires_grad=True) for _ in range(2))
    y = with_zero_gradients(x, [used, unused, None, torch.ones(2)])
    assert torch.equal(y, x)
    (y.sum() + used[0]).backward()
    assert x.grad.tolist() == [1, 1, 1]
    assert used.grad.tolist() == [1, 0]
    assert unused.grad.tolist() == [0, 0]


def test_nothing_is_recorded_where_no_gradient_is_wanted():
    x, weight = torch.ones(3), torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert with_zero_gradients(x, [weight]) is x
    assert with_zero_gradients(x, [weight.detach()]) is x
