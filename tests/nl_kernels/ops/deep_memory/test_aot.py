"""The kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest
import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.deep_memory import launch
from nl_kernels.ops.deep_memory.catalogue import catalogue
from nl_kernels.triton_support.ahead_of_time import compile_call
from nl_kernels.triton_support.resources import resources_of
from nl_kernels.triton_support.targets import TARGETS, TENSOR_MEMORY

pytestmark = pytest.mark.aot


def compiled(architecture, kernel, variant):
    found = [e for e in catalogue(architecture) if (e.kernel, e.variant) == (kernel, variant)]
    assert len(found) == 1, f"the catalogue has {len(found)} of {kernel} {variant}"
    resources = resources_of(compile_call(found[0].call, architecture))
    assert resources.shared_bytes <= TARGETS[architecture].shared_memory
    assert resources.tensor_memory <= TENSOR_MEMORY
    assert resources.scalar_products == 0
    return resources


# Products before unrolling: what must be on tensor cores.
FORWARD = {"64xlinear C16 running": 8, "64x64 C16 snapshot": 16, "64x64 C16 running": 22}


@pytest.mark.parametrize("sizes", FORWARD)
def test_hopper_spills_nothing_in_small_chunks(sizes):
    found = compiled("sm_90", "deep_memory_forward", f"bfloat16 {sizes} default")
    assert found.spill_bytes == 0
    assert found.products == FORWARD[sizes]
    assert "wgmma" in found.tensor_core


def test_hopper_spills_little_in_larger_chunks():
    found = compiled("sm_90", "deep_memory_forward", "bfloat16 64x64 C64 snapshot default")
    assert found.spill_bytes <= 128
    assert set(found.tensor_core) == {"wgmma"}


def test_the_backward_kernel_of_a_linear_memory():
    found = compiled("sm_90", "deep_memory_backward", "bfloat16 64xlinear C16 running default")
    assert found.spill_bytes == 0
    assert found.products == 29


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [pytest.param("sm_80", "mma", marks=pytest.mark.slow), ("sm_100", "tcgen05"), ("gfx942", "mfma")],
)
def test_other_architectures(architecture, kind):
    found = compiled(architecture, "deep_memory_forward", "bfloat16 64x64 C16 running default")
    assert kind in found.tensor_core


# Bytes a thread may spill; matrices of 128 x 128 fill the registers.
STEPS = {"64xlinear": 0, "64x64": 0, "128x128": 128}


# With momentum there is more to hold: without it every day where there is least.
@pytest.mark.parametrize(
    ("sizes", "momentum"),
    [
        pytest.param(s, m, marks=() if m or s == "64xlinear" else pytest.mark.slow)
        for s in STEPS
        for m in ("", " momentum")
    ],
)
def test_the_step_holds_whole_matrices_in_registers(sizes, momentum):
    found = compiled("sm_90", "step", f"bfloat16 {sizes} running default{momentum}")
    assert found.spill_bytes <= STEPS[sizes]
    assert found.products == 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
def test_the_step_on_other_architectures(architecture):
    assert compiled(architecture, "step", "bfloat16 64x64 running default").spill_bytes == 0


def test_catalogue_has_every_kernel_and_every_rule_and_read():
    entries = list(catalogue("sm_90"))
    kernels = {"erase_chunks", "deep_memory_forward", "deep_memory_backward", "step"}
    assert {e.kernel for e in entries} == kernels
    words = {word for e in entries for word in e.variant.split()}
    assert words >= {"bfloat16", "float32", "default", "literal", "titans", "gelu", "snapshot", "running"}


@pytest.mark.parametrize("architecture", TARGETS)
def test_what_is_too_large_is_refused_with_the_limit(architecture):
    call = {"rule": MemoryRule(), "has_momentum": False, "dtype": torch.float32, "architecture": architecture}
    sizes = {"key_dim": 16, "value_dim": 16, "hidden": 16, "chunk_size": 16}
    longest = 64 if launch.widest(64, architecture) else 16
    refused = launch.unsupported(**call, **{**sizes, "chunk_size": 1000})
    assert (
        refused == f"chunk_size: on {architecture} the Triton kernels take chunks up to {longest}, got 1000"
    )
    for chunk in (16, longest):
        limit = launch.widest(chunk, architecture)
        for name, argument in (("key_dim", "q, k"), ("value_dim", "v"), ("hidden", "weights")):
            fits = {**sizes, "chunk_size": chunk, name: limit}
            assert launch.unsupported(**call, **fits) is None
            refused = launch.unsupported(**call, **{**fits, name: limit + 1})
            assert refused.startswith(f"{argument}: on {architecture} with chunks of {chunk} ")
            assert refused.endswith(f"up to {limit} wide, got {limit + 1}")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    for entry in catalogue(architecture):
        found = resources_of(compile_call(entry.call, architecture))
        label = f"{entry.kernel} {entry.variant}"
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, label
        assert found.tensor_memory <= TENSOR_MEMORY, label
        assert found.scalar_products == 0, label
