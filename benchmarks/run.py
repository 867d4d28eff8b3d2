"""Run the benchmarks: ``python -m benchmarks.run --device cpu``. Appends JSON rows and prints tables."""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

import benchmarks
from benchmarks.harness import Case, dtype_name, environment, headline, run_case
from benchmarks.measure import Budget, Ceilings, measure_ceilings
from benchmarks.report import case_table, headline_line

RESULTS = Path(__file__).parent / "results"
BUDGET = Budget(samples=15, least=2, seconds=2.0)
QUICK_BUDGET = Budget(samples=5, least=2, seconds=0.3)


class Device(str, Enum):
    """Where to run."""

    cpu = "cpu"
    cuda = "cuda"


def op_names() -> list[str]:
    """The ops that have a benchmark: one ``bench_<op>.py`` each."""
    return sorted(
        module.name.removeprefix("bench_")
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if module.name.startswith("bench_")
    )


def load_cases(op: str) -> list[Case]:
    """The ``CASES`` of ``bench_<op>.py``."""
    return list(importlib.import_module(f"benchmarks.bench_{op}").CASES)


def select_cases(ops: list[str], device: str, quick: bool) -> list[Case]:
    """The cases to run.

    Raises:
        typer.BadParameter: an op without a benchmark.
    """
    known = op_names()
    if unknown := sorted(set(ops) - set(known)):
        raise typer.BadParameter(f"no benchmark for {unknown}; there are {known}", param_hint="--op")
    cases = [case for op in ops or known for case in load_cases(op)]
    return [case for case in cases if device in case.devices and (case.quick or not quick)]


def append_rows(path: Path, rows: list[dict]) -> None:
    """Append one JSON object a line; what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    quick: Annotated[
        bool, typer.Option(help="Few samples of the small cases, no memory: a smoke test.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Also time torch.compile of eager: minutes of compilation a case."),
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory where a case asks for it.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file to append to. [default: benchmarks/results/DEVICE.jsonl; none with --quick]"
        ),
    ] = None,
) -> None:
    """Time the ops against their variants, attention and the installed peers, and record every figure.

    Rows are appended to a JSONL file; `python -m benchmarks.tables` makes tables and plots of it.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here; use --device cpu", param_hint="--device")
    torch.set_num_threads(threads)
    where = torch.device(device.value)
    cases = select_cases(op or [], device.value, quick)
    if output is None and not quick:
        output = RESULTS / f"{device.value}.jsonl"
    shared = environment(where)
    console.print(f"[bold]{shared['device_name']}[/bold], {threads} thread(s), {shared['versions']}")

    started = time.perf_counter()
    ceilings: dict[torch.dtype, Ceilings] = {}
    headlines, skipped = [], {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn between cases only: a refreshing thread would take its share of what is being timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.title, refresh=True)
            if case.dtype not in ceilings:
                ceilings[case.dtype] = measure_ceilings(where, case.dtype)
            result = run_case(
                case,
                where,
                shared=shared,
                ceilings=ceilings[case.dtype],
                budget=QUICK_BUDGET if quick else BUDGET,
                measure_memory=memory and not quick,
                compiled=compiled,
            )
            if output is not None:
                append_rows(output, result.rows)
            console.print(case_table(case.title, result.rows))
            if line := headline(result.rows):
                headlines.append((case, line))
            for name, reason in result.skipped.items():
                skipped.setdefault(reason, name)
                console.print(f"  [yellow]without {name}[/yellow]: {reason}", highlight=False)
            progress.advance(task)

    console.rule("ours against the fastest other")
    for case, line in headlines:
        console.print(headline_line(case.title, line), highlight=False)
    for dtype, ceiling in ceilings.items():
        console.print(
            f"ceilings, {dtype_name(dtype)}: copy {ceiling.copy / 1e9:.1f} GB/s, "
            f"matrix product {ceiling.matmul / 1e12:.3f} TFLOP/s"
        )
    console.print(f"{len(cases)} cases in {time.perf_counter() - started:.0f} s")
    if output is not None:
        with contextlib.suppress(ValueError):
            output = output.resolve().relative_to(Path.cwd())
        console.print(f"rows appended to [bold]{output}[/bold]")


if __name__ == "__main__":
    typer.run(main)
