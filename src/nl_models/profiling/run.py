"""A series of measurements over modes, contexts and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nl_models.profiling.measure import MODES, Measurement, Work
from nl_models.profiling.process import measure_alone


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure and how; the fields below ``decode_after`` are those of :class:`Work`.

    Attributes:
        modes: of :data:`MODES`.
        lengths: contexts of prefill and training, tokens.
        decode_after: contexts after which to decode, tokens.
        time_limit: seconds for one measurement; the longer contexts of that model and mode are then left out.
    """

    modes: tuple[str, ...] = MODES
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    decode_after: tuple[int, ...] = (1, 1_000, 10_000, 100_000)
    segment: int = 2048
    decode_tokens: int = 32
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    enough_seconds: float = 2.0
    time_limit: float = 300.0

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            raise ValueError(f"modes: expected some of {MODES}, got {self.modes}")
        for name in ("lengths", "decode_after"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}: expected positive numbers of tokens, got {values}")
        if "training" in self.modes and min(self.lengths) < 2:
            raise ValueError(f"lengths: training needs at least 2 tokens, got {min(self.lengths)}")
        for name in ("segment", "decode_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.time_limit <= 0:
            raise ValueError(f"time_limit: expected a positive number of seconds, got {self.time_limit}")


def profile_models(
    models: Mapping[str, dict],
    settings: ProfileSettings,
    *,
    report: Callable[[int, int, Measurement], None] = lambda done, total, measurement: None,
) -> list[Measurement]:
    """Measure every model in every mode at every context, each in a process of its own.

    Args:
        models: name → arguments of :class:`nl_models.HopeConfig`.
        settings: see there.
        report: called after each measurement with how many of how many are done.
    """
    plan = _plan(models, settings)
    results: list[Measurement] = []
    given_up: set[tuple[str, str]] = set()
    for done, work in enumerate(plan, start=1):
        if (work.name, work.mode) in given_up:
            result = Measurement(work.name, work.mode, work.context, "left out: a shorter context failed")
        else:
            result = measure_alone(work, time_limit=settings.time_limit)
            if result.status != "ok":
                given_up.add((work.name, work.mode))
        results.append(result)
        report(done, len(plan), result)
    return results


def _plan(models: Mapping[str, dict], settings: ProfileSettings) -> Sequence[Work]:
    shared = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(Work)
        if field.name not in ("name", "config", "mode", "context")
    }
    return [
        Work(name=name, config=config, mode=mode, context=context, **shared)
        for mode in settings.modes
        for context in sorted(set(settings.decode_after if mode == "decode" else settings.lengths))
        for name, config in models.items()
    ]
