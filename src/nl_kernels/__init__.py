"""Kernels of Nested Learning: functions on tensors, with no modules and no state of their own."""

from nl_kernels.version import __version__

__all__ = ["__version__"]
