"""Inputs, error budgets and guarded buffers, shared by the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nl_kernels.memory_rule import DeepMemoryWeights
from nl_kernels.ops.self_modifying import SelfModifyingWeights

# Matrix products, and where their two operands stand among the arguments.
_PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.mm.out: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.bmm.out: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten.baddbmm.out: 1,
    torch.ops.aten.baddbmm_.default: 1,
}


def delta_memory_inputs(
    batch: int,
    length: int,
    heads: int,
    key_width: int,
    value_width: int | None = None,
    *,
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
    states = (batch if sequences is None else sequences, heads, value_width, key_width)
    erase = 0.05 + 0.9 * uniform(*rates)
    inputs = {
        "q": F.normalize(normal(*rates, key_width), dim=-1).to(dtype),
        "k": F.normalize(normal(*rates, key_width), dim=-1).to(dtype),
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


def tensors_of(value: object) -> list[torch.Tensor]:
    """All floating tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def to_float64(inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The same numbers in fp64, as new leaves: what the reference is evaluated on."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in fp64 (the plain norm where ``expected`` is zero)."""
    difference = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm > 0 else difference


def assert_within_budget(
    actual: torch.Tensor,
    same_dtype_eager: torch.Tensor,
    fp64_reference: torch.Tensor,
    *,
    factor: float = 2.0,
    token_dim: int | None = None,
    name: str = "result",
) -> None:
    """Assert that ``actual`` errs at most ``factor × (error of the eager computation + one rounding)``.

    Errors are against ``fp64_reference``, once in norm over the whole tensor and, with ``token_dim``, once
    for every index of that axis. A token's budget takes the eager error of the worst token: single tokens of
    the eager computation are right by luck. One rounding is half a unit in the last place of ``actual``'s
    dtype, relative to the size of the tensor or token.

    Raises:
        AssertionError: naming ``name``, the error and the budget; also when shapes or dtypes differ or
            values are not finite.
    """
    assert actual.shape == fp64_reference.shape, f"{name}: {actual.shape} is not {fp64_reference.shape}"
    assert actual.dtype == same_dtype_eager.dtype, f"{name}: {actual.dtype} is not {same_dtype_eager.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    expected = fp64_reference.double()
    error, eager_error = actual.double() - expected, same_dtype_eager.double() - expected
    rounding = torch.finfo(actual.dtype).eps / 2
    budget = factor * (eager_error.norm() + rounding * expected.norm())
    assert error.norm() <= budget, f"{name}: error {error.norm():.3e} exceeds the budget {budget:.3e}"
    if token_dim is None:
        return

    def per_token(x):
        return x.movedim(token_dim, 0).flatten(1).norm(dim=1)

    budget = factor * (per_token(eager_error).max() + rounding * per_token(expected))
    excess = per_token(error) - budget
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{name}: at token {worst} error {per_token(error)[worst]:.3e} exceeds the budget {budget[worst]:.3e}"
    )


class RoundedProducts(TorchDispatchMode):
    """Within this context fp32 matrix products round their operands to ``dtype`` and accumulate in fp32.

    That is how a tensor core sees a 16-bit kernel: run the eager implementation inside to get the
    "same-dtype eager" error that such a kernel is budgeted against. It reaches into the package's operators.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            first = _PRODUCTS[func]
            args = (*args[:first], *map(self._round, args[first : first + 2]), *args[first + 2 :])
        if func.namespace == "nl_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).to(x.dtype) if x.dtype == torch.float32 else x


class GuardedBuffer:
    """A tensor of NaN between two guard bands: shows elements never written and writes outside of it.

    ``buffer.tensor`` is a contiguous view to pass to a kernel; :meth:`check` then asserts that every element
    was written and that the guards are untouched.
    """

    GUARD = 256
    SENTINEL = -1234.5

    def __init__(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        size = torch.Size(shape).numel()
        self._storage = torch.full((size + 2 * self.GUARD,), self.SENTINEL, dtype=dtype, device=device)
        self.tensor = self._storage[self.GUARD : self.GUARD + size].view(*shape)
        self.tensor.fill_(float("nan"))

    @classmethod
    def holding(cls, values: torch.Tensor) -> GuardedBuffer:
        """A guarded copy of ``values``, to pass as an input."""
        buffer = cls(values.shape, dtype=values.dtype, device=values.device)
        buffer.tensor.copy_(values)
        return buffer

    def check(self, name: str = "buffer") -> None:
        """Assert that the tensor holds no NaN and that both guard bands are untouched."""
        assert not torch.isnan(self.tensor).any(), f"{name}: elements were not written"
        size = self.tensor.numel()
        guards = torch.cat([self._storage[: self.GUARD], self._storage[self.GUARD + size :]])
        sentinel = torch.tensor(self.SENTINEL, dtype=guards.dtype)
        assert (guards == sentinel.to(guards.device)).all(), f"{name}: written outside of its bounds"
