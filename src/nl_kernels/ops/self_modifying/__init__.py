"""Self-modifying Titans: memories that make their own keys, values and rates (arXiv 2512.24695, §8)."""

from nl_kernels.ops.self_modifying.api import self_modifying_memory, self_modifying_memory_step
from nl_kernels.ops.self_modifying.state import MemoryStack, SelfModifyingState, SelfModifyingWeights

__all__ = [
    "MemoryStack",
    "SelfModifyingState",
    "SelfModifyingWeights",
    "self_modifying_memory",
    "self_modifying_memory_step",
]
