"""Does the memory store and recall? Trains small models on multi-query associative recall and compares them.

    python -m benchmarks.recall --pairs 4,8,16 --model self_modifying_titans --model gated_delta_net
    python -m benchmarks.recall --model self_modifying_titans:memory_read=running --seeds 3
    python -m benchmarks.recall --plot-only --picture docs/images/recall.png

A model is a layer type of :class:`nl_models.HopeConfig`, with any of its fields after a colon. Each run
appends one row to ``--output`` (JSONL): the options, the accuracy on fresh sequences every ``--every`` steps,
and the wall time.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from nl_models import HopeConfig, HopeForCausalLM
from nl_models.data.associative_recall import AssociativeRecall, recall_accuracy
from nl_models.plots import model_looks, new_figure, save_figure

console = Console()
DEFAULT_OUTPUT = Path("benchmarks/results/recall.jsonl")
DEFAULT_MODELS = ["self_modifying_titans", "gated_delta_net", "self_modifying_titans:memory_rate_max=0.0"]
EVALUATION_SEED = 2**31  # beyond those of training batches; generators take the low 32 bits alone


def parse_model(text: str) -> tuple[str, dict[str, object]]:
    """``"layer:field=value,field=value"`` as a layer type and fields of HopeConfig (values are JSON)."""
    layer, _, rest = text.partition(":")
    fields = {}
    for pair in filter(None, rest.split(",")):
        name, separator, value = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"{text!r}: expected layer:field=value,field=value")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return layer, fields


def evaluate(model: HopeForCausalLM, task: AssociativeRecall, seed: int) -> float:
    """Accuracy on 256 sequences that training never sees."""
    model.eval()
    with torch.no_grad():
        input_ids, labels = task.batch(256, seed=EVALUATION_SEED + seed)
        accuracy = recall_accuracy(model(input_ids=input_ids, use_cache=False).logits, labels)
    model.train()
    return accuracy


def train(
    model: HopeForCausalLM,
    task: AssociativeRecall,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    every: int,
    seed: int,
) -> list[tuple[int, float, float]]:
    """AdamW, 50 steps of warm-up, then constant; stops once three evaluations in a row reach 0.99.

    Returns:
        The points (step, mean training loss since the last point, accuracy) of the curve.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    curve, losses = [], []
    for step in range(1, steps + 1):
        input_ids, labels = task.batch(batch_size, seed=seed * 1_000_003 + step)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % every == 0:
            curve.append((step, sum(losses) / len(losses), evaluate(model, task, seed)))
            losses.clear()
            console.print(f"  step {step:5d}  loss {curve[-1][1]:.3f}  accuracy {curve[-1][2]:.3f}")
            if len(curve) >= 3 and all(accuracy >= 0.99 for _, _, accuracy in curve[-3:]):
                break
    return curve


def show(rows: list[dict]) -> None:
    """A table, one line a run."""
    table = Table(box=None, pad_edge=False)
    for name in ("model", "pairs", "seed", "chance", "final", "steps to 0.95", "parameters", "ms a step"):
        table.add_column(name, overflow="fold", justify="left" if name == "model" else "right")
    for row in rows:
        reached = next((str(step) for step, _, accuracy in row["curve"] if accuracy >= 0.95), "-")
        table.add_row(
            row["model"],
            str(row["pairs"]),
            str(row["seed"]),
            f"{1 / row['pairs']:.2f}",
            f"{row['curve'][-1][2]:.3f}",
            reached,
            f"{row['parameters']:,}",
            f"{1e3 * row['seconds'] / row['curve'][-1][0]:.0f}",
        )
    console.print(table)


