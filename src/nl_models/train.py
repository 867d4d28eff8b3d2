"""Train a Hope language model, or a baseline, on a folder of text: ``python -m nl_models.train``."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.filesize import decimal

from nl_models.console import Display, explained_errors
from nl_models.data.corpus import check_folder
from nl_models.data.prepare import PreparedData, check_tokenizer, prepare_data
from nl_models.evaluation.held_out import measure_held_out
from nl_models.files import locked, write_json
from nl_models.hope.configuration_hope import PRESETS
from nl_models.open_model import copy_weights, open_model
from nl_models.parallel.mesh import Mesh, parts_in_turn
from nl_models.parallel.plan import idle_share, messages
from nl_models.profiling.dry_run import described, plan_run
from nl_models.training.checkpoint import best_checkpoint, list_checkpoints
from nl_models.training.config import TrainConfig, merged_options, read_options, with_config_options
from nl_models.training.distributed import (
    choose_device,
    computes_in_bf16,
    joined_processes,
    on_first,
    rank,
    restartable,
    run_mesh,
)
from nl_models.training.loop import (
    DivergedError,
    Trainer,
    autocast,
    continued_config,
    create_run,
    stop_signal,
)
from nl_models.training.metrics import read_metrics, tracker_class
from nl_models.training.model import build_model, hope_config, levels_hardly_trained, preset_options

_POSITION_WINDOWS = 16
_POSITION_STREAMS = 8
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def train(folder: Path, config: TrainConfig, *, resume: bool, console: Console) -> int:
    """Run or continue the training in ``folder`` and report on ``console``; returns the step it ends after.

    In a group of processes all call this together; the first one alone writes to the folder.

    Raises:
        ValueError: bad options, corpus, folder or checkpoint (the message says which).
        DivergedError: the loss is no longer finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run_mesh(config)
    if config.track is not None:
        tracker_class(config.track)
    if not resume:
        # Everything that can be refused is refused before a folder appears.
        choose_device(config.device)
        check_tokenizer(config.tokenizer)
        hope_config(config, vocab_size=config.vocab_size, separator_id=0)
        if config.corpus is not None and config.text_column is None:
            check_folder(config.corpus)
        on_first(lambda: create_run(folder, config))
    with contextlib.ExitStack() as lock:
        other = f"{folder}: another process is training in this folder"
        on_first(lambda: lock.enter_context(locked(folder / ".lock", other)))
        try:
            on_first(lambda: bool(prepare_data(config, folder / "data")))
            data = prepare_data(config, folder / "data")
            model = build_model(config, data.tokenizer.vocab_size, data.tokenizer.separator_id)
            if config.init_from is not None and not list_checkpoints(folder / "checkpoints"):
                copy_weights(config.init_from, model, data)
            trainer = Trainer(folder, config, model, data)
            start = trainer.resume() if resume else 0
        except (ValueError, OSError):
            # Refused after all: the folder would stand in the way of the next try.
            if not resume and rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _print_summary(console, folder, trainer, data.description, start)
        if start >= config.steps and (folder / "model").exists():
            console.print(
                f"{folder} is complete: all {config.steps} steps are done", highlight=False, soft_wrap=True
            )
            ended = start
        else:
            on_first(lambda: _save_steps(folder, config))
            with (
                Display(console, total=config.steps, start=start, label=config.model) as display,
                stop_signal() as stop,
            ):
                ended = trainer.run(display, stop.is_set)
        _print_exchange(console, trainer)
        if ended >= config.steps and rank() == 0:
            _measure_position(folder, config, data, console, trainer.device)
        return ended


def _save_steps(folder: Path, config: TrainConfig) -> None:
    """A run that was given more steps goes on to them whenever it is continued."""
    options = read_options(folder / "config.json")
    steps = {"steps": config.steps, "decay_steps": config.decay_steps}
    if {**options, **steps} != options:
        write_json(folder / "config.json", {**options, **steps})
        (folder / "position.json").unlink(missing_ok=True)  # of the shorter run


def _measure_position(
    folder: Path, config: TrainConfig, data: PreparedData, console: Console, device: torch.device
) -> None:
    length = config.position_length
    length = _POSITION_WINDOWS * config.sequence_length if length is None else length
    if not length or (folder / "position.json").exists():
        return
    model = open_model(folder, device).model  # in training it may lie in shards
    with autocast(config.precision, device):
        measure_held_out(
            model, data.validation, folder, window=config.sequence_length, length=length,
            streams=_POSITION_STREAMS, console=console, name=config.model,
        )  # fmt: skip


