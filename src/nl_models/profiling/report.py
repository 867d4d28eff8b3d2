"""Measurements as a table, a plot and JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from nl_kernels.version import __version__
from nl_models.files import write_json
from nl_models.profiling.measure import Measurement
from nl_models.training.plots import COLOURS, MARKERS, compact_number, context_label, new_figure, save_figure

FORMAT = "nl-models-profile-1"
_TITLES = {"prefill": "Prefill", "training": "Training step", "decode": "Decode"}


def describe_machine(device: str) -> dict[str, object]:
    """What the figures depend on besides the code."""
    processor = platform.processor() or platform.machine()
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.exists():
        for line in cpu_information.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nl_kernels": __version__,
    }


def save_profile(
    path: Path,
    measurements: Sequence[Measurement],
    *,
    settings: Mapping[str, object],
    machine: Mapping[str, object],
) -> None:
    """Write the measurements and all they depend on as JSON."""
    write_json(
        path,
        {
            "format": FORMAT,
            "machine": dict(machine),
            "settings": dict(settings),
            "measurements": [measurement.to_dict() for measurement in measurements],
        },
    )


def load_profile(path: Path) -> tuple[list[Measurement], dict]:
    """Measurements and settings of a file written by :func:`save_profile`.

    Raises:
        ValueError: the file is not one.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return [Measurement(**values) for values in content["measurements"]], content["settings"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a profile ({error})") from error


def profile_table(measurements: Sequence[Measurement]) -> Table:
    """A row per measurement, the models below one another, so that any number has room; memory in MiB."""
    table = Table(
        box=None,
        title="Speed and memory against context length",
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for what in ("tokens/s", "peak MiB", "state MiB"):
        table.add_column(what, justify="right", no_wrap=True)
    shown = None
    for mode in _in_order(m.mode for m in measurements):
        for m in sorted((m for m in measurements if m.mode == mode), key=lambda m: m.context):
            place = (m.mode, m.context)
            table.add_row(
                "" if shown and shown[0] == mode else mode,
                "" if shown == place else f"{m.context:,}",
                m.model,
                _rate(m),
                _size(m.peak_bytes),
                _size(m.state_bytes),
            )
            shown = place
    return table


def plot_profile(measurements: Sequence[Measurement], path: Path, *, title: str) -> Path:
    """Throughput above, memory below, a column per mode; all axes logarithmic."""
    models = _in_order(m.model for m in measurements)
    modes = [mode for mode in _TITLES if any(m.mode == mode for m in measurements)]
    figure, axes = new_figure(len(modes), rows=2, width=4.4, height=3.2)
    for column, mode in enumerate(modes):
        speed, memory = axes[column], axes[len(modes) + column]
        for colour, marker, model in zip(COLOURS, MARKERS, models):
            points = sorted(
                (m for m in measurements if (m.model, m.mode, m.status) == (model, mode, "ok")),
                key=lambda m: m.context,
            )
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.6, "label": model}
            contexts = [m.context for m in points]
            speed.plot(contexts, [m.tokens_per_second for m in points], **style)
            # While decoding, what counts is what a conversation keeps.
            bytes_ = [m.state_bytes if mode == "decode" else m.peak_bytes for m in points]
            memory.plot(contexts, [max(b or 0, 2**10) / 2**20 for b in bytes_], **style)
        speed.set_title(_TITLES[mode], loc="left", fontsize=11)
        speed.set_ylabel("tokens per second")
        memory.set_ylabel(
            "state (MiB)" if mode == "decode" else "peak memory above the model's (MiB)", fontsize=9
        )
        memory.set_xlabel("context (tokens)")
        for axis in (speed, memory):
            axis.set_xscale("log", base=2 if mode != "decode" else 10)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(compact_number))
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_formatter(FuncFormatter(context_label))
            _give_room(axis)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return save_figure(figure, path)


def _give_room(axis) -> None:
    """At least a decade on the y axis, so that noise on a flat line does not look like a trend."""
    low, high = axis.get_ylim()
    if high / low < 10:
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))


def _in_order(values) -> list:
    return list(dict.fromkeys(values))


def _rate(measurement: Measurement) -> str:
    if measurement.status != "ok":
        return measurement.status.split(":")[0]
    return f"{measurement.tokens_per_second:,.0f}"


def _size(count: int | None) -> str:
    """Bytes in MiB."""
    if count is None:
        return "–"
    mebibytes = count / 2**20
    return f"{mebibytes:,.0f}" if mebibytes >= 100 else f"{mebibytes:.2f}"
