"""The definition of ``self_modifying_memory``: a loop over tokens, differentiable by autograd."""

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
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule, l2_normalize
from nl_kernels.ops.self_modifying.state import (
    MemoryStack,
    SelfModifyingState,
    SelfModifyingWeights,
    stack_memories,
    unstack_memories,
)


def self_modifying_memory_reference(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    write_scale: torch.Tensor | None,
    momentum: torch.Tensor | None,
    anchor: MemoryStack,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: torch.Tensor,
    rate_bias: torch.Tensor,
    retention_bias: torch.Tensor,
    read: str,
    clocks: tuple[int, int],
    detach_targets: bool,
    truncate_every: int | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """Token by token: generate, write to all five memories, and read the snapshot or what is new.

    Args:
        query, key_input, value_input, gate_input, write_scale, momentum, mask: as
            :func:`nl_kernels.self_modifying_memory`, all of one dtype.
        anchor: the [B, H, ..] weights that are added to the state's (zeros for a rule that is not anchored).
        state: the state before the first token.
        rate_max, rate_bias, retention_bias: [H].
        clocks: tokens between boundaries of ``memory``, and of the others.
    """
    snapshot, running, position, velocity = state
    anchors = unstack_memories(anchor)
    slow, fast = max(clocks), min(clocks)
    seen = position  # tokens since the slower clock's last boundary before this call
    outputs = []
    for t in range(query.shape[1]):
        here = torch.ones_like(position, dtype=torch.bool) if mask is None else mask[:, t]
        base = unstack_memories(map_tensors(torch.add, anchor, snapshot))

        def project(memory: DeepMemoryWeights, x: torch.Tensor) -> torch.Tensor:
            return memory_output(memory, x, rule) + x

        k = l2_normalize(project(base.key, key_input[:, t]))
        v = project(base.value, value_input[:, t])
        log_decay = torch.nn.functional.logsigmoid(
            memory_output(base.retention, gate_input[:, t], rule)[..., 0] + retention_bias
        )
        rate = torch.sigmoid(memory_output(base.rate, gate_input[:, t], rule)[..., 0] + rate_bias)
        rate = torch.minimum(rate_max, 1 + log_decay.exp()) * rate

        now, new_velocity = {}, {}
        parts = zip(SelfModifyingWeights._fields, base, anchors, unstack_memories(running))
        for name, memory, fixed, layers in parts:
            is_gate = name in ("rate", "retention")
            target = memory_output(memory, v, rule)
            if not is_gate:
                target = target + v
            residual = not is_gate and (name != "memory" or rule.residual)
            error = memory_error(memory, fixed, k, target, rule, residual)
            if write_scale is not None and name == "memory":
                error = error * write_scale[:, t, :, None]
            gradients = [[pair] for pair in memory_gradients(memory, k, error, rule)]
            if not detach_targets:
                for pairs, pair in zip(gradients, memory_gradients(memory, v, -error, rule)):
                    pairs.append(pair)
            before = None if velocity is None else getattr(unstack_memories(velocity), name)
            decay = None if momentum is None else momentum[:, t]
            now[name], new_velocity[name] = write_memory(
                layers, before, gradients, rate, log_decay, decay, rule
            )
        running = choose(here, stack_memories(SelfModifyingWeights(**now)), running)
        if velocity is not None:
            velocity = choose(here, stack_memories(SelfModifyingWeights(**new_velocity)), velocity)

        q = l2_normalize(query[:, t])
        source = base if read == "snapshot" else unstack_memories(map_tensors(torch.add, anchor, running))
        y = memory_output(source.memory, q, rule) + (q if rule.residual else 0)
        outputs.append(torch.where(here[:, None, None], y, 0))

        seen = seen + here
        if truncate_every is not None:
            cut = here & (seen % (fast * truncate_every) == 0)
            running, snapshot, velocity = (
                choose(cut, map_tensors(torch.Tensor.detach, x), x) for x in (running, snapshot, velocity)
            )
        position = position + here
        refreshed = [
            choose(here & (position % clocks[name != "memory"] == 0), new, old)
            for name, new, old in zip(now, unstack_memories(running), unstack_memories(snapshot))
        ]
        snapshot = stack_memories(SelfModifyingWeights(*refreshed))
        position = position % slow
    return torch.stack(outputs, 1), SelfModifyingState(snapshot, running, position, velocity)
