"""The deep memory: a small network per head, written to by delta gradient descent (arXiv 2512.24695, §8)."""

from nl_kernels.ops.deep_memory.api import deep_memory, deep_memory_step
from nl_kernels.ops.deep_memory.state import DeepMemoryState

__all__ = ["DeepMemoryState", "deep_memory", "deep_memory_step"]
