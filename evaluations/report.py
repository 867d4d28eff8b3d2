"""Tables and pictures from the rows, for docs/evidence.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from evaluations.models import TITLES
from evaluations.studies import CLAIMS, PUBLISHED, QUICK, STUDIES, Claim
from evaluations.study import ROOT, Run, Study, best_setting, find, read_rows, tried
from nl_models.files import make_folder
from nl_models.training.plots import model_looks, new_figure, save_figure

PAGE = ROOT / "docs/evidence.md"
OURS = ("hope", "hope_two_layer", "hope_attention")
NONE = "–"


def chosen(rows: list[dict], study: Study, task: str, model: str) -> list[dict]:
    """The rows of the best setting tried, one a seed."""
    setting = best_setting(rows, study, task, model)
    if setting is None:
        return []
    found = (find(rows, study, Run(task, model, setting, seed)) for seed in study.seeds)
    return [row for row in found if row is not None]


def percent(rows: list[dict], name: str) -> str:
    """A score's mean over rows in percent, and its range where they differ by a point."""
    values = [100 * row["scores"][name] for row in rows]
    spread = f" ({min(values):.0f}–{max(values):.0f})" if max(values) - min(values) >= 1 else ""
    return f"{sum(values) / len(values):.1f}".removesuffix(".0") + spread


def table(rows: list[dict], study: Study, published: dict[str, dict]) -> str:
    """Markdown: a line a model, a column a task; then what was published."""
    lines = [["model", *study.tasks, "seeds", "settings tried"]]
    for model in study.settings:
        found = [chosen(rows, study, task, model) for task in study.tasks]
        if not any(found):
            continue
        cells = [
            " / ".join(percent(part, name) for name in part[0]["scores"]) if part else NONE for part in found
        ]
        seeds = [len(part) for part in found if part]
        settings = [len(tried(rows, study, task, model)) for task in study.tasks]
        of = f"{_range(filter(None, settings))} of {len(study.settings[model])}"
        lines.append([TITLES[model], *cells, _range(seeds), of])
    for model, scores in published.items():
        cells = (_numbers(scores[task]) if task in scores else NONE for task in study.tasks)
        lines.append([f"*published: {model}*", *cells, "", ""])
    return _markdown(lines)


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return "–".join(map(str, sorted({found[0], found[-1]})))


def claims(rows: dict[str, list[dict]]) -> str:
    """Markdown: a line a claim, ours beside the best other model's and what was published for Hope."""
    lines = [["claim", "task", "ours", "best baseline", "published for Hope"]]
    for claim in CLAIMS:
        study = STUDIES[claim.study]
        by_model = {model: chosen(rows[claim.study], study, claim.task, model) for model in study.settings}
        ours, others = (
            _best(by_model, (model for model in study.settings if (model in OURS) == own), claim)
            for own in (True, False)
        )
        published = PUBLISHED.get(claim.study, {}).get("Hope", {}).get(claim.task)
        lines.append(
            [claim.says, claim.label, ours, others, NONE if published is None else _numbers(published)]
        )
    return _markdown(lines)


def _best(by_model: dict[str, list[dict]], models: Iterable[str], claim: Claim) -> str:
    found = {model: by_model[model] for model in models if by_model[model]}
    if not found:
        return "not run"
    best = max(found, key=lambda m: sum(row["scores"][claim.score] for row in found[m]) / len(found[m]))
    count = len(found[best])
    return f"{percent(found[best], claim.score)} ({TITLES[best]}, {count} seed{'s' * (count > 1)})"


def _numbers(scores: float | tuple[float, ...]) -> str:
    return " / ".join(f"{x:g}" for x in (scores if isinstance(scores, tuple) else (scores,)))


def _markdown(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "| " + " | ".join("---" for _ in lines[0]) + " |", *body])


def draw(rows: list[dict], study: Study, path: Path) -> Path:
    """The last of a task's scores on validation data against steps: mean and range of the seeds."""
    tasks = [task for task in study.tasks if any(chosen(rows, study, task, m) for m in study.settings)]
    columns = min(3, len(tasks))
    figure, panels = new_figure(columns, rows=-(-len(tasks) // columns), width=3.6, height=2.7)
    known = {"attention": "transformer"}  # which is called so here
    looks = model_looks([known.get(model, model) for model in study.settings])
    colours = {model: looks[known.get(model, model)]["color"] for model in study.settings}
    end = study.training["steps"]
    for panel, task in zip(panels, tasks):
        for model in study.settings:
            curves = [_curve(row, end) for row in chosen(rows, study, task, model)]
            if not curves:
                continue
            steps = sorted({step for curve in curves for step in curve})
            # A run that has reached its goal stays there.
            values = np.array(
                [[curve[max(s for s in curve if s <= step)] for step in steps] for curve in curves]
            )
            panel.plot(steps, 100 * values.mean(0), color=colours[model], label=TITLES[model], linewidth=1.5)
            low, high = 100 * values.min(0), 100 * values.max(0)
            panel.fill_between(steps, low, high, color=colours[model], alpha=0.15, linewidth=0)
        last = study.tasks[task](task).scores[-1]
        panel.set(title=f"{task}, {last}", ylim=(-3, 103), xlim=(0, end), xlabel="steps", ylabel="right, %")
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    handles = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return save_figure(figure, path)


def _curve(row: dict, end: int) -> dict[int, float]:
    points = {0: 0.0} | {step: list(scores.values())[-1] for step, _, scores in row["curve"]}
    return {**points, end: points[max(points)]}


def blocks(rows: dict[str, list[dict]]) -> dict[str, str]:
    """What stands on the page between its marks, by name."""
    return {"claims": claims(rows)} | {
        name: table(rows[name], study, PUBLISHED.get(name, {})) for name, study in STUDIES.items()
    }


def fill(page: str, parts: dict[str, str]) -> str:
    """``page`` with each part between ``<!-- NAME -->`` and ``<!-- end -->``."""
    for name, text in parts.items():
        page, count = re.subn(
            rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)",
            lambda match, text=text: f"{match[1]}{text}\n{match[2]}",
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{PAGE}: expected one place for {name!r}, found {count}")
    return page


def rows_of(folder: Path, studies: dict[str, Study]) -> dict[str, list[dict]]:
    """The rows of each study."""
    return {name: read_rows(folder / f"{study.name}.jsonl") for name, study in studies.items()}


def write_report(folder: Path, *, quick: bool) -> list[Path]:
    """Tables into docs/evidence.md and pictures beside it; quick studies' into their folder."""
    studies = QUICK if quick else STUDIES
    rows = rows_of(folder, studies)
    pictures = folder if quick else ROOT / "docs/images"
    make_folder(pictures)
    written = [
        draw(rows[name], study, pictures / f"evidence_{name}.png")
        for name, study in studies.items()
        if any(chosen(rows[name], study, task, model) for task in study.tasks for model in study.settings)
    ]
    page = folder / "evidence.md" if quick else PAGE
    text = (
        "\n\n".join(f"## {name}\n\n{table(rows[name], study, {})}" for name, study in studies.items()) + "\n"
        if quick
        else fill(page.read_text(encoding="utf-8"), blocks(rows))
    )
    page.write_text(text, encoding="utf-8")
    return [page, *written]
