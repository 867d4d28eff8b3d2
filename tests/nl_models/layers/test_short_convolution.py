"""The short convolution against ``nn.Conv1d``."""

import pytest
import torch
from torch import nn

from nl_models.layers.short_convolution import ShortConvolution


@pytest.mark.parametrize("window", [2, 4])
def test_it_is_a_causal_depthwise_convolution(window):
    torch.manual_seed(0)
    layer = ShortConvolution(6, window).double()
    reference = nn.Conv1d(6, 6, window, groups=6, padding=window - 1, bias=False).double()
    with torch.no_grad():
        reference.weight.copy_(layer.weight[:, None])
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = reference(x.transpose(1, 2))[..., :9].transpose(1, 2)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-14)


def test_pieces_with_padding_anywhere_equal_the_real_tokens_alone():
    torch.manual_seed(0)
    layer = ShortConvolution(3).double()
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1]]).bool()
    state, outputs = None, []
    for piece, real in zip(x.split([3, 1, 5, 3], 1), mask.split([3, 1, 5, 3], 1)):
        y, state = layer(piece, state, real, output_state=True)
        assert (y[~real] == 0).all()
        outputs.append(y)
    y = torch.cat(outputs, 1)
    for row in range(2):
        alone, last = layer(x[row, mask[row]][None], output_state=True)
        torch.testing.assert_close(y[row, mask[row]][None], alone, rtol=0, atol=1e-14)
        assert torch.equal(state[row : row + 1], last)


def test_the_state_starts_as_zeros_and_keeps_the_last_inputs():
    layer, x = ShortConvolution(2), torch.ones(1, 2, 2)
    state = layer(x, output_state=True)[1]
    assert torch.equal(state, torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]]))
    assert layer(x)[1] is None
