"""Peak memory of this process (CPU) or of its tensors (CUDA) since a mark."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes that work takes above what was there when the mark was set.

    On CUDA: the allocator's peak of live tensors. On the CPU: the peak of the resident set. Where the system
    lets a process clear its own high-water mark (Linux), earlier peaks do not count; elsewhere they can hide
    a lower one, so each measurement belongs in a process of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _return_freed_memory()
            _clear_high_water_mark()
            self._before = _resident("VmRSS")

    def bytes(self) -> int:
        """The peak above the mark, at least 0."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)


def _resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) in bytes; without /proc the peak stands for both."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _clear_high_water_mark() -> None:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the class says what follows


def _return_freed_memory() -> None:
    """Give the C allocator's free pages back to the system (glibc): their reuse would not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
