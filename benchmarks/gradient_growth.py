"""How fast the outer gradient of self-modifying memories grows with the sequence, by the length of inputs.

    python -m benchmarks.gradient_growth
    python -m benchmarks.gradient_growth --lengths 1 --gate-spreads 0.25 --decays none,0.35,0.7,0.9 --repeated
    python -m benchmarks.gradient_growth --momenta none,average,sum

Five memories that rewrite each other's inputs are a feedback loop. Here untrained linear memories (64 wide,
in two heads) take in projections of a given length of 200 tokens that are drawn by Zipf's law. A
random gradient of the state after the last chunk is carried back from chunk to chunk; its growth is the slope
of the log of its norm. ``--decays`` gives them momentum, averaged, of constant decays.

With ``--momenta``, untrained Hope models (width 128, two layers, four heads, fp64, random tokens) stand in
their place: the norm of the loss's gradient by the number of tokens, and how far a change of the embeddings
by 1e-9 moves the last logits after 512 tokens, relative to them. A chaotic model shows in both.

Rows go to ``--output`` (JSONL).
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
from nl_models import HopeConfig, HopeForCausalLM

console = Console()
DEFAULT_OUTPUT = Path("benchmarks/results/gradient_growth.jsonl")
HEADS, WIDTH, CHUNK, TOKENS = 2, 64, 16, 200
NOISE = 0.1  # of what context adds to a token's projection
MODEL_LENGTHS = (64, 256, 1024, 4096)
MOMENTA = {
    "none": {},
    "average": {"memory_momentum": True},
    "sum": {"memory_momentum": True, "memory_rule": {"momentum": "sum"}},
}


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


def growth_per_chunk(
    length: float,
    gate_spread: float,
    chunks: int,
    seed: int,
    *,
    decay: float | None = None,
    repeated: bool = False,
    rate_max: float = 1.0,
    rate_bias: float = 0.0,
) -> float:
    """Slope of the log norm of the gradient with respect to the state at every chunk's start, backwards.

    Args:
        decay: of the average of the writes; ``None`` for no momentum.
        repeated: the first token again and again.
        rate_max, rate_bias: of the memories' rates.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = initial_memories(gate_spread, generator)
    inputs = projections(length, chunks * CHUNK, generator)
    if repeated:
        inputs = [x[:, :1].expand_as(x) for x in inputs]
    state, starts = None, []
    for pieces in zip(*(x.split(CHUNK, dim=1) for x in inputs)):
        momentum = None if decay is None else torch.full(pieces[0].shape[:3], decay)
        _, state = self_modifying_memory(
            *pieces,
            weights,
            chunk_size=CHUNK,
            momentum=momentum,
            rate_max=rate_max,
            rate_bias=rate_bias,
            initial_state=state,
            output_final_state=True,
            impl="eager",
        )
        # At a boundary snapshot and running weights are the same.
        stacks = [state.running] if decay is None else [state.running, state.momentum]
        after = [x for stack in stacks for x in (stack.last, stack.gate)]
        if not starts:
            after = [x.detach().requires_grad_() for x in after]
        stacks = [stack._replace(last=x, gate=y) for stack, x, y in zip(stacks, after[::2], after[1::2])]
        state = state._replace(snapshot=stacks[0], running=stacks[0], momentum=(*stacks[1:], None)[0])
        starts.append(after)
    cotangents = [torch.randn(x.shape, generator=generator) for x in starts[-1]]
    found = torch.autograd.grad(starts[-1], [x for after in starts[:-1] for x in after], cotangents)
    by_chunk = zip(*(found[i :: len(starts[0])] for i in range(len(starts[0]))))
    norms = torch.stack([torch.cat([g.flatten() for g in chunk]).norm() for chunk in by_chunk])
    back = torch.arange(len(norms) - 1, -1, -1, dtype=torch.float64)
    centred = back - back.mean()
    return float((centred * norms.double().log()).sum() / centred.square().sum())


def untrained_model(momentum: str, memory_hidden_size: int | None, seed: int) -> HopeForCausalLM:
    """A small Hope in fp64 with one of :data:`MOMENTA`."""
    torch.manual_seed(seed)
    config = HopeConfig.preset("tiny", memory_hidden_size=memory_hidden_size, **MOMENTA[momentum])
    return HopeForCausalLM(config).double()


