"""Momentum and delta momentum on a function whose curvature changes along the way (arXiv 2512.24695, Eq. 53).

    python -m benchmarks.curvature

    ψ(r, θ) = r² + k (r − θ + a sin(ω r))²,    start (−3.5, 2)

The valley winds: past gradients point across it, and momentum has to forget them. The paper gives no k, a, ω
and no rates. Here each rule's learning rate and, for delta momentum, the erase are searched over the same
number of runs for each of several curves; a row of ``--output`` (JSONL) is the best of one rule on one curve.
"""

from __future__ import annotations

import itertools
import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nl_models.optim import DeltaMomentum
from nl_models.plots import save_figure

console = Console(width=max(120, Console().width))
DEFAULT_OUTPUT = Path("benchmarks/results/curvature.jsonl")
START = (-3.5, 2.0)
CURVES = [(k, a, omega) for k in (1.0, 5.0) for a in (0.5, 1.0) for omega in (1.0, 3.0)]
REACHED = 1e-3
RULES = ("momentum", "momentum, α searched", "delta momentum", "delta momentum, printed")


def psi(point: torch.Tensor, k: float, a: float, omega: float) -> torch.Tensor:
    """Eq. 53 at [1, 2]."""
    r, theta = point[0]
    return r**2 + k * (r - theta + a * torch.sin(omega * r)) ** 2


def candidates(name: str, rates: int) -> list[dict[str, float]]:
    """As many for each rule: a fine ladder of rates, or a coarse one with four values of another option."""
    if name == "momentum":
        return [{"lr": 1e-4 * 10 ** (4 * i / (4 * rates - 1)), "erase": 0.0} for i in range(4 * rates)]
    ladder = [1e-4 * 10 ** (4 * i / (rates - 1)) for i in range(rates)]
    if name == "momentum, α searched":
        tried = itertools.product(ladder, (0.3, 0.6, 0.8, 0.95))
        return [{"lr": lr, "momentum": momentum, "erase": 0.0} for lr, momentum in tried]
    if name == "delta momentum":
        return [{"lr": lr, "erase": erase} for lr, erase in itertools.product(ladder, (0.1, 0.3, 0.9, 1.5))]
    return [{"lr": 1e-4 * 10 ** (4 * i / (4 * rates - 1)), "literal": True} for i in range(4 * rates)]


def descend(curve: tuple[float, float, float], options: dict[str, float], steps: int) -> list[list[float]]:
    """The points (r, θ, ψ) of a run; it ends early where it diverges."""
    point = torch.nn.Parameter(torch.tensor([START], dtype=torch.float64))
    optimizer = DeltaMomentum([point], **{"momentum": 0.9, **options})
    path = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        value = psi(point, *curve)
        path.append([*point[0].tolist(), value.item()])
        if not math.isfinite(value.item()) or value.item() > 1e6:
            break
        value.backward()
        optimizer.step()
    return path


def steps_needed(path: list[list[float]], steps: int) -> float:
    """After how many steps ψ stays below 0.001; infinite if it does not."""
    if len(path) <= steps:
        return math.inf
    above = [i for i, (_, _, value) in enumerate(path) if not value < REACHED]
    return math.inf if above and above[-1] == steps else (above[-1] + 1 if above else 0)


def plot(rows: list[dict], steps: int, path: Path) -> None:
    """The paths over the function's contours, and ψ against steps, on one of the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = CURVES[5]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    r, theta = torch.meshgrid(torch.linspace(-5, 2.5, 300), torch.linspace(-9, 4, 300), indexing="ij")
    k, a, omega = curve
    values = r**2 + k * (r - theta + a * torch.sin(omega * r)) ** 2
    left.contour(r, theta, values.log1p(), levels=14, cmap="Greys", linewidths=0.6)
    for number, row in enumerate(row for row in rows if row["curve"] == list(curve)):
        run = descend(curve, row["options"], steps)
        color, label = plt.get_cmap("tab10")(number), row["rule"]
        left.plot(
            [p[0] for p in run], [p[1] for p in run], ".-", color=color, markersize=3, lw=1, label=label
        )
        right.plot([max(p[2], 1e-16) for p in run], color=color, label=label)
    left.plot(*START, "k*", markersize=10)
    left.set(
        xlabel="r", ylabel="θ", xlim=(-5, 2.5), ylim=(-9, 4), title=f"k = {k:g}, a = {a:g}, ω = {omega:g}"
    )
    right.axhline(REACHED, color="0.5", linestyle=":")
    right.set(yscale="log", xlabel="step", ylabel="ψ", ylim=(1e-9, 1e3), title="best options of each")
    for panel in (left, right):
        panel.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    console.print(f"plot: {path}")


def main(
    steps: Annotated[int, typer.Option(min=10, help="steps of a run")] = 200,
    rates: Annotated[int, typer.Option(min=2, help="rates for each erase; four times as many without")] = 8,
    output: Annotated[Path, typer.Option(help="JSONL file; runs it holds are not repeated")] = DEFAULT_OUTPUT,
    picture: Annotated[Path, typer.Option(help="the plot")] = Path("docs/images/optimizers-curvature.png"),
) -> None:
    """Search, print, append and plot."""
    torch.set_num_threads(1)
    known = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    done = {(row["rule"], *row["curve"], row["steps"], row["rates"]): row for row in known}
    rows = []
    for curve, rule in track(list(itertools.product(CURVES, RULES)), "curves", console=console):
        key = (rule, *curve, steps, rates)
        if key not in done:
            runs = [(options, descend(curve, options, steps)) for options in candidates(rule, rates)]
            options, best = min(runs, key=lambda run: (steps_needed(run[1], steps), run[1][-1][2]))
            needed = steps_needed(best, steps)
            done[key] = {
                "rule": rule,
                "curve": curve,
                "steps": steps,
                "rates": rates,
                "options": options,
                "needed": None if math.isinf(needed) else needed,
                "last": best[-1][2],
                "diverged": sum(len(path) <= steps for _, path in runs) / len(runs),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
        rows.append({**done[key], "curve": list(curve)})
    table = Table(
        "k", "a", "ω", "rule", "rate", "α", "erase", "steps to ψ < 0.001", "diverged runs", box=None
    )
    for row in rows:
        erase = row["options"].get("erase")
        table.add_row(
            *(f"{x:g}" for x in row["curve"]),
            row["rule"],
            f"{row['options']['lr']:.3g}",
            f"{row['options'].get('momentum', 0.9):g}",
            "-" if erase is None else f"{erase:g}",
            "-" if row["needed"] is None else str(row["needed"]),
            f"{100 * row['diverged']:.0f} %",
        )
    console.print(table)
    plot(rows, steps, picture)


if __name__ == "__main__":
    typer.run(main)