def newest(rows: list[dict]) -> list[dict]:
    """Of runs with the same options the last one: the file also holds those of older code."""
    outcome = {"curve", "seconds", "parameters", "torch", "date"}
    latest = {json.dumps({k: row[k] for k in sorted(row.keys() - outcome)}): row for row in rows}
    return sorted(latest.values(), key=lambda row: (row["model"], row["pairs"], row["seed"]))


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against steps, one panel for each number of pairs, one line for each run."""
    sizes = sorted({row["pairs"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    looks = model_looks(models)
    figure, panels = new_figure(len(sizes), width=4.2, height=3.6)
    for panel, pairs in zip(panels, sizes):
        for row in (row for row in rows if row["pairs"] == pairs):
            steps, _, accuracy = zip(*row["curve"])
            color = looks[row["model"]]["color"]
            panel.plot((0, *steps), (0, *accuracy), color=color, label=row["model"])
        panel.axhline(1 / pairs, color="0.5", linestyle=":", label="chance among the values seen")
        panel.set(title=f"{pairs} pairs", xlabel="training step", ylim=(0, 1.02))
    panels[0].set_ylabel("accuracy on fresh sequences")
    handles = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8)
    save_figure(figure, path, tight=True)
    console.print(f"plot: {path}")


def main(
    model: Annotated[list[str] | None, typer.Option(help="layer type[:field=value,…]; repeatable")] = None,
    pairs: Annotated[str, typer.Option(help="numbers of pairs, comma-separated")] = "4,8,16",
    seeds: Annotated[int, typer.Option(help="runs of each, seeds 0, 1, …")] = 1,
    steps: Annotated[int, typer.Option(help="training steps at most")] = 1500,
    batch_size: Annotated[int, typer.Option(help="sequences a step")] = 32,
    learning_rate: Annotated[float, typer.Option(help="AdamW's rate after 50 steps of warm-up")] = 3e-3,
    vocabulary: Annotated[int, typer.Option(help="different keys, and different values")] = 32,
    hidden_size: Annotated[int, typer.Option(help="width")] = 64,
    heads: Annotated[int, typer.Option(help="heads")] = 2,
    layers: Annotated[int, typer.Option(help="blocks")] = 2,
    every: Annotated[int, typer.Option(help="steps between evaluations")] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    output: Annotated[Path, typer.Option(help="JSONL file to append to")] = DEFAULT_OUTPUT,
    picture: Annotated[Path | None, typer.Option(help="the plot; default: beside the output")] = None,
    plot_only: Annotated[bool, typer.Option(help="only show and draw what the file holds")] = False,
) -> None:
    """Train small models on multi-query associative recall; print, save and plot how fast they learn it."""
    torch.set_num_threads(threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = [
        (text, int(n), seed)
        for text in model or DEFAULT_MODELS
        for n in pairs.split(",")
        for seed in range(seeds)
    ]
    for text, count, seed in [] if plot_only else runs:
        console.print(f"[bold]{text}[/], {count} pairs, seed {seed}")
        task = AssociativeRecall(pairs=count, keys=vocabulary, values=vocabulary)
        layer, fields = parse_model(text)
        torch.manual_seed(seed)
        network = HopeForCausalLM(
            HopeConfig(
                vocab_size=task.vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                layer_types=layer,
                continuum_levels=[{"hidden_size": 2 * hidden_size}],  # a plain MLP: only the mixers differ
                **fields,
            )
        )
        settings = {"batch_size": batch_size, "learning_rate": learning_rate, "every": every, "seed": seed}
        start = time.perf_counter()
        curve = train(network, task, steps=steps, **settings)
        row = {
            "model": text,
            "pairs": count,
            **settings,
            "vocabulary": vocabulary,
            "hidden_size": hidden_size,
            "heads": heads,
            "layers": layers,
            "parameters": sum(p.numel() for p in network.parameters()),
            "seconds": time.perf_counter() - start,
            "curve": curve,
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if not output.is_file():
        raise typer.BadParameter(f"{output}: nothing to show yet", param_hint="--output")
    rows = newest([json.loads(line) for line in output.read_text().splitlines()])
    show(rows)
    plot(rows, picture or output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