def gradient_norm(model: HopeForCausalLM, ids: torch.Tensor) -> float:
    """The norm of the gradient of the mean loss by all parameters."""
    loss = model(ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


@torch.no_grad()
def logits_moved(model: HopeForCausalLM, ids: torch.Tensor, change: float = 1e-9) -> float:
    """How far a small change of the embeddings moves the last logits, relative to them."""
    before = model(ids, use_cache=False).logits[:, -1]
    embeddings = model.model.embed_tokens.weight
    embeddings += change * torch.randn_like(embeddings)
    return float((model(ids, use_cache=False).logits[:, -1] - before).norm() / before.norm())


def study_models(momenta: list[str], output: Path) -> None:
    """Gradients and sensitivity of untrained models, with linear and with two-layer memories."""
    table = Table("memories", "momentum", *(f"{n:,} tokens" for n in MODEL_LENGTHS), "logits moved")
    rows = []
    cases = [(hidden, momentum) for hidden in (None, 32) for momentum in momenta]
    for hidden, momentum in track(cases, "models", console=console):
        model = untrained_model(momentum, hidden, seed=0)
        ids = torch.randint(0, 256, (1, max(MODEL_LENGTHS)))
        norms = [gradient_norm(model, ids[:, :length]) for length in MODEL_LENGTHS]
        moved = logits_moved(model, ids[:, :512])
        kind = "linear" if hidden is None else "two layers"
        table.add_row(kind, momentum, *(f"{norm:.2g}" for norm in norms), f"{moved:.0e}")
        rows.append({"momentum": momentum, "memory_hidden_size": hidden, "norms": norms, "moved": moved})
    console.print(table)
    append_rows(rows, output)


def append_rows(rows: list[dict], output: Path) -> None:
    """Each with the time and PyTorch's version."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        for row in rows:
            time = datetime.now(timezone.utc).isoformat(timespec="seconds")
            file.write(json.dumps({"time": time, "torch": torch.__version__, **row}) + "\n")


def main(
    lengths: Annotated[str, typer.Option(help="Lengths of the inputs, separated by commas.")] = "1,1.8,5,15",
    gate_spreads: Annotated[
        str, typer.Option(help="Standard deviations of the gates' memories.")
    ] = "0.02,0.25",
    chunks: Annotated[int, typer.Option(min=3, help="Chunks of 16 tokens.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Sequences for each length.")] = 5,
    decays: Annotated[str, typer.Option(help="Decays of averaged momentum, or 'none'.")] = "none",
    repeated: Annotated[bool, typer.Option(help="One token again and again.")] = False,
    rate_max: Annotated[float, typer.Option(help="Largest rate of the memories, in [0, 2].")] = 1.0,
    rate_bias: Annotated[float, typer.Option(help="Bias of the rates' logits.")] = 0.0,
    momenta: Annotated[
        str, typer.Option(help=f"Study whole models instead, with momenta of {', '.join(MOMENTA)}.")
    ] = "",
    output: Annotated[Path, typer.Option(help="JSONL file that rows are appended to.")] = DEFAULT_OUTPUT,
) -> None:
    """Measure, print and append what was found."""
    torch.set_num_threads(1)
    if momenta:
        unknown = sorted(set(momenta.split(",")) - MOMENTA.keys())
        if unknown:
            raise typer.BadParameter(f"expected names of {', '.join(MOMENTA)}, got {', '.join(unknown)}")
        study_models(momenta.split(","), output)
        return
    columns = ("gates drawn at", "length of the inputs", "decay of momentum")
    table = Table(*columns, "growth per chunk (log), mean", "least", "greatest")
    rows = []
    cases = [
        (float(spread), float(length), None if decay == "none" else float(decay))
        for spread in gate_spreads.split(",")
        for length in lengths.split(",")
        for decay in decays.split(",")
    ]
    for spread, length, decay in track(cases, "cases", console=console):
        found = [
            growth_per_chunk(
                length,
                spread,
                chunks,
                seed,
                decay=decay,
                repeated=repeated,
                rate_max=rate_max,
                rate_bias=rate_bias,
            )
            for seed in range(seeds)
        ]
        mean = sum(found) / len(found)
        numbers = (f"{x:+.2f}" for x in (mean, min(found), max(found)))
        table.add_row(f"{spread:g}", f"{length:g}", "none" if decay is None else f"{decay:g}", *numbers)
        case = {"gate_spread": spread, "length": length, "decay": decay, "repeated": repeated}
        case |= {"rate_max": rate_max, "rate_bias": rate_bias}
        rows.append({**case, "chunks": chunks, "growth": found})
    console.print(table)
    append_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
