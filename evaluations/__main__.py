"""Run studies, and make the tables and pictures of docs/evidence.md from their rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from evaluations.report import score, write_report
from evaluations.studies import QUICK, STUDIES
from evaluations.study import (
    RESULTS,
    ROOT,
    DataNotInstalledError,
    Run,
    Study,
    TimeLeft,
    append,
    perform,
    read_rows,
    remaining,
    total,
)
from nl_models.console import Display, duration

console = Console()
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=f"Studies: {', '.join(STUDIES)}. 'all': every one, then the report.")
def main(
    what: Annotated[str, typer.Argument(metavar="TASK", help="A study, 'all', or 'report'.")],
    only: Annotated[list[str] | None, typer.Option(help="Tasks of the study; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Models of the study; repeatable.")] = None,
    setting: Annotated[int | None, typer.Option(help="One of a model's settings alone, from 0.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: minutes, and less is true.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so long.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Folder of the rows, STUDY.jsonl.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Train small models on tasks with published scores, and compare.

    Each run appends a row to a JSONL file. Runs whose rows exist are skipped, so a study that was stopped
    goes on where it was. 'report' writes tables and pictures from the rows.
    """
    studies = QUICK if quick else STUDIES
    if what not in (*studies, "all", "report"):
        _refuse("TASK", [what], [*studies, "all", "report"])
    rows = rows or (ROOT / "runs/evidence_quick" if quick else RESULTS)
    torch.set_num_threads(threads)
    left = TimeLeft(minutes)
    if what != "report":
        for study in studies.values() if what == "all" else [studies[what]]:
            if setting is not None:
                study = _alone(study, setting)
            _run(study, rows / f"{study.name}.jsonl", only, model, left)
    if what in ("all", "report"):
        for path in write_report(rows, quick=quick):
            console.print(f"written: {path}", highlight=False)


def _alone(study: Study, setting: int) -> Study:
    count = max(map(len, study.settings.values()))
    if not 0 <= setting < count:
        raise typer.BadParameter(f"expected 0 to {count - 1}, got {setting}", param_hint="--setting")
    return dataclasses.replace(
        study, settings={n: [s[min(setting, len(s) - 1)]] for n, s in study.settings.items()}
    )


def _run(study: Study, path: Path, only: list[str] | None, models: list[str] | None, left: TimeLeft) -> None:
    tasks, models = only or list(study.tasks), models or list(study.settings)
    _refuse("--only", set(tasks) - study.tasks.keys(), study.tasks)
    _refuse("--model", set(models) - study.settings.keys(), study.settings)
    tasks = [task for task in tasks if _there(study, task)]
    try:
        found = read_rows(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rows") from error
    count, began = total(study, tasks, models), len(found)
    for run in remaining(found, study, tasks, models):
        if left.over:
            console.print("time is up; the same command goes on from here", highlight=False)
            return
        row = _perform(study, run)
        append(path, row)
        found.append(row)
        left.done += 1
        scores = "  ".join(f"{name} {score([row], name, study.unit)}" for name in row["scores"])
        behind = left.minutes(count - (len(found) - began))
        console.print(f"  {scores}  in {row['steps']} steps, {duration(row['seconds'])}", highlight=False)
        console.print(f"  {study.name}: at most {duration(60 * behind)} left", highlight=False)
    console.print(f"{study.name}: {count} runs are there", highlight=False)


def _there(study: Study, task: str) -> bool:
    """Whether a task's data are installed; says what is skipped."""
    try:
        study.require(task)
    except DataNotInstalledError as error:
        console.print(f"{study.name}, {task}: skipped; {error}", highlight=False)
        return False
    return True


def _perform(study: Study, run: Run) -> dict:
    label = f"{run.task} {run.model} seed {run.seed}"
    steps = study.training_of(run.task)["steps"]
    with Display(console, total=steps, label=label) as display:
        return perform(
            study,
            run,
            lambda _, loss, tokens: display.advance(1, f"loss {loss:.3f}", tokens=tokens),
        )


def _refuse(name: str, unknown, known) -> None:
    if unknown:
        raise typer.BadParameter(
            f"expected of {', '.join(known)}, got {', '.join(sorted(unknown))}", param_hint=name
        )


if __name__ == "__main__":
    app(prog_name="python -m evaluations")
