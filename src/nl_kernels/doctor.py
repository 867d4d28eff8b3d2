"""``python -m nl_kernels.doctor``: what this machine runs, by which implementation, and whether it is right.

Every op runs forward and backward as a user would call it, in bfloat16 on a GPU and in float32 on a CPU, and
is compared with plain PyTorch in float64 on the CPU (which the tests hold to the definitions). A kernel that
is compiled wrong errs by as much as its result is long; rounding by a hundredth in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from nl_kernels import (
    ContinuumLevel,
    __version__,
    continuum_memory,
    deep_memory,
    delta_memory,
    dispatch,
    newton_schulz,
    self_modifying_memory,
)
from nl_kernels.testing import (
    deep_memory_inputs,
    delta_memory_inputs,
    relative_error,
    self_modifying_inputs,
    tensors_of,
)
from nl_kernels.triton_support.hazards import hazards_here

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "fla-core")
LIMITS = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-3}
"""Of errors, relative to the length of a result or of a gradient."""


class Case(NamedTuple):
    """A call of an op: its tensors, drawn in fp32, and the function of them and of ``impl``."""

    inputs: Callable[[int], dict]
    call: Callable[..., Any]


def _levels(length: int) -> dict:
    rng = torch.Generator().manual_seed(length)
    width, sizes = 64, ((16, 96), (32, 128))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * shape[-1] ** -0.5

    levels = [
        (torch.ones(width), normal(hidden, width), normal(width, hidden), normal(width, width))
        for _, hidden in sizes
    ]
    return {"x": torch.randn(2, length, width, generator=rng), "levels": levels}


def _continuum(x: torch.Tensor, levels: list[tuple], impl: str | None) -> tuple:
    built = [
        ContinuumLevel(
            norm=norm, up=up, down=down, gate=None, key=None, value=value, chunk_size=chunk, rate=0.01
        )
        for chunk, (norm, up, down, value) in zip((16, 32), levels)
    ]
    return continuum_memory(x, built, detach_updates=True, output_final_state=True, impl=impl)


def _chunked(op: Callable) -> Callable:
    return lambda impl, **x: op(**x, chunk_size=16, read="running", output_final_state=True, impl=impl)


CASES = {
    "delta_memory": Case(
        lambda n: delta_memory_inputs(2, n, 2, 64, initial_state=True),
        lambda impl, **x: delta_memory(**x, output_final_state=True, impl=impl),
    ),
    "deep_memory, linear": Case(lambda n: deep_memory_inputs(2, n, 2, 64, None), _chunked(deep_memory)),
    "deep_memory, two layers": Case(lambda n: deep_memory_inputs(2, n, 2, 64, 64), _chunked(deep_memory)),
    "self_modifying_memory, linear": Case(
        lambda n: self_modifying_inputs(2, n, 2, 64, None), _chunked(self_modifying_memory)
    ),
    "self_modifying_memory, two layers": Case(
        lambda n: self_modifying_inputs(2, n, 2, 32, 32), _chunked(self_modifying_memory)
    ),
    "continuum_memory": Case(_levels, lambda impl, **x: _continuum(**x, impl=impl)),
    "newton_schulz": Case(
        lambda n: {"x": torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n))},
        lambda impl, x: newton_schulz(x.detach(), impl=impl),
    ),
}


class Finding(NamedTuple):
    """What one case showed; ``error`` is the largest of its results and gradients, ``None`` if it failed."""

    case: str
    tokens: int
    implementation: str
    error: float | None
    limit: float
    seconds: float
    note: str

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.limit


def _leaves(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Nested tensors as new leaves."""
    return tree_map_only(
        torch.Tensor, lambda x: x.detach().to(device, dtype, copy=True).requires_grad_(), value
    )


def _results_and_gradients(case: Case, inputs: dict, impl: str | None) -> list[torch.Tensor]:
    results = tensors_of(case.call(impl=impl, **inputs))
    leaves = tensors_of(inputs)
    rng = torch.Generator().manual_seed(1)
    weighted = sum((r.double().cpu() * torch.randn(r.shape, generator=rng)).sum() for r in results)
    gradients = []
    if weighted.requires_grad:
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach().cpu() for x in (*results, *gradients)]


def examine(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Finding:
    """Run a case on ``device`` and compare it with fp64."""
    case, said = CASES[name], []
    inputs = case.inputs(tokens)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("nl_kernels")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    dispatch._say_once.cache_clear()
    began, error, notes = time.monotonic(), None, []
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = _results_and_gradients(case, _leaves(inputs, dtype, device), None)
        notes = [
            str(w.message).split("plain PyTorch: ")[-1] for w in warned if "plain PyTorch" in str(w.message)
        ]
        rounded = _leaves(_leaves(inputs, dtype, "cpu"), torch.float64, "cpu")
        exact = _results_and_gradients(case, rounded, "eager")
        error = max(relative_error(a, e) for a, e in zip(found, exact))
    except Exception as failure:  # the other ops are to be examined, whatever this one does
        notes = [f"{type(failure).__name__}: {failure}".splitlines()[0]]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    chosen = [message.split("using the ")[1].split()[0] for message in said if "using the " in message]
    seconds = time.monotonic() - began
    return Finding(
        name, tokens, chosen[0] if chosen else "?", error, LIMITS[dtype], seconds, "; ".join(notes)
    )


def about(device: torch.device) -> dict[str, str]:
    """Versions and the device."""
    found = {
        "nl-kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["CUDA of torch"] = str(torch.version.cuda or torch.version.hip)
    else:
        found["device"] = f"CPU, {os.cpu_count()} cores"
        found["Triton kernels"] = "not used: they need a CUDA device of compute capability 8.0 or later"
    return found


def hazards(device: torch.device) -> dict[str, str]:
    """What is known to go wrong with this Triton on this GPU, by name."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    return hazards_here(torch.cuda.get_device_capability(device))


def main(arguments: list[str] | None = None) -> int:
    """Print what was found; 1 where an op is wrong."""
    parser = argparse.ArgumentParser("python -m nl_kernels.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees it")
    parser.add_argument(
        "--json", metavar="FILE", help="also write what was found, a line a case, as it comes"
    )
    options = parser.parse_args(arguments)
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    device = torch.device(kind)
    torch.set_num_threads(1)  # the calls are small: threads would only wait for one another
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    for name, value in about(device).items():
        print(f"{name:>20}  {value}")
    for name, text in hazards(device).items():
        print(f"{name:>26}: {text}")
    print(f"\nops in {str(dtype)[6:]}, forward and backward, against float64")
    findings = []
    for name in CASES:
        for tokens in (40, 150):
            found = examine(name, tokens, device, dtype)
            findings.append(found)
            verdict = "ok   " if found.right else "WRONG" if found.error is not None else "FAILS"
            error = "" if found.error is None else f"error {found.error:.1e} of {found.limit:.0e}"
            print(f"{verdict} {name:<34}{tokens:>4} tokens  {found.implementation:<8}{error}", flush=True)
            if found.note:
                print(f"      {found.note}")
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**found._asdict(), "right": found.right}) + "\n")
    wrong = [found.case for found in findings if not found.right]
    if wrong:
        print(f"\nwrong: {', '.join(dict.fromkeys(wrong))}. Use impl='eager' there, and please report it.")
    else:
        print("\nall right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
