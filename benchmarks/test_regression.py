"""The regression gate: ``pytest benchmarks``.

Every quick CPU case of ours is timed turn by turn with a fixed matrix product. What is held against the
record in ``limits.json`` is the ratio of the two, which a faster or a busier machine changes little;
absolute times are not compared. After a change that is meant to be slower or faster: ``pytest benchmarks
--record-limits``.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Case, Provider
from benchmarks.measure import random_tensors
from benchmarks.run import op_names, select_cases

LIMITS = Path(__file__).with_name("limits.json")
ROUNDS = 12
#: Processors differ in how small and large products compare, and noise comes on top.
TOLERANCE = 1.8


def guarded() -> list:
    """The providers of ours in the quick cases for the CPU."""
    return [
        pytest.param(case, name, id=f"{case.title}: {name}")
        for case in select_cases(op_names(), "cpu", quick=True)
        for name in case.providers(case, torch.device("cpu"))
        if name.startswith("nl_kernels") and "reference" not in name
    ]


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def yardstick():
    """A matrix product of random numbers, some 5 ms long."""
    made = random_tensors(0, {"a": (1024, 256), "b": (256, 1024)}, torch.device("cpu"), torch.float32)
    return lambda: made["a"] @ made["b"]


@pytest.mark.parametrize(("case", "name"), guarded())
def test_time_relative_to_a_matrix_product(case: Case, name: str, benchmark, yardstick, request):
    provider: Provider = case.providers(case, torch.device("cpu"))[name]()
    provider.run()
    yardstick()
    # Both samples equally long, so that what else the machine does falls on both.
    repeats = max(1, round(seconds_of(provider.run) / seconds_of(yardstick)))
    runs = max(1, round(seconds_of(yardstick) / seconds_of(provider.run)))
    yardsticks = []

    def time_yardstick():
        yardsticks.append(seconds_of(lambda: [yardstick() for _ in range(repeats)]) / repeats)

    benchmark.pedantic(lambda: [provider.run() for _ in range(runs)], setup=time_yardstick, rounds=ROUNDS)
    ratio = benchmark.stats.stats.median / runs / statistics.median(yardsticks)
    benchmark.extra_info.update(ratio=ratio)
    key = f"{case.title}: {name}"
    limits = json.loads(LIMITS.read_text(encoding="utf-8")) if LIMITS.exists() else {}
    if request.config.getoption("--record-limits"):
        limits[key] = float(f"{ratio:.3g}")
        text = json.dumps(limits, indent=2, sort_keys=True, ensure_ascii=False)
        LIMITS.write_text(text + "\n", encoding="utf-8")
        return
    assert key in limits, f"no record: run pytest benchmarks --record-limits and commit {LIMITS.name}"
    assert ratio <= TOLERANCE * limits[key], (
        f"{ratio:.2f} times the matrix product, where {limits[key]:.2f} is on record: "
        f"{ratio / limits[key]:.2f} times as slow"
    )
