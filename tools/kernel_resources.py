"""What a compiled kernel takes of a GPU, read from its machine code: registers, spills, shared memory, and
whether its products run on tensor cores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nl_kernels.triton_support.targets import TARGETS

_TENSOR_CORE = {
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "tcgen05": re.compile(r"\btcgen05\.mma\b"),
    "mma": re.compile(r"\bmma\.sync"),
    "mfma": re.compile(r"\bv_mfma_"),
}


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a compiled kernel.

    Attributes:
        registers: 32-bit registers a thread.
        spill_bytes: bytes a thread keeps in local memory (stack included) for want of registers.
        shared_bytes: shared memory.
        resident: programs that fit a multiprocessor at once; 0 on AMD, where it is not reckoned.
        instructions, barriers: in the machine code, each one once; 0 on AMD.
        tensor_memory: columns of tensor memory, where there is any (sm_100).
        products: matrix products in the kernel, before unrolling.
        scalar_products: those of them compiled to scalar multiply-adds instead of matrix instructions.
        tensor_core: matrix instructions by kind.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    resident: int
    instructions: int
    barriers: int
    tensor_memory: int
    products: int
    scalar_products: int
    tensor_core: dict[str, int]


def resources_of(compiled: Any) -> Resources:
    """Read the resources of what :func:`tools.ahead_of_time.compile_call` returned."""
    asm = compiled.asm
    products, scalar = _count_products(asm["ttgir"])
    shared = compiled.metadata.shared
    resident = instructions = barriers = 0
    if "cubin" in asm:
        text = asm["ptx"]
        usage = _nvidia_code(asm["cubin"])
        fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        registers, spills = fields["REG"], fields["STACK"] + fields["LOCAL"]
        resident = _resident(registers, compiled.metadata.num_warps, shared, compiled.metadata.target.arch)
        code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?(\w+)", usage, re.MULTILINE)
        instructions, barriers = len(code), code.count("BAR")
    else:
        text = asm["amdgcn"]
        registers = _amd_field(text, "vgpr_count")
        spills = _amd_field(text, "private_segment_fixed_size")
    counts = {name: len(pattern.findall(text)) for name, pattern in _TENSOR_CORE.items()}
    return Resources(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        resident=resident,
        instructions=instructions,
        barriers=barriers,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        products=products,
        scalar_products=scalar,
        tensor_core={name: count for name, count in counts.items() if count},
    )


def _count_products(ttgir: str) -> tuple[int, int]:
    """Products in Triton's GPU IR, and those whose result has no matrix-instruction layout."""
    products = scalar = 0
    for line in ttgir.splitlines():
        if re.search(r"ttng\.warp_group_dot |ttng\.tc_gen5_mma", line):
            products += 1
        elif "tt.dot " in line:
            products += 1
            result = line.rsplit("->", 1)[-1]
            scalar += "#blocked" in result
    return products, scalar


def _nvidia_code(cubin: bytes) -> str:
    """What a kernel uses, and its machine code, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resident(registers: int, warps: int, shared: int, capability: int) -> int:
    """Programs that fit a multiprocessor: its 65,536 registers (256 at a time, to a warp), shared memory."""
    (target,) = (t for t in TARGETS.values() if t.compiler_arch == capability)
    warps_held = 48 if capability == 89 else 64
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = (target.shared_memory + 1024) // (shared + 1024)
    return min(by_registers, by_shared, warps_held // warps, 24 if capability == 89 else 32)


def _amd_field(text: str, name: str) -> int:
    return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))
