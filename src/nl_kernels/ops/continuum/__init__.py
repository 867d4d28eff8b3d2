"""Continuum memory: a chain of MLP blocks whose weights learn within the context, each at its own period."""

from nl_kernels.ops.continuum.api import continuum_flush, continuum_memory
from nl_kernels.ops.continuum.mlp import continuum_mlp
from nl_kernels.ops.continuum.state import (
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    continuum_clone,
    continuum_detach,
    continuum_reset,
)
from nl_kernels.ops.continuum.update import continuum_update

__all__ = [
    "ContinuumClock",
    "ContinuumLevel",
    "ContinuumLevelState",
    "ContinuumState",
    "continuum_clone",
    "continuum_detach",
    "continuum_flush",
    "continuum_memory",
    "continuum_mlp",
    "continuum_reset",
    "continuum_update",
]
