"""Losses by position as a table, a plot and JSON."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from nl_models.evaluation.generation import ConversationLosses, GenerationLosses
from nl_models.evaluation.position import PositionBucket, PositionLosses, standard_error
from nl_models.files import write_json
from nl_models.plots import COLOURS, MARKERS, context_label, new_figure, save_figure

FORMAT = "nl-models-position-1"
POSITION_HEADER = ("position", "carried", "fresh", "writes off", "carried − fresh")
_GENERATION_HEADER = ("written", "judge", "4-grams distinct")
_CONVERSATION_HEADER = ("turns", "reads: carried", "fresh", "writes: judge", "4-grams distinct")


def position_rows(buckets: Sequence[PositionBucket]) -> list[list[str]]:
    """A row of text for each bucket, under :data:`POSITION_HEADER`."""
    return [
        [
            _range(b.start, b.stop),
            _nats(b.carried),
            _nats(b.fresh),
            _nats(b.writes_off),
            _with_error(b.difference, b.standard_error, sign="+"),
        ]
        for b in buckets
    ]


def position_table(losses: PositionLosses, *, title: str = "Loss by position") -> Table:
    """A row per bucket, at most 80 columns wide; notes below."""
    table = _table(f"{title} (nats per token)", POSITION_HEADER, position_rows(losses.buckets()))
    about = (
        f"carried: one state from the first token on; fresh: a new one every {losses.window:,} tokens; "
        "writes off: that, with rates of 0. ±: standard error over "
        f"{len(losses.starts)} rotations of the text."
    )
    table.caption = "\n".join([about, *losses.notes])
    return table


def generation_table(losses: GenerationLosses) -> Table:
    """A row per bucket of what was written."""
    rows = [
        [_range(b.start, b.stop), _with_error(b.judge, b.standard_error), _share(b.distinct)]
        for b in losses.buckets()
    ]
    table = _table("What it writes, by position (nats per token)", _GENERATION_HEADER, rows)
    table.caption = (
        f"judge: the same model with a new state every {losses.window:,} tokens. A text that repeats itself "
        "pleases it; the share of distinct 4-grams in a window shows that."
    )
    return table


def conversation_table(losses: ConversationLosses) -> Table:
    """A row for turns 1, 2, 3–4, 5–8, …"""
    rows = [
        [
            f"{b.first:,}" if b.first == b.last else f"{b.first:,}–{b.last:,}",
            _nats(b.read_carried),
            _nats(b.read_fresh),
            _nats(b.judge),
            _share(b.distinct),
        ]
        for b in losses.buckets()
    ]
    return _table("A conversation, by turn (nats per token)", _CONVERSATION_HEADER, rows)


def save_position(
    path: Path,
    *,
    about: Mapping[str, object],
    position: PositionLosses | None = None,
    generation: GenerationLosses | None = None,
    conversation: ConversationLosses | None = None,
) -> None:
    """Write what was measured, and ``about`` what and where, as JSON."""
    measured = {"position": position, "generation": generation, "conversation": conversation}
    write_json(
        path,
        {
            "format": FORMAT,
            **about,
            **{name: losses.to_dict() for name, losses in measured.items() if losses is not None},
        },
    )


def plot_position(losses: PositionLosses, path: Path, *, title: str) -> Path:
    """The three losses against position (logarithmic), with standard errors over streams as bands."""
    figure, (axis,) = new_figure()
    curves = {
        "state carried": losses.carried,
        f"fresh state every {losses.window:,} tokens": losses.fresh,
        "writes off": losses.writes_off,
    }
    edges = _curve_edges(losses.window, losses.length)
    lines = zip(COLOURS, MARKERS, ("-", "--", ":"), curves.items())
    for colour, marker, line, (label, values) in lines:
        if values is None:
            continue
        places, means, errors = [], [], []
        for start, stop in itertools.pairwise(edges):
            if stop <= values.shape[1]:
                streams = values[:, start:stop].double().mean(1)
                places.append((max(start, edges[1] / 2) * stop) ** 0.5)
                means.append(streams.mean().item())
                errors.append(standard_error(streams) or 0.0)
        axis.plot(
            places,
            means,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            linestyle=line,
            label=label,
        )
        low, high = ([m + sign * e for m, e in zip(means, errors)] for sign in (-1, 1))
        axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axvline(losses.window, color="#888888", linewidth=0.8)
    axis.annotate(
        "training window", (losses.window, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
        textcoords="offset points", va="top", fontsize=8, color="#666666",
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axis.xaxis.set_major_formatter(FuncFormatter(context_label))
    axis.xaxis.set_minor_formatter(NullFormatter())
    _give_room(axis)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("position: tokens read (bands: standard error over rotations of the text)")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_generation(losses: GenerationLosses, path: Path, *, title: str) -> Path:
    """The judge's loss and the share of distinct 4-grams, window by window of what was written."""
    figure, (above, below) = new_figure(rows=2, height=2.7)
    starts = list(range(0, losses.tokens.shape[1], losses.window))
    stops = [min(start + losses.window, losses.tokens.shape[1]) for start in starts]
    judged = [losses.judge[:, start:stop].double().mean(1) for start, stop in zip(starts, stops)]
    means = [streams.mean().item() for streams in judged]
    errors = [standard_error(streams) or 0.0 for streams in judged]
    above.plot(stops, means, color=COLOURS[0], marker=MARKERS[0], markersize=4, linewidth=1.6)
    low, high = ([m + sign * e for m, e in zip(means, errors)] for sign in (-1, 1))
    above.fill_between(stops, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    above.set_ylabel("judge (nats per token)")
    _give_room(above)
    shares = [losses.between(start, stop).distinct for start, stop in zip(starts, stops)]
    full = [(stop, share) for stop, share in zip(stops, shares) if share is not None]
    below.plot(
        [stop for stop, _ in full], [share for _, share in full], color=COLOURS[1], marker=MARKERS[1],
        markersize=4, linewidth=1.6,
    )  # fmt: skip
    below.set_ylim(0, 1.05)
    below.set_ylabel("distinct 4-grams")
    below.set_xlabel("tokens written (band: standard error over samples)")
    above.set_title(title, loc="left", fontsize=11)
    return save_figure(figure, path)


def _curve_edges(window: int, length: int) -> list[int]:
    """Half octaves from an eighth of the window on; the window is one of them."""
    edges, step = [0], -6
    while (edge := round(window * 2 ** (step / 2))) < length:
        if edge > edges[-1]:
            edges.append(edge)
        step += 1
    return [*edges, length]


def _give_room(axis) -> None:
    """At least 0.2 nats on the y axis, so that noise on a flat line does not look like a trend."""
    low, high = axis.get_ylim()
    if high - low < 0.2:
        axis.set_ylim((low + high) / 2 - 0.1, (low + high) / 2 + 0.1)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        box=None,
        title=title,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _range(start: int, stop: int) -> str:
    return f"{start:,}–{stop:,}"


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_error(value: float | None, error: float | None, *, sign: str = "-") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
