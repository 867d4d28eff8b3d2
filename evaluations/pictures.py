"""Pictures of studies whose scores are more than curves: heat maps, and streams part by part.

Every function takes ``chosen``, which gives the rows of a task and a model, one a seed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from evaluations.learners import METHODS
from evaluations.models import TITLES
from evaluations.study import Study
from nl_models.plots import new_figure, save_figure

Chosen = Callable[[str, str], list[dict]]
CONTROLS = ("frozen", "joint", "starts_over", "other_project")  # dotted


def heat_maps(chosen: Chosen, study: Study, path: Path) -> Path:
    """Right answers by length (across) and depth (down) of the statement: a panel a task and model."""
    pairs = [(t, m) for t in study.tasks for m in study.settings if chosen(t, m)]
    tasks = [t for t in study.tasks if any(t == task for task, _ in pairs)]
    models = [m for m in study.settings if any(m == model for _, model in pairs)]
    figure, panels = new_figure(len(models), rows=len(tasks), width=2.5, height=2.0)
    for index, panel in enumerate(panels):
        task, model = tasks[index // len(models)], models[index % len(models)]
        rows = chosen(task, model)
        if not rows:
            panel.set_visible(False)
            continue
        lengths, depths, shares = _cells(rows)
        image = panel.imshow(shares, vmin=0, vmax=100, aspect="auto", cmap="viridis", origin="lower")
        panel.grid(False)
        panel.set_xticks(range(len(lengths)), lengths, fontsize=7)
        panel.set_yticks(range(len(depths)), depths, fontsize=7)
        panel.set_title(f"{task}\n" + textwrap.fill(TITLES[model], 24), fontsize=8)
    figure.supxlabel("tokens of the stream (trained on 512)", fontsize=9)
    figure.supylabel("depth of the statement", fontsize=9)
    figure.colorbar(image, ax=panels, label="right, %", shrink=0.6)
    return save_figure(figure, path)


def _cells(rows: list[dict]) -> tuple[list[str], list[str], np.ndarray]:
    """Lengths, depths, and percent ``[depths, lengths]``, the mean over rows; NaN where nothing was asked."""
    names = [name.split("@") for name in rows[0]["scores"] if "@" in name]
    lengths = list(dict.fromkeys(length for length, _ in names))
    depths = sorted({depth for _, depth in names})
    found = [[[row["scores"].get(f"{n}@{d}", np.nan) for n in lengths] for d in depths] for row in rows]
    return lengths, depths, 100 * np.mean(found, axis=0)


def by_part(chosen: Chosen, study: Study, path: Path) -> Path:
    """What is right of all parts so far (of personalisation: what a day is easier than for the base)."""
    tasks = [task for task in study.tasks if any(chosen(task, m) for m in study.settings)]
    figure, panels = new_figure(len(tasks), width=5.6, height=3.6)
    colours = matplotlib.colormaps["tab20"]
    for panel, task in zip(panels, tasks):
        base = chosen(task, "frozen")
        for model in study.settings:
            lines = [_line(row, base) for row in chosen(task, model)]
            if not lines or (study.unit == "nats" and model == "frozen"):
                continue
            values = np.array(lines)
            parts = range(1, values.shape[1] + 1)
            style = {"color": colours(list(METHODS).index(model)), "linewidth": 1.5}
            panel.plot(parts, values.mean(0), ":" if model in CONTROLS else "-", label=TITLES[model], **style)
            panel.fill_between(
                parts, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
        nats = study.unit == "nats"
        panel.set(title=task, xlabel="day" if nats else "parts learned", xticks=range(1, len(parts) + 1))
        panel.set_ylabel("nats less than the base" if nats else "of what was learned, %")
    handles = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels())}
    look = {"ncols": 2 * len(tasks), "frameon": False, "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **look)
    return save_figure(figure, path)


def differences(chosen: Chosen, study: Study, path: Path) -> Path:
    """Bars: how much more the last score of a task is than the first model's, mean and range."""
    (task,), (first, *others) = study.tasks, study.settings
    found = {model: chosen(task, model) for model in others if chosen(task, model)}
    name = study.tasks[task](task).scores[-1]
    whole = np.mean([row["scores"][name] for row in chosen(task, first)])
    figure, (panel,) = new_figure(width=6.4, height=0.9 + 0.35 * len(found))
    for model, rows in found.items():
        values = np.array([row["scores"][name] for row in rows]) - whole
        mean = values.mean()
        panel.barh(TITLES[model], mean, xerr=[[mean - values.min()], [values.max() - mean]], color="#009E73")
    panel.axvline(0, color="#444444", linewidth=0.8)
    panel.invert_yaxis()
    panel.set_xlabel(f"{study.unit} more than the whole")
    return save_figure(figure, path)


def _line(row: dict, base: list[dict]) -> list[float]:
    if "days" in row:
        same = next((other for other in base if other["seed"] == row["seed"]), None)
        if same is None:
            raise ValueError(f"{row['task']}: the picture needs the row of 'frozen' with seed {row['seed']}")
        return [b - a for a, b in zip(row["days"]["next day"], same["days"]["next day"])]
    matrix = row["matrix"]
    parts = len(matrix[0])
    if len(matrix) < parts + 1:  # all at once
        return [100 * sum(matrix[-1]) / parts] * parts
    return [100 * sum(scores[:seen]) / seen for seen, scores in enumerate(matrix) if seen]


PICTURES = {
    "ablation": differences,
    "long_context": heat_maps,
    "class_incremental": by_part,
    "two_languages": by_part,
    "personalisation": by_part,
}
