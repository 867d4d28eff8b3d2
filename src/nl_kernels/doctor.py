"""``python -m nl_kernels.doctor``: what this machine runs, by which implementation, and whether it is right.

Every op runs forward and backward as a user would call it, in bfloat16 on a GPU and in float32 on a CPU, and
is compared with plain PyTorch in float64 on the CPU (which the tests hold to the definitions). A kernel that
is compiled wrong errs by as much as its result is long; rounding by a hundredth in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
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
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from nl_kernels import (
    ContinuumLevel,
    DeepMemoryWeights,
    SelfModifyingWeights,
    __version__,
    continuum_memory,
    deep_memory,
    delta_memory,
    dispatch,
    newton_schulz,
    self_modifying_memory,
)
from nl_kernels.triton_support.hazards import hazards_here

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "fla-core")
LIMITS = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-3}
"""Of errors, relative to the length of a result or of a gradient."""


class Case(NamedTuple):
    """A call of an op: its tensors, drawn in fp32, and the function of them and of ``impl``."""

    inputs: Callable[[int], dict]
    call: Callable[..., Any]


class _Draw:
    """Draws for a call on two sequences, of two heads; the same for the same length."""

    def __init__(self, length: int) -> None:
        self.tokens = (2, length, 2)
        rng = torch.Generator().manual_seed(length)
        self.normal, self.uniform = (functools.partial(f, generator=rng) for f in (torch.randn, torch.rand))

    def unit(self, width: int) -> torch.Tensor:
        return F.normalize(self.normal(*self.tokens, width), dim=-1)

    def rate(self) -> torch.Tensor:
        return 0.05 + 0.9 * self.uniform(self.tokens)

    def log_decay(self) -> torch.Tensor:
        return (1 - 0.4 * self.uniform(self.tokens) ** 2).log()

    def matrix(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape) * shape[-1] ** -0.5

    def memory(self, width: int, hidden: int | None, out: int) -> DeepMemoryWeights:
        if hidden is None:
            return DeepMemoryWeights(self.matrix(2, out, width), None)
        return DeepMemoryWeights(self.matrix(2, hidden, width), self.matrix(2, out, hidden))


def _delta_memory(length: int) -> dict:
    draw, width = _Draw(length), 64
    write = draw.rate()
    inputs = {"q": draw.unit(width), "k": draw.unit(width), "v": write[..., None] * draw.unit(width)}
    inputs |= {"log_decay": draw.log_decay(), "erase": write}
    return inputs | {"initial_state": draw.normal(2, 2, width, width)}


def _deep_memory(length: int, hidden: int | None) -> dict:
    draw, width = _Draw(length), 64
    inputs = {name: draw.unit(width) for name in ("q", "k", "v")}
    inputs |= {"rate": draw.rate(), "log_decay": draw.log_decay()}
    return inputs | {"weights": draw.memory(width, hidden, width)}


def _self_modifying_memory(length: int, width: int, hidden: int | None) -> dict:
    draw = _Draw(length)
    names = ("query", "key_input", "value_input", "gate_input")
    inputs = {name: draw.normal(*draw.tokens, width) for name in names}
    inputs |= {
        "rate_max": draw.uniform(2),
        "rate_bias": draw.normal(2),
        "retention_bias": 2 + draw.uniform(2),
    }
    outs = (width, width, width, 1, 1)
    return inputs | {"weights": SelfModifyingWeights(*(draw.memory(width, hidden, out) for out in outs))}


def _levels(length: int) -> dict:
    draw, width = _Draw(length), 64
    levels = [
        (torch.ones(width), draw.matrix(hidden, width), draw.matrix(width, hidden), draw.matrix(width, width))
        for hidden in (96, 128)
    ]
    return {"x": draw.normal(2, length, width), "levels": levels}


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
        _delta_memory,
        lambda impl, **x: delta_memory(**x, output_final_state=True, impl=impl),
    ),
    "deep_memory, linear": Case(lambda n: _deep_memory(n, None), _chunked(deep_memory)),
    "deep_memory, two layers": Case(lambda n: _deep_memory(n, 64), _chunked(deep_memory)),
    "self_modifying_memory, linear": Case(
        lambda n: _self_modifying_memory(n, 64, None), _chunked(self_modifying_memory)
    ),
    "self_modifying_memory, two layers": Case(
        lambda n: _self_modifying_memory(n, 32, 32), _chunked(self_modifying_memory)
    ),
    "continuum_memory": Case(_levels, lambda impl, **x: _continuum(**x, impl=impl)),
    "newton_schulz": Case(
        lambda n: {"x": _Draw(n).normal(2, n, 64)},
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


def tensors_of(value: object) -> list[torch.Tensor]:
    """All floating tensors in nested tuples, lists and dicts, in order."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in fp64 (the plain norm where ``expected`` is zero)."""
    difference = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm > 0 else difference


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
    found["torch"] = torch.__version__  # which says the build, too
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
