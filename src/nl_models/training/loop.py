"""The training loop: a run in a folder, that can be killed at any moment and continued to the same curve.

A run's folder holds::

    config.json     the options
    data/           tokenizer and token arrays, made once (so a continued run sees the same tokens)
    metrics.jsonl   one record per step and per evaluation
    checkpoints/    step-00000100/ …
    loss.png        written every minute and at the end
    model/          at the end: weights, config and tokenizer, for ``HopeForCausalLM.from_pretrained``
    position.json   by the command, after the end: loss by position, with its plot
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from nl_models.data.batches import TrainingBatches, validation_windows
from nl_models.data.prepare import PreparedData
from nl_models.files import new_directory, remove_incomplete, write_json
from nl_models.hope.configuration_hope import current_names, name_rule
from nl_models.training.checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from nl_models.training.config import FREE_ON_RESUME, TrainConfig, load_config
from nl_models.training.console import TrainingDisplay, without_progress_bars
from nl_models.training.metrics import MetricsLog, read_metrics
from nl_models.training.optimizer import build_optimizer, learning_rate_at
from nl_models.training.plots import plot_losses

_PLOT_EVERY_SECONDS = 60.0


class RunError(ValueError):
    """A run's folder cannot be created, continued or used."""


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a finite number."""


@dataclass(frozen=True)
class Evaluation:
    """Loss on the validation windows: nats per token, bits per byte of text, ``exp(loss)``."""

    loss: float
    bits_per_byte: float
    perplexity: float


@dataclass(frozen=True)
class Outcome:
    """How a call of :meth:`Trainer.run` ended: all steps done, or stopped by a signal after ``step``."""

    step: int
    finished: bool


class StopSignal:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM into a request to stop after the current step.

    The second one interrupts at once. The previous handlers return when the block ends.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {
            number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def create_run(folder: Path, config: TrainConfig) -> None:
    """Make the folder of a new run, with its config in it from the first moment.

    Raises:
        RunError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise RunError(f"{folder} exists; continue it with --resume, or choose another --output")
        folder.rmdir()
    with new_directory(folder) as temporary:
        options = config.to_dict()
        options["model_options"] = name_rule(options["model_options"])
        write_json(temporary / "config.json", options)


