"""The kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest
import torch

from nl_kernels.ops.delta_memory import launch
from nl_kernels.ops.delta_memory.triton_forward import plan_forward
from nl_kernels.triton_support.targets import TARGETS
from tools.ahead_of_time import compile_call
from tools.catalogue.delta_memory import catalogue
from tools.catalogue.entry import unallocated
from tools.kernel_resources import resources_of

pytestmark = pytest.mark.aot

# Products per kernel before unrolling, at C = 64: what must be on tensor cores.
PLAIN = {
    "solve_chunks": 13,
    "scan_chunks": 2,
    "read_chunks": 3,
    "read_gradients": 4,
    "scan_gradients": 3,
    "solve_gradients": 4,
    "state_gradients": 6,
    "rate_gradients": 0,
    "step": 0,
}


def entries(architecture, variant):
    """The catalogue's entries of one variant by kernel (of the two solves, the one that keeps T)."""
    found = {e.kernel: e.call for e in catalogue(architecture) if e.variant == variant}
    assert found, f"the catalogue has no {variant}"
    return found


def compiled(architecture, variant, kernel):
    resources = resources_of(compile_call(entries(architecture, variant)[kernel], architecture))
    assert resources.shared_bytes <= TARGETS[architecture].shared_memory
    assert resources.scalar_products == 0
    return resources


@pytest.mark.parametrize("kernel", PLAIN)
@pytest.mark.parametrize("width", ["64x64", "128x128"])
def test_hopper_uses_tensor_cores_spills_nothing_and_holds_two_programs(kernel, width):
    found = compiled("sm_90", f"bfloat16 {width} after", kernel)
    assert found.spill_bytes == 0
    assert found.resident >= 2
    assert found.products == PLAIN[kernel]
    # The solve's blocks of 16 × 16 are too small for wgmma.
    kinds = {"mma", "wgmma"} if kernel == "solve_chunks" else {"wgmma"} if PLAIN[kernel] else set()
    assert set(found.tensor_core) == kinds


@pytest.mark.parametrize("kernel", ["state_gradients", "step"])
def test_kernels_of_shared_keys_spill_nothing_and_hold_two_programs(kernel):
    found = compiled("sm_90", "bfloat16 128x128 after shared", kernel)
    assert found.spill_bytes == 0
    assert found.resident >= 2


@pytest.mark.parametrize("architecture", TARGETS)
def test_value_tiles_are_smaller_when_states_are_few(architecture):
    """A scan has a program for each state and tile: with few states, more tiles use more multiprocessors."""
    for kernel in ("scan_chunks", "scan_gradients"):
        options = {"dtype": torch.bfloat16, "architecture": architecture, "has_momentum": False}
        few, many = (
            launch.config_of(kernel, key_dim=64, value_dim=64, rows=rows, **options).block_v
            for rows in (16, 1000)
        )
        assert (few, many) == ((16, 16) if architecture == "gfx942" else (16, 32))


@pytest.mark.parametrize("kernel", PLAIN)
@pytest.mark.parametrize("width", ["64x64", "128x128"])
def test_hopper_with_momentum_spills_nothing_and_holds_two_programs(kernel, width):
    found = compiled("sm_90", f"bfloat16 {width} momentum after", kernel)
    assert found.spill_bytes <= (16 if kernel == "state_gradients" else 0)  # from Triton 3.8 on
    assert found.resident >= 2
    assert bool(found.tensor_core) == (kernel != "step")


@pytest.mark.parametrize("kernel", ["scan_chunks", "solve_gradients"])
@pytest.mark.parametrize(
    ("architecture", "kind"), [("sm_80", "mma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_other_architectures(architecture, kind, kernel):
    found = compiled(architecture, "bfloat16 64x64 after", kernel)
    assert set(found.tensor_core) == {kind}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype):
    assert compiled("sm_90", f"{dtype} 128x128 after", "read_chunks").tensor_core


def test_catalogue_has_every_kernel_option_and_dtype():
    entries = list(catalogue("sm_90"))
    assert {e.kernel for e in entries} == {*PLAIN, "join_segments"}
    words = {word for e in entries for word in e.variant.split()}
    assert words >= {
        "bfloat16",
        "float16",
        "float32",
        "momentum",
        "before",
        "packed",
        "shared",
        "long",
        "256x256",
        "40x24",
    }


def test_what_is_planned_once_is_of_one_signature():
    """The same call again takes its numbers from the first; another length, option or dtype has its own."""

    def planned(tokens=96, read="running", dtype=torch.bfloat16, chunk_size=64):
        token = unallocated(1, tokens, 2, 32, dtype=dtype)
        inputs = [token] * 3 + [unallocated(1, tokens, 2)] * 2 + [None] * 4
        options = {"scale": 1.0, "read": read, "chunk_size": chunk_size, "architecture": "sm_90"}
        return plan_forward(*inputs, **options)[0]

    first = planned()
    for before, call in zip(first, planned(), strict=True):
        assert call.constants is before.constants
        assert call.grid == before.grid
        assert call.arguments.keys() == before.arguments.keys()
    solve, _, read = planned(tokens=160)
    assert (solve.grid, first[0].grid) == ((3 * 2, 1), (2 * 2, 1))
    assert (read.arguments["T"], first[2].arguments["T"]) == (160, 96)
    assert (planned(read="before")[2].constants["BEFORE"], first[2].constants["BEFORE"]) == (True, False)
    assert planned(dtype=torch.float16)[0].constants["STATE"] == "rounded tf32"
    assert planned(chunk_size=16)[0].constants["BLOCK_C"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    limit = TARGETS[architecture].shared_memory
    for entry in catalogue(architecture):
        found = resources_of(compile_call(entry.call, architecture))
        label = f"{entry.kernel} {entry.variant}"
        assert found.shared_bytes <= limit, label
        assert found.scalar_products == 0, label
        if architecture == "sm_90" and "bfloat16" in label and "256" not in label:
            assert found.spill_bytes == 0, label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [1, 16, 33, 64, 128, 200, 256])
@pytest.mark.parametrize("architecture", TARGETS)
def test_launch_parameters_are_tiles_the_compiler_takes(architecture, dim, dtype):
    for kernel in PLAIN:
        for has_momentum in (False, True):
            config = launch.config_of(
                kernel,
                key_dim=dim,
                value_dim=dim,
                dtype=dtype,
                architecture=architecture,
                has_momentum=has_momentum,
                rows=16,
            )
            for block in (config.block_k, config.block_v):
                assert block >= 16
                assert block & (block - 1) == 0
            if kernel.startswith("scan") or kernel == "step":
                assert config.block_k >= dim
    for has_momentum in (False, True):
        assert launch.chunk_rows(1, dtype, has_momentum) == 16
        assert launch.chunk_rows(20, dtype, has_momentum) == 32
        assert launch.chunk_rows(1000, dtype, has_momentum) <= 64
