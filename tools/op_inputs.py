"""Inputs of the ops, as a trained layer would produce them, for the tests and the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nl_kernels.memory_rule import DeepMemoryWeights
from nl_kernels.ops.self_modifying import SelfModifyingWeights


def delta_memory_inputs(
    batch: int,
    length: int,
    heads: int,
    key_width: int,
    value_width: int | None = None,
    *,
    key_heads: int | None = None,
    momentum: bool = False,
    initial_state: bool = False,
    sequences: int | None = None,
    slowest_decay: float = 0.98,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> dict[str, torch.Tensor | None]:
    """Keyword arguments of :func:`nl_kernels.delta_memory` as a trained layer would produce them.

    Unit keys and queries, values of unit variance scaled by the erase rate, erase in (0, 1), decay between
    ``slowest_decay / 2`` and 1 with most of it near 1, momentum in (0, 0.95). Drawn in fp64 and rounded, so
    that the same seed gives the same problem in every dtype; rates and states are fp32 for 16-bit inputs.

    Args:
        key_heads: heads of q and k, a divisor of ``heads``; ``None`` for as many.
        sequences: number of packed sequences, whose states have that leading size (cu_seqlens is the
            caller's to choose); ``None`` for one sequence per batch row.
    """
    value_width = key_width if value_width is None else value_width
    rng = torch.Generator().manual_seed(seed)
    rates_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    rates = (batch, length, heads)
    keys = (batch, length, key_heads or heads, key_width)
    states = (batch if sequences is None else sequences, heads, value_width, key_width)
    erase = 0.05 + 0.9 * uniform(*rates)
    inputs = {
        "q": F.normalize(normal(*keys), dim=-1).to(dtype),
        "k": F.normalize(normal(*keys), dim=-1).to(dtype),
        "v": (erase[..., None] * normal(*rates, value_width)).to(dtype),
        "log_decay": (1 - (1 - slowest_decay / 2) * uniform(*rates) ** 4).log().to(rates_dtype),
        "erase": erase.to(rates_dtype),
        "momentum": (0.95 * uniform(*rates)).to(rates_dtype) if momentum else None,
        "initial_state": normal(*states).to(rates_dtype) if initial_state else None,
        "initial_momentum": (0.3 * normal(*states)).to(rates_dtype) if initial_state and momentum else None,
    }
    return {
        name: None if x is None else x.to(device).requires_grad_(requires_grad) for name, x in inputs.items()
    }


def deep_memory_inputs(
    batch: int,
    length: int,
    heads: int,
    width: int,
    hidden: int | None,
    value_width: int | None = None,
    *,
    momentum: bool = False,
    outer_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
) -> dict[str, object]:
    """Keyword arguments of :func:`nl_kernels.deep_memory` but for the options; drawn in fp64 and rounded.

    Unit keys and queries, rates in (0, 1), decays between 0.6 and 1 with most near 1. ``hidden=None`` makes a
    linear memory.
    """
    value_width = width if value_width is None else value_width
    rng = torch.Generator().manual_seed(seed)

    def draw(function, *shape):
        return function(*shape, generator=rng, dtype=torch.float64)

    rates = (batch, length, heads)
    tensors = {
        "q": F.normalize(draw(torch.randn, *rates, width), dim=-1),
        "k": F.normalize(draw(torch.randn, *rates, width), dim=-1),
        "v": draw(torch.randn, *rates, value_width),
        "rate": 0.05 + 0.9 * draw(torch.rand, *rates),
        "log_decay": (1 - 0.4 * draw(torch.rand, *rates) ** 2).log(),
        "momentum": 0.9 * draw(torch.rand, *rates) if momentum else None,
    }
    inputs: dict[str, object] = {
        name: None if x is None else x.to(dtype).requires_grad_(requires_grad) for name, x in tensors.items()
    }
    inputs["weights"] = _memory(draw, heads, width, hidden, value_width, outer_scale, dtype, requires_grad)
    return inputs


def self_modifying_inputs(
    batch: int,
    length: int,
    heads: int,
    width: int,
    hidden: int | None,
    *,
    momentum: bool = False,
    outer_scale: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
) -> dict[str, object]:
    """Keyword arguments of :func:`nl_kernels.self_modifying_memory` but for the options; as above."""
    rng = torch.Generator().manual_seed(seed)

    def draw(function, *shape):
        return function(*shape, generator=rng, dtype=torch.float64)

    rates = (batch, length, heads)
    tensors = {
        name: draw(torch.randn, *rates, width) for name in ("query", "key_input", "value_input", "gate_input")
    }
    tensors["momentum"] = 0.6 * draw(torch.rand, *rates) if momentum else None
    tensors["rate_max"] = 0.5 + 0.5 * draw(torch.rand, heads)
    tensors["rate_bias"] = draw(torch.randn, heads)
    tensors["retention_bias"] = 2 + draw(torch.rand, heads)
    inputs: dict[str, object] = {
        name: None if x is None else x.to(dtype).requires_grad_(requires_grad) for name, x in tensors.items()
    }
    outs = [1 if name in ("rate", "retention") else width for name in SelfModifyingWeights._fields]
    inputs["weights"] = SelfModifyingWeights(
        *(_memory(draw, heads, width, hidden, out, outer_scale, dtype, requires_grad) for out in outs)
    )
    return inputs


def _memory(draw, heads, width, hidden, out, scale, dtype, requires_grad) -> DeepMemoryWeights:
    inner = draw(torch.randn, heads, hidden or out, width) * width**-0.5
    outer = None if hidden is None else scale * draw(torch.randn, heads, out, hidden) * hidden**-0.5
    layers = (inner if hidden else inner * scale, outer)
    return DeepMemoryWeights(
        *(None if x is None else x.to(dtype).requires_grad_(requires_grad) for x in layers)
    )


def to_float64(inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The same numbers in fp64, as new leaves: what the reference is evaluated on."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
