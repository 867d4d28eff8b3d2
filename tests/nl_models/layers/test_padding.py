"""What every token mixer promises: output zero at padding, and a state that padding does not touch."""

import pytest
import torch

from nl_models.layers.attention import Attention
from nl_models.layers.gated_delta_net import GatedDeltaNet
from nl_models.layers.self_modifying_titans import SelfModifyingTitans
from nl_models.layers.state import state_tensors
from nl_models.layers.titans import Titans


def make(kind):
    torch.manual_seed(0)
    sizes = {"memory_hidden_size": 5, "chunk_size": 4} if kind in (Titans, SelfModifyingTitans) else {}
    return kind(12, 2, **sizes).double()


@pytest.mark.parametrize("kind", [Attention, GatedDeltaNet, Titans, SelfModifyingTitans])
def test_outputs_at_padding_are_zero(kind):
    layer, x = make(kind), torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    y, _ = layer(x, mask=mask)
    assert (y[~mask] == 0).all()
    assert (y[mask].abs().sum(-1) > 0).sum() >= 5  # a memory that is still empty reads as zero


@pytest.mark.parametrize("kind", [GatedDeltaNet, Titans, SelfModifyingTitans])
def test_padding_does_not_touch_the_state(kind):
    layer, x = make(kind), torch.randn(1, 9, 12, dtype=torch.float64)
    state = layer(x, output_state=True)[1]
    after = layer(x, state, torch.zeros(1, 9, dtype=torch.bool), output_state=True)[1]
    for before, held in zip(state_tensors(state), state_tensors(after), strict=True):
        torch.testing.assert_close(held, before, rtol=0, atol=1e-14)


def test_values_at_padding_do_not_matter():
    for kind in (Attention, GatedDeltaNet, Titans, SelfModifyingTitans):
        layer, x = make(kind), torch.randn(2, 9, 12, dtype=torch.float64)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
        other = torch.where(mask[..., None], x, 100 * torch.randn_like(x))
        torch.testing.assert_close(layer(other, mask=mask)[0], layer(x, mask=mask)[0], rtol=0, atol=1e-14)
