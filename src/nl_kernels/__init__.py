"""Kernels of Nested Learning: functions on tensors, with no modules and no state of their own."""

from nl_kernels.ops.continuum import ContinuumLevel, ContinuumLevelState, ContinuumState, continuum_memory
from nl_kernels.ops.delta_memory import chunk_gated_delta_rule, delta_memory, delta_memory_step
from nl_kernels.version import __version__

__all__ = [
    "ContinuumLevel",
    "ContinuumLevelState",
    "ContinuumState",
    "__version__",
    "chunk_gated_delta_rule",
    "continuum_memory",
    "delta_memory",
    "delta_memory_step",
]
