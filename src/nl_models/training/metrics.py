"""Metrics as JSON lines: one object per step or evaluation, in order, without duplicates after a resume."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nl_models.files import write_bytes

Write = Callable[[dict[str, Any]], None]
"""Takes one record."""


@contextlib.contextmanager
def metrics_log(path: Path, *, last_step: int, track: str | None = None) -> Iterator[Write]:
    """What appends a record to the log at ``path`` and hands it to the operating system at once.

    ``track`` names a tracker that is given it, too (:func:`tracker`).

    To begin with, every record after ``last_step`` goes: a killed run may have logged steps past its last
    checkpoint, and half a line, and logs these steps again. They vanish in one atomic replacement.
    """

    def line(record: dict[str, Any]) -> str:
        return json.dumps(record, separators=(",", ":")) + "\n"

    kept = [line(record) for record in read_metrics(path) if record["step"] <= last_step]
    write_bytes(path, "".join(kept).encode())
    send = contextlib.nullcontext(lambda _: None) if track is None else tracker(track, path.parent)
    with Path(path).open("a", encoding="utf-8", buffering=1) as file, send as also:

        def write(record: dict[str, Any]) -> None:
            file.write(line(record))
            also(record)

        yield write


@contextlib.contextmanager
def tracker(name: str, folder: Path) -> Iterator[Write]:
    """What logs a record's figures as ``train/loss``, ``validation/loss``, … in one of accelerate's trackers.

    Args:
        name: as accelerate has it: ``"tensorboard"``, ``"wandb"``, ….
        folder: of the run, after which the tracker's project is named, and which has its files, if any.
    """
    kind = tracker_class(name)
    from accelerate import PartialState

    PartialState()  # without it accelerate's own logging, which trackers call, is an error
    made = kind("tracker", folder) if kind.requires_logging_directory else kind(folder.name)
    made.start()

    def write(record: dict[str, Any]) -> None:
        figures = {f"{record['kind']}/{name}": value for name, value in record.items() if name != "kind"}
        made.log(figures, step=record["step"])

    try:
        yield write
    finally:
        made.finish()


def tracker_class(name: str) -> Any:
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
        ValueError: a line is not a record.
    """
    path, records = Path(path), []
    # Only what ends with a newline was written whole.
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is not an integer")
            records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number} is not a metrics record ({error})") from error
    return records
