"""What a run shows: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from transformers.utils import logging as transformers_logging

_LINE_EVERY_SECONDS = 10.0


class Display:
    """Shows how much is done, at which rate, and the time left.

    Args:
        console: where to; on a terminal a live bar, else one line per ten seconds; ``None``: nothing.
        total: steps to be done; in reading a step is a token.
        label: in front of the bar or of each line.
        start: what was done before.
        bars: of several runs that are shown together (:func:`training_bars`); its own if not given.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        console: Console | None,
        *,
        total: int,
        label: str,
        start: int = 0,
        bars: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._total, self._label, self._clock = console, total, label, clock
        self._first = self._done = start
        self._tokens = 0
        self._began = self._last_line = clock()
        self._bars = training_bars(console) if bars is None else bars
        self._task = self._bars.add_task(label, total=total, completed=start, status="")
        self._shown = contextlib.nullcontext() if bars else self._bars

    def __enter__(self) -> Display:
        self._shown.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)

    def advance(self, steps: int, status: str = "", *, tokens: int | None = None, line: bool = False) -> None:
        """Report that as many more steps are done.

        Args:
            tokens: of these steps; by default one each.
            line: print one now, however short ago the last was.
        """
        self._done += steps
        self._tokens += steps if tokens is None else tokens
        now = self._clock()
        seconds = max(now - self._began, 1e-9)
        left = duration(max(self._total - self._done, 0) * seconds / (self._done - self._first))
        status = f"{status}  {self._tokens / seconds:,.0f} tokens/s  {left} left".strip()
        self._bars.update(self._task, completed=self._done, status=status)
        if self._bars.disable and (line or now - self._last_line >= _LINE_EVERY_SECONDS):
            self._last_line = now
            self.note(status)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._console is not None:
            done = f"{self._label}  {self._done}/{self._total}  {text}"
            self._console.print(done, highlight=False, soft_wrap=True)

    def expect(self, steps: int) -> None:
        """Report that as many more are to be done."""
        self._total += steps
        self._bars.update(self._task, total=self._total)


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
