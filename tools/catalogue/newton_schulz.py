"""What of ``newton_schulz`` is compiled ahead of time: its launchers' calls, planned on no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tools.catalogue.entry import CatalogueEntry, unallocated


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """Both kernels in each dtype: large, middling and small matrices, and sizes that no tile divides."""
    from nl_kernels.ops.newton_schulz.triton_forward import plan_forward

    sizes = ((24, 1024, 4096), (1, 1024, 1024), (2, 32, 64), (3, 112, 144))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for count, rows, columns in sizes:
            x = unallocated(count, rows, columns, dtype=dtype)
            calls, _ = plan_forward(x, [(1.0, 1.0, 1.0)], architecture=architecture)
            words = f"{str(dtype).removeprefix('torch.')} {count}x{rows}x{columns}"
            for call, part in zip(calls, ("gram", "polynomial", "update")):
                yield CatalogueEntry("newton_schulz", f"{words} {part}", call)
