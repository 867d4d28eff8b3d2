"""Attention against its formula written out."""

import math

import pytest
import torch

from nl_models.layers.attention import Attention, flash_obstacle


def written_out(layer, x, positions):
    """One head at a time, one query at a time, with rotations as complex numbers."""
    outputs = torch.zeros(*x.shape[:2], layer.num_heads, layer.head_dim, dtype=x.dtype)
    half = layer.head_dim // 2
    frequencies = layer.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)

    def turned(vector, position):
        angle = (position.float() * frequencies).to(x.dtype)
        pairs = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag])

    q, k, v = (p(x).unflatten(-1, (layer.num_heads, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    for b in range(x.shape[0]):
        for h in range(layer.num_heads):
            keys = [turned(k[b, t, h], positions[t]) for t in range(x.shape[1])]
            for t in range(x.shape[1]):
                scores = torch.stack(keys[: t + 1]) @ turned(q[b, t, h], positions[t])
                weights = (scores / math.sqrt(layer.head_dim)).softmax(0)
                outputs[b, t, h] = weights @ v[b, : t + 1, h]
    return outputs


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Attention(12, 2, rope_theta=100.0, gated=False).double()


def test_it_is_rotary_causal_attention(layer):
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = layer.output(written_out(layer, x, torch.arange(7)), x)
    # Angles are fp32 in both; their cosines are rounded differently.
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)


def test_only_relative_positions_matter(layer):
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    shifted = layer(x, positions=torch.arange(50, 56)[None])[0]
    torch.testing.assert_close(shifted, layer(x)[0], rtol=0, atol=1e-5)
    stretched = layer(x, positions=torch.arange(0, 12, 2)[None])[0]
    assert not torch.allclose(stretched, layer(x)[0], atol=1e-3)


def test_given_positions_continue_in_the_next_piece(layer):
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    state = layer(x[:, :3], positions=torch.tensor([[4, 5, 6]]), output_state=True)[1]
    assert state.position.tolist() == [7]


def test_flash_is_an_error_where_it_cannot_run(layer):
    layer.impl = "flash"
    with pytest.raises(ValueError, match="'cpu', not on a CUDA device; use 'sdpa'"):
        layer(torch.randn(1, 3, 12, dtype=torch.float64))
    assert "CUDA" in flash_obstacle(torch.zeros(1, 1, 1, 8), None)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="even width"):
        Attention(9, 3)
    with pytest.raises(ValueError, match=r"impl: expected one of \('sdpa', 'flash', None\)"):
        Attention(8, 2, impl="math")
