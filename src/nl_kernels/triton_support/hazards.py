"""Versions of Triton and of its assembler that are known to compute wrongly on some GPU, by name.

Not here: products of transposed accumulators, which Triton 3.4 to 3.7.0 computes wrongly on Hopper. No kernel
of this package has one; a test over all kernels holds it.
"""

from __future__ import annotations

import functools
import re
import warnings

_OPERANDS = (
    "ptxas 12.8 to 13.2 may reuse registers of a product before it has read them (triton #11781), which no "
    "kernel compiled ahead of time shows; set TRITON_PTXAS_PATH to the ptxas of CUDA 13.3 or later"
)
_GROUPS = (
    "up to Triton 3.7 a wait for products of 8 warps is for 4 of them (triton #11047); no kernel compiled "
    "ahead of time overwrites what the others read; install a Triton that has its change #11056"
)


def known_hazards(triton: str, ptxas: str, capability: tuple[int, int]) -> dict[str, str]:
    """What may go wrong and its remedy, by name; versions as Triton and ptxas spell them."""
    version, assembler = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (triton, ptxas))
    found = {}
    if capability[0] == 9 and (12, 8) <= assembler < (13, 3):
        found["wgmma operands overwritten"] = _OPERANDS
    if capability[0] == 9 and version < (3, 8):
        found["wgmma groups not awaited"] = _GROUPS
    return found


def hazards_here(capability: tuple[int, int]) -> dict[str, str]:
    """What is known of this process's Triton on NVIDIA GPUs of ``capability``."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas  # from Triton 3.9 on not knobs.nvidia.ptxas

    return known_hazards(triton.__version__, get_ptxas(10 * capability[0]).version, capability)


@functools.cache
def warn_of_hazards(capability: tuple[int, int]) -> None:
    """Warn once of what :func:`hazards_here` finds."""
    for name, text in hazards_here(capability).items():
        warnings.warn(f"{name}: {text}", stacklevel=2)
