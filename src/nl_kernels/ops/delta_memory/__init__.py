"""The linear associative memory with decay, erase and momentum."""

from nl_kernels.ops.delta_memory.api import chunk_gated_delta_rule, delta_memory, delta_memory_step

__all__ = ["chunk_gated_delta_rule", "delta_memory", "delta_memory_step"]
