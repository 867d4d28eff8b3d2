"""``continuum_update_`` as a PyTorch operator that changes its arguments: schema and shapes for tracing.

It has no derivative. The implementation is given by name and imported when called, so that nothing imports
Triton unless it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

_NAME = "nl_kernels::continuum_update_"
_FUNCTIONS = {
    "triton": ("triton_update", "update"),
    "eager": ("update", "update_in_place"),
    "reference": ("reference", "update_in_place"),
}

torch.library.define(
    _NAME,
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[]? momenta, float decay, Tensor[]? norms, "
    "Tensor(c!)[]? copies, str impl) -> ()",
)


def apply(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
    decay: float,
    norms: Sequence[torch.Tensor] | None,
    copies: Sequence[torch.Tensor] | None,
    impl: str,
) -> None:
    """The operator on lists of matrices."""
    torch.ops.nl_kernels.continuum_update_(
        *(None if part is None else list(part) for part in (weights, gradients, momenta)),
        decay,
        *(None if part is None else list(part) for part in (norms, copies)),
        impl,
    )


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _(weights, gradients, momenta, decay, norms, copies, impl):
    module, name = _FUNCTIONS[impl]
    update = getattr(importlib.import_module(f"nl_kernels.ops.continuum.{module}"), name)
    with torch.no_grad():
        update(weights, gradients, momenta, decay, norms, copies)


@torch.library.register_fake(_NAME)
def _(weights, gradients, momenta, decay, norms, copies, impl):
    return None
