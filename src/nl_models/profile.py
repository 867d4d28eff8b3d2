"""Speed and memory against context length: ``python -m nl_models.profile``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nl_models.console import explained_errors, token_count
from nl_models.files import make_folder
from nl_models.hope import HopeConfig
from nl_models.hope.configuration_hope import PRESETS
from nl_models.profiling.choose import MODELS, Sizes, choose_sources
from nl_models.profiling.flops import copy_ceiling, matmul_ceiling
from nl_models.profiling.measure import MODES, Measurement
from nl_models.profiling.plan import plan_table, plan_training_step
from nl_models.profiling.report import (
    describe_machine,
    find_crossings,
    plot_profile,
    profile_table,
    save_profile,
)
from nl_models.profiling.run import ProfileSettings, profile_models
from nl_models.profiling.subjects import LAYERS, count_parameters
from nl_models.training.distributed import choose_device

_DEFAULT = ProfileSettings()
_WHAT = {"rich_help_panel": "What is measured"}
_PLAN = {"rich_help_panel": "A plan instead"}


def main(
    output: Annotated[Path, typer.Option(help="Folder for profile.json and profile.png.")] = Path(
        "runs/profile"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier profile there.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a training run, a checkpoint, or a saved or converted model.", **_WHAT),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help=f"Preset of Hope, with random weights: {', '.join(PRESETS)}.", **_WHAT)
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help=f"A layer alone, of --hidden-size and --heads: {', '.join(LAYERS)}.", **_WHAT),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help=f"Models of --layers, --hidden-size and --heads, comma-separated: {', '.join(MODELS)}. "
            "Default: hope,attention.",
            **_WHAT,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What it is measured against in the same run: for a Hope 'attention' or 'transformer' (both "
            "with as many parameters), 'titans' or 'gated_delta_net'; for a layer another one; a folder; or "
            "'none'. Default: attention where it is no attention itself; for the layer continuum mlp.",
            **_WHAT,
        ),
    ] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the residual stream.", **_WHAT)] = 256,
    layers: Annotated[int, typer.Option(help="Blocks.", **_WHAT)] = 2,
    heads: Annotated[int, typer.Option(help="Heads.", **_WHAT)] = 4,
    vocab_size: Annotated[int, typer.Option(help="Ids in the vocabulary.", **_WHAT)] = 1024,
    modes: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(MODES)}. Learning: of converted models.")
    ] = ",".join(_DEFAULT.modes),
    lengths: Annotated[
        str,
        typer.Option(
            help="Contexts of prefill, training and learning, comma-separated; 512..16K: 512, 1K, 2K … "
            "K and M are 1024 and 1024²."
        ),
    ] = "512..16K",
    decode_after: Annotated[
        str,
        typer.Option(
            help="Contexts after which to decode. The memory reads them, attention's cache is filled."
        ),
    ] = "1,1000,10000,100000",
    batch: Annotated[
        str | None, typer.Option(help="Sequences at a time, comma-separated. Default: 1, of a plan 8.")
    ] = None,
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
    trace: Annotated[
        Path | None,
        typer.Option(
            help="File for a trace by torch.profiler, for https://ui.perfetto.dev: of the first model, mode "
            "and batch at the shortest context."
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Measure nothing, but say what a training step of this preset will take on a GPU, with "
            "--batch, --length and --precision, by running it on tensors without data. Takes minutes.",
            **_PLAN,
        ),
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens of the planned step's sequences.", **_PLAN)] = "4K",
) -> None:
    """Measure speed, memory and FLOP/s of a model or a layer beside a baseline.

    Without --model, --config, --layer and --models: a small Hope beside the
    same blocks with softmax attention and as many parameters.

    Each measurement runs in a process of its own; memory is the peak above
    that of the idle model. Long ones: --modes prefill --lengths 64K..1M.
    """
    console = Console()
    if plan is not None:
        with explained_errors():
            size = _counts("batch", batch or "8")[0]
            console.print(_planned(plan, size, token_count("length", length), precision or "bf16"))
        return
    precision = precision or "fp32"
    with explained_errors():
        settings = ProfileSettings(
            modes=tuple(_split(modes)),
            lengths=_counts("lengths", lengths),
            decode_after=_counts("decode_after", decode_after),
            batches=_counts("batch", batch or "1"),
            segment=segment,
            device=str(choose_device(device)),
            precision=_precision(precision),
            threads=threads,
            time_limit=time_limit,
            trace=None if trace is None else str(trace),
        )
        sizes = Sizes(hidden_size, layers, heads, vocab_size)
        sources, against = choose_sources(
            model=model, config=config, layer=layer, models=models, baseline=baseline, sizes=sizes
        )
        target = output / "profile.json"
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; choose another --output or add --overwrite")
        make_folder(output)
        if trace is not None:
            make_folder(trace.parent)
        counts = {name: count_parameters(source) for name, source in sources.items()}
        console.print(
            ", ".join(f"{name}: {count:,} parameters" for name, count in counts.items()), highlight=False
        )
        flops = matmul_ceiling(settings.device, precision, threads)
        bytes_ = copy_ceiling(settings.device, threads)
        results = profile_models(sources, settings, report=progress_printer(console))
    described = {
        **dataclasses.asdict(settings),
        "models": {name: dataclasses.asdict(source) for name, source in sources.items()},
        "parameters": counts,
        "baseline": against,
    }
    machine = describe_machine(settings.device)
    machine |= {"matmul_flops_per_second": flops, "copy_bytes_per_second": bytes_}
    with explained_errors():
        save_profile(target, results, settings=described, machine=machine)
        if all(result.status != "ok" for result in results):
            raise ValueError(f"nothing could be measured; the first: {results[0].status}")
    console.print(profile_table(results, flops, bytes_))
    console.print(
        f"%: of the {flops / 1e12:.3g} TFLOP/s of a large matrix product here, and of the {bytes_ / 1e9:.3g} "
        "GB/s of a large copy; calls: of operators (CUDA: kernels launched), when decoding for a token",
        highlight=False,
    )
    if against is not None:
        for crossing in find_crossings(results, against):
            console.print(crossing.describe(against), highlight=False)
    title = f"{' and '.join(sources)}, {precision}, {machine['device']}"
    with explained_errors():
        plot = plot_profile(results, output / "profile.png", title=title, baseline=against)
    written = [target, plot] if trace is None else [target, plot, trace]
    console.print("\n".join(map(str, written)), highlight=False, soft_wrap=True)


def _planned(preset: str, batch: int, length: int, precision: str) -> Table:
    """What a training step takes without and with activation checkpointing of every block."""
    config = HopeConfig.preset(preset)
    plans = {
        name: plan_training_step(
            config, batch=batch, length=length, precision=precision, block_checkpoints=checkpoints
        )
        for name, checkpoints in (("all activations kept", False), ("a checkpoint a block", True))
    }
    return plan_table(
        plans, f"A training step of {preset}, {batch} × {length:,} tokens, {precision}: planned GB"
    )


def progress_printer(console: Console) -> Callable[[int, int, Measurement], None]:
    """A ``report`` for :func:`profile_models`: one line per measurement, or a status line on a terminal."""

    def report(done: int, total: int, result: Measurement) -> None:
        size = f"{result.batch} × {result.context:,}" if result.batch > 1 else f"{result.context:,}"
        what = f"[{done}/{total}] {result.model} {result.mode} {size}"
        figure = (
            f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_bytes / 2**20:,.1f} MiB"
            if result.peak_bytes is not None
            else result.status
        )
        console.print(f"{what}: {figure}", highlight=False, markup=False)

    return report


def _counts(name: str, text: str) -> tuple[int, ...]:
    """``"512,1K"``, and ``"512..4K"`` for 512, 1024, 2048, 4096."""
    counts: list[int] = []
    for part in _split(text):
        first, dots, last = part.partition("..")
        counts.append(token_count(name, first))
        end = token_count(name, last) if dots else counts[-1]
        while 2 * counts[-1] <= end:
            counts.append(2 * counts[-1])
    return tuple(counts)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _precision(text: str) -> str:
    if text not in ("fp32", "bf16"):
        raise ValueError(f"precision: expected 'fp32' or 'bf16', got {text!r}")
    return text


if __name__ == "__main__":
    typer.run(main)
