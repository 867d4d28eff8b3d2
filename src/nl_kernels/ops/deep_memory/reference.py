"""The definition of ``deep_memory``: a loop over tokens, differentiable by autograd."""

from __future__ import annotations

import torch

from nl_kernels.memory.state import map_tensors
from nl_kernels.memory_definition import (
    choose,
    memory_error,
    memory_gradients,
    memory_output,
    write_memory,
)
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory.state import DeepMemoryState


def deep_memory_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """Token by token: write with the gradient at the snapshot, then read at the snapshot or at the new state.

    Args:
        q, k, v, rate, log_decay, momentum, mask: as :func:`nl_kernels.deep_memory`, all of one dtype.
        anchor: [B, H, ..] weights that are added to the state's (zeros for a rule that is not anchored).
        state: the state before the first token.
    """
    snapshot, running, position, velocity = state
    outputs = []
    for t in range(q.shape[1]):
        here = torch.ones_like(position, dtype=torch.bool) if mask is None else mask[:, t]
        base = map_tensors(torch.add, anchor, snapshot)
        error = memory_error(base, anchor, k[:, t], v[:, t], rule, rule.residual)
        gradients = [[pair] for pair in memory_gradients(base, k[:, t], error, rule)]
        decay = None if momentum is None else momentum[:, t]
        now, new_velocity = write_memory(
            running, velocity, gradients, rate[:, t], log_decay[:, t], decay, rule
        )
        running, velocity = choose(here, now, running), choose(here, new_velocity, velocity)

        source = base if read == "snapshot" else map_tensors(torch.add, anchor, running)
        y = memory_output(source, q[:, t], rule) + (q[:, t] if rule.residual else 0)
        outputs.append(torch.where(here[:, None, None], y, 0))

        position = position + here
        snapshot = choose(position == chunk_size, running, snapshot)
        position = position % chunk_size
    return torch.stack(outputs, 1), DeepMemoryState(snapshot, running, position, velocity)
