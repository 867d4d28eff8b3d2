"""What the launchers of the chunked memories have in common."""

from __future__ import annotations

import torch


def precision_of(dtype: torch.dtype, architecture: str) -> str:
    """How products compute (a name of :func:`triton_support.language.matmul`) for callers of ``dtype``.

    Operands are fp32 in any case. tf32 has the mantissa of fp16 and two bits more than bf16. fp32: three-pass
    tf32 on NVIDIA (about 2^-21 a product, on tensor cores), plain fp32 matrix instructions on AMD.
    """
    if architecture.startswith("gfx"):
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
