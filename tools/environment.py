"""The project's virtual environments: ``python -m tools.environment .venv`` makes the locked one.

An environment is whole or is made anew: a file in it, written last, says what it was made from. If that is
missing (an interrupted installation) or differs (another lock, another Python, a moved folder), pip is not
asked to mend what it finds. Needs nothing but Python's own library.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
_MARK = ".nl-kernels"  # this module made the folder, so it may empty it
_STAMP = ".installed"  # everything is in it

Steps = Sequence[Sequence[str]]

# Without build isolation setuptools comes from the lock too, not from what is newest on the day.
LOCKED: Steps = (
    ("--constraint", str(LOCK), "pip", "setuptools"),
    ("--constraint", str(LOCK), "--no-build-isolation", "--editable", f"{ROOT}[dev,docs]"),
)


class InstallError(RuntimeError):
    """An environment that cannot be made; the message says what to do."""


def make(folder: Path, steps: Steps) -> Path:
    """Make the environment ``folder`` unless it is complete; returns its Python.

    Args:
        folder: the environment.
        steps: what to install: the arguments of one ``pip install`` after another.

    Raises:
        InstallError: the folder holds something else, or an installation failed.
    """
    folder = Path(folder).absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "folder": str(folder),
        "steps": [list(step) for step in steps],
        "inputs": hashlib.sha256(LOCK.read_bytes() + (ROOT / "setup.py").read_bytes()).hexdigest(),
    }
    reason = _why_anew(folder, python, wanted)
    if reason is None:
        return python
    print(f"making {folder}: {reason}", flush=True)
    # Without pip it takes no time, so that hardly anything can come between the folder and its mark.
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
    (folder / _MARK).touch()
    _run([str(python), "-m", "ensurepip", "--default-pip"], quiet=True)
    for step in steps:
        _run([str(python), "-m", "pip", "install", "--quiet", *step])
    (folder / _STAMP).write_text(json.dumps(wanted))
    return python


def _why_anew(folder: Path, python: Path, wanted: dict) -> str | None:
    """What is wrong with the environment, or ``None``."""
    if not folder.exists():
        return "a new environment"
    ours = any((folder / name).exists() for name in (_MARK, _STAMP))
    if not folder.is_dir() or (any(folder.iterdir()) and not ours):
        raise InstallError(
            f"{folder} exists and was not made by make, so it is left alone: move it away, remove it with "
            "'make clean', or choose another folder with VENV="
        )
    try:
        made = json.loads((folder / _STAMP).read_text())
    except (OSError, ValueError):
        return "its installation was not finished"
    for name, what in (
        ("python", "Python is {} now, it was {} (PYTHON= chooses)"),
        ("folder", "it lies in {} now, it was made in {}"),
        ("steps", "what is installed has changed"),
        ("inputs", "setup.py or the lock has changed"),
    ):
        if made.get(name) != wanted[name]:
            return what.format(wanted[name], made.get(name))
    try:
        subprocess.run([str(python), "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "its Python does not start any more"
    return None


def _run(command: list[str], *, quiet: bool = False) -> None:
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL if quiet else None)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(
            f"failed: {' '.join(command)}\nSee the message above; the next make starts anew"
        ) from error


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        make(Path(sys.argv[1]), LOCKED)
    except InstallError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
