"""A driver for Triton without a device: launches take CPU tensors, and the emulator runs them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import nl_kernels
from nl_kernels import dispatch
from tools.ptx_emulator.launch import Launch

ARCHITECTURE = "sm_80"


class _Device:
    """What Triton asks of a driver before it compiles."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 163 * 1024})

    def get_current_device(self) -> str:
        return "emulated"  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclasses.dataclass
class Record:
    """A launch that was run: its kernel, programs, what they executed, and what was found wrong."""

    kernel: str
    programs: int
    instructions: Counter
    findings: list[str]


def parameters_of(compiled: Any, arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """(type, value) of what the PTX takes at run time, tuples one by one."""
    found: list[tuple[str, Any]] = []

    def walk(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for own, item in zip(kind, value):
                walk(own, item)
        elif kind != "constexpr":
            found.append((kind, value))

    for name, kind in compiled.src.signature.items():
        walk(kind, arguments.get(name))
    return found


def run_compiled(compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any], seed: int | None) -> Record:
    """Run in lockstep; and, with a ``seed``, in an order that it draws, which must give the same bits."""
    if compiled.metadata.global_scratch_size:
        raise NotImplementedError("kernels with scratch in global memory")
    given = compiled.asm["ptx"], compiled.metadata.shared, grid, parameters_of(compiled, arguments)
    first = Launch(*given)
    before = first.memory.contents()
    findings = first.run().findings.lines()
    if seed is not None:
        expected = first.memory.contents()
        first.memory.restore(before)
        findings += Launch(*given, order=np.random.default_rng(seed)).run().findings.lines()
        if not all(map(np.array_equal, first.memory.contents(), expected)):
            findings.append("another order of warps and programs gives other bits")
        first.memory.restore(expected)
    return Record(compiled.name, int(np.prod(first.grid)), first.instructions(), findings)


def _modules_that_ask_for_the_architecture() -> list[Any]:
    """Of the package; all are imported, so that none takes the answer given here with it."""
    for info in pkgutil.walk_packages(nl_kernels.__path__, "nl_kernels."):
        importlib.import_module(info.name)
    own = [module for name, module in sys.modules.items() if name.startswith("nl_kernels")]
    return [module for module in own if hasattr(module, "architecture_of")]


@contextmanager
def emulated(*, seed: int | None = 0) -> Iterator[list[Record]]:
    """Within it kernels run in the emulator, on CPU tensors; yields the list of launches so far.

    ``seed``: of the order of warps and programs in which each launch is run a second time; ``None``: once.
    Triton's cache on disk is another one here: what it holds has not been through the assembler.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "the emulator cannot share a process with Triton's interpreter: unset TRITON_INTERPRET"
        )
    records: list[Record] = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        if not warmup:
            arguments = dict(zip(self.arg_names, args)) | options
            number = None if seed is None else seed + len(records)
            records.append(run_compiled(compiled, tuple(grid), arguments, number))
        return compiled

    with ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = str(Path(tempfile.gettempdir()) / "ptx_emulator_cache")
        patches = [
            mock.patch.object(driver, "_active", _Device()),
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
            mock.patch.object(dispatch, "interpreting", return_value=True),
        ]
        for module in _modules_that_ask_for_the_architecture():
            patches.append(mock.patch.object(module, "architecture_of", return_value=ARCHITECTURE))
        for patch in patches:
            stack.enter_context(patch)
        yield records
