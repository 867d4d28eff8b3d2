"""Several trainings at a time, each in a process of its own, shown on one console."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nl_models.console import Display, training_bars
from nl_models.data.prepare import prepare_data
from nl_models.processes import fork_server
from nl_models.training.config import TrainConfig
from nl_models.training.loop import Trainer, create_run, stop_signal
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
    total = {job.name: job.config.steps for job in jobs}
    displays: dict[str, Display] = {}
    with stop_signal() as stop, training_bars(console) as bars:
        pool = ProcessPoolExecutor(at_once, context, initializer=_begin, initargs=(news, stopping))
        try:
            futures = {job.name: pool.submit(_train, job) for job in jobs}
            running: Any = True
            while running:
                running = wait(futures.values(), _LOOK_EVERY_SECONDS).not_done
                while not news.empty():
                    name, kind, figures, more = news.get()
                    if name not in displays:
                        displays[name] = Display(console, total=total[name], label=name, bars=bars)
                    getattr(displays[name], kind)(*figures, **more)
                if stop.is_set():
                    stopping.set()
        finally:
            stopping.set()
            pool.shutdown()
    for name, future in futures.items():
        if isinstance(future.exception(), BrokenProcessPool):
            raise RuntimeError(f"{name}: its process, or one beside it, ended before its time")
    seconds = {name: future.result() for name, future in futures.items()}
    if stop.is_set():
        raise KeyboardInterrupt
    return seconds


class _Elsewhere:
    """A :class:`Display` in the process that asked."""

    news: Any
    stopping: Any

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, kind: str) -> Callable[..., None]:
        return lambda *figures, **more: self.news.put((self._name, kind, figures, more))


def _begin(news: Any, stopping: Any) -> None:
    """In each process, before its first job."""
    os.setpgrp()  # a terminal's Ctrl-C is for the process that asked; it tells this one
    _Elsewhere.news, _Elsewhere.stopping = news, stopping


def _train(job: Job) -> float:
    began, display, stopping = time.monotonic(), _Elsewhere(job.name), _Elsewhere.stopping
    if stopping.is_set():  # before its turn came
        return 0.0
    try:
        display.expect(0)  # it shows from now on
        if job.config.threads is not None:
            torch.set_num_threads(job.config.threads)
        data = prepare_data(job.config, job.data)
        create_run(job.folder, job.config)
        model = build_model(job.config, data.tokenizer.vocab_size, data.tokenizer.separator_id)
        Trainer(job.folder, job.config, model, data).run(display, stopping.is_set)
    except BaseException:
        stopping.set()  # before this process takes the next
        raise
    return time.monotonic() - began
