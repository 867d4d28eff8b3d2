"""The training loop: a run in a folder, that can be killed at any moment and continued to the same curve.

Any number of processes train together (:mod:`nl_models.training.distributed`). They share out the windows of
a batch, so that their number changes neither what a step computes nor its loss, but for rounding.

A run's folder holds::

    config.json     the options
    data/           tokenizer and token arrays, made once (so a continued run sees the same tokens)
    metrics.jsonl   one record per step and per evaluation
    checkpoints/    step-00000100/ … which ``from_pretrained`` opens, too
    loss.png        written every minute and at the end
    model/          at the end: weights, config and tokenizer, for ``HopeForCausalLM.from_pretrained``
    position.json   by the command, after the end: loss by position, with its plot
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from nl_models.console import Display
from nl_models.data.batches import DocumentStreams, StreamBatch, TrainingBatches, validation_windows
from nl_models.data.prepare import PreparedData
from nl_models.files import new_directory, remove_incomplete, write_json
from nl_models.hope import HopeCache
from nl_models.hope.configuration_hope import current_names, name_rule
from nl_models.parallel.mesh import ParallelModel
from nl_models.plots import plot_losses
from nl_models.training.carried import CarriedStates
from nl_models.training.checkpoint import (
    export_model,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    validation_losses,
)
from nl_models.training.config import FREE_ON_RESUME, TrainConfig, load_config
from nl_models.training.distributed import choose_device, computes_in_bf16, on_first, rank, run_mesh, summed
from nl_models.training.metrics import metrics_log, read_metrics
from nl_models.training.model import build_optimizer, learning_rate_at

_PLOT_EVERY_SECONDS = 60.0


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a finite number."""


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C (SIGINT) or SIGTERM sets the event, a request to stop after the step.

    The second one interrupts at once. The handlers of before return when the block ends.
    """
    stop = threading.Event()

    def receive(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def create_run(folder: Path, config: TrainConfig) -> None:
    """Make the folder of a new run, with its config in it from the first moment.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"{folder} exists; continue it with --resume, or choose another --output")
        folder.rmdir()
    with new_directory(folder) as temporary:
        options = dataclasses.asdict(config)
        options["model_options"] = name_rule(options["model_options"])
        write_json(temporary / "config.json", options)


