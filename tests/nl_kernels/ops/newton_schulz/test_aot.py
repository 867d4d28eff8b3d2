"""The kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest
import torch

from nl_kernels.ops.newton_schulz import launch
from nl_kernels.triton_support.targets import TARGETS
from tools.ahead_of_time import compile_call
from tools.catalogue.newton_schulz import catalogue
from tools.kernel_resources import resources_of

pytestmark = pytest.mark.aot

PARTS = ("gram", "polynomial", "update")
KINDS = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def compiled(architecture, variant):
    (call,) = (e.call for e in catalogue(architecture) if e.variant == variant)
    resources = resources_of(compile_call(call, architecture))
    assert resources.shared_bytes <= TARGETS[architecture].shared_memory
    assert resources.scalar_products == 0
    return resources


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", ["24x1024x4096", "3x112x144"])
def test_hopper_uses_tensor_cores_and_spills_nothing(shape, part):
    found = compiled("sm_90", f"bfloat16 {shape} {part}")
    assert found.spill_bytes == 0
    assert found.products == 1
    assert set(found.tensor_core) == {"wgmma"}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("part", ["polynomial", "update"])
def test_other_architectures(architecture, part):
    found = compiled(architecture, f"bfloat16 24x1024x4096 {part}")
    assert found.spill_bytes == 0
    assert set(found.tensor_core) == {KINDS[architecture]}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype):
    assert compiled("sm_90", f"{dtype} 1x1024x1024 update").tensor_core


def test_catalogue_has_every_kernel_and_dtype():
    entries = list(catalogue("sm_90"))
    assert {e.kernel for e in entries} == {"symmetric_product", "update"}
    words = {word for e in entries for word in e.variant.split()}
    assert words >= {"bfloat16", "float16", "float32", *PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    for entry in catalogue(architecture):
        found = resources_of(compile_call(entry.call, architecture))
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, entry.variant
        assert found.scalar_products == 0, entry.variant
        assert found.spill_bytes <= 16, entry.variant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", TARGETS)
def test_launch_parameters_are_tiles_the_compiler_takes(architecture, dtype):
    for kernel in ("symmetric_product", "update"):
        for count, rows, columns in ((1, 1, 1), (1, 16, 16), (1, 65, 4000), (500, 100, 100), (1, 9000, 9000)):
            config = launch.config_of(kernel, count, rows, columns, dtype, architecture)
            for block in (config.block_m, config.block_n, config.block_k):
                assert block >= 16
                assert block & (block - 1) == 0
    # Many tiles: the largest ones; few: smaller ones that fill the device; a small matrix: little padding.
    largest = 64 if dtype == torch.float32 else 128
    assert launch.config_of("update", 24, 1024, 4096, dtype, architecture).block_m == largest
    assert launch.config_of("symmetric_product", 1, 1024, 1024, dtype, architecture).block_m == 64
    assert launch.config_of("symmetric_product", 1000, 16, 16, dtype, architecture).block_m == 32
