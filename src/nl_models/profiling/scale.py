"""Tokens a second that many GPUs could reach at best, from plans: ``python -m nl_models.profiling.scale``.

A prediction: nothing runs. Each bound is what a step takes of one resource at its ceiling, as if nothing else
took time, so that the smallest of them is not reached either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from nl_models.console import explained_errors
from nl_models.parallel.mesh import Mesh
from nl_models.profiling.dry_run import RunPlan, plan_run
from nl_models.training.config import TrainConfig, load_config


@dataclass(frozen=True)
class Machine:
    """Ceilings of a GPU and its links; the defaults are an H200's.

    Attributes:
        flops: a second, of bf16 products of random matrices.
        memory: bytes a second read and written, of a copy.
        launch: seconds that PyTorch takes to start an operator.
        inside, across: bytes a second that a GPU sends to others of its node (NVLink), and of other nodes.
        node: GPUs in a node.
        size: bytes of its memory.
    """

    flops: float = 780e12
    memory: float = 4.3e12
    launch: float = 5e-6
    inside: float = 450e9
    across: float = 50e9
    node: int = 8
    size: float = 141e9


def spread(config: TrainConfig, gpus: int) -> tuple[TrainConfig, Mesh]:
    """The run's same steps on so many GPUs: first the windows are shared out, then each of them.

    A GPU has as many windows in a pass as ``config`` says, or all that are left for it.

    Raises:
        ValueError: the windows of a step and their tokens do not share out equally.
    """
    windows = config.batch_size * config.gradient_accumulation
    data = min(gpus, windows)
    sequence = gpus // data
    if windows % data or data * sequence != gpus:
        raise ValueError(f"gpus: {gpus} do not share out the {windows} windows of a step equally")
    own = windows // data
    passes = -(-own // config.batch_size)
    if own % passes:
        raise ValueError(f"batch_size: the {own} windows of a GPU do not make {passes} equal passes")
    spread_out = replace(config, batch_size=data * own // passes, gradient_accumulation=passes)
    return spread_out, Mesh(data, sequence)


def bounds(plan: RunPlan, machine: Machine) -> dict[str, float]:
    """Tokens a second of all GPUs together, were a step bound by one resource alone."""
    tokens, ranks = plan.config.tokens_per_step, plan.mesh.ranks
    link = machine.inside if ranks <= machine.node else machine.across
    seconds = {
        "compute": plan.flops * tokens / ranks / machine.flops,
        "memory": plan.rank.moved / machine.memory,
        "launches": plan.rank.calls * machine.launch,
        "network": plan.rank.sent / link,
    }
    busy = 1 - plan.idle
    return {name: tokens * busy / time if time else float("inf") for name, time in seconds.items()}


def main(
    recipe: Annotated[Path, typer.Argument(help="File of a run's options; its steps stay as large.")],
    gpus: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 1, 8, 64 and 512.")] = None,
) -> None:
    """Predict the most tokens a second on H200s, as a Markdown table. Takes minutes for a large model."""
    machine = Machine()
    with explained_errors():
        config = load_config(recipe)
        print("| mesh | a pass | passes | GB a GPU | compute | memory | launches | network | at most |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        flops = None
        for count in gpus or (1, 8, 64, 512):
            spread_out, mesh = spread(config, count)
            plan = plan_run(spread_out, mesh, flops)
            flops = plan.flops
            found = bounds(plan, machine)
            least = min(found, key=found.__getitem__)
            size = f"{plan.rank.peak / 1e9:.0f}{'' if plan.rank.peak < machine.size else ', too much'}"
            cells = [
                mesh,
                f"{spread_out.batch_size // mesh.data} × {config.sequence_length // mesh.sequence:,}",
                spread_out.gradient_accumulation,
                size,
                *map(_thousands, found.values()),
                f"{_thousands(found[least])} ({least})",
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _thousands(rate: float) -> str:
    return "–" if rate == float("inf") else f"{float(f'{rate / 1e3:.3g}'):,g}K"


if __name__ == "__main__":
    typer.run(main)
