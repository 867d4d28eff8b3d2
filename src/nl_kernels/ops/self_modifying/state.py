"""The weights of the five memories of a head, and the state that they carry between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.memory.state import own_memory
from nl_kernels.memory_rule import DeepMemoryWeights


class SelfModifyingWeights(NamedTuple):
    """The (meta-learned) initial states of the five memories of each head, all two-layer or all linear.

    Attributes:
        key, value, memory: from D to D, of one hidden width h.
        rate, retention: from D to 1, of the same hidden width (the gates).
    """

    key: DeepMemoryWeights
    value: DeepMemoryWeights
    memory: DeepMemoryWeights
    rate: DeepMemoryWeights
    retention: DeepMemoryWeights


class MemoryStack(NamedTuple):
    """The five memories of N sequences, in the order key, value, memory, rate, retention.

    Attributes:
        first: [N, H, 5, h, D], their first layers; ``None`` for linear memories.
        last: [N, H, 3, D, h], the last layers of key, value and memory; [N, H, 3, D, D] for linear memories.
        gate: [N, H, 2, h], the last layers of rate and retention; [N, H, 2, D] for linear memories.
    """

    first: torch.Tensor | None
    last: torch.Tensor
    gate: torch.Tensor


class SelfModifyingState(NamedTuple):
    """The fast state of N sequences; its size does not depend on how many tokens came before.

    With an anchored rule the weights here are the changes Δ to the anchor, otherwise the weights themselves.

    Attributes:
        snapshot: every memory at the last boundary of its own clock.
        running: the memories with every token so far written.
        position: [N] int64, tokens since the last boundary of the slower clock, below its chunk size.
        momentum: the momentum U of each layer, like ``running``; ``None`` without momentum.
    """

    snapshot: MemoryStack
    running: MemoryStack
    position: torch.Tensor
    momentum: MemoryStack | None

    def clone(self) -> SelfModifyingState:
        """A copy whose tensors are contiguous and share no memory, as steps in place need it."""
        return own_memory(self)


def stack_memories(weights: SelfModifyingWeights) -> MemoryStack:
    """Five memories with weights [N, H, ..] as one stack."""
    linear = weights.key.outer is None
    first = None if linear else torch.stack([memory.inner for memory in weights], -3)
    lasts = [memory.inner if linear else memory.outer for memory in weights]
    return MemoryStack(first, torch.stack(lasts[:3], -3), torch.cat(lasts[3:], -2))


def unstack_memories(stack: MemoryStack) -> SelfModifyingWeights:
    """The five memories of a stack, as views."""
    lasts = [*stack.last.unbind(-3), *stack.gate.split(1, -2)]
    if stack.first is None:
        return SelfModifyingWeights(*(DeepMemoryWeights(last, None) for last in lasts))
    return SelfModifyingWeights(*map(DeepMemoryWeights, stack.first.unbind(-3), lasts))
