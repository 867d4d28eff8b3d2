"""The chunked kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest
import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.catalogue import catalogue
from nl_kernels.triton_support.ahead_of_time import compile_call
from nl_kernels.triton_support.resources import resources_of
from nl_kernels.triton_support.targets import TARGETS

pytestmark = pytest.mark.aot

KERNELS = {"linear_forward", "linear_backward", "two_layer_forward", "two_layer_backward"}


def compiled(architecture, kernel, variant):
    found = [e for e in catalogue(architecture) if (e.kernel, e.variant) == (kernel, variant)]
    assert len(found) == 1, f"the catalogue has {len(found)} of {kernel} {variant}"
    return within_limits(architecture, found[0])


def within_limits(architecture, entry):
    resources = resources_of(compile_call(entry.call, architecture))
    assert resources.shared_bytes <= TARGETS[architecture].shared_memory
    assert resources.scalar_products == 0
    return resources


def test_the_default_forward_pass_on_hopper():
    found = compiled("sm_90", "linear_forward", "bfloat16 64xlinear C16 running default")
    assert found.spill_bytes <= 512
    assert set(found.tensor_core) == {"wgmma", "mma"}


@pytest.mark.parametrize(("architecture", "kind"), [("sm_80", "mma"), ("gfx942", "mfma")])
def test_other_architectures(architecture, kind):
    found = compiled(architecture, "linear_forward", "bfloat16 64xlinear C16 running default")
    assert set(found.tensor_core) == {kind}


def test_the_default_backward_pass_on_hopper():
    found = compiled("sm_90", "linear_backward", "bfloat16 64xlinear C16 running default")
    assert found.spill_bytes <= 3200
    assert set(found.tensor_core) == {"wgmma", "mma"}


def test_two_layers_on_hopper():
    found = compiled("sm_90", "two_layer_forward", "bfloat16 64x64 C16 running default")
    assert found.spill_bytes <= 1024
    assert set(found.tensor_core) == {"wgmma", "mma"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_every_kernel_fits_its_architecture(architecture):
    entries = [e for e in catalogue(architecture) if e.kernel in KERNELS]
    assert len(entries) >= 4
    for entry in entries:
        within_limits(architecture, entry)


def test_catalogue_has_every_kernel_rule_and_read():
    entries = [e for e in catalogue("sm_90") if e.kernel != "step"]
    assert {e.kernel for e in entries} == KERNELS
    words = {word for e in entries for word in e.variant.split()}
    assert words >= {"bfloat16", "float32", "default", "literal", "titans", "gelu", "snapshot", "running"}


@pytest.mark.parametrize("architecture", TARGETS)
def test_limits_are_a_table_of_powers_of_two(architecture):
    for linear in (True, False):
        longest, none = launch.limits_of(linear=linear, chunk=1000, architecture=architecture)
        assert none == 0
        widest = [
            launch.limits_of(linear=linear, chunk=chunk, architecture=architecture)[1]
            for chunk in range(1, longest + 1)
        ]
        assert widest == sorted(widest, reverse=True)
        assert all(width & (width - 1) == 0 for width in widest)
        call = {"rule": MemoryRule(), "dtype": torch.float32, "hidden": None if linear else 17, "chunk": 1}
        call |= {"momentum": False, "architecture": architecture}
        assert launch.why_not(**call, width=16) is None
        assert "up to" in launch.why_not(**call, width=129)
