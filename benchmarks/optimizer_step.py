"""What a step of each optimiser costs: time of ``step()`` alone and bytes of state, on a small Hope.

    python -m benchmarks.optimizer_step

Gradients are those of one batch of random tokens; the optimisers take turns of 8 steps (one period of M3), so
that what else the machine does falls on all alike, and figures are medians of turns. Every run appends a row
for each to ``--output`` (JSONL).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from nl_models.optim import M3, DeepMomentum, DeltaGradientDescent, DeltaMomentum, Muon, split_parameters
from nl_models.training.config import TrainConfig
from nl_models.training.model import build_model

console = Console()
DEFAULT_OUTPUT = Path("benchmarks/results/optimizer_step.jsonl")
FREQUENCY = 8


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """By name: what makes it for a model."""
    split = split_parameters
    return {
        "AdamW (fused)": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
        "Muon": lambda m: Muon(split(m)),
        "M3": lambda m: M3(split(m), frequency=FREQUENCY),
        "M3, second_moment": lambda m: M3(split(m), frequency=FREQUENCY, second_moment=True),
        "DeltaMomentum": lambda m: DeltaMomentum(split(m)),
        "DeltaMomentum, rms": lambda m: DeltaMomentum(split(m), preconditioner="rms"),
        "DeepMomentum": lambda m: DeepMomentum(split(m)),
        "DeltaGradientDescent": lambda m: DeltaGradientDescent(split(m, linear_only=True), model=m),
    }


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors it keeps from step to step."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def main(
    hidden_size: Annotated[int, typer.Option(help="width of the Hope")] = 256,
    layers: Annotated[int, typer.Option(help="its layers")] = 4,
    tokens: Annotated[int, typer.Option(help="tokens whose gradient is taken")] = 512,
    rounds: Annotated[int, typer.Option(help=f"turns of {FREQUENCY} steps each")] = 5,
    output: Annotated[Path, typer.Option(help="JSONL file to append to")] = DEFAULT_OUTPUT,
) -> None:
    """Time, print and append."""
    torch.set_num_threads(1)
    config = TrainConfig(model="hope", hidden_size=hidden_size, layers=layers)
    model = build_model(config, 4096, 0)
    rows = torch.randint(4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    made = {}
    for name, make in optimizers().items():
        network = copy.deepcopy(model)
        optimizer = make(network)
        network(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()  # states are made
        made[name] = (network, optimizer)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in track(range(rounds), "rounds", console=console):
        for name, (_, optimizer) in made.items():
            start = time.perf_counter()
            for _ in range(FREQUENCY):
                optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - start) / FREQUENCY)
    table = Table("optimiser", "ms a step", "least", "against Muon", "state, MB", box=None)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        for name, (network, optimizer) in made.items():
            row = {
                "optimizer": name,
                "parameters": sum(p.numel() for p in network.parameters()),
                "hidden_size": hidden_size,
                "layers": layers,
                "tokens": tokens,
                "rounds": rounds,
                "median_ms": round(median(times[name]), 3),
                "least_ms": round(min(times[name]), 3),
                "against_muon": round(median(a / b for a, b in zip(times[name], times["Muon"])), 3),
                "state_bytes": bytes_of_state(optimizer),
                "torch": torch.__version__,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            file.write(json.dumps(row) + "\n")
            table.add_row(
                name,
                f"{row['median_ms']:.1f}",
                f"{row['least_ms']:.1f}",
                f"{row['against_muon']:.2f}",
                f"{row['state_bytes'] / 1e6:.1f}",
            )
    console.print(f"{row['parameters']:,} parameters")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
