"""Every kernel that is compiled ahead of time: the calls of the ops' own launchers, planned on no device."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from tools.catalogue import continuum, delta_memory, memories, newton_schulz
from tools.catalogue.entry import CatalogueEntry, unallocated

__all__ = ["CATALOGUES", "CatalogueEntry", "collect_catalogue", "unallocated"]

CATALOGUES = {
    "continuum": continuum.catalogue,
    "deep_memory": functools.partial(memories.catalogue, "deep_memory", self_made=False),
    "delta_memory": delta_memory.catalogue,
    "newton_schulz": newton_schulz.catalogue,
    "self_modifying": functools.partial(memories.catalogue, "self_modifying", self_made=True),
}
"""By the op's folder, of an architecture in ``TARGETS``."""


def collect_catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """All that is compiled for ``architecture``."""
    for catalogue in CATALOGUES.values():
        yield from catalogue(architecture)
