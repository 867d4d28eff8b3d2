"""How a figure is written: the same units in the terminal, in Markdown and in plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.harness import Headline, headline

COLUMNS = (
    "provider",
    "µs/token",
    "p20–p80",
    "n",
    "ours is",
    "peak MB",
    "state KB",
    "% of ceiling",
    "error",
    "first run",
)
Row = Mapping[str, Any]


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent; ``–`` for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def shape_text(shape: Mapping[str, int]) -> str:
    """``T=512, D=64``: sizes, without a batch of one."""
    return ", ".join(f"{key}={value}" for key, value in shape.items() if (key, value) != ("B", 1))


def times(ratio: float | None) -> str:
    """``3.2×``."""
    return "–" if ratio is None else f"{significant(ratio, 2 if ratio < 10 else 3)}×"


def cells(row: Row, ours: Row | None) -> tuple[str, ...]:
    """One row of a table in the order of :data:`COLUMNS`."""
    scale = row["us_per_token"] / row["median_s"]
    return (
        row["provider"],
        significant(row["us_per_token"]),
        f"{significant(row['p20_s'] * scale)}–{significant(row['p80_s'] * scale)}",
        str(row["n"]),
        "" if ours is None or ours is row else f"{times(row['median_s'] / ours['median_s'])} as fast",
        significant(row["peak_bytes"] and row["peak_bytes"] / 1e6),
        significant(row["state_bytes"] and row["state_bytes"] / 1e3),
        significant(row["ceiling_percent"], 2),
        "–" if row["error_vs_fp64"] is None else f"{row['error_vs_fp64']:.1e}",
        f"{significant(row['compile_s'], 2)} s" if row["compile_s"] >= 0.1 else "",
    )


def fastest_of_ours(rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with."""
    return min((row for row in rows if row["role"] == "ours"), key=lambda row: row["median_s"], default=None)


def case_table(title: str, rows: Sequence[Row]) -> Table:
    """All providers of one case, fastest first, for the terminal."""
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "provider" else "right")
    ours = fastest_of_ours(rows)
    for row in sorted(rows, key=lambda row: row["median_s"]):
        table.add_row(*cells(row, ours), style="bold" if row["role"] == "ours" else None)
    return table


def headline_line(title: str, line: Headline) -> str:
    """One line for the terminal: who is how much faster, and how much smaller."""
    memory = ""
    if line.memory_ratio is not None:
        memory = f" and {times(line.memory_ratio)} less memory"
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
    for rows in cases:
        line = headline(rows)
        if line is None:
            continue
        ours, other = line.ours, line.other
        memory = "–"
        if line.memory_ratio is not None:
            memory = (
                f"{significant(ours['peak_bytes'] / 1e6)} / {significant(other['peak_bytes'] / 1e6)} MB "
                f"({times(line.memory_ratio)} less)"
            )
        body.append(
            (
                f"`{ours['op']}`, {shape_text(ours['shape'])}, {ours['mode']}",
                f"{significant(ours['us_per_token'])}",
                f"{significant(other['us_per_token'])} ({other['provider']})",
                f"**{times(line.speedup)}**",
                memory,
            )
        )
    header = ("case", "ours, µs/token", "fastest other, µs/token", "faster by", "peak memory, ours / other")
    return markdown_table(header, body)


def markdown_cases(cases: Sequence[Sequence[Row]]) -> str:
    """Every figure: one table a case, with the notes that its providers carry."""
    parts = []
    for rows in cases:
        first = rows[0]
        what = f"{first['mode']}, {first['dtype']}, {shape_text(first['shape'])}"
        parts.append(f"**`{first['op']}`: {first['case']}**, {what}")
        ours = fastest_of_ours(rows)
        ordered = sorted(rows, key=lambda row: row["median_s"])
        parts.append(markdown_table(COLUMNS, [cells(row, ours) for row in ordered]))
        notes = [f"- {row['provider']}: {row['note']}" for row in ordered if row["note"]]
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join(parts)
