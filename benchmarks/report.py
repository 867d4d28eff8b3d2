"""How a figure is written: the same units in the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.harness import Headline, headline

Row = Mapping[str, Any]


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent; nothing for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def times(ratio: float) -> str:
    """Two significant digits or all before the point: ``3.0×``, ``0.25×``, ``120×``."""
    return f"{ratio:.{max(0, 1 - math.floor(math.log10(ratio)))}f}×"


def shape_text(shape: Mapping[str, int]) -> str:
    """``T=512, D=64``: sizes, without a batch of one."""
    return ", ".join(f"{key}={value}" for key, value in shape.items() if (key, value) != ("B", 1))


def fastest_of_ours(rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with."""
    return min((row for row in rows if row["role"] == "ours"), key=lambda row: row["median_s"], default=None)


def table_of_case(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines of one case, fastest provider first, without the columns that nothing fills."""
    ours = fastest_of_ours(rows)

    def cells(row: Row) -> dict[str, str]:
        scale = row["us_per_token"] / row["median_s"]
        error = row["error_vs_fp64"]
        return {
            "provider": row["provider"],
            "µs/token": significant(row["us_per_token"]),
            "p20–p80": f"{significant(row['p20_s'] * scale)}–{significant(row['p80_s'] * scale)}",
            "time, ours = 1": "" if ours is None else significant(row["median_s"] / ours["median_s"]),
            "peak MB": significant(row["peak_bytes"] and row["peak_bytes"] / 1e6),
            "state KB": significant(row["state_bytes"] and row["state_bytes"] / 1e3),
            "TFLOP/s": significant(row["tflops"], 2),
            "% of ceiling": significant(row["ceiling_percent"], 2),
            "error": "" if error is None else f"{error:.1e}",
            "first run, s more": significant(row["compile_s"], 2) if row["compile_s"] >= 1 else "",
        }

    lines = [cells(row) for row in sorted(rows, key=lambda row: row["median_s"])]
    header = tuple(name for name in lines[0] if any(line[name] for line in lines))
    return header, [tuple(line[name] for name in header) for line in lines]


def case_table(title: str, rows: Sequence[Row]) -> Table:
    """One case for the terminal."""
    header, lines = table_of_case(rows)
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name == "provider" else "right")
    for line in lines:
        table.add_row(*line)
    return table


def headline_line(title: str, line: Headline) -> str:
    """One line for the terminal: who is how much faster, and both peaks of memory."""
    memory = ""
    if line.memory_ratio is not None:
        memory = f"; {_megabytes(line.ours)} MB against {_megabytes(line.other)}"
    microseconds = significant(line.ours["us_per_token"])
    return (
        f"{title}: {microseconds} µs/token, [bold]{times(line.speedup)}[/bold] as fast as "
        f"{line.other['provider']}{memory}"
    )


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A GitHub Markdown table, the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def markdown_headlines(cases: Sequence[Sequence[Row]]) -> str:
    """Ours against the fastest other, one line a case."""
    body = []
    for line in filter(None, map(headline, cases)):
        ours, other = line.ours, line.other
        memory = ""
        if line.memory_ratio is not None:
            memory = f"{_megabytes(ours)} / {_megabytes(other)}"
        elif ours["state_bytes"] and other["state_bytes"]:
            memory = (
                f"state {significant(ours['state_bytes'] / 1e6)} / {significant(other['state_bytes'] / 1e6)}"
            )
        body.append(
            (
                f"`{ours['op']}`: {ours['case']}, {ours['mode']}, {shape_text(ours['shape'])}",
                significant(ours["us_per_token"]),
                f"{significant(other['us_per_token'])} ({other['provider']})",
                f"**{times(line.speedup)}**",
                memory,
            )
        )
    header = ("case", "ours, µs/token", "fastest other, µs/token", "as fast", "peak MB, ours / other")
    return markdown_table(header, body)


def markdown_cases(cases: Sequence[Sequence[Row]]) -> str:
    """Every figure: one table a case, with the notes that its providers carry."""
    parts = []
    for rows in cases:
        first = rows[0]
        what = f"{first['mode']}, {first['dtype']}, {shape_text(first['shape'])}"
        parts.append(f"**`{first['op']}`: {first['case']}**, {what}")
        parts.append(markdown_table(*table_of_case(rows)))
        notes = [f"- {row['provider']}: {row['note']}" for row in rows if row["note"]]
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _megabytes(row: Row) -> str:
    return significant(row["peak_bytes"] / 1e6)
