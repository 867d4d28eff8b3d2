"""The state that a deep memory carries between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.memory.state import own_memory
from nl_kernels.memory_rule import DeepMemoryWeights


class DeepMemoryState(NamedTuple):
    """The fast state of N sequences; its size does not depend on how many tokens came before.

    With an anchored rule the weights here are the changes Δ to the anchor, otherwise the weights themselves.

    Attributes:
        snapshot: weights at the last chunk boundary, where the running chunk takes its gradients;
            inner [N, H, h, D], outer [N, H, Dv, h] or ``None``.
        running: the weights with every token so far written.
        position: [N] int64, tokens since that boundary, below the chunk size.
        momentum: the momentum U of each layer, like ``running``; ``None`` without momentum.
    """

    snapshot: DeepMemoryWeights
    running: DeepMemoryWeights
    position: torch.Tensor
    momentum: DeepMemoryWeights | None

    def clone(self) -> DeepMemoryState:
        """A copy whose tensors are contiguous and share no memory, as steps in place need it."""
        return own_memory(self)
