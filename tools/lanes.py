"""The tests that touch a dependency, with its oldest and newest supported version: ``python -m tools.lanes``.

Each lane is the locked environment with a few packages replaced, in ``.venv-lanes/NAME``. Names after the
command choose lanes; ``--report`` never fails, so that the newest transformers can be watched in every run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from tools.environment import LOCKED, ROOT, InstallError, make

FOLDER = ROOT / ".venv-lanes"
OLDEST_TRANSFORMERS = "5.6.0"
# PyPI has builds for CUDA alone, of gigabytes; they run on CPUs.
NEWEST_TORCH = ("torch==2.15.0", "triton==3.9.0")
MODELS = (
    *(f"tests/nl_models/{part}" for part in ("hope", "surgery", "continual", "layers", "data", "training")),
    "tests/nl_models/test_train.py",
    "tests/test_readme.py",
)
# What uses other tools where they are installed.
ECOSYSTEM = (
    "tests/test_ecosystem.py",
    "tests/nl_models/evaluation/test_harness.py",
    "tests/nl_models/test_remote_code.py",
    "tests/nl_models/surgery/test_convert_mlp.py",
    "tests/nl_models/surgery/test_parts.py",
    "tests/nl_models/continual/test_learner.py",
)
KERNELS = tuple(
    f"tests/nl_kernels/{part}"
    for part in (
        "triton_support",
        "ops/delta_memory",
        "ops/deep_memory/test_step_interpreter.py",
        "ops/deep_memory/test_aot.py",
        "ops/self_modifying/test_step_interpreter.py",
        "ops/self_modifying/test_aot.py",
        "ops/continuum/test_interpreter.py",
        "ops/continuum/test_aot.py",
        "ops/newton_schulz",
    )
)


@dataclass(frozen=True)
class Lane:
    """Packages in the place of the lock's, and what is then run: one process for each marker expression."""

    name: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    markers: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Of one lane; ``problem`` where it could not be made or run to its end."""

    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def good(self) -> bool:
        return not self.failed and not self.problem and self.passed > 0


def lanes(newest: str) -> dict[str, Lane]:
    """By name.

    A GPU machine has torch 2.11 with Triton 3.6.0. Of that pair only Triton is tried here, beside the locked
    torch.
    """
    models = ("not interpreter and not aot and not compiled",)
    chosen = (
        Lane("oldest-transformers", (f"transformers=={OLDEST_TRANSFORMERS}",), MODELS, models),
        Lane("newest-transformers", (f"transformers=={newest}",), MODELS, models),
        # Triton 3.6's interpreter fails with numpy 2.4.
        Lane("ecosystem", ("peft==0.21.2", "trl==1.16.0", "lm-eval==0.4.13"), ECOSYSTEM, models),
        Lane("triton-3.6", ("triton==3.6.0", "numpy<2.4"), KERNELS, ("interpreter", "aot")),
        Lane("newest-torch", NEWEST_TORCH, MODELS + KERNELS, (*models, "interpreter", "aot")),
    )
    return {lane.name: lane for lane in chosen}


def newest_transformers() -> str:
    """The newest that setup.py allows and the registry has for this Python."""
    asked = re.search(r'"(transformers>=[^"]+)"', (ROOT / "setup.py").read_text()).group(1)
    command = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-"]
    found = subprocess.run(
        [sys.executable, "-m", "pip", *command, asked], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(found[found.index("{") :])["install"][0]["metadata"]["version"]


def locked_transformers() -> str:
    """The lock's version: that of the environment which runs this."""
    return importlib.metadata.version("transformers")


def run(lane: Lane, workers: str) -> Result:
    """Make the lane's environment and run its tests there; their output is shown as it comes."""
    # Held: another torch, or a Triton that is not the lane's, would be another lane.
    held = [line for line in (ROOT / "constraints.in").read_text().splitlines() if re.match(r"\w", line)]
    held = [line for line in held if not any(p.startswith(line.split("=")[0]) for p in lane.packages)]
    try:
        python = make(FOLDER / lane.name, (*LOCKED, (*held, *lane.packages)))
    except InstallError as error:
        return Result(problem=f"cannot be installed here ({error})")
    passed, skipped, failed = 0, 0, []
    for marker in lane.markers:
        report = FOLDER / f"{lane.name}.xml"
        report.unlink(missing_ok=True)
        command = [python, "-m", "pytest", "-q", "--no-header", "-m", marker, f"--junitxml={report}"]
        command += ["-n", workers, "--dist", "worksteal", "-p", "no:cacheprovider", *lane.tests]
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        triton = {"TRITON_INTERPRET": "1"} if marker == "interpreter" else {}
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads, **triton}).returncode
        if not report.exists() or status not in (0, 1):
            return Result(passed, skipped, tuple(failed), f"pytest ended with status {status}")
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = {child.tag for child in case}
            if outcome & {"failure", "error"}:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
            elif "skipped" in outcome:
                skipped += 1
            else:
                passed += 1
    return Result(passed, skipped, tuple(failed))


def describe(lane: Lane, result: Result, seconds: float) -> str:
    """A line for a lane, and one for each test that failed."""
    counts = (
        f"{result.passed} passed, {len(result.failed)} failed, {result.skipped} skipped in {seconds:.0f} s"
    )
    verdict = "ok" if result.good else "FAILED"
    why = f": {result.problem}" if result.problem else ""
    lines = [f"lane {lane.name} ({', '.join(lane.packages)}): {verdict}, {counts}{why}"]
    return "\n".join([*lines, *(f"    {name}" for name in result.failed)])


def report_newest(newest: str, result: Result) -> str:
    """What the newest transformers means for this package, in a line that can be looked for."""
    if result.good:
        return f"newest transformers {newest} passes: {result.passed} tests"
    if result.problem:
        return f"newest transformers {newest} was not tried to the end: {result.problem}"
    names = "".join(f"\n    {name}" for name in result.failed)
    return f"newest transformers {newest} breaks, of {len(result.failed) + result.passed} tests:{names}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.lanes", description=__doc__)
    parser.add_argument("lanes", nargs="*", help="names of lanes; none: all")
    parser.add_argument("--report", action="store_true", help="the newest transformers only; always succeeds")
    parser.add_argument("--workers", default="2", help="tests at a time")
    given = parser.parse_args(arguments)
    try:
        newest = newest_transformers()
    except (subprocess.CalledProcessError, ValueError, LookupError) as error:
        print(f"newest transformers: not found on a registry ({error})")
        if given.report:
            return 0
        newest = locked_transformers()
    if given.report:
        if newest == locked_transformers():
            print(f"newest transformers {newest} is the locked version, which 'make test' has tested")
            return 0
        print(report_newest(newest, run(lanes(newest)["newest-transformers"], given.workers)), flush=True)
        return 0
    chosen = lanes(newest)
    for name in given.lanes:
        if name not in chosen:
            parser.error(f"no lane {name!r}; there are {', '.join(chosen)}")
    summaries, good = [], True
    for name in given.lanes or chosen:
        began = time.monotonic()
        result = run(chosen[name], given.workers)
        summaries.append(describe(chosen[name], result, time.monotonic() - began))
        good = good and result.good
    print("\n".join(["", *summaries]), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
