"""Make the tables, the CSV and the plots from the recorded rows: ``python -m benchmarks.tables``.

The JSONL file is the record and only ever grows; everything here is derived from it and may be thrown away.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness import SCHEMA, headline
from benchmarks.report import Row, markdown_cases, markdown_headlines, shape_text, times
from benchmarks.run import load_cases, op_names
from nl_models.files import write_bytes
from nl_models.plots import save_figure

MARKER = re.compile(
    r"(<!-- benchmarks:(?P<kind>headlines|cases) ?(?P<op>\w*) -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL
)
RENDERERS = {"headlines": markdown_headlines, "cases": markdown_cases}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file, oldest first.

    Raises:
        ValueError: a line is no JSON object of this schema; the message names the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number}: expected a row of schema {SCHEMA}")
        rows.append(row)
    return rows


def case_key(row: Row) -> tuple:
    """What makes two rows answers to the same question."""
    sizes = tuple(sorted(row["shape"].items()))
    return (row["device_name"], row["threads"], row["op"], row["case"], row["mode"], row["dtype"], sizes)


def latest_cases(rows: Iterable[Row]) -> list[list[Row]]:
    """For every case the rows of the last run that holds it, in the order of first appearance.

    Rows of different runs are never mixed: only what ran side by side can be compared.
    """
    grouped: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[case_key(row)][row["date"]].append(row)
    return [runs[max(runs)] for runs in grouped.values()]


def still_asked(cases: Iterable[list[Row]]) -> list[list[Row]]:
    """Those that the benchmarks still measure; others stay in the record alone."""
    ops = op_names()
    asked = {
        (
            case.op,
            case.name,
            case.mode,
            str(case.dtype).removeprefix("torch."),
            tuple(sorted(case.shape.items())),
        )
        for op in ops
        for case in load_cases(op)
    }
    return [rows for rows in cases if rows[0]["op"] not in ops or case_key(rows[0])[2:] in asked]


def provenance(cases: Sequence[Sequence[Row]]) -> str:
    """One sentence a run: device, threads, versions, commit, date."""
    runs = {}
    for rows in cases:
        row = rows[0]
        threads = "" if row["threads"] is None else f", {row['threads']} thread{'s' * (row['threads'] > 1)}"
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        runs[row["date"]] = (
            f"*{row['device_name']}{threads}; {versions}; "
            f"commit `{row['git'] or 'unknown'}`, {row['date'][:10]}; "
            f"ceilings: copy {row['copy_gbps']:.1f} GB/s, matrix product {row['matmul_tflops']:.3f} TFLOP/s.*"
        )
    return "\n".join(runs[date] for date in sorted(runs))


def fill_markers(text: str, cases: Sequence[Sequence[Row]]) -> str:
    """Fill the Markdown between ``<!-- benchmarks:headlines [op] -->`` (or ``cases``) and ``benchmarks:end``.

    Raises:
        ValueError: there is no such pair of markers.
    """

    def fill(match: re.Match[str]) -> str:
        op = match["op"]
        chosen = [rows for rows in cases if op in ("", rows[0]["op"])]
        body = RENDERERS[match["kind"]](chosen)
        return f"{match[1]}\n{body}\n\n{provenance(chosen)}\n\n{match[4]}"

    filled, count = MARKER.subn(fill, text)
    if not count:
        raise ValueError("no <!-- benchmarks:headlines --> … <!-- benchmarks:end --> markers")
    return filled


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, one column a field; dictionaries become text."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        flat = {**row, "shape": shape_text(row["shape"]), "versions": json.dumps(row["versions"])}
        writer.writerow(flat)
    write_bytes(path, file.getvalue().encode())


def plot_scaling(folder: Path, cases: Sequence[Sequence[Row]]) -> list[Path]:
    """Time (and peak memory, where measured) against the number of tokens, one PNG for each comparison.

    Comparisons with fewer than three lengths show no trend and are left to the tables.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    families: dict[tuple, list[Row]] = defaultdict(list)
    for rows in cases:
        for row in rows:
            others = {name: size for name, size in row["shape"].items() if name != "T"}
            families[row["device"], row["op"], row["case"], row["mode"], shape_text(others)].append(row)
    written = []
    for (device, op, case, mode, sizes), rows in families.items():
        if len({row["shape"]["T"] for row in rows}) < 3:
            continue
        panels = [("us_per_token", 1.0, "µs per token")]
        if any(row["peak_bytes"] for row in rows):
            panels.append(("peak_bytes", 1e-6, "peak memory above inputs, MB"))
        figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
        for axis, (field, unit, label) in zip(axes[0], panels):
            for provider in dict.fromkeys(row["provider"] for row in rows):
                points = sorted(
                    (row["shape"]["T"], row[field] * unit, row["role"])
                    for row in rows
                    if row["provider"] == provider and row[field]
                )
                if points:
                    lengths, values, roles = zip(*points)
                    width = 2.4 if roles[0] == "ours" else 1.2
                    axis.plot(lengths, values, marker="o", markersize=4, linewidth=width, label=provider)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted({row["shape"]["T"] for row in rows}))
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set_xlabel("tokens")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0][0].legend(fontsize=8)
        figure.suptitle(f"{op}: {case}, {mode}, {sizes}", fontsize=10)
        figure.tight_layout()
        name = re.sub(r"[^a-z0-9]+", "-", f"{device}-{op}-{case}-{mode}-{sizes}".lower()).strip("-")
        path = folder / f"{name}.png"
        save_figure(figure, path)
        pyplot.close(figure)
        written.append(path)
    return written


