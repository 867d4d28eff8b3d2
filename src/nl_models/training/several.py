"""Several trainings at a time, each in a process of its own, shown on one console."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nl_models.data.prepare import prepare_data
from nl_models.processes import fork_server
from nl_models.training.config import TrainConfig
from nl_models.training.console import Display, training_bars
from nl_models.training.loop import StopSignal, Trainer, create_run
from nl_models.training.model import build_model

_LOOK_EVERY_SECONDS = 0.2  # for a signal and for news


@dataclass(frozen=True)
class Job:
    """A training to run.

    Attributes:
        name: on the console.
        folder: the run's (see :func:`~nl_models.training.loop.create_run`).
        config: its options; ``config.threads`` are those of its process.
        data: folder that :func:`~nl_models.data.prepare.prepare_data` has made.
    """

    name: str
    folder: Path
    config: TrainConfig
    data: Path


def train_several(jobs: Sequence[Job], *, at_once: int, console: Console) -> dict[str, float]:
    """Run the jobs, ``at_once`` at a time, in their order; returns the seconds of each by name.

    Raises:
        DivergedError: a loss is no longer finite.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; every run under way has saved a checkpoint.
        RuntimeError: a process has ended before its time.
        ValueError: a folder that is no place for a run.
    """
    context = fork_server(__name__)
    news, stopping = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(at_once, context, initializer=_begin, initargs=(news, stopping))
    waiting, running, seconds = list(jobs), {}, {}
    with StopSignal() as stop, training_bars(console) as bars:
        try:
            while running or (waiting and stop.received is None):
                while waiting and len(running) < at_once and stop.received is None:
                    job = waiting.pop(0)
                    display = Display(console, total=job.config.steps, label=job.name, bars=bars)
                    running[pool.submit(_train, job)] = (job.name, display.__enter__())
                done = wait(running, _LOOK_EVERY_SECONDS, FIRST_COMPLETED).done
                displays = dict(running.values())
                while not news.empty():
                    name, kind, figures, more = news.get()
                    getattr(displays[name], kind)(*figures, **more)
                for future in done:
                    name, display = running.pop(future)
                    display.__exit__(None, None, None)
                    try:
                        seconds[name] = future.result()
                    except BrokenProcessPool as error:
                        early = f"{name}: its process, or one beside it, ended before its time"
                        raise RuntimeError(early) from error
                if stop.received is not None:
                    stopping.set()
        finally:
            stopping.set()
            pool.shutdown()
    if stop.received is not None:
        raise KeyboardInterrupt
    return seconds


def _begin(news: Any, stopping: Any) -> None:
    """In each process, before its first job."""
    os.setpgrp()  # a terminal's Ctrl-C is for the process that asked; it tells this one
    _Elsewhere.news, _Elsewhere.stopping = news, stopping


class _Elsewhere:
    """A :class:`Display` and a :class:`StopSignal` that are in the process that asked."""

    news: Any
    stopping: Any

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def received(self) -> bool | None:
        return self.stopping.is_set() or None

    def advance(self, *figures: object, **more: object) -> None:
        self.news.put((self._name, "advance", figures, more))

    def note(self, text: str) -> None:
        self.news.put((self._name, "note", (text,), {}))


def _train(job: Job) -> float:
    began = time.monotonic()
    if job.config.threads is not None:
        torch.set_num_threads(job.config.threads)
    data = prepare_data(job.config.data_options, job.data)
    create_run(job.folder, job.config)
    model = build_model(job.config, data.tokenizer.vocab_size, data.tokenizer.separator_id)
    elsewhere = _Elsewhere(job.name)
    Trainer(job.folder, job.config, model, data).run(elsewhere, elsewhere)
    return time.monotonic() - began
