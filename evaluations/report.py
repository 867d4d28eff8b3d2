"""Tables and pictures from the rows."""

from __future__ import annotations

from pathlib import Path


def write_report(rows: Path, *, quick: bool) -> list[Path]:
    return []
