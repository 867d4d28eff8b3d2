"""Metrics as JSON lines: one object per step or evaluation, in order, without duplicates after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from nl_models.files import write_bytes


class MetricsLog:
    """Append-only log at ``path``; opening it drops every record after ``last_step``.

    A killed run may have logged steps past its last checkpoint, and half a line; the resumed run logs these
    steps again. The old records vanish in one atomic replacement.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        write_bytes(path, "".join(_line(record) for record in kept).encode())
        self._file: TextIO = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, record: dict[str, object]) -> None:
        """Append one record and hand it to the operating system at once."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tracker:
    """One of accelerate's trackers, given the same records; its files, if any, are in the run's folder.

    Args:
        name: as accelerate has it: ``"tensorboard"``, ``"wandb"``, ….
        folder: of the run, after which the tracker's project is named.
    """

    def __init__(self, name: str, folder: Path) -> None:
        kind = tracker_class(name)
        self._tracker = kind("tracker", folder) if kind.requires_logging_directory else kind(folder.name)
        self._tracker.start()

    def write(self, record: dict[str, object]) -> None:
        """Log a record's figures as ``train/loss``, ``validation/loss``, …."""
        figures = {f"{record['kind']}/{name}": value for name, value in record.items() if name != "kind"}
        self._tracker.log(figures, step=record["step"])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._tracker.finish()


def tracker_class(name: str) -> type:
    """The class of one of accelerate's trackers.

    Raises:
        ValueError: there is none of that name, or what it needs is not installed.
    """
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise ValueError("track: needs accelerate; pip install accelerate") from error
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"track: expected one of {sorted(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
    if name not in map(str, get_available_trackers()):
        raise ValueError(f"track: {name} is not installed; pip install {name}")
    return LOGGER_TYPE_TO_CLASS[name]


def read_metrics(path: Path) -> list[dict]:
    """All records of a log; a last line cut short by a kill is ignored, a missing file is empty.

    Raises:
        ValueError: a line other than the last is not a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is not an integer")
            records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not a metrics record ({error})") from error
    return records


def _line(record: dict[str, object]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