def continued_config(folder: Path, overrides: dict[str, object]) -> TrainConfig:
    """The config of an existing run, with the overrides that may change in a continuation.

    Raises:
        RunError: ``folder`` is not a run, or an override would change what the run computes.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} is not a training run (it has no config.json); start one without --resume")
    saved = load_config(folder / "config.json").to_dict()
    saved["model_options"] = name_rule(current_names(saved["model_options"]), older=True)
    if "model_options" in overrides:
        overrides = {**overrides, "model_options": name_rule(overrides["model_options"])}
    changed = sorted(
        name for name, value in overrides.items() if value != saved[name] and name not in FREE_ON_RESUME
    )
    if changed:
        listed = ", ".join(f"{name} ({saved[name]!r} → {overrides[name]!r})" for name in changed)
        raise RunError(
            f"{folder}: a continued run keeps its options, but these differ: {listed}. "
            f"Only {', '.join(sorted(FREE_ON_RESUME))} may change"
        )
    return TrainConfig(**{**saved, **overrides})


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the run's lock; it goes with the process, however that ends.

    Where the system has no such locks (Windows), there is none, and a warning says so.

    Raises:
        RunError: another process trains in this folder.
    """
    if fcntl is None:
        warnings.warn(f"{folder}: no locks here; start no second process in this folder", stacklevel=3)
        yield
        return
    with (Path(folder) / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{folder}: another process is training in this folder") from error
        yield


def choose_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is a device, else the CPU.

    Raises:
        ValueError: not a device, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} asked for, but PyTorch finds no CUDA device here; use 'cpu'")
    return device


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a run computes in: bf16 where ``precision`` says so, or is ``"auto"`` on CUDA."""
    low = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


class Trainer:
    """Trains a causal language model in a run's folder.

    Args:
        folder: the run (see :func:`create_run`).
        config: its options.
        model: with ``forward(input_ids=, labels=, use_cache=)`` as in transformers; moved to the device.
        data: the tokens.
    """

    def __init__(self, folder: Path, config: TrainConfig, model: PreTrainedModel, data: PreparedData) -> None:
        self.folder = Path(folder)
        self.config = config
        self.device = choose_device(config.device)
        self.model = model.to(self.device)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.tokenizer = data.tokenizer
        self._batches = TrainingBatches(data.train, config.sequence_length, config.batch_size, config.seed)
        self._validation = validation_windows(
            data.validation, sequence_length=config.sequence_length, count=config.validation_windows
        )
        # The first token of a window is given, not predicted.
        self._validation_bytes = int(data.tokenizer.token_bytes()[self._validation[:, 1:].numpy()].sum())
        self._optimizer = build_optimizer(self.model, config)
        self.step = 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def resume(self) -> int:
        """Continue from the newest checkpoint, or from the start if none was written yet; returns the step.

        Raises:
            CheckpointError: the newest checkpoint is damaged or foreign; nothing has changed then.
        """
        remove_incomplete(self.folder)
        remove_incomplete(self.checkpoints)
        checkpoints = list_checkpoints(self.checkpoints)
        if checkpoints:
            self.step = load_checkpoint(checkpoints[-1], self.model, self._optimizer).step
        return self.step

    def run(self, display: TrainingDisplay, stop: StopSignal | None = None) -> Outcome:
        """Train until the last step, or until ``stop`` has received a signal; a checkpoint is saved then.

        Raises:
            DivergedError: a loss or gradient norm that is not finite; checkpoints stay as they were.
        """
        config = self.config
        stopped = False
        plotted = time.monotonic()
        with MetricsLog(self.metrics, last_step=self.step) as log, display:
            while self.step < config.steps and not stopped:
                record = self._train_step()
                log.write(record)
                display.step(self.step, loss=record["loss"], tokens_per_step=config.tokens_per_step)
                stopped = stop is not None and stop.received is not None
                last = self.step == config.steps
                validation_loss = None
                if last or self.step % config.evaluate_every == 0:
                    result = self.evaluate()
                    validation_loss = result.loss
                    improved = result.loss < min(
                        (r["loss"] for r in read_metrics(self.metrics) if r["kind"] == "validation"),
                        default=math.inf,
                    )
                    log.write({"kind": "validation", **self._position(), **vars(result)})
                    display.validation(**vars(result))
                else:
                    improved = False
                if last or stopped or improved or self.step % config.checkpoint_every == 0:
                    save_checkpoint(
                        self.checkpoints, Progress(self.step, validation_loss), self.model, self._optimizer
                    )
                    prune_checkpoints(self.checkpoints, keep=config.keep_checkpoints)
                if last or stopped or time.monotonic() - plotted > _PLOT_EVERY_SECONDS:
                    self._plot()
                    plotted = time.monotonic()
        finished = self.step >= config.steps
        if finished:
            self._export()
        return Outcome(self.step, finished)

    def evaluate(self) -> Evaluation:
        """Loss on the fixed validation windows, with a fresh state for each window."""
        self.model.eval()
        total, targets = 0.0, 0
        with torch.no_grad():
            for rows in self._validation.split(self.config.batch_size):
                rows = rows.to(self.device)
                count = rows.shape[0] * (rows.shape[1] - 1)
                total += self._loss(rows).item() * count
                targets += count
        self.model.train()
        loss = total / targets
        bits = total / math.log(2) / max(1, self._validation_bytes)
        return Evaluation(loss, bits, math.exp(min(loss, 700.0)))

    def _train_step(self) -> dict:
        config = self.config
        began = time.perf_counter()
        self.model.train()
        rate = learning_rate_at(self.step, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("rate_share", 1.0)
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for part in range(config.gradient_accumulation):
            rows = self._batches.batch(self.step * config.gradient_accumulation + part).to(self.device)
            part_loss = self._loss(rows) / config.gradient_accumulation
            part_loss.backward()
            loss += part_loss.detach()
        norm = clip_grad_norm_(self.model.parameters(), config.clip_norm)
        measured, norm = loss.item(), norm.item()
        if not (math.isfinite(measured) and math.isfinite(norm)):
            raise DivergedError(
                f"step {self.step + 1}: loss {measured}, gradient norm {norm}. Lower the learning rate or "
                f"lengthen the warm-up; the checkpoints in {self.checkpoints} are untouched"
            )
        self._optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - began
        return {
            "kind": "train",
            **self._position(),
            "loss": measured,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": round(config.tokens_per_step / seconds, 1),
        }

    def _position(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.step * self.config.tokens_per_step}

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        with autocast(self.config.precision, self.device):
            return self.model(input_ids=rows, labels=rows, use_cache=False).loss

    def _plot(self) -> None:
        plot_losses(
            {self.config.model: read_metrics(self.metrics)}, self.folder / "loss.png", title="Loss of the run"
        )

    def _export(self) -> None:
        target = self.folder / "model"
        if not target.exists():
            with new_directory(target) as temporary:
                with without_progress_bars():
                    self.model.save_pretrained(temporary)
                self.tokenizer.save(temporary)
