"""What a command shows: progress on a terminal or in a log file, and errors that name the remedy."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
import typing
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from transformers.utils import logging as transformers_logging

_LINE_EVERY_SECONDS = 10.0

OtherModel = typing.Annotated[
    bool,
    typer.Option("--allow-other-model", help="Use a memory that was made with other weights of the model."),
]


class Display:
    """Shows how much is done, at which rate, and the time left.

    Args:
        console: where to; on a terminal a live bar, else one line per ten seconds; ``None``: nothing.
        total: steps to be done; in reading a step is a token.
        label: in front of the bar or of each line.
        start: what was done before.
        bars: of several runs that are shown together (:func:`training_bars`); its own if not given.
    """

    def __init__(
        self,
        console: Console | None,
        *,
        total: int,
        label: str,
        start: int = 0,
        bars: Progress | None = None,
    ) -> None:
        self._console, self._label, self._start, self._tokens = console, label, start, 0
        self._began = self._last_line = time.monotonic()
        self._bars = training_bars(console) if bars is None else bars
        self._shown = self._bars if bars is None else contextlib.nullcontext()
        self._bars.add_task(label, total=total, completed=start, status="")
        self._task = self._bars.tasks[-1]

    def __enter__(self) -> Display:
        self._shown.__enter__()
        return self

    def __exit__(self, *error: typing.Any) -> None:
        self._shown.__exit__(*error)

    def advance(self, steps: int, status: str = "", *, tokens: int | None = None, line: bool = False) -> None:
        """Report that as many more steps are done.

        Args:
            tokens: of these steps; by default one each.
            line: print one now, however short ago the last was.
        """
        now, task = time.monotonic(), self._task
        done = int(task.completed) + steps
        self._tokens += steps if tokens is None else tokens
        seconds = max(now - self._began, 1e-9)
        left = duration(max(int(task.total or 0) - done, 0) * seconds / (done - self._start))
        status = f"{status}  {self._tokens / seconds:,.0f} tokens/s  {left} left".strip()
        self._bars.update(task.id, completed=done, status=status)
        if self._bars.disable and (line or now - self._last_line >= _LINE_EVERY_SECONDS):
            self._last_line = now
            self.note(status)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._console is not None:
            done = f"{self._label}  {self._task.completed}/{self._task.total}  {text}"
            self._console.print(done, highlight=False, soft_wrap=True)

    def expect(self, steps: int) -> None:
        """Report that as many more are to be done."""
        self._bars.update(self._task.id, total=(self._task.total or 0) + steps)


def training_bars(console: Console | None) -> Progress:
    """Bars that live within a block; disabled where there is no terminal."""
    whole = Column(no_wrap=True)  # the bar is what gives way in a narrow terminal
    return Progress(
        TextColumn("[bold]{task.description}", table_column=whole),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
        TextColumn("{task.fields[status]}", table_column=whole),
        console=console,
        expand=True,
        disable=console is None or console.quiet or not console.is_terminal,
    )


def duration(seconds: float) -> str:
    """Seconds as ``1:02`` or ``3:04:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within the block transformers draws no bars (it does even for one small file)."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def explained_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Within the block, or in the command so decorated, bad input and what the disk refuses are one line.

    Args:
        kinds: further exceptions whose text says all.
    """
    told: tuple[type[Exception], ...] = (ValueError, OSError, *kinds)
    try:
        yield
    except told as error:
        fail(_told(error) if isinstance(error, OSError) else error)


_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space, or choose a place on another disk",
    (errno.EFBIG,): "choose a place on a disk that takes larger files",
    (errno.ENOTDIR,): "choose another place",
    (errno.EACCES, errno.EPERM, errno.EROFS): "choose a place that you may write to",
}


def _told(error: OSError) -> str:
    """What the system said of which file, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    remedies = (f"; {remedy}" for numbers, remedy in _REMEDIES.items() if error.errno in numbers)
    return f"{where}{error.strerror or error}{next(remedies, '')}"


def fail(message: object) -> typing.NoReturn:
    """Print an error for the user and leave with status 2, without a traceback."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    sys.exit(2)


def token_count(name: str, text: str) -> int:
    """``512`` or ``16K`` as a number of tokens; K and M are 1024 and 1024².

    Raises:
        ValueError: something else; ``name`` is the option's.
    """
    factor = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit() or int(digits) < 1:
        raise ValueError(f"{name}: expected numbers such as 512 or 16K, got {text!r}")
    return int(digits) * factor
