"""Batched PyTorch: the CPU path, and what the kernels are measured against.

A step is ``X ← P X`` with ``P = aI + bA + cA²``, ``A = XXᵀ``. In fp32 and fp64 several steps may share one
product with X: every ``P`` is a polynomial of the first ``A``, so with ``A ← P A P`` and ``Q ← P Q`` only
matrices of the short side are multiplied until ``X ← Q X`` ends the group. What that may cost in accuracy is
bounded by :func:`group_lengths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nl_kernels.ops.newton_schulz.coefficients import Triple
from nl_kernels.ops.newton_schulz.stack import normalised, restored, wide_stack

# Elements of X that are worked on together, so that they and the square matrices stay in a core's cache.
_CPU_ELEMENTS = 2**18
# A direction that the matrix lacks has rounding noise in A, of either sign; P A P raises it by a² a step, and
# what is still small against 1 then does no harm.
_NOISE = 1e-2


def newton_schulz(
    x: torch.Tensor, schedule: Sequence[Triple], eps: float, compute_dtype: torch.dtype
) -> torch.Tensor:
    """All steps on x [..., m, n]; operands and results of products in ``compute_dtype``."""
    stack = wide_stack(x)
    count, rows, columns = stack.shape
    on_cpu = stack.device.type == "cpu"
    blocks = symmetric_blocks(rows) if on_cpu else 1
    together = max(1, _CPU_ELEMENTS // (rows * columns)) if on_cpu else count
    groups = list(groups_of(schedule, rows, columns, compute_dtype, blocks))
    out = stack.new_empty(stack.shape)
    for source, target in zip(stack.split(together), out.split(together)):
        part = normalised(source, eps, compute_dtype)
        for group in groups:
            part = _grouped(part, group, blocks) if len(group) > 1 else _step(part, group[0], blocks)
        target.copy_(part)
    return restored(out, x)


def symmetric_blocks(rows: int) -> int:
    """Row blocks of a symmetric product on the CPU; 1 where more calls cost more than they save."""
    return 4 if rows >= 256 else 2 if rows >= 128 else 1


def groups_of(
    schedule: Sequence[Triple], rows: int, columns: int, dtype: torch.dtype, blocks: int
) -> Iterator[Sequence[Triple]]:
    """The steps cut into groups that share their products with X; groups of one where that pays nothing."""
    start = 0
    for length in group_lengths(schedule, dtype):
        group = schedule[start : start + length]
        start += length
        if _grouped_flops(length, rows, columns, blocks) < length * _step_flops(rows, columns, blocks):
            yield group
        else:
            yield from ([triple] for triple in group)


def group_lengths(schedule: Sequence[Triple], dtype: torch.dtype) -> Iterator[int]:
    """Steps that may share products with X: until noise of one unit in the last place has grown to 1 %."""
    if dtype not in (torch.float32, torch.float64):
        yield from (1 for _ in schedule)
        return
    length, growth = 0, torch.finfo(dtype).eps
    for a, _, _ in schedule:
        if length and growth > _NOISE:
            yield length
            length, growth = 0, torch.finfo(dtype).eps
        length += 1
        growth *= a * a
    yield length


def _step(x: torch.Tensor, triple: Triple, blocks: int) -> torch.Tensor:
    a, b, c = triple
    gram = _symmetric_product(x, x.mT, blocks)
    return torch.baddbmm(x, _polynomial(gram, b, c, blocks), x, beta=a)


def _grouped(x: torch.Tensor, group: Sequence[Triple], blocks: int) -> torch.Tensor:
    gram, total = _symmetric_product(x, x.mT, blocks), None
    for i, (a, b, c) in enumerate(group):
        factor = _polynomial(gram, b, c, blocks)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        if i + 1 < len(group):
            gram = _symmetric_product(_symmetric_product(factor, gram, blocks), factor, blocks)
        # Symmetric as well but for rounding, and not taken so: it is large where X is small, and only in this
        # order does the error of a factor meet the product of the others with X, which is not.
        total = factor if total is None else torch.bmm(factor, total)
    return torch.bmm(total, x)


def _polynomial(gram: torch.Tensor, b: float, c: float, blocks: int) -> torch.Tensor:
    """``bA + cA²``."""
    if blocks == 1:
        return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return _symmetric_product(gram, gram, blocks).mul_(c).add_(gram, alpha=b)


def _symmetric_product(left: torch.Tensor, right: torch.Tensor, blocks: int) -> torch.Tensor:
    """``left @ right``, known to be symmetric: blocks below the diagonal are computed, then mirrored."""
    if blocks == 1:
        return torch.bmm(left, right)
    count, rows, _ = left.shape
    out = left.new_empty(count, rows, rows)
    size = -(-rows // blocks)
    for start in range(0, rows, size):
        end = min(rows, start + size)
        out[:, start:end, :end] = torch.bmm(left[:, start:end], right[:, :, :end])
        out[:, :start, start:end] = out[:, start:end, :start].mT
    return out


def _step_flops(rows: int, columns: int, blocks: int) -> float:
    share = (blocks + 1) / (2 * blocks)
    return 2 * rows**2 * (share * (columns + rows) + columns)


def _grouped_flops(steps: int, rows: int, columns: int, blocks: int) -> float:
    share = (blocks + 1) / (2 * blocks)
    square = steps * share + (steps - 1) * (1 + 2 * share)
    return 2 * rows**2 * ((share + 1) * columns + square * rows)
