"""The architectures that launch tables and the ahead-of-time compiler know, and their limits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """One architecture to compile for.

    Attributes:
        backend, compiler_arch, threads_per_warp: what ``triton.backends.compiler.GPUTarget`` takes.
        shared_memory: bytes a program may use.
        multiprocessors: how many programs it takes to use the largest part of this kind.
    """

    backend: str
    compiler_arch: int | str
    threads_per_warp: int
    shared_memory: int
    multiprocessors: int


TENSOR_MEMORY = 512  # columns a program may use, where there is tensor memory (sm_100)

TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 108),
    "sm_89": Target("cuda", 89, 32, 99 * 1024, 142),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 132),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 148),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 304),
}


def architecture_of(device: torch.device) -> str:
    """The name in :data:`TARGETS` whose launch tables serve ``device``.

    The newest listed one that is not newer than the device; all consumer and workstation parts (sm_86, sm_89,
    sm_120) have sm_89's shared memory. Off CUDA (under the interpreter) it is sm_90.

    Raises:
        RuntimeError: an NVIDIA GPU older than sm_80, which has no products in bf16 and tf32.
    """
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((9, 0), (10, 0), (10, 3)):
        return "sm_90" if major == 9 else "sm_100"
    if major < 8:
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0 or later, {device} has {major}.{minor}; use "
            "impl='eager'"
        )
    return "sm_89" if major == 12 or (major, minor) in ((8, 6), (8, 9)) else "sm_80"


def precision_of(dtype: torch.dtype, architecture: str) -> str:
    """How products compute (a name of :func:`triton_support.language.matmul`) for callers of ``dtype``.

    Operands are fp32 in any case. tf32 has the mantissa of fp16 and two bits more than bf16. fp32: three-pass
    tf32 on NVIDIA (about 2^-21 a product, on tensor cores), plain fp32 matrix instructions on AMD.
    """
    if architecture.startswith("gfx"):
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