@with_config_options
def main(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/train"),
    config: Annotated[
        Path | None, typer.Option(help="JSON or YAML file of options; those on the command line win.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output from its newest checkpoint.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Sizes of a Hope, under all other options: {', '.join(PRESETS)}. tiny is a whole first run,"
            " of a minute or two on one core."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: print memory, operations and communication of a step, planned on tensors "
            "without data, for a GPU unless --device is cpu. Takes minutes for a large model.",
        ),
    ] = False,
    *,
    overrides: dict[str, object],
) -> None:
    """Train a Hope language model, or a baseline, on real text.

    A killed run continues with --resume to the same loss curve. Ctrl-C saves a checkpoint first.
    """
    with explained_errors(DivergedError):
        file = read_options(config) if config else {}
        options = merged_options(preset_options(preset) if preset else {}, file, overrides)
        # All look before they join, so that none sees what another has just begun.
        resume |= restartable() and (output / "config.json").is_file()
        if not resume and "steps" in options and "warmup_steps" not in options:
            options["warmup_steps"] = min(TrainConfig.warmup_steps, options["steps"] // 10)
        checked = continued_config(output, options) if resume else TrainConfig(**options)
        if dry_run:
            _print_pairs(Console(), **described(plan_run(checked, Mesh.parse(checked.mesh or "data=1"))))
            return
        with joined_processes(choose_device(checked.device)):
            console = Console(quiet=rank() > 0)
            ended = train(output, checked, resume=resume, console=console)
    if ended >= checked.steps:
        _print_results(console, output)
    else:
        again = shlex.join(["python", "-m", "nl_models.train", "--output", str(output), "--resume"])
        console.print(
            f"Stopped after step {ended}; a checkpoint is saved. Continue with:\n  {again}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)


def _print_summary(console: Console, folder: Path, trainer: Trainer, description: dict, start: int) -> None:
    config = trainer.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    learned, held_out = (description[side] for side in ("train", "validation"))
    _print_pairs(
        console,
        run=f"{folder}{f' (continued after step {start})' if start else ''}",
        model=f"{config.model}, {parameters:,} parameters, on {trainer.device}",
        data=f"{learned['tokens']:,} tokens of {learned['files']:,} files, "
        f"{held_out['tokens']:,} of {held_out['files']:,} for validation",
        steps=f"{config.steps:,} of {config.tokens_per_step:,} tokens",
    )
    for size in levels_hardly_trained(trainer.model.config, config.sequence_length):
        console.print(  # a sentence, which is broken where the terminal ends
            f"[bold]note    [/]windows of {config.sequence_length} tokens hold fewer than three chunks of "
            f"the level that learns every {size}: what its steps add up to is not trained. Use longer "
            "windows (--sequence-length) or a smaller chunk_size (--model-option continuum_levels=...)",
            highlight=False,
        )


def _print_exchange(console: Console, trainer: Trainer) -> None:
    """What ranks that share windows sent and waited in the last step, beside what the formulas say."""
    config, mesh = trainer.config, trainer.mesh
    steps = [record for record in read_metrics(trainer.metrics) if "sent_bytes" in record]
    if mesh.sequence == 1 or not steps:
        return
    windows, length = config.batch_size // mesh.data, config.sequence_length // mesh.sequence
    element = 2 if computes_in_bf16(config.precision, trainer.device.type) else 4
    sent = sum(messages(trainer.model, windows, [length] * mesh.sequence, element))
    sent *= mesh.data * config.gradient_accumulation
    idle = idle_share(trainer.model, mesh.sequence, parts_in_turn(windows, mesh.sequence))
    found = f"{decimal(steps[-1]['sent_bytes'])} a step (formula: {decimal(sent)})"
    _print_pairs(console, states=f"{found}, waiting {steps[-1]['waiting']:.0%} of it (formula: {idle:.0%})")


def _print_results(console: Console, folder: Path) -> None:
    last = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "validation"][-1]
    figures = f"{last['bits_per_byte']:.3f} bits per byte, perplexity {last['perplexity']:.4g}"
    results = {
        "loss": f"{last['loss']:.4f} nats/token in validation, {figures}",
        "model": folder / "model",
        "best": best_checkpoint(folder / "checkpoints"),
        "metrics": folder / "metrics.jsonl",
        "plot": folder / "loss.png",
    }
    if (folder / "position.json").exists():
        results["position"] = f"{folder / 'position.json'}, {folder / 'position.png'}"
    _print_pairs(console, **results)


def _print_pairs(console: Console, **pairs: object) -> None:
    """Aligned names and values; long values are neither cut nor broken, so that paths can be copied."""
    for name, value in pairs.items():
        console.print(f"[bold]{name:<9}[/]{value}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
