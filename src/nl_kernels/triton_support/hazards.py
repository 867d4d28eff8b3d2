"""Versions of Triton and of its assembler that are known to compute wrongly on some GPU, by name.

Not here: products of transposed accumulators, which Triton 3.4 to 3.7.0 computes wrongly on Hopper. No kernel
of this package has one; a test over the catalogue holds it.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import NamedTuple

import torch


class Hazard(NamedTuple):
    """What may go wrong, and what takes it away."""

    name: str
    meaning: str
    remedy: str


_OPERANDS = Hazard(
    "wgmma operands overwritten",
    "ptxas 12.8 to 13.2 may reuse registers of a product before it has read them (triton #11781); no kernel "
    "compiled ahead of time shows it",
    "set TRITON_PTXAS_PATH to the ptxas of CUDA 13.3 or later",
)
_GROUPS = Hazard(
    "wgmma groups not awaited",
    "up to Triton 3.7 a wait for products of 8 warps is for 4 of them (triton #11047); no kernel compiled "
    "ahead of time overwrites what the others read",
    "install a Triton that has its change #11056",
)


def known_hazards(triton: str, ptxas: str, capability: tuple[int, int]) -> tuple[Hazard, ...]:
    """Those of this package's kernels, for versions as ``triton.__version__`` and ``ptxas`` spell them."""
    if capability[0] != 9:
        return ()
    found = [_OPERANDS] if (12, 8) <= _version(ptxas) < (13, 3) else []
    return (*found, *([_GROUPS] if _version(triton) < (3, 8) else []))


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


@functools.cache
def warn_of_hazards(capability: tuple[int, int]) -> None:
    """Warn once of what is known of this process's Triton on GPUs of ``capability``."""
    import triton

    if torch.version.hip is not None:
        return
    for hazard in known_hazards(triton.__version__, triton.knobs.nvidia.ptxas.version, capability):
        warnings.warn(f"{hazard.name}: {hazard.meaning}. To be safe, {hazard.remedy}", stacklevel=2)
