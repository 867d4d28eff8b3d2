"""Tables and pictures from the rows, for docs/evidence.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from evaluations.models import TITLES
from evaluations.pictures import CONTROLS, PICTURES
from evaluations.studies import CLAIMS, PUBLISHED, QUICK, STUDIES, Claim
from evaluations.study import ROOT, Run, Study, best_setting, find, read_rows, tried
from nl_models.files import make_folder
from nl_models.plots import model_looks, new_figure, save_figure

PAGE = ROOT / "docs/evidence.md"
OURS = tuple(model for model in TITLES if model.startswith("hope"))
# With a continuum a model's line is dashed, without writes dotted.
DASHES = {"_continuum": "--", "_writes_nothing": ":"}
NONE = "–"
# Neither ours nor baselines: controls, Hope's continuum beside another memory, another base.
NEITHER = (*CONTROLS, "gated_delta_net_continuum", "hope_reads", "hope_reads_anew")


def chosen(rows: list[dict], study: Study, task: str, model: str) -> list[dict]:
    """The rows of the best setting tried, one a seed."""
    setting = best_setting(rows, study, task, model)
    if setting is None:
        return []
    found = (find(rows, study, Run(task, model, setting, seed)) for seed in study.seeds)
    return [row for row in found if row is not None]


def score(rows: list[dict], name: str, unit: str) -> str:
    """A score's mean over rows, and its range: in percent where rows differ by a point, in nats always."""
    values = [row["scores"][name] * (100 if unit == "%" else 1) for row in rows]
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if unit == "nats":
        return f"{mean:.3f}" + (f" ({low:.3f}–{high:.3f})" if len(values) > 1 else "")
    mean = round(mean, 1) + 0.0  # of what is just below zero no sign is left
    return f"{mean:.1f}".removesuffix(".0") + (f" ({round(low)}–{round(high)})" if high - low >= 1 else "")


def table(rows: list[dict], study: Study, published: dict[str, dict]) -> str:
    """Markdown: a line a model, a column a task; then what was published."""
    lines = [["model", *study.tasks, "seeds", "settings tried"]]
    for model in study.settings:
        found = [chosen(rows, study, task, model) for task in study.tasks]
        if not any(found):
            continue
        cells = [
            _cell(part, study.tasks[task](task).scores, study.unit) for task, part in zip(study.tasks, found)
        ]
        seeds = [len(part) for part in found if part]
        settings = [len(tried(rows, study, task, model)) for task in study.tasks]
        of = f"{_range(filter(None, settings))} of {len(study.settings[model])}"
        lines.append([TITLES[model], *cells, _range(seeds), of])
    for model, scores in published.items():
        cells = (_numbers(scores[task]) if task in scores else NONE for task in study.tasks)
        lines.append([f"*published: {model}*", *cells, "", ""])
    return _markdown(lines)


def _cell(rows: list[dict], names: tuple[str, ...], unit: str) -> str:
    """All scores of a task; not every model has each."""
    if not rows:
        return NONE
    return " / ".join(score(rows, name, unit) if name in rows[0]["scores"] else NONE for name in names)


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
            _best(by_model, (m for m in study.settings if (m in OURS) == own and m not in NEITHER), claim)
            for own in (True, False)
        )
        published = PUBLISHED.get(claim.study, {}).get("Hope", {}).get(claim.task)
        lines.append(
            [claim.says, claim.label, ours, others, NONE if published is None else _numbers(published)]
        )
    return _markdown(lines)


def _best(by_model: dict[str, list[dict]], models: Iterable[str], claim: Claim) -> str:
    found = {m: by_model[m] for m in models if by_model[m] and claim.score in by_model[m][0]["scores"]}
    if not found:
        return "not run"
    study = STUDIES[claim.study]

    def goodness(model: str) -> float:
        return study.goodness(row["scores"][claim.score] for row in found[model]) / len(found[model])

    best = max(found, key=goodness)
    count = len(found[best])
    return f"{score(found[best], claim.score, study.unit)} ({TITLES[best]}, {count} seed{'s' * (count > 1)})"


def _numbers(scores: float | tuple[float, ...]) -> str:
    return " / ".join(f"{x:g}" for x in (scores if isinstance(scores, tuple) else (scores,)))


def _markdown(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "| " + " | ".join("---" for _ in lines[0]) + " |", *body])


def draw(name: str, rows: list[dict], study: Study, path: Path) -> Path:
    """A study's own picture, or the last of a task's scores on validation data against steps: mean and range
    of the seeds."""
    if name in PICTURES:
        return PICTURES[name](lambda task, model: chosen(rows, study, task, model), study, path)
    tasks = [task for task in study.tasks if any(chosen(rows, study, task, m) for m in study.settings)]
    columns = min(3, len(tasks))
    figure, panels = new_figure(columns, rows=-(-len(tasks) // columns), width=3.6, height=2.7)
    percent = study.unit == "%"
    for panel, task in zip(panels, tasks):
        end = study.training_of(task)["steps"]
        for model in study.settings:
            curves = [_curve(row, end, study.unit) for row in chosen(rows, study, task, model)]
            if not curves:
                continue
            steps = sorted({step for curve in curves for step in curve})
            # A run that has reached its goal stays there.
            values = np.array(
                [[curve[max(s for s in curve if s <= step)] for step in steps] for curve in curves]
            )
            colour, dashes = _look(model)
            panel.plot(steps, values.mean(0), dashes, color=colour, label=TITLES[model], linewidth=1.5)
            panel.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        last = study.tasks[task](task).scores[-1]
        panel.set(title=f"{task}, {last}", xlim=(0, end), xlabel="steps")
        panel.set(ylabel="right, %", ylim=(-3, 103)) if percent else panel.set(ylabel="nats per token")
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    handles = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return save_figure(figure, path)


def _look(model: str) -> tuple[str, str]:
    """Colour, that of its kind in all pictures, and dashes."""
    suffix = next((suffix for suffix in DASHES if model.endswith(suffix)), "")
    kind = {"attention": "transformer"}.get(model, model).removesuffix(suffix)
    return model_looks([kind])[kind]["color"], DASHES.get(suffix, "-")


def _curve(row: dict, end: int, unit: str) -> dict[int, float]:
    """The last score by step; right answers start at none."""
    points = {step: list(scores.values())[-1] for step, _, scores in row["curve"]}
    if unit == "%":
        points = {0: 0.0} | {step: 100 * share for step, share in points.items()}
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
        draw(name, rows[name], study, pictures / f"evidence_{name}.png")
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