def continued_config(folder: Path, overrides: dict[str, object]) -> TrainConfig:
    """The config of an existing run, with the overrides that may change in a continuation.

    Raises:
        ValueError: ``folder`` is not a run, or an override would change what the run computes.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a training run (it has no config.json); start one without --resume"
        )
    saved = dataclasses.asdict(load_config(folder / "config.json"))
    saved["model_options"] = name_rule(current_names(saved["model_options"]), older=True)
    if "model_options" in overrides:
        overrides = {**overrides, "model_options": name_rule(overrides["model_options"])}
    if overrides.get("steps", 0) > saved["steps"]:
        # A longer run keeps its curve: the schedule ends where it would have, and the last rate stays.
        saved["decay_steps"] = saved["decay_steps"] or saved["steps"]
        saved["steps"] = overrides["steps"]
    changed = sorted(
        name for name, value in overrides.items() if value != saved[name] and name not in FREE_ON_RESUME
    )
    if changed:
        listed = ", ".join(f"{name} ({saved[name]!r} → {overrides[name]!r})" for name in changed)
        raise ValueError(
            f"{folder}: a continued run keeps its options, but these differ: {listed}. "
            f"Only {', '.join(sorted(FREE_ON_RESUME))} may change, and steps may become more"
        )
    return TrainConfig(**{**saved, **overrides})


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a run computes in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(precision, device.type))


class Trainer:
    """Trains a causal language model in a run's folder.

    Args:
        folder: the run (see :func:`create_run`).
        config: its options.
        model: with ``forward(input_ids=, labels=, use_cache=, num_items_in_batch=)`` as in transformers;
            moved to the device. A Hope where states are carried.
        data: the tokens.

    Raises:
        ValueError: options that this model, the data or the number of processes do not allow.
    """

    def __init__(self, folder: Path, config: TrainConfig, model: PreTrainedModel, data: PreparedData) -> None:
        self.mesh = run_mesh(config)
        self.folder = Path(folder)
        self.checkpoints, self.metrics = self.folder / "checkpoints", self.folder / "metrics.jsonl"
        self.config = config
        self.device = choose_device(config.device)
        self.model = model.to(self.device)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            self.model.compile()
        self._parallel = ParallelModel(self.model, self.device, self.mesh, fsdp=config.fsdp)
        self.tokenizer = data.tokenizer
        length, batch_size, parts = config.sequence_length, config.batch_size, config.gradient_accumulation
        # Which of a batch's windows are this process's.
        self._own = slice(self.mesh.place(rank()), None, self.mesh.data)
        self._carried = None
        if config.carry_state:
            self._batches = DocumentStreams(
                data.train, data.tokenizer.separator_id, length, batch_size, parts, config.seed
            )
            streams = [range(part * batch_size, (part + 1) * batch_size) for part in range(parts)]
            self._carried = CarriedStates(self.model, [each[self._own] for each in streams])
        else:
            self._batches = TrainingBatches(data.train, length, batch_size, config.seed)
        self._validation = validation_windows(
            data.validation, sequence_length=length, count=config.validation_windows
        )
        # The first token of a window is given, not predicted.
        self._validation_bytes = int(data.tokenizer.token_bytes()[self._validation[:, 1:].numpy()].sum())
        self._optimizer = build_optimizer(self.model, config)
        self._lowest = math.inf  # of the validation losses
        self.step = 0

    def resume(self) -> int:
        """Continue from the newest checkpoint, or from the start if none was written yet; returns the step.

        Raises:
            ValueError: the newest checkpoint is damaged or foreign; nothing has changed then.
        """
        on_first(lambda: [remove_incomplete(folder) for folder in (self.folder, self.checkpoints)])
        if checkpoints := list_checkpoints(self.checkpoints):
            self.step = load_checkpoint(checkpoints[-1], self.model, self._optimizer, self._carried)
            self._lowest = min(validation_losses(self.checkpoints).values(), default=math.inf)
        return self.step

    def run(self, display: Display, stop: Callable[[], bool] = lambda: False) -> int:
        """Train until the last step, or until ``stop()`` in some process; a checkpoint is saved then.

        Returns:
            The step after which it ended.

        Raises:
            DivergedError: a loss or gradient norm that is not finite; checkpoints stay as they were.
        """
        config, stopped, plotted = self.config, False, time.monotonic()
        first = rank() == 0
        records = metrics_log(self.metrics, last_step=self.step, track=config.track)
        with records if first else contextlib.nullcontext(lambda _: None) as log:
            while self.step < config.steps and not stopped:
                record = self._train_step()
                log(record)
                last = self.step == config.steps
                display.advance(1, f"loss {record['loss']:.3f}", tokens=config.tokens_per_step, line=last)
                stopped = any(summed(stop()))
                loss, improved = None, False
                if last or self.step % config.evaluate_every == 0:
                    record = self.evaluate()
                    log(record)
                    loss = record["loss"]
                    improved, self._lowest = loss < self._lowest, min(loss, self._lowest)
                    display.note(
                        f"validation {loss:.4f}  {record['bits_per_byte']:.3f} bits/byte  "
                        f"ppl {record['perplexity']:.4g}"
                    )
                if last or stopped or improved or self.step % config.checkpoint_every == 0:
                    saved = (self.model, self.tokenizer, self._optimizer, self._carried)
                    save_checkpoint(self.checkpoints, self.step, *saved, validation_loss=loss)
                    on_first(lambda: prune_checkpoints(self.checkpoints, keep=config.keep_checkpoints))
                if first and (last or stopped or time.monotonic() - plotted > _PLOT_EVERY_SECONDS):
                    shown = {config.model: read_metrics(self.metrics)}
                    plot_losses(shown, self.folder / "loss.png", title="Loss of the run")
                    plotted = time.monotonic()
        if self.step >= config.steps:
            on_first(lambda: export_model(list_checkpoints(self.checkpoints)[-1], self.folder / "model"))
        return self.step

    def evaluate(self) -> dict[str, Any]:
        """The record of the fixed validation windows, with a fresh state for each: nats per token, bits per
        byte of text, ``exp(loss)``.
        """
        self.model.eval()
        total = 0.0
        with torch.no_grad(), autocast(self.config.precision, self.device):
            for rows in self._validation.split(self.config.batch_size):
                own = rows[self._own]
                # All processes run the model equally often; one without a window of its own counts none.
                loss = self._loss(StreamBatch.whole(own if len(own) else rows[:1]), 1).item()
                total += loss if len(own) else 0.0
        self.model.train()
        total = summed(total)[0] / self.mesh.heads
        loss = total / self._validation[:, 1:].numel()
        bits = total / math.log(2) / max(1, self._validation_bytes)
        return self._record(
            "validation", loss=loss, bits_per_byte=bits, perplexity=math.exp(min(loss, 700.0))
        )

    def _train_step(self) -> dict:
        config = self.config
        began, before = time.perf_counter(), self._parallel.exchanged()
        self.model.train()
        rate = learning_rate_at(self.step, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("rate_share", 1.0)
        # Random numbers, too, are a function of the step.
        place = rank() // self.mesh.heads  # ranks with other heads of the same tokens draw the same
        seed = np.random.SeedSequence([config.seed, self.step, place]).generate_state(1)
        torch.manual_seed(int(seed[0]))
        self._optimizer.zero_grad(set_to_none=True)
        first = self.step * config.gradient_accumulation
        batches = [self._batches.batch(first + part) for part in range(config.gradient_accumulation)]
        if self._carried is None:
            batches = [StreamBatch.whole(batch) for batch in batches]
        # Gradients are averaged over data ranks, so that each divides by its share of the targets.
        share = sum(int((batch.lengths - 1).sum()) for batch in batches) / self.mesh.data
        loss = sum(self._backward(part, batch, share) for part, batch in enumerate(batches))
        self._parallel.exchange_gradients()
        norm = clip_grad_norm_(self.model.parameters(), config.clip_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        sent, waited = (now - then for now, then in zip(self._parallel.exchanged(), before))
        measured, sent, waited = summed(loss.item(), sent, waited)
        measured /= self.mesh.data * self.mesh.heads
        if not (math.isfinite(measured) and math.isfinite(norm)):
            raise DivergedError(
                f"step {self.step + 1}: loss {measured}, gradient norm {norm}. Lower the learning rate or "
                f"lengthen the warm-up; the checkpoints in {self.checkpoints} are untouched"
            )
        self._optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - began
        rounded = round(config.tokens_per_step / seconds, 1)
        figures = {"learning_rate": rate, "gradient_norm": norm, "tokens_per_second": rounded}
        if self.mesh.sequence > 1:
            figures |= {"sent_bytes": int(sent), "waiting": round(waited / seconds / self.mesh.ranks, 3)}
        return self._record("train", loss=measured, **figures)

    def _record(self, kind: str, **figures: float) -> dict[str, Any]:
        tokens = self.step * self.config.tokens_per_step
        return {"kind": kind, "step": self.step, "tokens": tokens, **figures}

    def _backward(self, part: int, batch: StreamBatch, targets: float) -> torch.Tensor:
        """Add a pass's gradients, given the windows of all processes; returns its share of the loss."""
        own, cache = StreamBatch(*(x[self._own] for x in batch)), None
        last = part == self.config.gradient_accumulation - 1
        exchange = contextlib.nullcontext() if last else self._parallel.without_exchange()
        with autocast(self.config.precision, self.device), exchange:
            if self._carried is not None:
                cache = self._carried.before(part, own.begins)
            loss = self._loss(own, targets, cache)
            if self._carried is not None:
                self._carried.after(part, cache)
            loss.backward()
        return loss.detach()

    def _loss(self, batch: StreamBatch, targets: float, cache: HopeCache | None = None) -> torch.Tensor:
        """The summed loss of what is real in a batch, divided by ``targets``."""
        tokens, lengths, _ = batch
        inputs = {"input_ids": tokens, "labels": tokens}
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        if not bool(real.all()):
            inputs |= {"attention_mask": real, "labels": tokens.masked_fill(~real, -100)}
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        if cache is not None:
            inputs["cache"] = cache
        return self._parallel(**inputs, num_items_in_batch=targets)
