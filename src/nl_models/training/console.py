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


class TrainingDisplay:
    """Shows loss, tokens/s and the time left.

    Args:
        console: where to; on a terminal a live bar, else one line per ten seconds.
        steps: of the whole run.
        start: steps done before (a resumed run).
        label: in front of the bar or of each line.
        bars: of several runs that are shown together (:func:`training_bars`); this run's own if not given.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        start: int,
        label: str,
        bars: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._steps = steps
        self._first = self._step = start
        self._label = label
        self._clock = clock
        self._began = self._last_line = clock()
        self._own = training_bars(console) if bars is None else contextlib.nullcontext(bars)
        self._bars: Progress | None = None

    def __enter__(self) -> TrainingDisplay:
        self._bars = self._own.__enter__()
        if self._bars:
            self._task = self._bars.add_task(self._label, total=self._steps, completed=self._first, status="")
        return self

    def __exit__(self, *error: object) -> None:
        self._own.__exit__(*error)

    def step(self, step: int, *, loss: float, tokens_per_step: int) -> None:
        """Report a completed step."""
        self._step = step
        now = self._clock()
        done = step - self._first
        seconds = max(now - self._began, 1e-9)
        rate = done * tokens_per_step / seconds
        left = duration((self._steps - step) * seconds / done)
        status = f"loss {loss:.3f}  {rate:,.0f} tokens/s  {left} left"  # a line has 80 columns
        if self._bars:
            self._bars.update(self._task, completed=step, status=status)
        elif step == self._steps or now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            self._console.print(
                f"{self._label}  {step}/{self._steps}  {status}", highlight=False, soft_wrap=True
            )

    def validation(self, *, loss: float, bits_per_byte: float, perplexity: float) -> None:
        """Report an evaluation."""
        self._console.print(
            f"{self._label}  {self._step}/{self._steps}  validation {loss:.4f}  "
            f"{bits_per_byte:.3f} bits/byte  ppl {perplexity:.4g}",
            highlight=False,
            soft_wrap=True,
        )


class ReadingDisplay:
    """Shows how much of the tokens to read has been read.

    Args:
        console: where to; on a terminal a live bar, else one line per ten seconds; ``None``: nothing.
        total: tokens.
        label: in front of the bar or of each line.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        console: Console | None,
        *,
        total: int,
        label: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._total, self._label, self._clock = console, total, label, clock
        self._done = 0
        self._began = self._last_line = clock()
        self._own = contextlib.nullcontext() if console is None else training_bars(console)
        self._bars: Progress | None = None

    def __enter__(self) -> ReadingDisplay:
        self._bars = self._own.__enter__()
        if self._bars:
            self._task = self._bars.add_task(self._label, total=self._total, status="")
        return self

    def __exit__(self, *error: object) -> None:
        self._own.__exit__(*error)

    def advance(self, tokens: int, *, status: str = "") -> None:
        """Report that ``tokens`` more have been read."""
        self._done += tokens
        now = self._clock()
        left = (self._total - self._done) * max(now - self._began, 1e-9) / self._done
        status = f"{status}  {duration(left)} left".strip()
        if self._bars:
            self._bars.update(self._task, completed=self._done, status=status)
        elif self._console is not None and now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            self._console.print(
                f"{self._label}  {self._done:,}/{self._total:,} tokens  {status}",
                highlight=False,
                soft_wrap=True,
            )


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
