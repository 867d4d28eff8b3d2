"""How fast the outer gradient of self-modifying memories grows with the sequence, by the length of inputs.

    python -m benchmarks.gradient_growth

Five memories that rewrite each other's inputs are a feedback loop. Here untrained linear memories (64 wide,
in two heads) take in projections of a given length of 200 tokens that are drawn by Zipf's law. A
random gradient of the state after the last chunk is carried back from chunk to chunk; its growth is the slope
of the log of its norm. Rows go to ``--output`` (JSONL).
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nl_kernels import DeepMemoryWeights, SelfModifyingWeights, self_modifying_memory
from nl_kernels.memory_rule import l2_normalize

console = Console()
DEFAULT_OUTPUT = Path("benchmarks/results/gradient_growth.jsonl")
HEADS, WIDTH, CHUNK, TOKENS = 2, 64, 16, 200
NOISE = 0.1  # of what context adds to a token's projection


def initial_memories(gate_spread: float, generator: torch.Generator) -> SelfModifyingWeights:
    """Linear memories as :class:`nl_models.layers.SelfModifyingTitans` draws them, but for the gates."""
    spreads = {"key": 0.02, "value": 0.02, "memory": 0.02, "rate": gate_spread, "retention": gate_spread}
    rows = {"rate": 1, "retention": 1}
    return SelfModifyingWeights(
        **{
            name: DeepMemoryWeights(
                spread * torch.randn(HEADS, rows.get(name, WIDTH), WIDTH, generator=generator), None
            )
            for name, spread in spreads.items()
        }
    )


def projections(length: float, tokens: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Query, key, value and gate inputs [1, T, H, D] of vectors of one length."""
    vocabulary = torch.randn(4, TOKENS, HEADS, WIDTH, generator=generator)
    shares = 1 / torch.arange(1, TOKENS + 1)
    drawn = torch.multinomial(shares, tokens, replacement=True, generator=generator)
    noise = torch.randn(4, tokens, HEADS, WIDTH, generator=generator)
    return (length * l2_normalize(vocabulary[:, drawn] + NOISE * noise)).unsqueeze(1).unbind()


def growth_per_chunk(length: float, gate_spread: float, chunks: int, seed: int) -> float:
    """Slope of the log norm of the gradient with respect to the state at every chunk's start, backwards."""
    generator = torch.Generator().manual_seed(seed)
    weights = initial_memories(gate_spread, generator)
    inputs = projections(length, chunks * CHUNK, generator)
    state, starts = None, []
    for pieces in zip(*(x.split(CHUNK, dim=1) for x in inputs)):
        _, state = self_modifying_memory(
            *pieces, weights, chunk_size=CHUNK, initial_state=state, output_final_state=True, impl="eager"
        )
        # At a boundary snapshot and running weights are the same.
        after = [state.running.last, state.running.gate]
        if not starts:
            after = [x.detach().requires_grad_() for x in after]
        stack = state.running._replace(last=after[0], gate=after[1])
        state = state._replace(snapshot=stack, running=stack)
        starts.append(after)
    cotangents = [torch.randn(x.shape, generator=generator) for x in starts[-1]]
    found = torch.autograd.grad(starts[-1], [x for after in starts[:-1] for x in after], cotangents)
    norms = torch.stack(
        [torch.cat([g.flatten() for g in pair]).norm() for pair in zip(found[::2], found[1::2])]
    )
    back = torch.arange(len(norms) - 1, -1, -1, dtype=torch.float64)
    centred = back - back.mean()
    return float((centred * norms.double().log()).sum() / centred.square().sum())


def main(
    lengths: Annotated[str, typer.Option(help="Lengths of the inputs, separated by commas.")] = "1,1.8,5,15",
    gate_spreads: Annotated[
        str, typer.Option(help="Standard deviations of the gates' memories.")
    ] = "0.02,0.25",
    chunks: Annotated[int, typer.Option(min=3, help="Chunks of 16 tokens.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Sequences for each length.")] = 5,
    output: Annotated[Path, typer.Option(help="JSONL file that rows are appended to.")] = DEFAULT_OUTPUT,
) -> None:
    """Measure, print and append what was found."""
    torch.set_num_threads(1)
    table = Table(
        "gates drawn at", "length of the inputs", "growth per chunk (log), mean", "least", "greatest"
    )
    rows = []
    cases = [(float(spread), float(x)) for spread in gate_spreads.split(",") for x in lengths.split(",")]
    for spread, length in track(cases, "lengths", console=console):
        found = [growth_per_chunk(length, spread, chunks, seed) for seed in range(seeds)]
        mean = sum(found) / len(found)
        table.add_row(
            f"{spread:g}", f"{length:g}", f"{mean:+.2f}", f"{min(found):+.2f}", f"{max(found):+.2f}"
        )
        rows.append({"gate_spread": spread, "length": length, "chunks": chunks, "growth": found})
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        for row in rows:
            time = datetime.now(timezone.utc).isoformat(timespec="seconds")
            file.write(json.dumps({"time": time, "torch": torch.__version__, **row}) + "\n")


if __name__ == "__main__":
    typer.run(main)
