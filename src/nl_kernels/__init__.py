"""Kernels of Nested Learning: functions on tensors, with no modules and no state of their own."""

from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.continuum import (
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    continuum_clone,
    continuum_detach,
    continuum_flush,
    continuum_memory,
    continuum_mlp,
    continuum_reset,
    continuum_update,
)
from nl_kernels.ops.deep_memory import DeepMemoryState, deep_memory, deep_memory_step
from nl_kernels.ops.delta_memory import chunk_gated_delta_rule, delta_memory, delta_memory_step
from nl_kernels.ops.newton_schulz import newton_schulz, optimal_coefficients
from nl_kernels.ops.self_modifying import (
    MemoryStack,
    SelfModifyingState,
    SelfModifyingWeights,
    self_modifying_memory,
    self_modifying_memory_step,
)
from nl_kernels.version import __version__

__all__ = [
    "ContinuumClock",
    "ContinuumLevel",
    "ContinuumLevelState",
    "ContinuumState",
    "DeepMemoryState",
    "DeepMemoryWeights",
    "MemoryRule",
    "MemoryStack",
    "SelfModifyingState",
    "SelfModifyingWeights",
    "__version__",
    "chunk_gated_delta_rule",
    "continuum_clone",
    "continuum_detach",
    "continuum_flush",
    "continuum_memory",
    "continuum_mlp",
    "continuum_reset",
    "continuum_update",
    "deep_memory",
    "deep_memory_step",
    "delta_memory",
    "delta_memory_step",
    "newton_schulz",
    "optimal_coefficients",
    "self_modifying_memory",
    "self_modifying_memory_step",
]
