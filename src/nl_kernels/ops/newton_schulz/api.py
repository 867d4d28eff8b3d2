"""``newton_schulz``: the public function and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nl_kernels.checks import FLOAT_DTYPES, check_positive_int
from nl_kernels.dispatch import choose_implementation
from nl_kernels.ops.newton_schulz import registration
from nl_kernels.ops.newton_schulz.coefficients import MUON_COEFFICIENTS, Triple, optimal_coefficients


def newton_schulz(
    x: torch.Tensor,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Sequence[float]] = "muon",
    lower_singular_value: float = 1e-3,
    eps: float = 1e-7,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Take every singular value of each matrix towards 1, keeping its singular vectors.

    ``X_0 = x / max(‖x‖_F, eps)``, then in each step ``X ← aX + b(XXᵀ)X + c(XXᵀ)²X``: the polynomial
    ``as + bs³ + cs⁵`` of the singular values (Muon; Nested Learning, arXiv 2512.24695, Eqs. 42–44).
    Matrices with more rows than columns are transposed for it. Values below what the schedule reaches grow by
    at most the product of the a's and stay below the others.

    Args:
        x: [..., m, n] of float64, float32, bfloat16 or float16; matrices of a stack are independent. Any
            scale: no square under- or overflows.
        steps: number of steps.
        coefficients: ``"muon"``: (3.4445, −4.7750, 2.0315) in every step, which takes values from 0.002 on to
            [0.68, 1.21] in 5 steps. ``"optimal"``: a schedule of its own for each number of steps and lower
            end (:func:`optimal_coefficients`). Or triples (a, b, c): one for every step, or one for all.
        lower_singular_value: of ``"optimal"``: values from this share of ‖x‖_F on are to end close to 1.
        eps: matrices of a smaller norm are scaled up by 1/eps only, so that zero stays zero; positive.
        compute_dtype: of the operands and results of products, which accumulate in fp32 (fp64 in fp64).
            ``None``: x's dtype. ``torch.bfloat16`` is what Muon uses on GPUs.
        impl: ``"triton"``, ``"eager"``, ``"reference"`` (SVD in fp64) or ``None``: by x's device and dtype.

    Returns:
        The result, contiguous, in x's shape and dtype.

    Raises:
        TypeError, ValueError: a bad argument, named.
        ValueError: x requires grad and gradients are recorded: there is no derivative.
        NotImplementedError: ``impl="triton"`` in fp64.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x: expected one of {[str(d) for d in FLOAT_DTYPES]}, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x: expected shape [..., m, n], got {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x: newton_schulz has no derivative; pass x.detach(), or call it in torch.no_grad()")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a positive number, got {eps!r}")
    compute_dtype = x.dtype if compute_dtype is None else compute_dtype
    if compute_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"compute_dtype: expected one of {[str(d) for d in FLOAT_DTYPES]} or None, got {compute_dtype!r}"
        )
    schedule = resolve_schedule(steps, coefficients, lower_singular_value)
    refused = None
    if compute_dtype == torch.float64:
        refused = "x: without compute_dtype=torch.float32 the Triton kernels do not compute in float64"
    chosen = choose_implementation("newton_schulz", impl, x.device, unsupported=lambda: refused)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return registration.apply(x, schedule, eps, compute_dtype, chosen)


def resolve_schedule(
    steps: int, coefficients: str | Sequence[Sequence[float]], lower_singular_value: float = 1e-3
) -> tuple[Triple, ...]:
    """The triples of all steps.

    Raises:
        TypeError, ValueError: ``steps`` or ``coefficients`` are none of what :func:`newton_schulz` lists.
    """
    check_positive_int("steps", steps)
    if isinstance(coefficients, str):
        if coefficients == "muon":
            return (MUON_COEFFICIENTS,) * steps
        if coefficients == "optimal":
            return optimal_coefficients(steps, lower_singular_value)
        raise ValueError(f"coefficients: expected 'muon', 'optimal' or triples, got {coefficients!r}")
    triples = tuple(tuple(float(c) for c in triple) for triple in coefficients)
    for triple in triples:
        if len(triple) != 3 or not all(math.isfinite(c) for c in triple):
            raise ValueError(f"coefficients: expected triples of finite numbers, got {triple}")
    if len(triples) == 1:
        return triples * steps
    if len(triples) != steps:
        raise ValueError(f"coefficients: expected 1 triple or steps = {steps} of them, got {len(triples)}")
    return triples