def plot_headlines(folder: Path, cases: Sequence[Sequence[Row]]) -> list[Path]:
    """How many times as fast as the fastest other, one bar a case; one PNG for each kind of device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for device in sorted({rows[0]["device"] for rows in cases}):
        lines = [line for rows in cases if rows[0]["device"] == device and (line := headline(rows))][::-1]
        if not lines:
            continue
        labels = [
            f"{line.ours['op']}: {line.ours['case']}, {line.ours['mode']}, {shape_text(line.ours['shape'])}\n"
            f"against {line.other['provider']}"
            for line in lines
        ]
        speedups = [line.speedup for line in lines]
        figure, axis = pyplot.subplots(figsize=(9, 1 + 0.42 * len(lines)))
        bars = axis.barh(labels, speedups, color=["tab:blue" if s >= 1 else "tab:red" for s in speedups])
        axis.bar_label(bars, [times(s) for s in speedups], padding=3, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.18, y=0.01)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel("times as fast as the fastest other")
        figure.tight_layout()
        path = folder / f"{device}-headlines.png"
        save_figure(figure, path)
        pyplot.close(figure)
        written.append(path)
    return written


def main(
    results: Annotated[
        list[Path], typer.Argument(help="JSONL files of benchmarks.run.", exists=True, dir_okay=False)
    ],
    write: Annotated[
        list[Path] | None,
        typer.Option(help="Markdown file to fill between its markers; may be repeated.", exists=True),
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all rows as CSV.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for PNG plots against the number of tokens.")
    ] = None,
) -> None:
    """Print the headline table of the latest run of every case; write CSV, plots and Markdown on request."""
    try:
        rows = [row for path in results for row in read_rows(path)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RESULTS") from None
    if not rows:
        raise typer.BadParameter("no rows", param_hint="RESULTS")
    cases = still_asked(latest_cases(rows))
    typer.echo(markdown_headlines(cases))
    for path in write or []:
        try:
            filled = fill_markers(path.read_text(encoding="utf-8"), cases)
        except ValueError as error:
            raise typer.BadParameter(f"{path}: {error}", param_hint="--write") from None
        write_bytes(path, filled.encode())
        typer.echo(f"filled {path}")
    if csv_file is not None:
        csv_file.parent.mkdir(parents=True, exist_ok=True)
        write_csv(csv_file, rows)
        typer.echo(f"wrote {csv_file}")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for path in (*plot_headlines(plots, cases), *plot_scaling(plots, cases)):
            typer.echo(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
