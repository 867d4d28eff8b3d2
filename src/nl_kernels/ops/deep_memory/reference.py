"""The definition of ``deep_memory``: a loop over tokens, differentiable by autograd."""

from __future__ import annotations

import torch

from nl_kernels.memory_definition import memory_error, memory_gradients, memory_output, memory_write
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
        base = _add(anchor, snapshot)
        error = memory_error(base, anchor, k[:, t], v[:, t], rule, rule.residual)
        written = [
            memory_write(
                weight,
                None if velocity is None else velocity[layer],
                [pair],
                rate[:, t],
                log_decay[:, t],
                None if momentum is None else momentum[:, t],
                rule,
                first_layer=layer == 0,
            )
            for layer, (weight, pair) in enumerate(zip(running, memory_gradients(base, k[:, t], error, rule)))
        ]
        running = _where(here, _weights([w for w, _ in written]), running)
        if velocity is not None:
            velocity = _where(here, _weights([u for _, u in written]), velocity)

        source = base if read == "snapshot" else _add(anchor, running)
        y = memory_output(source, q[:, t], rule) + (q[:, t] if rule.residual else 0)
        outputs.append(torch.where(here[:, None, None], y, 0))

        position = position + here
        snapshot = _where(position == chunk_size, running, snapshot)
        position = position % chunk_size
    return torch.stack(outputs, 1), DeepMemoryState(snapshot, running, position, velocity)


def _weights(layers: list[torch.Tensor]) -> DeepMemoryWeights:
    return DeepMemoryWeights(layers[0], layers[1] if len(layers) == 2 else None)


def _add(a: DeepMemoryWeights, b: DeepMemoryWeights) -> DeepMemoryWeights:
    return DeepMemoryWeights(*(None if x is None else x + y for x, y in zip(a, b)))


def _where(here: torch.Tensor, a: DeepMemoryWeights, b: DeepMemoryWeights) -> DeepMemoryWeights:
    here = here[:, None, None, None]
    return DeepMemoryWeights(*(None if x is None else torch.where(here, x, y) for x, y in zip(a, b)))
