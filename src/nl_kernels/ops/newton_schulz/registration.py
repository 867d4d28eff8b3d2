"""Newton–Schulz as a PyTorch operator: schema, shape for tracing and vmap. It has no derivative.

The operator takes the implementation by name and imports it when called, so that nothing imports Triton
unless it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from nl_kernels.dispatch import without_autocast

_NAME = "nl_kernels::newton_schulz"
_MODULES = {"triton": "triton_forward", "eager": "eager", "reference": "reference"}

torch.library.define(
    _NAME, "(Tensor x, float[] coefficients, float eps, ScalarType compute_dtype, str impl) -> Tensor"
)


def apply(
    x: torch.Tensor,
    schedule: Sequence[tuple[float, float, float]],
    eps: float,
    compute_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    """The operator on x [..., m, n], with the schedule's triples one after the other."""
    coefficients = [c for triple in schedule for c in triple]
    return torch.ops.nl_kernels.newton_schulz(x, coefficients, eps, compute_dtype, impl)


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _(x, coefficients, eps, compute_dtype, impl):
    schedule = [tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3)]
    function = importlib.import_module(f"nl_kernels.ops.newton_schulz.{_MODULES[impl]}").newton_schulz
    options = () if impl == "reference" else (compute_dtype,)
    with torch.no_grad(), without_autocast(x.device.type):
        return function(x, schedule, eps, *options)


@torch.library.register_fake(_NAME)
def _(x, coefficients, eps, compute_dtype, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_vmap(_NAME)
def _(info, in_dims, x, coefficients, eps, compute_dtype, impl):
    x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
    result = torch.ops.nl_kernels.newton_schulz(x, coefficients, eps, compute_dtype, impl)
    return result, None if in_dims[0] is None else 0
