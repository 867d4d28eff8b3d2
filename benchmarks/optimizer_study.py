"""Optimisers compared on small tasks, each with the same search for its learning rate.

    python -m benchmarks.optimizer_study --task digits-vit
    python -m benchmarks.optimizer_study --task text-transformer --task text-hope --seeds 3
    python -m benchmarks.optimizer_study --plot-only

A search walks a ladder of rates, each twice the last, from the task's first: it tries the rung beyond the
side on which its best lies nearer to an end, until ``--budget`` rungs are tried. So every optimiser gets as
many runs, and the best rate ends up between others. The best is then run again with other seeds, which are
what is reported. Every finished run is a row of ``--output`` (JSONL); what the file holds is not run again.
"""

from __future__ import annotations

import json
import math
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.utils import clip_grad_norm_

from benchmarks.optimizer_tasks import TASKS, Task
from nl_models.plots import save_figure

console = Console(width=max(120, Console().width))
DEFAULT_OUTPUT = Path("benchmarks/results/optimizer_study.jsonl")
SEARCH_SEED = 1000  # first seed of the search; those of the comparison count from 0
EVALUATE_EVERY = 25
CLIP_NORM = 1.0


def train(task: Task, name: str, learning_rate: float, seed: int) -> dict[str, object]:
    """One run: 10 % warm-up, then a cosine to a tenth of the rate.

    Returns:
        The curve, the seconds of all steps and of those in ``optimizer.step``; a run whose loss is not finite
        has ``None`` for its last values.
    """
    model = task.model(seed)
    model.train()
    optimizer = task.optimizer(name, model, learning_rate)
    warmup = task.steps // 10

    def share(step: int) -> float:
        progress = (step - warmup) / max(1, task.steps - 1 - warmup)
        return (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * min(1, progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    curve, in_step, begin, evaluating = [], 0.0, time.perf_counter(), 0.0
    result: dict[str, float | None] = {"selection": None, "loss": None}
    for step in range(task.steps):
        optimizer.zero_grad()
        loss = task.loss(model, step, seed)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), CLIP_NORM)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            result = {"selection": None, "loss": None}
            break
        start = time.perf_counter()
        optimizer.step()
        in_step += time.perf_counter() - start
        schedule.step()
        if (step + 1) % EVALUATE_EVERY == 0:
            start = time.perf_counter()
            model.eval()
            result = task.evaluate(model)
            model.train()
            curve.append((step + 1, round(result["loss"], 5)))
            evaluating += time.perf_counter() - start
    seconds = time.perf_counter() - begin - evaluating
    done = {
        key: None if value is None or not math.isfinite(value) else value for key, value in result.items()
    }
    return {**done, "curve": curve, "seconds": round(seconds, 3), "optimizer_seconds": round(in_step, 3)}


