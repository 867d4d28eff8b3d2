"""A series of measurements over modes, contexts and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nl_models.profiling.measure import MODES, Measurement, Work
from nl_models.profiling.process import measure_alone, without_figures
from nl_models.profiling.subjects import LayerAlone, Source


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure and how; those that are not here are of :class:`Work`.

    Attributes:
        modes: of :data:`MODES`; by default all but learning.
        lengths: contexts of prefill, training and learning, tokens.
        decode_after: contexts after which to decode, tokens.
        batches: how many sequences at a time, one after the other.
        time_limit: seconds for one measurement; the longer contexts of that model, mode and batch are then
            left out.
        trace: file for a trace of the first model in the first mode at the shortest context and first batch.
    """

    modes: tuple[str, ...] = MODES[:3]
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    decode_after: tuple[int, ...] = (1, 1_000, 10_000, 100_000)
    batches: tuple[int, ...] = (1,)
    segment: int = 2048
    decode_tokens: int = 32
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    enough_seconds: float = 2.0
    time_limit: float = 300.0
    trace: str | None = None

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            raise ValueError(f"modes: expected some of {MODES}, got {self.modes}")
        for name in ("lengths", "decode_after"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}: expected positive numbers of tokens, got {values}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches: expected positive numbers of sequences, got {self.batches}")
        if {"training", "learning"} & {*self.modes} and min(self.lengths) < 2:
            raise ValueError(f"lengths: what has a loss needs at least 2 tokens, got {min(self.lengths)}")
        for name in ("segment", "decode_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.time_limit <= 0:
            raise ValueError(f"time_limit: expected a positive number of seconds, got {self.time_limit}")


def profile_models(
    models: Mapping[str, Source],
    settings: ProfileSettings,
    *,
    report: Callable[[int, int, Measurement], None] = lambda done, total, measurement: None,
) -> list[Measurement]:
    """Measure every model in every mode at every context, each in a process of its own.

    Args:
        models: by name, what each is made of.
        settings: see there.
        report: called after each measurement with how many of how many are done.

    Raises:
        ValueError: a layer alone in mode learning: it has no loss of its own.
    """
    layers = [name for name, source in models.items() if isinstance(source, LayerAlone)]
    if "learning" in settings.modes and layers:
        raise ValueError(f"modes: learning is of language models, and {layers[0]} is a layer alone")
    plan = _plan(models, settings)
    results: list[Measurement] = []
    given_up: set[tuple[str, str, int]] = set()
    for done, work in enumerate(plan, start=1):
        series = (work.name, work.mode, work.batch)
        if series in given_up:
            result = without_figures(work, "left out: a shorter context failed")
        else:
            result = measure_alone(work, time_limit=settings.time_limit)
            if result.status != "ok":
                given_up.add(series)
        results.append(result)
        report(done, len(plan), result)
    return results


def _plan(models: Mapping[str, Source], settings: ProfileSettings) -> Sequence[Work]:
    own = {field.name for field in dataclasses.fields(settings)} - {"trace"}
    shared = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(Work) if field.name in own
    }
    plan = [
        Work(name=name, source=source, mode=mode, context=context, batch=batch, **shared)
        for mode in settings.modes
        for batch in sorted(set(settings.batches))
        for context in sorted(set(settings.decode_after if mode == "decode" else settings.lengths))
        for name, source in models.items()
    ]
    return [dataclasses.replace(plan[0], trace=settings.trace), *plan[1:]]
