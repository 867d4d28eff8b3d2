"""What is compared, and what is recorded of it: cases, providers, rows, headlines.

A *case* is one question at one size (``delta_memory`` against attention at T = 2048). A *provider* answers
it: one way to do that work, prepared on the case's inputs. All providers of a case are timed in one process,
turn by turn, so that whatever else the machine does hits all of them alike; ratios are what to read.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    Budget,
    Ceilings,
    Timing,
    Unavailable,
    Work,
    peak_memory_cpu,
    peak_memory_cuda,
    time_interleaved,
)

SCHEMA = 1
MODES = ("forward", "forward+backward", "step")
COMPILED = "torch.compile of eager"
ROLES = ("ours", "variant", "peer", "baseline")
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash-linear-attention",
    "fla-core",
    "titans-pytorch",
    "nested-learning",
)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a case, prepared on the case's inputs.

    Attributes:
        run: does the work once; returns a tuple of tensors whose first is the output ``[B, T, …]``.
        role: ``"ours"`` (what a user gets by default), ``"variant"`` (another implementation of ours),
            ``"peer"`` (another project) or ``"baseline"`` (another method with the same purpose).
        comparable: computes the same function as ours from the same inputs, so that its outputs must have the
            same dtypes and shapes and its error against fp64 is measured.
        headline: may be the "fastest other". False for providers that do less than ours; ``note`` says what.
        note: a difference that a reader must know, one sentence.
        state_bytes: size of the state carried from token to token, for ``mode="step"``.
        work: declared work where it is another than the case's (another method has its own count).
    """

    run: Callable[[], tuple[torch.Tensor, ...]]
    role: str = "ours"
    comparable: bool = False
    headline: bool = True
    note: str = ""
    state_bytes: int | None = None
    work: Work | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: expected one of {ROLES}, got {self.role!r}")


Factories = Mapping[str, Callable[[], Provider]]


@dataclass(frozen=True)
class Case:
    """One question at one size.

    Attributes:
        op: folder name of the op.
        name: what is compared, e.g. ``"causal attention"``.
        mode: one of :data:`MODES`.
        shape: sizes by name; ``B`` and ``T`` (tokens of one run) are always there.
        providers: ``(case, device) -> {provider name: factory}``; a factory makes the inputs (the same random
            ones for everybody) and returns a :class:`Provider`, or raises :class:`Unavailable`.
        work: declared work of one run of ours, held against peers too.
        reference: ``(case, tokens) -> [B, tokens, …]``: the first output tokens in fp64, or None.
        dtype: of inputs and outputs.
        memory: measure peak memory too.
        quick: part of ``--quick``.
        devices: where the case makes sense.
    """

    op: str
    name: str
    mode: str
    shape: Mapping[str, int]
    providers: Callable[[Case, torch.device], Factories]
    work: Work | None = None
    reference: Callable[[Case, int], torch.Tensor] | None = None
    dtype: torch.dtype = torch.float32
    memory: bool = False
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {self.mode!r}")
        if missing := {"B", "T"} - set(self.shape):
            raise ValueError(f"shape: needs {sorted(missing)}, got {dict(self.shape)}")

    @property
    def tokens(self) -> int:
        """Tokens of one run, over the batch."""
        return self.shape["B"] * self.shape["T"]

    @property
    def title(self) -> str:
        """Unique within a run."""
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.op}: {self.name}, {self.mode}, {dtype_name(self.dtype)}, {sizes}"

    def with_tokens(self, tokens: int) -> Case:
        """The same case at another length."""
        return replace(self, shape={**self.shape, "T": tokens})


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """‖output − reference‖ / ‖reference‖ over the tokens that the reference has, in fp64."""
    got = output.detach()[:, : reference.shape[1]].double().cpu()
    reference = reference.double().cpu()
    return float((got - reference).norm() / reference.norm().clamp_min(1e-300))


def check_same_outputs(outputs: Mapping[str, tuple[torch.Tensor, ...]]) -> None:
    """Comparable providers must return the same dtypes and shapes, all finite.

    Raises:
        ValueError: naming the provider and the difference.
    """
    first = None
    for name, tensors in outputs.items():
        described = [(dtype_name(t.dtype), tuple(t.shape)) for t in tensors]
        if first is None:
            first = (name, described)
        elif described != first[1]:
            raise ValueError(f"{name} returns {described}, but {first[0]} returns {first[1]}")
        for position, tensor in enumerate(tensors):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: result {position} is not finite")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """Short commit id, with ``+dirty`` when tracked sources differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # Results are appended while this runs, so they do not count as a change.
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of what was measured, as far as installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment(device: torch.device) -> dict[str, Any]:
    """The part of a row that all rows of a run share."""
    now = time.gmtime()
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        "git": git_revision(),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": package_versions(),
    }


