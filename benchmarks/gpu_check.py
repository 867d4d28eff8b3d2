"""What only a GPU can tell, in ten minutes: ``python -m benchmarks.gpu_check``.

Each stage is a process of its own with a time limit, the most telling first: the doctor; error budgets and
determinism of every kernel; their times beside flash-linear-attention (where installed), attention and plain
PyTorch; a training step of the 340m preset beside its plan; each kernel's time over its predicted one;
decoding; long contexts; the other GPU tests. A stage that fails or runs out of time does not stop
the others. Logs and rows are written as they come, so that a run that is cut short leaves what it had. Needs
torch with CUDA, triton, transformers, typer, rich, matplotlib and pytest; it installs nothing.
"""

from __future__ import annotations

import json
import os
import signal
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
class Stage:
    """One process.

    Attributes:
        name: of the stage and of its log.
        arguments: of Python; ``{output}`` is the folder of results, ``{device}`` where it runs.
        limit: seconds after which it is stopped.
        small: arguments added on a CPU, where a run shows that everything starts and writes what it should.
    """

    name: str
    arguments: tuple[str, ...]
    limit: int
    small: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: ``state`` is "passed", "failed" or "out of time"."""

    name: str
    state: str
    seconds: float


_TESTS = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
_FIRST = "budget or error or deterministic or default"
_PROFILE = ("-m", "nl_models.profile", "--device", "{device}", "--output")

STAGES = (
    Stage(
        "doctor",
        ("-m", "nl_kernels.doctor", "--device", "{device}", "--json", "{output}/doctor.jsonl"),
        60,
    ),
    Stage("budgets", (*_TESTS, "-k", _FIRST), 130, ("--collect-only", "-q")),
    Stage(
        "speed",
        ("-m", "benchmarks.run", "--device", "{device}", "--quick", "--output", "{output}/speed.jsonl"),
        100,
        ("--op", "newton_schulz", "--no-memory"),
    ),
    Stage(
        "step",
        ("-m", "benchmarks.training_step", "--device", "{device}", "--output", "{output}/step.jsonl"),
        90,
        ("--preset", "tiny", "--layers", "1", "--batch", "2", "--length", "64", "--steps", "1"),
    ),
    Stage(
        "factor",
        ("-m", "benchmarks.model_factor", "--device", "{device}", "--output", "{output}/factor.jsonl"),
        50,
        ("--tokens", "64", "--heads", "1"),
    ),
    Stage(
        "decode",
        (*_PROFILE, "{output}/decode", "--modes", "decode", "--precision", "bf16", "--time-limit", "15"),
        40,
        ("--decode-after", "1,16", "--hidden-size", "32", "--layers", "1", "--heads", "2"),
    ),
    Stage(
        "context",
        (*_PROFILE, "{output}/context", "--modes", "prefill,training", "--time-limit", "15"),
        60,
        ("--lengths", "64,128", "--hidden-size", "32", "--layers", "1", "--heads", "2"),
    ),
    Stage("tests", (*_TESTS, "-k", f"not ({_FIRST})"), 70, ("--collect-only", "-q")),
)


def run_stage(stage: Stage, output: Path, device: str, seconds: float) -> Outcome:
    """Run one stage for at most ``seconds``; its output goes to the terminal and to ``<name>.log``."""
    arguments = stage.arguments + (stage.small if device == "cpu" else ())
    command = [sys.executable, *(x.format(output=output, device=device) for x in arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    with (output / f"{stage.name}.log").open("w") as log:
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
    # Killed at last, timeout goes with it.
    state = "passed" if code == 0 else "out of time" if code in (124, 137, -signal.SIGKILL) else "failed"
    return Outcome(stage.name, state, time.monotonic() - began)


def main(
    output: Annotated[Path, typer.Option(help="New or empty folder for logs and results.")] = Path(
        "runs/gpu_check"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Only this stage; may be repeated.")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="For all stages together.")] = 600,
    device: Annotated[
        str, typer.Option(help="'cuda'; 'cpu' is a dry run of every stage at small sizes.")
    ] = "cuda",
) -> None:
    """Run every stage on the CUDA device; keep every log and row."""
    names = [stage.name for stage in STAGES]
    if unknown := set(only or []) - set(names):
        raise typer.BadParameter(f"expected some of {names}, got {sorted(unknown)}", param_hint="--only")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"expected 'cuda' or 'cpu', got {device!r}", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here; --device cpu is a dry run")
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty; name another folder", param_hint="--output")
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    about = environment(torch.device(device))
    (output / "environment.json").write_text(json.dumps(about, indent=1, default=str) + "\n")

    end, outcomes = time.monotonic() + seconds, []
    for stage in STAGES:
        left = end - time.monotonic()
        if (only and stage.name not in only) or left < 1:
            continue
        limit = min(left, stage.limit) if device == "cuda" else left
        outcomes.append(run_stage(stage, output, device, limit))
        with (output / "outcomes.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcomes[-1])) + "\n")

    table = Table("stage", "state", "seconds", title=str(about["device_name"]))
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.0f}")
    Console().print(table)
    raise typer.Exit(any(outcome.state != "passed" for outcome in outcomes))


if __name__ == "__main__":
    typer.run(main)
