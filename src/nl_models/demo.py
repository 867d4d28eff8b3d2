"""Hope beside attention and Gated DeltaNet on real text, in some minutes: ``python -m nl_models.demo``."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from nl_models.console import duration, explained_errors, fail, without_progress_bars
from nl_models.data.prepare import prepare_data
from nl_models.data.tokenizer import Tokenizer
from nl_models.demo_report import DemoResult, ModelResult, Sample, write_reports
from nl_models.evaluation.held_out import measure_held_out
from nl_models.files import write_json
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.hope.baseline import mixer_baseline, parameter_count
from nl_models.plots import plot_losses
from nl_models.processes import available_cores
from nl_models.profile import progress_printer
from nl_models.profiling.choose import config_arguments
from nl_models.profiling.report import describe_machine, plot_profile, profile_table, save_profile
from nl_models.profiling.run import ProfileSettings, profile_models
from nl_models.profiling.subjects import ConfiguredModel
from nl_models.training.config import TrainConfig
from nl_models.training.distributed import choose_device
from nl_models.training.loop import DivergedError
from nl_models.training.metrics import read_metrics
from nl_models.training.model import hope_config
from nl_models.training.several import Job, train_several

PROMPT = 'def read(self, size=-1):\n    """'


MODELS = ("hope", "transformer", "hope-attention", "gated-delta-net")
"""A plain transformer, and Hope's own blocks with softmax attention, or with Gated DeltaNet, as the mixer."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo. The defaults take four or five minutes on two slow cores.

    Attributes:
        corpus: folder of text files; ``None``: Python's own library.
        vocab_size: ids of the BPE.
        hidden_size, layers, heads: of all models.
        initializer_range: of all; smaller than HopeConfig's default, which is slow with so few tokens.
        steps, batch_size, sequence_length: all models see the same windows in the same order.
        hope_learning_rate, transformer_learning_rate, attention_learning_rate,
            gated_delta_net_learning_rate: peaks; the best of those tried for each (docs/demo.md).
        warmup_steps: of all.
        evaluations: how often the validation loss is taken in training.
        validation_windows: windows of the validation set.
        sample_tokens: tokens to generate.
        position_windows: windows of held-out text that are read with one state; less if there is less.
        position_streams: rotations of that text.
        lengths, decode_after: contexts of the profile, tokens.
        threads: CPU threads of a training. Two are little faster, and many times slower where another process
            wants a core; on a CPU, as many trainings run at once as there are cores for.
        device: ``"auto"`` (CUDA when there), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        seed: of weights, data order and sampling.
    """

    corpus: str | None = None
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 2
    heads: int = 2
    initializer_range: float = 0.02
    steps: int = 400
    batch_size: int = 4
    sequence_length: int = 256
    hope_learning_rate: float = 8e-3
    transformer_learning_rate: float = 4e-3
    attention_learning_rate: float = 4e-3
    gated_delta_net_learning_rate: float = 8e-3
    warmup_steps: int = 30
    evaluations: int = 8
    validation_windows: int = 48
    sample_tokens: int = 160
    position_windows: int = 64
    position_streams: int = 4
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    decode_after: tuple[int, ...] = (1, 100, 1_000, 10_000)
    threads: int = 1
    device: str = "auto"
    seed: int = 0

    def train_config(self, model: str) -> TrainConfig:
        """The options of a run of one of :data:`MODELS`; what makes a baseline is not in yet."""
        learning_rates = {
            "hope": self.hope_learning_rate,
            "transformer": self.transformer_learning_rate,
            "hope-attention": self.attention_learning_rate,
            "gated-delta-net": self.gated_delta_net_learning_rate,
        }
        return TrainConfig(
            corpus=self.corpus,
            vocab_size=self.vocab_size,
            model="hope" if model == "hope" else "attention",
            hidden_size=self.hidden_size,
            layers=self.layers,
            heads=self.heads,
            model_options={"initializer_range": self.initializer_range},
            steps=self.steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            learning_rate=learning_rates[model],
            warmup_steps=self.warmup_steps,
            evaluate_every=max(1, self.steps // self.evaluations),
            validation_windows=self.validation_windows,
            checkpoint_every=self.steps,
            keep_checkpoints=1,
            device=self.device,
            threads=self.threads,
            seed=self.seed,
        )


def run_demo(output: Path, settings: DemoSettings, *, console: Console, command: str) -> DemoResult:
    """Train all models, generate, profile, and write plots and reports into the new folder ``output``.

    Raises:
        ValueError: bad settings or corpus.
        DivergedError: a loss is no longer finite.
        KeyboardInterrupt: stopped by Ctrl-C.
    """
    began = time.monotonic()
    device = choose_device(settings.device)
    torch.set_num_threads(settings.threads)
    hope_run = settings.train_config("hope")
    console.rule("[bold]1/5 text", align="left")
    data = prepare_data(hope_run, output / "data")
    for side in ("train", "validation"):
        about = data.description[side]
        console.print(f"{side}: {about['tokens']:,} tokens of {about['files']:,} files", highlight=False)

    hope = hope_config(hope_run, data.tokenizer.vocab_size, data.tokenizer.separator_id)
    configs = {
        "hope": hope,
        "transformer": mixer_baseline(hope, same_blocks=False),
        "hope-attention": mixer_baseline(hope),
        "gated-delta-net": mixer_baseline(hope, "gated_delta_net"),
    }
    console.rule("[bold]2/5 training", align="left")
    jobs = []
    for name in MODELS:
        run, sizes = settings.train_config(name), configs[name]
        plain = hope_config(run, data.tokenizer.vocab_size, data.tokenizer.separator_id)
        run = dataclasses.replace(run, model_options={**run.model_options, **_difference(plain, sizes)})
        jobs.append(Job(name, output / name, run, output / "data"))
        console.print(
            f"{name}: {parameter_count(sizes):,} parameters, peak learning rate {run.learning_rate:g}",
            highlight=False,
        )
    at_once = 1 if device.type == "cuda" else max(1, available_cores() // settings.threads)
    seconds = train_several(jobs, at_once=at_once, console=console)
    results = [_result(job, parameter_count(configs[job.name]), seconds[job.name]) for job in reversed(jobs)]
    records = {result.name: read_metrics(output / result.name / "metrics.jsonl") for result in results}
    plot_losses(records, output / "loss.png", title="The same text, tokens and parameter count")

    console.rule("[bold]3/5 generation", align="left")
    with without_progress_bars():
        model = HopeForCausalLM.from_pretrained(output / "hope" / "model").to(device).eval()
    sample = _generate(model, data.tokenizer, settings)
    console.print(sample.prompt, style="bold", end="", highlight=False, markup=False, soft_wrap=True)
    console.print(sample.continuation, highlight=False, markup=False, soft_wrap=True)

    console.rule("[bold]4/5 loss by position", align="left")
    position = measure_held_out(
        model,
        data.validation,
        output,
        window=settings.sequence_length,
        length=settings.position_windows * settings.sequence_length,
        streams=settings.position_streams,
        console=console,
        name="hope",
    )

    console.rule("[bold]5/5 speed and memory", align="left")
    profile_settings = ProfileSettings(
        lengths=settings.lengths,
        decode_after=settings.decode_after,
        threads=settings.threads,
        device=str(device),
        segment=512,
        enough_seconds=0.5,
        decode_tokens=16,
    )
    models = {name: config_arguments(configs[name]) for name in ("hope-attention", "hope")}
    measurements = profile_models(
        {name: ConfiguredModel(config) for name, config in models.items()},
        profile_settings,
        report=progress_printer(console),
    )
    machine = describe_machine(str(device))
    described = {**dataclasses.asdict(profile_settings), "models": models}
    save_profile(output / "profile.json", measurements, settings=described, machine=machine)
    sizes = f"{settings.layers} layers of width {settings.hidden_size}"
    title = f"{sizes}, {settings.threads} thread(s), {machine['device']}"
    plot_profile(measurements, output / "profile.png", title=title, baseline="hope-attention")

    result = DemoResult(
        models=tuple(results),
        sample=sample,
        position=position.to_dict(),
        measurements=tuple(measurements),
        settings=dataclasses.asdict(settings),
        data=data.description,
        machine=machine,
        command=command,
        at_once=at_once,
        seconds=time.monotonic() - began,
    )
    write_json(output / "demo.json", result.to_dict())
    write_reports(output, result)
    return result


def fresh_folder(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``, …: the first that does not exist."""
    candidate, number = wanted, 2
    while candidate.exists():
        candidate, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return candidate


_DEFAULT = DemoSettings()


def main(
    output: Annotated[
        Path, typer.Option(help="Folder of the results; if it exists, NAME-2, NAME-3, … is made instead.")
    ] = Path("runs/demo"),
    corpus: Annotated[
        str | None, typer.Option(help="Folder of UTF-8 text files. Without it: Python's own library.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Ids of the BPE.")] = _DEFAULT.vocab_size,
    hidden_size: Annotated[int, typer.Option(help="Width of all models.")] = _DEFAULT.hidden_size,
    layers: Annotated[int, typer.Option(help="Blocks of all models.")] = _DEFAULT.layers,
    heads: Annotated[int, typer.Option(help="Heads of all models.")] = _DEFAULT.heads,
    steps: Annotated[int, typer.Option(help="Optimiser steps of all models.")] = _DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = _DEFAULT.batch_size,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = _DEFAULT.sequence_length,
    hope_learning_rate: Annotated[float, typer.Option(help="Hope's peak.")] = _DEFAULT.hope_learning_rate,
    transformer_learning_rate: Annotated[
        float, typer.Option(help="The plain transformer's peak.")
    ] = _DEFAULT.transformer_learning_rate,
    attention_learning_rate: Annotated[
        float, typer.Option(help="The peak of attention in Hope's blocks.")
    ] = _DEFAULT.attention_learning_rate,
    gated_delta_net_learning_rate: Annotated[
        float, typer.Option(help="Gated DeltaNet's peak.")
    ] = _DEFAULT.gated_delta_net_learning_rate,
    longest: Annotated[int, typer.Option(help="Longest context of the profile.")] = max(_DEFAULT.lengths),
    longest_decode: Annotated[int, typer.Option(help="Longest context to decode after.")] = max(
        _DEFAULT.decode_after
    ),
    sample_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = _DEFAULT.sample_tokens,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = _DEFAULT.threads,
    device: Annotated[
        str, typer.Option(help="'auto' (CUDA when there), 'cpu', 'cuda' or 'cuda:N'.")
    ] = _DEFAULT.device,
    seed: Annotated[int, typer.Option(help="Of weights, data order and sampling.")] = _DEFAULT.seed,
) -> None:
    """Train a small Hope and baselines of equal size on real text, generate, and compare them.

    Some four minutes on two cores with the defaults. Writes plots and a report (Markdown and HTML).
    """
    console = Console()
    command = f"python -m nl_models.demo --output {output}"
    with explained_errors(DivergedError):
        folder = fresh_folder(output)
        settings = DemoSettings(
            corpus=corpus,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            steps=steps,
            batch_size=batch_size,
            sequence_length=sequence_length,
            hope_learning_rate=hope_learning_rate,
            transformer_learning_rate=transformer_learning_rate,
            attention_learning_rate=attention_learning_rate,
            gated_delta_net_learning_rate=gated_delta_net_learning_rate,
            warmup_steps=min(_DEFAULT.warmup_steps, steps - 1),
            lengths=(*tuple(n for n in _DEFAULT.lengths if n < longest), longest),
            decode_after=(*tuple(n for n in _DEFAULT.decode_after if n < longest_decode), longest_decode),
            sample_tokens=sample_tokens,
            threads=threads,
            device=device,
            seed=seed,
        )
        try:
            result = run_demo(folder, settings, console=console, command=command)
        except KeyboardInterrupt:
            fail(f"stopped; what was done so far is in {folder}")
    _print_summary(console, folder, result)


def _difference(shared: HopeConfig, baseline: HopeConfig) -> dict[str, object]:
    """The arguments by which a model differs from what its training config already says."""
    values, known = config_arguments(baseline), config_arguments(shared)
    return {name: value for name, value in values.items() if known.get(name) != value}


def _result(job: Job, parameters: int, seconds: float) -> ModelResult:
    last = [r for r in read_metrics(job.folder / "metrics.jsonl") if r["kind"] == "validation"][-1]
    return ModelResult(
        name=job.name,
        parameters=parameters,
        learning_rate=job.config.learning_rate,
        tokens=last["tokens"],
        validation_loss=last["loss"],
        bits_per_byte=last["bits_per_byte"],
        perplexity=last["perplexity"],
        seconds=seconds,
    )


def _generate(model: HopeForCausalLM, tokenizer: Tokenizer, settings: DemoSettings) -> Sample:
    """Sample from the model, one token at a time from its recurrent state."""
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=model.device)
    torch.manual_seed(settings.seed)
    began = time.monotonic()
    with torch.no_grad():
        ids = model.generate(
            prompt,
            max_new_tokens=settings.sample_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=tokenizer.separator_id,
        )
    new = ids[0, prompt.shape[1] :].tolist()
    return Sample(PROMPT, tokenizer.decode(new), len(new), time.monotonic() - began)


def _print_summary(console: Console, folder: Path, result: DemoResult) -> None:
    console.rule("[bold]result", align="left")
    console.print(profile_table(result.measurements))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, justify in (
        ("model", "left"), ("parameters", "right"), ("tokens", "right"), ("validation loss", "right"),
        ("bits/byte", "right"), ("perplexity", "right"), ("time", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)
    best = min(model.validation_loss for model in result.models)
    for model in result.models:
        table.add_row(
            model.name,
            f"{model.parameters:,}",
            f"{model.tokens:,}",
            f"{model.validation_loss:.4f}",
            f"{model.bits_per_byte:.3f}",
            f"{model.perplexity:.4g}",
            duration(model.seconds),
            style="bold" if model.validation_loss == best else None,
        )
    console.print(table)
    console.print(f"\n{duration(result.seconds)} in all. Read:", highlight=False)
    for name in ("report.html", "report.md", "loss.png", "position.png", "profile.png"):
        console.print(folder / name, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
