"""Several trainings at a time, each in a process of its own, shown on one console."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from nl_models.data.prepare import prepare_data
from nl_models.processes import fork_server
from nl_models.training.config import TrainConfig
from nl_models.training.console import TrainingDisplay, training_bars
from nl_models.training.loop import DivergedError, StopSignal, Trainer, create_run
from nl_models.training.model import build_model

_LOOK_EVERY_SECONDS = 0.2  # for a signal


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
    waiting, seconds = list(jobs), {}
    running: dict[Connection, _Running] = {}
    with StopSignal() as stop, training_bars(console) as bars:
        try:
            while running or (waiting and stop.received is None):
                while waiting and len(running) < at_once and stop.received is None:
                    begun = _Running.begin(context, waiting.pop(0), console, bars)
                    running[begun.receiver] = begun
                for receiver in wait(list(running), _LOOK_EVERY_SECONDS):
                    if running[receiver].follow():
                        ended = running.pop(receiver)
                        seconds[ended.name] = ended.close()
                if stop.received is not None:
                    for run in running.values():
                        run.stop()
        finally:
            for run in running.values():
                run.process.kill()
                run.close()
    if stop.received is not None:
        raise KeyboardInterrupt
    return seconds


class _Running:
    """A job's process, and what shows it here."""

    def __init__(self, name: str, process: BaseProcess, receiver: Connection, display: TrainingDisplay):
        self.name, self.process, self.receiver, self.display = name, process, receiver, display
        self._began = time.monotonic()
        self._stopping = False

    @classmethod
    def begin(cls, context: ForkServerContext, job: Job, console: Console, bars: Progress | None) -> _Running:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_train, args=(job, sender), daemon=True)
        process.start()
        sender.close()
        display = TrainingDisplay(console, steps=job.config.steps, start=0, label=job.name, bars=bars)
        return cls(job.name, process, receiver, display.__enter__())

    def follow(self) -> bool:
        """Show one message; whether it was the last."""
        try:
            kind, content = self.receiver.recv()
        except EOFError as error:
            self.process.join()
            raise RuntimeError(f"{self.name}: its process ended, status {self.process.exitcode}") from error
        if kind == "error":
            raise content
        if kind != "end":
            getattr(self.display, kind)(**content)
        return kind == "end"

    def stop(self) -> None:
        """Ask once for the end after the present step."""
        if not self._stopping:
            self._stopping = True
            self.process.terminate()

    def close(self) -> float:
        """Wait for the process; the seconds that it took."""
        self.process.join()
        self.receiver.close()
        self.display.__exit__(None, None, None)
        return time.monotonic() - self._began


class _Sender:
    """A :class:`TrainingDisplay` that is elsewhere."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, step: int, **figures: float) -> None:
        self._sender.send(("step", {"step": step, **figures}))

    def validation(self, **figures: float) -> None:
        self._sender.send(("validation", figures))


def _train(job: Job, sender: Connection) -> None:
    os.setpgrp()  # a terminal's Ctrl-C is for the process that asked; it tells this one
    with StopSignal() as stop:
        try:
            if job.config.threads is not None:
                torch.set_num_threads(job.config.threads)
            data = prepare_data(job.config.data_options, job.data)
            create_run(job.folder, job.config)
            model = build_model(job.config, data.tokenizer.vocab_size, data.tokenizer.separator_id)
            Trainer(job.folder, job.config, model, data).run(_Sender(sender), stop)
        except (ValueError, OSError, DivergedError) as error:
            sender.send(("error", error))
        else:
            sender.send(("end", {}))
