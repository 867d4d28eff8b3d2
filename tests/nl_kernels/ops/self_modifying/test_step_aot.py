"""The one-token kernel compiles for GPUs that are not here, within what those GPUs have."""

import pytest

from nl_kernels.ops.self_modifying.catalogue import catalogue
from nl_kernels.triton_support.ahead_of_time import compile_call
from nl_kernels.triton_support.resources import resources_of
from nl_kernels.triton_support.targets import TARGETS

pytestmark = pytest.mark.aot


def compiled(architecture, variant):
    found = [e for e in catalogue(architecture) if (e.kernel, e.variant) == ("step", variant)]
    assert len(found) == 1, f"the catalogue has {len(found)} of {variant}"
    resources = resources_of(compile_call(found[0].call, architecture))
    assert resources.shared_bytes <= TARGETS[architecture].shared_memory
    assert resources.products == 0
    return resources


# Bytes a thread may spill; matrices of 128 x 128 fill the registers.
STEPS = {"64xlinear": 0, "64x64": 0, "64x128": 128, "128xlinear": 512}


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
    found = compiled("sm_90", f"bfloat16 {sizes} running default{momentum}")
    assert found.spill_bytes <= STEPS[sizes]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
def test_the_step_on_other_architectures(architecture):
    assert compiled(architecture, "bfloat16 64xlinear running default").spill_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_every_variant(architecture):
    for entry in catalogue(architecture):
        if entry.kernel == "step":
            compiled(architecture, entry.variant)
