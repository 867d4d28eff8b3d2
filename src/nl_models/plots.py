"""Plots: one look for all of them, and the loss curve of a run."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nl_models.files import write_bytes

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")

# The looks of a model are the same in every picture; a layer has those of the model that is made of it.
_LOOKS = {
    "hope-attention": {"color": "#0072B2", "marker": "o"},
    "transformer": {"color": "#D55E00", "marker": "s"},
    "hope": {"color": "#009E73", "marker": "^"},
    "titans": {"color": "#CC79A7", "marker": "D"},
    "gated-delta-net": {"color": "#E69F00", "marker": "v"},
    "hope-two-layer": {"color": "#56B4E9", "marker": "P"},
    "lstm": {"color": "#000000", "marker": "X"},
}
# Of what has no name here: Tol's muted palette, none of which looks like one of these.
_OTHERS = [
    {"color": color, "marker": marker}
    for color, marker in zip(("#882255", "#332288", "#999933", "#AA4499", "#888888"), "x*<>+")
]
_LAYERS = {"self-modifying-titans": "hope", "attention": "hope-attention", "mlp": "transformer"}


def model_looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each model or layer, as keywords of ``plot``; others get looks of their own."""
    known = {name: name.replace("_", "-") for name in names}
    known = {name: _LAYERS.get(key, key) for name, key in known.items()}
    others = itertools.cycle(_OTHERS)
    return {name: _LOOKS.get(key) or next(others) for name, key in known.items()}


def new_figure(
    columns: int = 1, *, rows: int = 1, width: float = 6.4, height: float = 4.2
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row, without touching matplotlib's global state; inches are per axes."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: Path, *, tight: bool = False) -> Path:
    """Write a PNG in one step; ``tight`` makes room for what stands outside the axes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight" if tight else None)
    write_bytes(path, buffer.getvalue())
    return path


def plot_losses(runs: Mapping[str, Sequence[Mapping]], path: Path, *, title: str) -> Path:
    """Training and validation loss against tokens seen.

    Args:
        runs: name → records of the run's metrics (:func:`nl_models.training.metrics.read_metrics`).
        path: of the PNG.
        title: above the plot.
    """
    figure, (axis,) = new_figure()
    shown: list[float] = []
    for (name, look), records in zip(model_looks(runs).items(), runs.values(), strict=True):
        seen = {}
        for kind in ("train", "validation"):
            chosen = [record for record in records if record["kind"] == kind]
            seen[kind] = [np.array([r[key] for r in chosen], dtype=float) for key in ("tokens", "loss")]
        (tokens, losses), (evaluated, validation) = seen["train"], seen["validation"]
        smooth = _moving_average(losses, max(1, len(losses) // 40))
        shown += [*smooth, *validation]
        label = None if len(validation) else name
        axis.plot(tokens, smooth, color=look["color"], linewidth=1.0, alpha=0.5, label=label)
        if len(validation):
            label = f"{name} ({validation[-1]:.3f})"
            axis.plot(evaluated, validation, **look, markersize=4.5, linewidth=1.6, label=label)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("training tokens")
    axis.set_ylabel("loss (nats per token)")
    axis.xaxis.set_major_formatter(compact_number)
    if shown:
        # The first steps fall from ln(vocabulary) at once; they would flatten the rest.
        low, high = min(shown), float(np.quantile(shown, 0.95))
        margin = 0.06 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)
        legend = "validation: markers (last); training: thin"
        axis.legend(title=legend, title_fontsize=8, fontsize=9, frameon=False)
    return save_figure(figure, path)


def compact_number(value: float, _position: object = None) -> str:
    """1500 → ``1.5K``, 2000000 → ``2M``."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def context_label(value: float, _position: object = None) -> str:
    """2048 → ``2K`` (binary), 100000 → ``100K``."""
    whole = round(value)
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{suffix}"
    return compact_number(value)


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last ``width`` values (fewer at the start)."""
    total = np.cumsum(np.concatenate([np.zeros(width), values]))
    counts = np.minimum(np.arange(len(values)) + 1, width)
    return (total[width:] - total[: len(values)]) / counts
