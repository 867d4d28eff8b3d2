"""Files and folders that appear whole or not at all, whatever kills the process while they are written."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY_PREFIX = ".incomplete-"


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an exception.

    The folder lies beside ``path`` under a hidden name until then; its files are flushed to the disk before
    the rename, so after a crash or power cut ``path`` either does not exist or is complete. On an exception
    the folder is removed.

    Raises:
        FileExistsError: ``path`` exists already.
        OSError: it cannot be written; where safetensors could not, too.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for folder, _, names in os.walk(temporary):
            for name in names:
                # Some writers make private files; these get the rights any new file has.
                Path(folder, name).chmod(0o666 & ~_umask())
                _flush(Path(folder, name))
            _flush(Path(folder))
        temporary.rename(path)
        _flush(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        number = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        NotADirectoryError: a file stands where a folder should.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(errno.ENOTDIR, "a file stands where a folder should", str(path)) from error


def remove_incomplete(folder: Path, *, name: str | None = None) -> None:
    """Remove what killed processes left half written in ``folder``: all, or only of the file ``name``."""
    of_name = "" if name is None else f"{glob.escape(name)}-"
    for left_over in Path(folder).glob(f"{_TEMPORARY_PREFIX}{of_name}*"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file ``path``, or that to which it is a link, by ``content`` in one step.

    It is on the disk before it appears, and has the rights that any new file has.

    Raises:
        FileNotFoundError: there is no folder for it.
        FileExistsError: ``path`` is a folder, or no ordinary file.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: '{path}' has no folder to lie in; make it first")
    if path.exists() and not path.is_file():  # root could replace a device
        kind = "a folder" if path.is_dir() else "no ordinary file (a device, a pipe)"
        raise FileExistsError(f"path: '{path}' is {kind}; name a file that can be replaced")
    remove_incomplete(path.parent, name=path.name)
    handle, name = tempfile.mkstemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        _flush(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path, value: object) -> None:
    """Replace the file ``path`` by ``value`` as indented JSON in one step."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _flush(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's list of names, on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # it opens no folders, and flushes only what is open for writing
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
