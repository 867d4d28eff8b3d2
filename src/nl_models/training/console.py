"""What a run shows: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from transformers.utils import logging as transformers_logging

_LINE_EVERY_SECONDS = 10.0


class _Display:
    """Shows how much is done, and the time left.

    Args:
        console: where to; on a terminal a live bar, else one line per ten seconds; ``None``: nothing.
        total: what is to be done.
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
        self._began = self._last_line = clock()
        given = bars is not None or console is None
        self._own = contextlib.nullcontext(bars) if given else training_bars(console)
        self._bars: Progress | None = None

    def __enter__(self):
        self._bars = self._own.__enter__()
        if self._bars:
            self._task = self._bars.add_task(self._label, total=self._total, completed=self._first, status="")
        return self

    def __exit__(self, *error: object) -> None:
        self._own.__exit__(*error)

    def _update(self, done: int, count: str, status: Callable[[float], str], *, line: bool = False) -> None:
        """``status`` of what is done in a second; ``line``: one now, however short ago the last was."""
        self._done, now = done, self._clock()
        rate = (done - self._first) / max(now - self._began, 1e-9)
        text = f"{status(rate)}  {duration(max(self._total - done, 0) / rate)} left".strip()
        if self._bars:
            self._bars.update(self._task, completed=done, status=text)
        elif self._console is not None and (line or now - self._last_line >= _LINE_EVERY_SECONDS):
            self._last_line = now
            self._console.print(f"{self._label}  {count}  {text}", highlight=False, soft_wrap=True)


class TrainingDisplay(_Display):
    """Shows loss, tokens/s and the time left of a run of ``total`` steps."""

    def step(self, step: int, *, loss: float, tokens_per_step: int) -> None:
        """Report a completed step."""

        def status(rate: float) -> str:
            return f"loss {loss:.3f}  {rate * tokens_per_step:,.0f} tokens/s"  # a line has 80 columns

        self._update(step, f"{step}/{self._total}", status, line=step == self._total)

    def validation(self, *, loss: float, bits_per_byte: float, perplexity: float) -> None:
        """Report an evaluation."""
        self._console.print(
            f"{self._label}  {self._done}/{self._total}  validation {loss:.4f}  "
            f"{bits_per_byte:.3f} bits/byte  ppl {perplexity:.4g}",
            highlight=False,
            soft_wrap=True,
        )


class ReadingDisplay(_Display):
    """Shows how much of ``total`` tokens has been read."""

    def advance(self, tokens: int, *, status: str = "") -> None:
        """Report that ``tokens`` more have been read."""
        done = self._done + tokens
        self._update(
            done,
            f"{done:,}/{self._total:,} tokens",
            lambda rate: f"{status}  {rate:,.0f} tokens/s".strip(),
        )

    def expect(self, tokens: int) -> None:
        """Report that ``tokens`` more are to be read."""
        self._total += tokens
        if self._bars:
            self._bars.update(self._task, total=self._total)


@contextlib.contextmanager
def training_bars(console: Console) -> Iterator[Progress | None]:
    """Live bars on a terminal, for as long as the block lasts; elsewhere ``None``."""
    if not console.is_terminal:
        yield None
        return
    whole = Column(no_wrap=True)  # the bar is what gives way in a narrow terminal
    with Progress(
        TextColumn("[bold]{task.description}", table_column=whole),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
        TextColumn("{task.fields[status]}", table_column=whole),
        console=console,
        expand=True,
    ) as bars:
        yield bars


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
