"""The instruments: interleaved timing, peak memory, and the ceilings of the device."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.harness import Case

WARM_TOKENS = 64
LONG = 1.0


class Unavailable(Exception):
    """A provider cannot run here; the message says why (and how to get it)."""


@dataclass(frozen=True)
class Work:
    """Declared work of one run: the method's own products and traffic, not what an implementation adds.

    Attributes:
        flops: floating-point operations (a multiply-add counts two).
        bytes: bytes that must cross memory at least once: inputs, outputs and their gradients.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Budget:
    """How long to measure one provider: ``samples`` runs, fewer (never under ``least``) past ``seconds``."""

    samples: int = 15
    least: int = 3
    seconds: float = 3.0


@dataclass
class Timing:
    """Seconds of one run, every sample."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, fraction: float) -> float:
        """Linear interpolation between order statistics."""
        ordered = sorted(self.samples)
        position = fraction * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def random_tensors(
    seed: int, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Standard normal tensors, the same on every device and for every provider; never zeros."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        for name, shape in shapes.items()
    }


def _timer(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """A function that runs something ``inner`` times and returns the seconds of one run."""
    if device.type != "cuda":

        def on_cpu(run: Callable[[], Any], inner: int) -> float:
            start = time.perf_counter()
            for _ in range(inner):
                run()
            return (time.perf_counter() - start) / inner

        return on_cpu

    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def on_cuda(run: Callable[[], Any], inner: int) -> float:
        flush.zero_()  # the inputs must come from memory, not from the cache of the run before
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / inner

    return on_cuda


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, budget: Budget
) -> dict[str, Timing]:
    """Time all ``runs`` turn by turn, in a new random order every round.

    One run of each comes first, which counts only if it takes over a second. Runs of less than 10 ms are
    repeated within a sample. A provider whose budget is spent leaves the rounds; the others go on.
    """
    timer = _timer(device)
    timings = {name: Timing() for name in runs}
    inner = {}
    for name, run in runs.items():
        warm = timer(run, 1)
        if warm > LONG:
            timings[name].samples.append(warm)
        inner[name] = min(1000, max(1, math.ceil(10e-3 / max(warm, 1e-7))))
    order, spent = list(runs), dict.fromkeys(runs, 0.0)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        while order:
            shuffle(order)
            for name in order:
                seconds = timer(runs[name], inner[name])
                timings[name].samples.append(seconds)
                spent[name] += seconds * inner[name]
            order = [
                name
                for name in order
                if (n := len(timings[name].samples)) < budget.least
                or (n < budget.samples and spent[name] < budget.seconds)
            ]
    finally:
        if collecting:
            gc.enable()
    return timings


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Unavailable("this kernel does not report VmHWM")


def _peak_of_one_run(case: Case, name: str, threads: int, pipe: Any) -> None:
    """Body of the fresh process: peak resident bytes of one run above what was resident before it."""
    try:
        torch.set_num_threads(threads)
        device = torch.device("cpu")
        # A short run first loads the libraries' code and tables, which are nobody's activation memory.
        short = case.with_tokens(min(WARM_TOKENS, case.shape["T"]))
        short.providers(short, device)[name]().run()
        provider = case.providers(case, device)[name]()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
        before = _resident_bytes()
        kept = provider.run()
        pipe.send(max(0, _peak_resident_bytes() - before))
        del kept
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        pipe.close()


def peak_memory_cpu(case: Case, name: str, threads: int, timeout: float = 300.0) -> int:
    """Peak memory of one run above its inputs, in a process of its own (Linux).

    Raises:
        Unavailable: not on Linux, or the process failed, was killed or took longer than ``timeout`` seconds.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable("peak memory on the CPU is read from /proc, which only Linux has")
    # A fork server that has torch loaded and nothing else: a clean process without two seconds of imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of_one_run, args=(case, name, threads, send), daemon=True)
    process.start()
    send.close()
    try:
        if not receive.poll(timeout):
            raise Unavailable(f"peak memory: no result after {timeout:.0f} s")
        answer = receive.recv()
    except EOFError:
        raise Unavailable("peak memory: the measuring process was killed") from None
    finally:
        process.join(1.0)
        if process.is_alive():
            process.terminate()
    if isinstance(answer, str):
        raise Unavailable(f"peak memory: {answer}")
    return answer


def peak_memory_cuda(run: Callable[[], Any]) -> int:
    """Peak allocated bytes of one run above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run: bytes/s of a large copy, FLOP/s of a large matrix product."""

    copy: float
    matmul: float

    def percent(self, work: Work, seconds: float) -> float:
        """Share of the roofline: the least time that ``work`` could take, over the time it took."""
        return 100.0 * max(work.flops / self.matmul, work.bytes / self.copy) / seconds


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a large copy (read and write counted) and a large matrix product of random numbers."""
    size, elements = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    data = random_tensors(0, {"a": (size, size), "b": (size, size)}, device, dtype)
    source = torch.rand(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timings = time_interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: data["a"] @ data["b"]},
        device,
        Budget(samples=10, least=5, seconds=1.0),
    )
    return Ceilings(
        copy=2 * 4 * elements / min(timings["copy"].samples),
        matmul=2.0 * size**3 / min(timings["matmul"].samples),
    )
