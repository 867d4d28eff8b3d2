"""Attention against its formula written out."""

import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from nl_models.layers.attention import Attention


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


def test_other_implementations_are_those_of_transformers(layer, monkeypatch):
    """Padded and in pieces: the mask is made for each of them."""
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :2] = False
    expected = layer(x, mask=mask)[0]
    seen = []

    def plain(module, q, k, v, allowed, **_):
        seen.append(allowed.shape)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf).softmax(-1)
        return (weights.nan_to_num() @ v).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", plain)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flex_attention", sdpa_mask)
    layer.impl = "flex_attention"
    first, state = layer(x[:, :3], mask=mask[:, :3], output_state=True)
    rest, _ = layer(x[:, 3:], state, mask[:, 3:])
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)
    assert seen == [(2, 1, 3, 3), (2, 1, 4, 7)]


def test_flash_is_an_error_where_it_cannot_run(layer):
    layer.impl = "flash_attention_2"
    with pytest.raises(ImportError, match=r"impl=.flash_attention_2. cannot serve this call: .*; use .sdpa."):
        layer(torch.randn(1, 3, 12, dtype=torch.float64))


@pytest.mark.slow
def test_flex_attention_runs(layer):
    """Compiled by inductor, which on a CPU has no backward pass of it."""
    layer = Attention(32, 2).eval()
    x = torch.randn(2, 32, 32)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, :5] = False
    with torch.no_grad():
        expected = layer(x, mask=mask)[0]
        layer.impl = "flex_attention"
        torch.testing.assert_close(layer(x, mask=mask)[0], expected, rtol=1e-5, atol=1e-5)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="even width"):
        Attention(9, 3)
    with pytest.raises(ValueError, match=r"impl: expected one of \('sdpa', 'flash_attention_2'"):
        Attention(8, 2, impl="math")
