"""``python -m tools.kernel_report``: compile every kernel for every target, without a GPU.

Prints registers, spills, shared memory and matrix instructions of each, and fails if a kernel does not
compile, exceeds its target's shared or tensor memory, or computes a product without matrix instructions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nl_kernels.triton_support.targets import TARGETS, TENSOR_MEMORY
from tools.ahead_of_time import compile_call
from tools.catalogue import CatalogueEntry, collect_catalogue
from tools.kernel_resources import Resources, resources_of

_FILE_WIDTH = 180  # of a table in a file or pipe


@dataclass(frozen=True)
class Row:
    """One kernel for one target: its resources, or why it did not compile."""

    op: str
    kernel: str
    variant: str
    target: str
    tiles: str
    warps: int
    stages: int
    resources: Resources | None
    problems: tuple[str, ...]


def compile_catalogue(targets: Iterable[str], words: Iterable[str]) -> Iterator[Row]:
    """Rows of all entries whose description contains every one of ``words``."""
    words = list(words)
    for target in targets:
        for entry in collect_catalogue(target):
            description = f"{entry.op} {entry.kernel} {entry.variant}"
            if all(word in description for word in words):
                yield _compile(entry, target)


def _compile(entry: CatalogueEntry, target: str) -> Row:
    constants = entry.call.constants
    resources, problems = None, []
    try:
        resources = resources_of(compile_call(entry.call, target))
    except Exception as error:  # whatever a compiler stage throws is a row of the report, not its end
        problems.append(f"does not compile: {type(error).__name__}: {error}")
    else:
        limit = TARGETS[target].shared_memory
        if resources.shared_bytes > limit:
            problems.append(f"needs {resources.shared_bytes} of {limit} bytes of shared memory")
        if resources.tensor_memory > TENSOR_MEMORY:
            problems.append(f"needs {resources.tensor_memory} of {TENSOR_MEMORY} columns of tensor memory")
        if resources.scalar_products:
            problems.append(f"{resources.scalar_products} products without matrix instructions")
    return Row(
        op=entry.op,
        kernel=entry.kernel,
        variant=entry.variant,
        target=target,
        tiles=" ".join(f"{n[-1]}{constants[n]}" for n in sorted(constants) if n.startswith("BLOCK_")),
        warps=entry.call.num_warps,
        stages=entry.call.num_stages,
        resources=resources,
        problems=tuple(problems),
    )


def table_of(target: str, rows: Iterable[Row]) -> Table:
    """One target's report for a terminal."""
    table = Table(title=f"{target}: {TARGETS[target].shared_memory // 1024} KiB of shared memory")
    for heading in ("op", "kernel", "variant", "tiles"):
        table.add_column(heading)
    for heading in ("registers", "spill B", "shared KiB", "products", "matrix instructions"):
        table.add_column(heading, justify="right")
    table.add_column("problems", style="red")
    for row in rows:
        cells = [row.op, row.kernel, row.variant, f"{row.tiles} w{row.warps} s{row.stages}"]
        if row.resources is None:
            cells += [""] * 5
        else:
            found = row.resources
            cells += [
                str(found.registers),
                f"[yellow]{found.spill_bytes}[/]" if found.spill_bytes else "0",
                f"{found.shared_bytes / 1024:.0f}",
                str(found.products),
                " ".join(f"{count} {name}" for name, count in found.tensor_core.items()),
            ]
        table.add_row(*cells, "; ".join(row.problems))
    return table


def main(
    words: Annotated[
        list[str] | None, typer.Argument(help="Only entries that contain all of these, e.g. bfloat16 128x128")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TARGETS)}; all if absent")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file")] = None,
) -> None:
    """Compile every kernel for every target without a GPU and print what it takes of one."""
    for name in target or ():
        if name not in TARGETS:
            raise typer.BadParameter(
                f"expected one of {', '.join(TARGETS)}, got {name}", param_hint="--target"
            )
    console = Console()
    rows = []
    with console.status("compiling") as status:
        for row in compile_catalogue(target or TARGETS, words or ()):
            rows.append(row)
            status.update(f"{len(rows)} compiled, last {row.target} {row.kernel} {row.variant}")
    if not rows:
        raise typer.BadParameter(f"no kernel matches {words}", param_hint="words")
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for name in dict.fromkeys(row.target for row in rows):
        console.print(table_of(name, (row for row in rows if row.target == name)))
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    failed = sum(bool(row.problems) for row in rows)
    console.print(f"{len(rows)} kernels, {failed} with problems")
    raise typer.Exit(code=1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
