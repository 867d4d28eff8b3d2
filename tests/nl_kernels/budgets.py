"""Error budgets and guarded buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
