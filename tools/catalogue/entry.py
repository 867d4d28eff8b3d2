"""An entry of the catalogue, and tensors to plan its call with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nl_kernels.triton_support.kernel_call import KernelCall


@dataclass(frozen=True)
class CatalogueEntry:
    """A kernel call to compile ahead of time.

    Attributes:
        op: the op's folder.
        variant: dtype, widths and options, in words, for tables and test names.
        call: the planned call, on meta tensors.
    """

    op: str
    variant: str
    call: KernelCall

    @property
    def kernel(self) -> str:
        return self.call.kernel.__name__.removesuffix("_kernel")


def unallocated(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor to plan calls with: it takes no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