class Results:
    """The rows of one file, by what was run; with ``frozen`` nothing that is missing is run."""

    def __init__(self, path: Path, *, frozen: bool = False) -> None:
        self.path, self.frozen = path, frozen
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {self.key(row): row for row in map(json.loads, lines)}

    @staticmethod
    def key(row: dict) -> tuple:
        """What makes two runs the same."""
        return row["task"], row["optimizer"], row["learning_rate"], row["seed"], row["steps"]

    def run(self, task_name: str, task: Task, name: str, learning_rate: float, seed: int) -> dict:
        """The row of a run: the file's, or a new one that is appended to it."""
        row = {
            "task": task_name,
            "optimizer": name,
            "learning_rate": learning_rate,
            "seed": seed,
            "steps": task.steps,
        }
        if self.key(row) not in self.rows:
            if self.frozen:
                raise typer.BadParameter(f"{self.path} has no run of {row}", param_hint="--plot-only")
            row |= train(task, name, learning_rate, seed)
            row |= {
                "torch": torch.__version__,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[self.key(row)] = row
        return self.rows[self.key(row)]


def next_rung(losses: dict[int, float]) -> int:
    """The rung to try next, given the losses of a run of neighbours: beyond the nearer end of the best."""
    best = min(losses, key=lambda rung: (losses[rung], abs(rung)))
    low, high = min(losses), max(losses)
    # Upwards on a tie: rates that are too high show at once, too low ones do not.
    return high + 1 if high - best <= best - low else low - 1


def search(
    results: Results, task_name: str, task: Task, name: str, *, budget: int, seeds: int
) -> tuple[dict[float, float], float]:
    """Mean selection loss of every rate tried, and the best rate."""
    start = task.optimizers[name]
    losses: dict[int, float] = {}
    while len(losses) < budget:
        rung = next_rung(losses) if losses else 0
        rows = [
            results.run(task_name, task, name, start * 2.0**rung, SEARCH_SEED + seed) for seed in range(seeds)
        ]
        found = [row["selection"] for row in rows]
        losses[rung] = math.inf if None in found else mean(found)
        console.print(f"  {task_name} {name} rate {start * 2.0**rung:g}: {losses[rung]:.4f}")
    best = min(losses, key=lambda rung: (losses[rung], abs(rung)))
    if best in (min(losses), max(losses)):
        console.print(f"[bold yellow]{task_name} {name}: the best rate is at an end; raise --budget[/]")
    return {start * 2.0**rung: losses[rung] for rung in sorted(losses)}, start * 2.0**best


def show(summaries: list[dict]) -> None:
    """A line for each optimiser of each task."""
    table = Table(box=None, pad_edge=False)
    for name in (
        "task",
        "optimiser",
        "rates tried",
        "best",
        "loss",
        "±",
        "accuracy",
        "ms a step",
        "in step()",
    ):
        table.add_column(name, justify="left" if name in ("task", "optimiser") else "right")
    for summary in summaries:
        rows = summary["rows"]
        losses = [math.inf if row["loss"] is None else row["loss"] for row in rows]
        accuracy = [row["accuracy"] for row in rows if row.get("accuracy") is not None]
        table.add_row(
            summary["task"],
            summary["optimizer"],
            f"{min(summary['searched']):g} … {max(summary['searched']):g}",
            f"{summary['best']:g}",
            f"{mean(losses):.4f}",
            f"{stdev(losses):.4f}" if len(losses) > 1 else "-",
            f"{100 * mean(accuracy):.2f} %" if accuracy else "-",
            f"{1e3 * sum(row['seconds'] for row in rows) / sum(row['steps'] for row in rows):.1f}",
            f"{1e3 * sum(row['optimizer_seconds'] for row in rows) / sum(row['steps'] for row in rows):.1f}",
        )
    console.print(table)


def plot(summaries: list[dict], unit: str, path: Path) -> None:
    """Left: the search. Right: mean curves of the best rates, with the range over seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for number, summary in enumerate(summaries):
        color = plt.get_cmap("tab10")(number)
        rates = [rate for rate, loss in summary["searched"].items() if math.isfinite(loss)]
        left.plot(
            rates, [summary["searched"][r] for r in rates], "o-", color=color, label=summary["optimizer"]
        )
        left.plot([summary["best"]], [summary["searched"][summary["best"]]], "*", color=color, markersize=14)
        curves = [row["curve"] for row in summary["rows"] if row["loss"] is not None]
        if curves:
            steps = [step for step, _ in curves[0]]
            columns = list(zip(*([loss for _, loss in curve] for curve in curves)))
            right.plot(steps, [mean(column) for column in columns], color=color, label=summary["optimizer"])
            right.fill_between(steps, *zip(*((min(c), max(c)) for c in columns)), color=color, alpha=0.2)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="loss that picks the rate", title="search")
    seeds = len(summaries[0]["rows"])
    right.set(xlabel="step", ylabel=unit, title=f"best rate, mean and range of {seeds} other seeds")
    for panel in (left, right):
        best = min(line for s in summaries for row in s["rows"] for _, line in row["curve"])
        worst = max(row["curve"][0][1] for s in summaries for row in s["rows"] if row["curve"])
        panel.set(yscale="log", ylim=(0.95 * best, 1.05 * worst))
        panel.grid(alpha=0.3, which="both")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=8)
    figure.suptitle(summaries[0]["task"])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    plt.close(figure)
    console.print(f"plot: {path}")


def main(
    task: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(TASKS)}; repeatable")] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="of the task's; repeatable; default all")
    ] = None,
    budget: Annotated[int, typer.Option(min=3, help="learning rates tried for each optimiser")] = 7,
    search_seeds: Annotated[int, typer.Option(min=1, help="runs of each rate in the search")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="runs of the best rate, seeds 0, 1, …")] = 5,
    output: Annotated[Path, typer.Option(help="JSONL file to append to")] = DEFAULT_OUTPUT,
    images: Annotated[Path, typer.Option(help="folder of the plots")] = Path("docs/images"),
    plot_only: Annotated[bool, typer.Option(help="fail rather than run what the file lacks")] = False,
) -> None:
    """Search a rate for each optimiser, run the best with other seeds, print and plot."""
    torch.set_num_threads(1)
    unknown = set(task or []) - set(TASKS)
    if unknown:
        raise typer.BadParameter(
            f"{unknown.pop()!r}: expected one of {', '.join(TASKS)}", param_hint="--task"
        )
    results, summaries = Results(output, frozen=plot_only), []
    for task_name in task or TASKS:
        current = TASKS[task_name]()
        wrong = set(optimizer or []) - set(current.optimizers)
        if wrong:
            raise typer.BadParameter(
                f"{wrong.pop()!r}: expected one of {', '.join(current.optimizers)}", param_hint="--optimizer"
            )
        found = []
        for name in optimizer or current.optimizers:
            settings = {"budget": budget, "seeds": search_seeds}
            searched, best = search(results, task_name, current, name, **settings)
            rows = []
            with Progress(console=console, transient=True) as progress:
                for seed in progress.track(range(seeds), description=f"{task_name} {name}"):
                    rows.append(results.run(task_name, current, name, best, seed))
            found.append(
                {"task": task_name, "optimizer": name, "searched": searched, "best": best, "rows": rows}
            )
        plot(found, current.unit, images / f"optimizers-{task_name}.png")
        summaries += found
    show(summaries)


if __name__ == "__main__":
    typer.run(main)
