"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check``.

Runs the tests marked ``gpu``, the benchmarks, the demo and the profile, each in a process of its own with a
time limit, the most telling first. A step that fails or runs
out of time does not stop the others. Logs and results go to one folder, written as they come, so that a run
that is cut short leaves what it had. Needs torch with CUDA, triton, transformers, typer, rich, matplotlib and
pytest; it installs nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import environment

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of the step and of its log.
        arguments: of Python; ``{output}`` is the folder of results.
        limit: seconds after which it is stopped.
    """

    name: str
    arguments: tuple[str, ...]
    limit: int


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ``state`` is "passed", "failed" or "out of time"."""

    name: str
    state: str
    seconds: float


STEPS = (
    Step("tests", ("-m", "pytest", "-q", "-m", "gpu", "--durations=10"), 420),
    Step("bench", ("-m", "benchmarks.run", "--device", "cuda", "--output", "{output}/cuda.jsonl"), 540),
    Step("demo", ("-m", "nl_models.demo", "--device", "cuda", "--output", "{output}/demo"), 300),
    Step(
        "profile",
        ("-m", "nl_models.profile", "--device", "cuda", "--output", "{output}/profile"),
        240,
    ),
)


def run_step(step: Step, output: Path, seconds: float) -> Outcome:
    """Run one step for at most ``seconds``; its output goes to the terminal and to ``<name>.log``."""
    command = [sys.executable, *(argument.format(output=output) for argument in step.arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    with (output / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            ["timeout", "--signal=INT", "--kill-after=10", str(int(seconds)), *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            log.write(line)
            log.flush()
            sys.stdout.write(line)
        code = process.wait()
    state = "passed" if code == 0 else "out of time" if code in (124, 137) else "failed"
    return Outcome(step.name, state, time.monotonic() - began)


def main(
    output: Annotated[Path, typer.Option(help="New or empty folder for logs and results.")] = Path(
        "runs/gpu_check"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Only this step; may be repeated.")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="For all steps together.")] = 1500,
) -> None:
    """Run the GPU tests, the benchmarks, the demo and the profile on the CUDA device; keep every log."""
    names = [step.name for step in STEPS]
    if unknown := set(only or []) - set(names):
        raise typer.BadParameter(f"expected some of {names}, got {sorted(unknown)}", param_hint="--only")
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here")
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty; name another folder", param_hint="--output")
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    about = environment(torch.device("cuda"))
    (output / "environment.json").write_text(json.dumps(about, indent=1, default=str) + "\n")

    end, outcomes = time.monotonic() + seconds, []
    for step in STEPS:
        left = end - time.monotonic()
        if (only and step.name not in only) or left < 1:
            continue
        outcomes.append(run_step(step, output, min(left, step.limit)))
        (output / "outcomes.json").write_text(json.dumps([asdict(x) for x in outcomes], indent=1) + "\n")

    table = Table("step", "state", "seconds", title=str(about["device_name"]))
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.0f}")
    Console().print(table)
    raise typer.Exit(any(outcome.state != "passed" for outcome in outcomes))


if __name__ == "__main__":
    typer.run(main)
