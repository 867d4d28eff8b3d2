"""``newton_schulz`` on stacks of gradients against the plain PyTorch that optimisers use.

    python -m benchmarks.run --op newton_schulz

B is the number of matrices, T and D are their rows and columns; a "token" is a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import COMPILED, Case, Factories, Provider
from benchmarks.measure import Work, random_tensors
from nl_kernels import newton_schulz
from nl_kernels.ops.newton_schulz import MUON_COEFFICIENTS

STEPS = 5


def plain(x: Tensor) -> Tensor:
    """Muon's own lines: one matrix, or a stack of them, wide."""
    a, b, c = MUON_COEFFICIENTS
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def loop(x: Tensor) -> Tensor:
    """One matrix after the other."""
    return torch.stack([plain(one) for one in x])


def matrices_of(case: Case, device: torch.device) -> Tensor:
    """The stack [B, T, D] of gradients."""
    shape = tuple(case.shape[name] for name in ("B", "T", "D"))
    return random_tensors(0, {"x": shape}, device, case.dtype)["x"]


def providers(case: Case, device: torch.device) -> Factories:
    """All in the case's dtype: products of bf16 operands on a GPU, of fp32 ones on the CPU."""

    def provider(function, role: str, note: str = "") -> Provider:
        x = matrices_of(case, device)
        return Provider(lambda: (function(x),), role=role, comparable=True, note=note)

    made = {
        "nl_kernels": lambda: provider(newton_schulz, "ours"),
        "PyTorch loop": lambda: provider(loop, "baseline", "one matrix after the other"),
        "PyTorch batched": lambda: provider(plain, "baseline", "the same lines on the whole stack"),
        COMPILED: lambda: provider(torch.compile(plain), "baseline", "of the batched lines"),
    }
    if device.type == "cuda":
        made["nl_kernels eager"] = lambda: provider(lambda x: newton_schulz(x, impl="eager"), "variant")
    return made


def reference(case: Case, rows: int) -> Tensor:
    """The first rows of the polynomials of the singular values in fp64."""
    return newton_schulz(matrices_of(case, torch.device("cpu")).double(), impl="reference")[:, :rows]


def work_of(shape: dict[str, int], dtype: torch.dtype) -> Work:
    """Three products a step, none of them halved; the matrices in and out once."""
    count, rows, columns = shape["B"], *sorted((shape["T"], shape["D"]))
    flops = STEPS * count * (4 * rows**2 * columns + 2 * rows**3)
    return Work(flops, 2 * dtype.itemsize * count * rows * columns)


def case_of(
    device: str, dtype: torch.dtype, *, checked: bool = True, quick: bool = False, **shape: int
) -> Case:
    """One stack on one kind of device."""
    return Case(
        op="newton_schulz",
        name="plain PyTorch",
        mode="forward",
        shape=shape,
        providers=providers,
        work=work_of(shape, dtype),
        reference=reference if checked else None,
        dtype=dtype,
        quick=quick,
        devices=(device,),
    )


CASES = [
    case_of("cpu", torch.float32, quick=True, B=64, T=64, D=256),
    case_of("cpu", torch.float32, B=24, T=256, D=1024),
    case_of("cpu", torch.float32, B=24, T=256, D=256),
    case_of("cuda", torch.bfloat16, quick=True, B=1, T=1024, D=1024),
    # An SVD of these in fp64 takes minutes.
    case_of("cuda", torch.bfloat16, checked=False, B=1, T=4096, D=4096),
    case_of("cuda", torch.bfloat16, checked=False, B=24, T=1024, D=4096),
]
