"""Speed and memory against context length: ``python -m nl_models.profile``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nl_models.files import make_folder
from nl_models.hope import HopeConfig
from nl_models.profiling.measure import Measurement
from nl_models.profiling.plan import plan_table, plan_training_step
from nl_models.profiling.report import describe_machine, plot_profile, profile_table, save_profile
from nl_models.profiling.run import ProfileSettings, profile_models
from nl_models.training.baseline import attention_baseline, parameter_count
from nl_models.training.command_line import explained_errors, token_count
from nl_models.training.config import TrainConfig
from nl_models.training.distributed import choose_device
from nl_models.training.model import hope_config

_DEFAULT = ProfileSettings()


def main(
    output: Annotated[Path, typer.Option(help="Folder for profile.json and profile.png.")] = Path(
        "runs/profile"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier profile there.")] = False,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Only say what a training step of this preset (tiny, 340m, 760m, 1.3b) will take on a GPU: "
            "with --batch, --length and --precision, by running it on tensors without data. Takes minutes."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of the planned step.")] = 8,
    length: Annotated[str, typer.Option(help="Their tokens.")] = "4K",
    models: Annotated[
        str, typer.Option(help="Comma-separated: hope, titans, gated_delta_net, attention.")
    ] = "hope,attention",
    modes: Annotated[str, typer.Option(help="Comma-separated: prefill, training, decode.")] = ",".join(
        _DEFAULT.modes
    ),
    lengths: Annotated[
        str, typer.Option(help="Context lengths of prefill and training. K and M are 1024 and 1024².")
    ] = "512,1K,2K,4K,8K,16K",
    decode_after: Annotated[
        str,
        typer.Option(
            help="Contexts after which to decode. The memory reads them, attention's cache is filled."
        ),
    ] = "1,1000,10000,100000",
    hidden_size: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    vocab_size: Annotated[int, typer.Option(help="Ids in the vocabulary.")] = 1024,
    segment: Annotated[
        int, typer.Option(help="Memories prefill this many tokens at a time; attention all at once.")
    ] = _DEFAULT.segment,
    device: Annotated[
        str, typer.Option(help="'auto' (CUDA when there), 'cpu', 'cuda' or 'cuda:N'.")
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="'fp32' (default) or 'bf16' weights; of a plan bf16 autocast (default)."),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = _DEFAULT.threads,
    time_limit: Annotated[
        float, typer.Option(help="Seconds for one measurement; longer contexts are then left out.")
    ] = _DEFAULT.time_limit,
) -> None:
    """Measure tokens per second and memory of Hope against the same model with softmax attention.

    Both have the same number of parameters. Each measurement runs in a process of its own; memory is the peak
    above that of the idle model. For a million tokens and more: --modes prefill --lengths 64K,256K,1M.
    """
    console = Console()
    if plan is not None:
        with explained_errors():
            console.print(_planned(plan, batch, token_count("length", length), precision or "bf16"))
        return
    precision = precision or "fp32"
    with explained_errors():
        settings = ProfileSettings(
            modes=tuple(_split(modes)),
            lengths=tuple(token_count("lengths", text) for text in _split(lengths)),
            decode_after=tuple(token_count("decode_after", text) for text in _split(decode_after)),
            segment=segment,
            device=str(choose_device(device)),
            precision=_precision(precision),
            threads=threads,
            time_limit=time_limit,
        )
        configs = _configs(_split(models), hidden_size, layers, heads, vocab_size)
        target = output / "profile.json"
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; choose another --output or add --overwrite")
        make_folder(output)
    counts = {name: parameter_count(HopeConfig(**config)) for name, config in configs.items()}
    console.print(
        ", ".join(f"{name}: {count:,} parameters" for name, count in counts.items()), highlight=False
    )
    results = profile_models(configs, settings, report=progress_printer(console))
    described = {**dataclasses.asdict(settings), "models": configs, "parameters": counts}
    machine = describe_machine(settings.device)
    with explained_errors():
        save_profile(target, results, settings=described, machine=machine)
    title = (
        f"{' and '.join(configs)}, {layers} layers of width {hidden_size}, {precision}, {machine['device']}"
    )
    console.print(profile_table(results))
    with explained_errors():
        plot = plot_profile(results, output / "profile.png", title=title)
    console.print(f"{target}\n{plot}", highlight=False, soft_wrap=True)


def _planned(preset: str, batch: int, length: int, precision: str) -> Table:
    """What a training step takes without and with activation checkpointing of every block."""
    config = HopeConfig.preset(preset)
    sizes = {"batch": batch, "length": length, "precision": _precision(precision)}
    plans = {
        name: plan_training_step(config, **sizes, block_checkpoints=checkpoints)
        for name, checkpoints in (("all activations kept", False), ("a checkpoint a block", True))
    }
    return plan_table(
        plans, f"A training step of {preset}, {batch} × {length:,} tokens, {precision}: planned GB"
    )


def progress_printer(console: Console):
    """A ``report`` for :func:`profile_models`: one line per measurement, or a status line on a terminal."""

    def report(done: int, total: int, result: Measurement) -> None:
        what = f"[{done}/{total}] {result.model} {result.mode} {result.context:,}"
        figure = (
            f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_bytes / 2**20:,.1f} MiB"
            if result.status == "ok"
            else result.status
        )
        console.print(f"{what}: {figure}", highlight=False, markup=False)

    return report


def _configs(names: list[str], hidden_size: int, layers: int, heads: int, vocab_size: int) -> dict[str, dict]:
    """Arguments of HopeConfig by model name; attention is matched to Hope's parameter count."""
    configs = {}
    for name in names:
        asked = TrainConfig(
            model="hope" if name == "attention" else name, hidden_size=hidden_size, layers=layers, heads=heads
        )
        config = hope_config(asked, vocab_size, separator_id=0)
        chosen = attention_baseline(config) if name == "attention" else config
        configs[name] = config_arguments(chosen)
    return configs


def config_arguments(config: HopeConfig) -> dict:
    """The arguments that make an equal config: plain data, for another process or a JSON file."""
    defaults = HopeConfig()
    return {
        name: getattr(config, name)
        for name in HopeConfig.__annotations__
        if getattr(config, name) != getattr(defaults, name)
    }


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _precision(text: str) -> str:
    if text not in ("fp32", "bf16"):
        raise ValueError(f"precision: expected 'fp32' or 'bf16', got {text!r}")
    return text


if __name__ == "__main__":
    typer.run(main)
