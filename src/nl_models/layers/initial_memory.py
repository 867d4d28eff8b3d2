"""The learned initial state of a memory."""

from __future__ import annotations

import math

import torch
from torch import nn

from nl_kernels import DeepMemoryWeights


class InitialMemory(nn.Module):
    """Initial weights of one memory per head, ``f(x) = outer n(σ(inner x))`` or ``f(x) = inner x``.

    They are meta-learned: the outer loss reaches them through everything that is written on top of them.

    Args:
        num_heads: heads ``H``.
        width: width ``D`` of the input.
        out_width: width of the output.
        hidden_size: width ``h`` of the hidden layer; ``None`` makes the memory linear.
        initializer_range: standard deviation of the initial last layer. It is small, so that a memory starts
            close to its residual or to empty; and not zero, where the first layer would get no gradient.
    """

    def __init__(
        self, num_heads: int, width: int, out_width: int, hidden_size: int | None, initializer_range: float
    ):
        super().__init__()
        self.initializer_range = initializer_range
        if hidden_size is None:
            self.inner = nn.Parameter(torch.empty(num_heads, out_width, width))
            self.outer = None
        else:
            self.inner = nn.Parameter(torch.empty(num_heads, hidden_size, width))
            self.outer = nn.Parameter(torch.empty(num_heads, out_width, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The last layer as said above; the first keeps the length of its input, as usual."""
        if self.outer is None:
            nn.init.normal_(self.inner, std=self.initializer_range)
        else:
            nn.init.normal_(self.inner, std=1 / math.sqrt(self.inner.shape[-1]))
            nn.init.normal_(self.outer, std=self.initializer_range)

    def forward(self) -> DeepMemoryWeights:
        """The weights, shared by all sequences."""
        return DeepMemoryWeights(self.inner, self.outer)
