"""Gated DeltaNet against its recurrence as its paper prints it."""

import pytest
import torch
import torch.nn.functional as F

from nl_models import HopeConfig, HopeModel
from nl_models.layers.gated_delta_net import GatedDeltaNet


@pytest.mark.parametrize("rate_max", [1.0, 2.0])
def test_it_is_the_gated_delta_rule(rate_max):
    torch.manual_seed(0)
    layer = GatedDeltaNet(12, 2, rate_max=rate_max).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (F.silu(p(x)).unflatten(-1, (2, 6)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    alpha = torch.exp(-layer.log_rate.exp() * F.softplus(layer.a_proj(x) + layer.decay_bias))
    beta = rate_max * layer.b_proj(x).sigmoid()
    S, outputs = torch.zeros(2, 2, 6, 6, dtype=torch.float64), []
    for t in range(9):
        key, rate = k[:, t, :, None, :], beta[:, t, :, None, None]
        erased = S - rate * (S * key).sum(-1, keepdim=True) * key
        S = alpha[:, t, :, None, None] * erased + rate * v[:, t, :, :, None] * key
        outputs.append((S * q[:, t, :, None, :]).sum(-1))
    y, state = layer(x, output_state=True)
    torch.testing.assert_close(state, S, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, layer.output(torch.stack(outputs, 1), x), rtol=0, atol=1e-12)


def test_half_lives_are_spread_at_the_start():
    torch.manual_seed(0)
    layer = GatedDeltaNet(256, 64)
    half_life = half_lives(layer)
    assert half_life.min() < 10
    assert half_life.max() > 100


def half_lives(layer):
    """Tokens after which a memory has halved, for an input of zero."""
    return torch.log(torch.tensor(2.0)) / (layer.log_rate.exp() * F.softplus(layer.decay_bias))


@pytest.mark.parametrize(("asked", "rate_max"), [(0.0, 1.0), (1, 1.0), (2.0, 2.0)])
def test_in_a_model_its_rates_go_up_to_two_where_those_of_memories_may(asked, rate_max):
    """Switching the memories' writes off leaves it as it is."""
    sizes = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = HopeModel(HopeConfig(**sizes, layer_types="gated_delta_net", memory_rate_max=asked))
    assert model.layers[0].mixer.rate_max == rate_max
