"""What of ``self_modifying`` is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from nl_kernels.memory.kernels.catalogue import entries
from nl_kernels.triton_support.ahead_of_time import CatalogueEntry


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """Every kernel at the widths models use."""
    yield from entries("self_modifying", architecture, self_made=True)
