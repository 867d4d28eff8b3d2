"""A layer's old names are errors that say the new ones."""

import inspect

import pytest
import torch

from nl_models.layers import Attention, ContinuumMemory, GatedDeltaNet, SelfModifyingTitans, Titans

LAYERS = [Attention, GatedDeltaNet, SelfModifyingTitans, Titans]


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_the_old_name_of_impl(cls):
    with pytest.raises(TypeError, match=r"implementation: is called impl since version 0\.2"):
        cls(8, 2, implementation="eager")
    layer = cls(8, 2)
    with pytest.raises(AttributeError, match=r"implementation: is called impl since version 0\.2"):
        layer.implementation = "reference"
    assert not hasattr(layer, "implementation")
    assert torch.isfinite(layer(torch.randn(1, 3, 8))[0]).all()


@pytest.mark.parametrize("cls", [*LAYERS, ContinuumMemory], ids=lambda cls: cls.__name__)
def test_impl_is_none_by_default_in_every_layer(cls):
    parameter = inspect.signature(cls).parameters["impl"]
    assert parameter.default is None
    assert parameter.annotation == "str | None"
