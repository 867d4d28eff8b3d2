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

from filelock import FileLock, Timeout

if os.name != "nt":
    import fcntl

_TEMPORARY_PREFIX = ".incomplete-"


@contextlib.contextmanager
def locked(place: Path, refusal: str) -> Iterator[None]:
    """Within the block no other process enters one of the same place, a file that is made for it.

    The lock goes with the process, however that ends.

    Raises:
        ValueError: another process is within such a block; it says ``refusal``.
    """
    try:
        lock = FileLock(place).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(refusal) from error
    with lock:
        yield


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Within the block no other process enters one of the same memory. A hidden file beside it is locked.

    Raises:
        FileNotFoundError: there is no folder for it.
        ValueError: another process is within such a block.
        OSError: its folder cannot be written.
    """
    named, path = path, Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"memory: {named} has no folder to lie in; make it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    place = path.with_name(f".{path.name}.lock")
    other = f"memory: {named} is kept up to date by another process; end that one, or go on with a copy"
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(place, other))
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        try:
            yield
        finally:
            if not path.exists():  # nothing came of it
                place.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an exception.

    The folder lies beside ``path`` under a hidden name until then; its files are flushed to the disk before
    the rename, so after a crash or power cut ``path`` either does not exist or is complete. On an exception
    the folder is removed.

    Raises:
        FileExistsError: ``path`` exists already.
        OSError: it cannot be written; where safetensors or tokenizers could not, too.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    make_folder(path.parent)
    with _named(path):
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
        # Writers in Rust have errors of their own, tokenizers a bare Exception.
        number = None if isinstance(error, OSError) else re.search(r"os error (\d+)", str(error))
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


def remove_incomplete(folder: Path) -> None:
    """Remove what killed processes left half written in ``folder``, in which nobody else writes."""
    for left_over in Path(folder).glob(f"{_TEMPORARY_PREFIX}*"):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def _remove_left_overs(path: Path) -> None:
    """Remove what killed processes left of the file ``path``, but nothing that a living one is writing."""
    for left_over in path.parent.glob(f"{_TEMPORARY_PREFIX}{glob.escape(path.name)}-*"):
        with contextlib.suppress(OSError), left_over.open("rb") as file:
            _lock(file.fileno(), wait=False)
            left_over.unlink()


def _temporary(path: Path) -> tuple[int, str]:
    """A file beside ``path`` that is open for writing, and its name; locked for as long as it is open."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{_TEMPORARY_PREFIX}{path.name}-", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:  # else it was taken for a left-over before it was locked
            return handle, name
        os.close(handle)


def _lock(handle: int, *, wait: bool) -> None:
    """Lock an open file, which Windows does by itself; ``OSError`` if another process has done so."""
    if os.name != "nt":
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


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
    _remove_left_overs(path)
    with _named(path):
        handle, name = _temporary(path)
    try:
        with _named(path), os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which moves no open file, and lets nobody remove one
                file.close()
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


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses within the block is of ``path``, under whatever name, or none, it says so."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text is all that it says
            error.filename = str(path)
        raise


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