def make_row(
    case: Case,
    name: str,
    provider: Provider,
    timing: Timing,
    *,
    first_s: float,
    shared: Mapping[str, Any],
    ceilings: Ceilings,
    peak_bytes: int | None,
    error: float | None,
) -> dict[str, Any]:
    """One JSON line: seconds, bytes and rates in SI units; None where a figure does not apply.

    ``compile_s`` is what the first run took above the median: compilation, lazy loading, first-touch.
    """
    work = provider.work or case.work
    return {
        **shared,
        "op": case.op,
        "case": case.name,
        "mode": case.mode,
        "shape": dict(case.shape),
        "dtype": dtype_name(case.dtype),
        "provider": name,
        "role": provider.role,
        "headline": provider.headline,
        "note": provider.note,
        "median_s": timing.median,
        "p20_s": timing.quantile(0.2),
        "p80_s": timing.quantile(0.8),
        "n": len(timing.samples),
        "us_per_token": timing.median / case.tokens * 1e6,
        "compile_s": max(0.0, first_s - timing.median),
        "peak_bytes": peak_bytes,
        "state_bytes": provider.state_bytes,
        "tflops": work and work.flops / timing.median / 1e12,
        "gbps": work and work.bytes / timing.median / 1e9,
        "ceiling_percent": work and ceilings.percent(work, timing.median),
        "copy_gbps": ceilings.copy / 1e9,
        "matmul_tflops": ceilings.matmul / 1e12,
        "error_vs_fp64": error,
    }


@dataclass(frozen=True)
class CaseResult:
    """Rows of one case, and the providers that could not run with the reason."""

    rows: list[dict[str, Any]]
    skipped: dict[str, str]


def run_case(
    case: Case,
    device: torch.device,
    *,
    shared: Mapping[str, Any],
    ceilings: Ceilings,
    budget: Budget,
    measure_memory: bool = True,
    compiled: bool = False,
    reference_tokens: int = 128,
) -> CaseResult:
    """Build, check and measure every provider of ``case``.

    A provider that cannot run is left out with its reason; one of ours that fails is an error. Compiled
    providers take minutes to build on a CPU, so they run only with ``compiled``.

    Raises:
        ValueError: comparable providers disagree on dtypes or shapes, or return values that are not finite.
    """
    providers: dict[str, Provider] = {}
    outputs: dict[str, tuple[torch.Tensor, ...]] = {}
    first: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, factory in case.providers(case, device).items():
        if name == COMPILED and not compiled:
            continue
        try:
            provider = factory()
            start = time.perf_counter()
            result = provider.run()
            first[name] = time.perf_counter() - start
        except Unavailable as reason:
            skipped[name] = str(reason)
            continue
        except Exception as error:
            # What is not ours may fail in any way: no reason to lose the other figures.
            if name.startswith("nl_kernels"):
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        providers[name] = provider
        if provider.comparable:
            outputs[name] = tuple(tensor.detach() for tensor in result)
    check_same_outputs(outputs)
    errors: dict[str, float] = {}
    if case.reference is not None and outputs:
        expected = case.reference(case, min(case.shape["T"], reference_tokens))
        errors = {name: relative_error(tensors[0], expected) for name, tensors in outputs.items()}
    outputs.clear()
    timings = time_interleaved({name: p.run for name, p in providers.items()}, device, budget)
    rows = []
    for name, provider in providers.items():
        peak = None
        if case.memory and measure_memory:
            try:
                if device.type == "cuda":
                    peak = peak_memory_cuda(provider.run)
                else:
                    peak = peak_memory_cpu(case, name, torch.get_num_threads())
            except Unavailable as reason:
                skipped[f"{name} (memory)"] = str(reason)
        rows.append(
            make_row(
                case,
                name,
                provider,
                timings[name],
                first_s=first[name],
                shared=shared,
                ceilings=ceilings,
                peak_bytes=peak,
                error=errors.get(name),
            )
        )
    return CaseResult(rows, skipped)


@dataclass(frozen=True)
class Headline:
    """Ours against the fastest other of the same case and run. Ratios above 1 are in our favour."""

    ours: Mapping[str, Any]
    other: Mapping[str, Any]

    @property
    def speedup(self) -> float:
        return self.other["median_s"] / self.ours["median_s"]

    @property
    def memory_ratio(self) -> float | None:
        if not self.ours["peak_bytes"] or not self.other["peak_bytes"]:
            return None
        return self.other["peak_bytes"] / self.ours["peak_bytes"]


def headline(rows: Iterable[Mapping[str, Any]]) -> Headline | None:
    """The headline of one case: None without a row of ours or without another provider to compare with."""
    rows = list(rows)
    ours = [row for row in rows if row["role"] == "ours"]
    others = [row for row in rows if row["role"] != "ours" and row["headline"]]
    if not ours or not others:
        return None
    return Headline(*(min(group, key=lambda row: row["median_s"]) for group in (ours, others)))
