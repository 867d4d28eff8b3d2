"""The parts of a continuum level's work with kernels of their own, against the same lines in plain PyTorch.

Cases of ``bench_continuum``: the MLP with weights of each sequence, and a chunk's step, gradients and update.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import COMPILED, Case, Factories, Provider
from benchmarks.measure import Work, random_tensors
from nl_kernels import continuum_mlp, continuum_update
from nl_kernels.ops.continuum.registration import Update, products

RATE = 1e-3


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``down GELU(up x)``, two products."""
    return F.gelu(x @ up.mT) @ down.mT


def plain_step(x: Tensor, error: Tensor, rates: Tensor, up: Tensor, down: Tensor, momenta: list[Tensor]):
    """One step with momentum: the weights and momenta after it, in fp32."""
    opened = x @ up.mT.to(x.dtype)
    signal = torch.ops.aten.gelu_backward(error @ down.to(x.dtype), opened)
    rated = rates.to(x.dtype)[..., None]
    gradients = (signal * rated).mT @ x, (error * rated).mT @ F.gelu(opened)
    after = [0.9 * m + g.float() for m, g in zip(momenta, gradients)]
    return [w - m for w, m in zip((up, down), after)], after


def tensors_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x and error [B, T, D] in the case's dtype; weights of each sequence and momenta in fp32."""
    batch, tokens, width, hidden = (case.shape[name] for name in ("B", "T", "D", "h"))
    made = random_tensors(
        0, {"x": (batch, tokens, width), "error": (batch, tokens, width)}, device, case.dtype
    )
    weights = random_tensors(
        1, {"up": (batch, hidden, width), "down": (batch, width, hidden)}, device, torch.float32
    )
    made |= {name: w * w.shape[-1] ** -0.5 for name, w in weights.items()}
    return made


def mlp_providers(case: Case, device: torch.device) -> Factories:
    """Weights in the dtype of the tokens, as a serving copy is."""

    def provider(function, role: str, note: str = "") -> Provider:
        made = tensors_of(case, device)
        up, down = made["up"].to(case.dtype), made["down"].to(case.dtype)
        return Provider(lambda: (function(made["x"], up, down),), role=role, comparable=True, note=note)

    return {
        "nl_kernels": lambda: provider(continuum_mlp, "ours"),
        "nl_kernels eager": lambda: provider(lambda *t: continuum_mlp(*t, impl="eager"), "variant"),
        "two products": lambda: provider(plain_mlp, "baseline", "the same lines in PyTorch"),
        COMPILED: lambda: provider(torch.compile(plain_mlp), "baseline", "of the two products"),
    }


def step_providers(case: Case, device: torch.device) -> Factories:
    """Gradients of a chunk, and momentum and weights after it."""

    def start() -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
        made = tensors_of(case, device)
        rates = torch.full(made["x"].shape[:2], RATE / case.shape["T"], device=device)
        return made, rates, [torch.zeros_like(made[name]) for name in ("up", "down")]

    def ours(role: str, impl: str) -> Provider:
        made, rates, momenta = start()
        weights = [made["up"], made["down"]]

        def run() -> tuple[Tensor, ...]:
            error = made["error"] * rates.to(case.dtype)[..., None]
            sums = torch.ops.nl_kernels.continuum_mlp_backward(error, made["x"], *weights, None, False, impl)
            if impl == "triton":
                products(impl).update_in_place(Update(weights, sums, momenta, 0.9, None, None))
                return tuple(weights)
            options = {"rule": "momentum", "momentum_decay": 0.9}
            stepped = [
                continuum_update(w, g, momentum=m, **options) for w, g, m in zip(weights, sums, momenta)
            ]
            return tuple(new for new, _ in stepped)

        return Provider(run, role=role)

    def plain(function, note: str) -> Provider:
        made, rates, momenta = start()
        return Provider(
            lambda: tuple(function(made["x"], made["error"], rates, made["up"], made["down"], momenta)[0]),
            role="baseline",
            note=note,
        )

    return {
        "nl_kernels": lambda: ours("ours", "triton" if device.type == "cuda" else "eager"),
        "nl_kernels eager": lambda: ours("variant", "eager"),
        "plain PyTorch": lambda: plain(plain_step, "the same lines; new weights, not in place"),
        COMPILED: lambda: plain(torch.compile(plain_step), "of these lines"),
    }


def mlp_work(case: Case) -> Work:
    """Two products; tokens in and out and the weights once."""
    tokens, width, hidden, batch = case.tokens, case.shape["D"], case.shape["h"], case.shape["B"]
    size = case.dtype.itemsize
    return Work(4 * tokens * width * hidden, size * 2 * (tokens * width + batch * width * hidden))


def step_work(case: Case) -> Work:
    """The hidden layer, the way back, two sums; tokens and errors once, weights and momenta in and out."""
    tokens, width, hidden, batch = case.tokens, case.shape["D"], case.shape["h"], case.shape["B"]
    size = case.dtype.itemsize
    return Work(8 * tokens * width * hidden, 2 * size * tokens * width + 2 * 4 * 4 * batch * width * hidden)


def step_case(name: str, device: str, dtype: torch.dtype, *, quick: bool = False, **shape: int) -> Case:
    """``"two products"`` (the MLP) or ``"chunk step"`` at one size."""
    providers, work_of = {
        "two products": (mlp_providers, mlp_work),
        "chunk step": (step_providers, step_work),
    }[name]
    case = Case("continuum", name, "forward", shape, providers, dtype=dtype, quick=quick, devices=(device,))
    return replace(case, work=work_of(case))


STEP_CASES = [
    step_case(name, device, dtype, **shape)
    for name in ("two products", "chunk step")
    for device, dtype, shape in (
        ("cpu", torch.float32, {"B": 2, "T": 256, "D": 256, "h": 1024}),
        ("cuda", torch.bfloat16, {"B": 8, "T": 2048, "D": 1024, "h": 4096}),
        ("cuda", torch.bfloat16, {"B": 1, "T": 4096, "D": 4096, "h": 16384}),
    )
]
