"""Measurements as a table, a plot and JSON."""

from __future__ import annotations

import itertools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from nl_kernels.version import __version__
from nl_models.files import write_json
from nl_models.plots import compact_number, context_label, model_looks, new_figure, save_figure
from nl_models.profiling.flops import Moves
from nl_models.profiling.measure import Measurement
from nl_models.profiling.process import OVER_TIME

FORMAT = "nl-models-profile-1"
_TITLES = {"prefill": "Prefill", "training": "Training step", "decode": "Decode", "learning": "Learning"}


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
        return [_measurement(values) for values in content["measurements"]], content["settings"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a profile ({error})") from error


def _measurement(values: Mapping[str, object]) -> Measurement:
    quartiles, moved = values.get("quartiles"), values.get("moved")  # which older files do not have
    return Measurement(
        **{
            **values,
            "quartiles": None if quartiles is None else tuple(quartiles),
            "moved": None if moved is None else Moves(*moved),
        }
    )


def profile_table(
    measurements: Sequence[Measurement],
    flops_ceiling: float | None = None,
    bytes_ceiling: float | None = None,
) -> Table:
    """A row per measurement, the models below one another, so that any number has room; memory in MiB.

    Args:
        measurements: of any modes, which are headings.
        flops_ceiling, bytes_ceiling: FLOP/s and bytes/s of the machine, for the share that was reached.
    """
    table = Table(
        box=None,
        title="Speed and memory (MiB) against context length",
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    several = any(m.batch > 1 for m in measurements)
    table.add_column("batch × context" if several else "context", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    for what in ("tokens/s", "±%", "peak", "state", "TFLOP/s", "%", "GB/s", "%", "calls"):
        table.add_column(what, justify="right", no_wrap=True)
    for mode in _in_order(m.mode for m in measurements):
        table.add_row(f"[bold]{mode}[/]")
        shown = None
        for m in sorted((m for m in measurements if m.mode == mode), key=lambda m: (m.batch, m.context)):
            place = f"{m.batch} × {context_label(m.context)}" if several else context_label(m.context)
            table.add_row(
                "" if shown == place else place,
                m.model,
                _rate(m),
                _spread(m),
                _size(m.peak_bytes),
                _size(m.state_bytes),
                *_reached(m.flops_per_second, 1e12, flops_ceiling),
                *_reached(m.bytes_per_second, 1e9, bytes_ceiling),
                "–" if m.moved is None else compact_number(m.moved.calls),
            )
            shown = place
    return table


@dataclass(frozen=True)
class Crossing:
    """Where a model begins to be faster than the baseline.

    Attributes:
        model, mode, batch: of what.
        context: tokens, between two measured contexts on straight lines between the logarithms; 0: it is
            faster at every context measured; infinite: at none.
        longest: the longest context that both were measured at.
    """

    model: str
    mode: str
    batch: int
    context: float
    longest: int

    def describe(self, baseline: str) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        where = f"{_TITLES[self.mode]}{batch}:"
        if self.context == 0:
            return f"{where} {self.model} is faster than {baseline} at every context"
        if self.context == math.inf:
            return (
                f"{where} {baseline} is faster than {self.model} up to {context_label(self.longest)} tokens"
            )
        return f"{where} {self.model} is faster than {baseline} from {compact_number(self.context)} tokens on"


def find_crossings(measurements: Sequence[Measurement], baseline: str) -> list[Crossing]:
    """For each other model, mode and batch that has figures at the contexts of the baseline."""
    speeds: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for m in measurements:
        if m.status == "ok":
            series = speeds.setdefault((m.mode, m.batch), {}).setdefault(m.model, {})
            series[m.context] = m.tokens_per_second
    found = []
    for (mode, batch), models in speeds.items():
        for model, ours in models.items():
            theirs = models.get(baseline, {})
            shared = sorted(ours.keys() & theirs.keys())
            if model != baseline and shared:
                gains = [math.log(ours[context] / theirs[context]) for context in shared]
                found.append(Crossing(model, mode, batch, _crossing(shared, gains), shared[-1]))
    return found


def _crossing(contexts: Sequence[int], gains: Sequence[float]) -> float:
    """Where the gains begin to be positive up to the last."""
    slower = [i for i, gain in enumerate(gains) if gain <= 0]
    if not slower:
        return 0
    last = slower[-1]
    if last == len(gains) - 1:
        return math.inf
    share = gains[last] / (gains[last] - gains[last + 1])
    return contexts[last] * (contexts[last + 1] / contexts[last]) ** share


def plot_profile(
    measurements: Sequence[Measurement], path: Path, *, title: str, baseline: str | None = None
) -> Path:
    """Throughput above, memory below, a column per mode that has figures; all axes logarithmic.

    Batches have lines of their own. A dotted line stands where a model begins to be faster than ``baseline``.
    """
    models = model_looks(_in_order(m.model for m in measurements))
    modes = [mode for mode in _TITLES if any((m.mode, m.status) == (mode, "ok") for m in measurements)]
    crossings = [] if baseline is None else find_crossings(measurements, baseline)
    batches = sorted({m.batch for m in measurements})
    figure, axes = new_figure(len(modes), rows=2, width=4.4, height=3.2)
    for column, mode in enumerate(modes):
        speed, memory = axes[column], axes[len(modes) + column]
        for (model, look), (batch, line) in itertools.product(
            models.items(), zip(batches, itertools.cycle(("-", "--", ":", "-.")))
        ):
            points = sorted(
                (
                    m
                    for m in measurements
                    if (m.model, m.mode, m.batch, m.status) == (model, mode, batch, "ok")
                ),
                key=lambda m: m.context,
            )
            label = f"{model}, batch {batch}" if len(batches) > 1 else model
            style = {**look, "linestyle": line, "markersize": 4.5, "linewidth": 1.6, "label": label}
            contexts = [m.context for m in points]
            speed.plot(contexts, [m.tokens_per_second for m in points], **style)
            # While decoding, what counts is what a conversation keeps.
            bytes_ = [m.state_bytes if mode == "decode" else m.peak_bytes for m in points]
            memory.plot(contexts, [max(b or 0, 2**10) / 2**20 for b in bytes_], **style)
        for crossing in crossings:
            if crossing.mode == mode and 0 < crossing.context < math.inf:
                speed.axvline(crossing.context, linestyle=":", color=models[crossing.model]["color"])
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
        return {OVER_TIME: "time limit"}.get(measurement.status, measurement.status.split(":")[0])
    return f"{measurement.tokens_per_second:,.0f}"


def _spread(measurement: Measurement) -> str:
    """Half of what lies between the quartiles, in percent of the median."""
    if measurement.quartiles is None or measurement.repeats < 2:
        return "–"
    low, high = measurement.quartiles
    return f"{50 * (high - low) / measurement.seconds:.0f}"


def _reached(rate: float | None, unit: float, ceiling: float | None) -> tuple[str, str]:
    """A rate in units of it, and in percent of what the machine does at best."""
    if rate is None:
        return "–", "–"
    return f"{rate / unit:.3g}", "–" if ceiling is None else f"{100 * rate / ceiling:.0f}"


def _size(count: int | None) -> str:
    """Bytes in MiB."""
    if count is None:
        return "–"
    mebibytes = count / 2**20
    return f"{mebibytes:,.0f}" if mebibytes >= 100 else f"{mebibytes:.2f}"
