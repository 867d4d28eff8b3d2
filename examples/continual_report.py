"""What the example of continual learning shows: tables on the terminal, two figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table

from nl_models.plots import COLOURS, MARKERS, compact_number, new_figure, save_figure

STAYS = 0.03
"""How much the old may rise, in nats, for a setting to be one in which it stays."""

Setting = list[dict]
"""The records of one setting of one reader, one for each stream."""


def settings_of(records: Sequence[dict]) -> dict[str, list[Setting]]:
    """Records by reader and setting, in the order in which they come."""
    found: dict[str, dict[tuple, Setting]] = {}
    for record in records:
        found.setdefault(record["reader"], {}).setdefault(tuple(record["rates"]), []).append(record)
    return {reader: list(settings.values()) for reader, settings in found.items()}


def after(setting: Setting, key: str) -> float:
    """The mean over streams of a loss; of one along the stream, at its end."""
    values = (record[key] for record in setting)
    return mean(value[-1] if isinstance(value, list) else value for value in values)


def least_rise(settings: Sequence[Setting], frozen: Setting, new: str, gain: float) -> float | None:
    """The least rise of the old's held-out loss with which a reader's loss ``new`` falls by ``gain``.

    Between two settings that follow one another, the frozen model before the first, it is taken to lie on the
    line; ``None`` where no setting falls that far.
    """
    start = (0.0, 0.0)
    points = [
        (after(frozen, new) - after(s, new), after(s, "prose") - after(frozen, "prose")) for s in settings
    ]
    found = [rise for fall, rise in points if fall >= gain]
    for (fall, rise), (next_fall, next_rise) in itertools.pairwise([start, *points]):
        if min(fall, next_fall) < gain <= max(fall, next_fall):
            found.append(rise + (next_rise - rise) * (gain - fall) / (next_fall - fall))
    return min(found, default=None)


def rates_of(setting: Setting) -> str:
    """The rates of a setting's levels, fast to slow."""
    shortened = (f"{rate:.0e}".replace("e-0", "e-") if rate else "0" for rate in setting[0]["rates"])
    return " ".join(shortened)


def report(records: Sequence[dict], console: Console) -> None:
    """Every setting, and the readers at equal gain."""
    readers = settings_of(records)
    (frozen,) = readers.pop("frozen")
    table = Table(
        title="nats per token, mean over streams",
        title_justify="left",
        caption="new: source code as it is read; held out, afterwards; read next; read last, after prose. "
        "old: prose held out, afterwards; held out, in the middle of the levels' chunks; read next.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("reader", no_wrap=True)
    for kind, losses in (("rates", ""), ("new", "read"), ("new", "held"), ("old", "held"), ("old", "mid")):
        table.add_column(f"{kind}\n{losses}", justify="right", no_wrap=True)
    for kind, losses in (("old", "next"), ("new", "next"), ("new", "last")):
        table.add_column(f"{kind}\n{losses}", justify="right", no_wrap=True)
    keys = ("as_read", "code", "prose", "middle_prose", "next_prose", "next_code", "returned_code")
    table.add_row("frozen", "–", *(f"{after(frozen, key):.3f}" for key in keys), end_section=True)
    for reader, settings in readers.items():
        for setting in settings:
            losses = (f"{after(setting, key):.3f}" for key in keys)
            table.add_row(reader, rates_of(setting), *losses, end_section=setting is settings[-1])
            reader = ""
    console.print(table)
    for new, text in (("as_read", "as it is read"), ("code", "held out, afterwards")):
        largest = max(after(frozen, new) - after(s, new) for settings in readers.values() for s in settings)
        gains = [largest * share for share in (0.25, 0.5, 0.75, 0.95)]
        title = f"rise of the old where the new, {text}, falls by"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))
        table.add_column("reader")
        for gain in gains:
            table.add_column(f"{gain:.3f}", justify="right")
        for reader, settings in readers.items():
            rises = (least_rise(settings, frozen, new, gain) for gain in gains)
            table.add_row(reader, *("–" if rise is None else f"{rise:+.3f}" for rise in rises))
        console.print(table)


def looks(readers: Mapping[str, object]) -> dict[str, dict]:
    """Of every reader, how its line looks."""
    return {
        reader: {"color": colour, "marker": marker, "markersize": 5, "label": reader}
        for reader, colour, marker in zip(readers, COLOURS, MARKERS)
    }


def plot_exchange(records: Sequence[dict], path: Path) -> None:
    """The old against the new, a line for each reader, a point for each setting; streams are faint."""
    readers = settings_of(records)
    (frozen,) = readers.pop("frozen")
    figure, axes = new_figure(3, width=4.6, height=4.2)
    panels = (
        ("as_read", "prose", "learning while reading", "new: as it is read", "old: held out"),
        ("code", "prose", "what stays in the weights", "new: held out", "old: held out"),
        ("next_code", "next_prose", "both read on after the stream", "new: read next", "old: read next"),
    )
    for axis, (new, old, title, x, y) in zip(axes, panels, strict=True):
        axis.plot(
            after(frozen, new), after(frozen, old),
            marker="*", markersize=11, color="#888888", linestyle="", label="frozen",
        )  # fmt: skip
        for reader, look in looks(readers).items():
            points = [(after(s, new), after(s, old)) for s in readers[reader]]
            axis.plot(*zip(*points, strict=True), **look)
            for record in (record for setting in readers[reader] for record in setting):
                values = (
                    record[key][-1] if isinstance(record[key], list) else record[key] for key in (new, old)
                )
                axis.plot(*values, marker=".", markersize=3, alpha=0.35, color=look["color"])
        keep_readable(axis, after(frozen, old))
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel(f"{x}, nats per token")
        axis.set_ylabel(f"{y}, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def keep_readable(axis: Axes, frozen: float) -> None:
    """A setting that falls apart would leave nothing to see of the others: the axis ends before it."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, min(high, frozen + 0.35))


def plot_streams(records: Sequence[dict], path: Path) -> None:
    """Held-out losses along the stream, of each reader's setting that reads best while the old stays."""
    readers = settings_of(records)
    (frozen,) = readers.pop("frozen")
    figure, axes = new_figure(2, width=5.4, height=4.2)
    for axis, key, title in zip(axes, ("code", "prose"), ("new: source code", "old: prose"), strict=True):
        axis.axhline(after(frozen, key), color="#888888", linestyle="--", linewidth=1.2, label="frozen")
        for reader, look in looks(readers).items():
            allowed = after(frozen, "prose") + STAYS
            staying = [s for s in readers[reader] if after(s, "prose") <= allowed] or readers[reader][:1]
            setting = min(staying, key=lambda s: after(s, "as_read"))
            losses = [mean(values) for values in zip(*(r[key] for r in setting), strict=True)]
            axis.plot(setting[0]["tokens"], losses, **{**look, "label": f"{reader}, η {rates_of(setting)}"})
        axis.set_title(f"{title}, held out", loc="left", fontsize=11)
        axis.set_xlabel("tokens of source code read")
        axis.set_ylabel("nats per token")
        axis.xaxis.set_major_formatter(compact_number)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
