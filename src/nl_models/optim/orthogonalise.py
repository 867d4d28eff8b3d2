"""Newton–Schulz on many matrices at once: equal shapes in one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from nl_kernels import newton_schulz


def orthogonalise(
    tensors: Sequence[torch.Tensor],
    *,
    steps: int,
    coefficients: str | Sequence[Sequence[float]],
    eps: float,
    compute_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """:func:`nl_kernels.newton_schulz` of each tensor [..., m, n], in the same order, shapes and dtypes.

    One call serves all matrices of a size, device and dtype; a tall one counts as its transpose.

    Args:
        compute_dtype: of the products; None: bf16 on accelerators, the tensor's dtype on the CPU.
    """
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        buckets[(*sorted(tensor.shape[-2:]), tensor.device, tensor.dtype)].append(i)
    results: list[torch.Tensor] = list(tensors)
    for (rows, columns, device, dtype), members in buckets.items():
        wide = [_wide(tensors[i]).reshape(-1, rows, columns) for i in members]
        done = newton_schulz(
            torch.cat(wide) if len(wide) > 1 else wide[0],
            steps=steps,
            coefficients=coefficients,
            eps=eps,
            compute_dtype=compute_dtype_of(compute_dtype, device, dtype),
        )
        for i, part in zip(members, done.split([x.shape[0] for x in wide])):
            like = _wide(tensors[i])
            results[i] = _wide_as(part.reshape(like.shape), tensors[i])
    return results


def compute_dtype_of(asked: torch.dtype | None, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """``asked``, or bf16 on accelerators and ``dtype`` on the CPU (and for fp64)."""
    if asked is not None:
        return asked
    return dtype if device.type == "cpu" or dtype == torch.float64 else torch.bfloat16


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT if tensor.shape[-2] > tensor.shape[-1] else tensor


def _wide_as(wide: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_wide`."""
    return wide.mT if like.shape[-2] > like.shape[-1] else wide
