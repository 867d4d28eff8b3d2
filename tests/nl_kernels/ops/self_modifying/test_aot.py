"""The kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest

from nl_kernels.triton_support.targets import TARGETS
from tests.nl_kernels.compiled import BEFORE_3_7, compiled, within_limits
from tools.catalogue import CATALOGUES

pytestmark = pytest.mark.aot

catalogue = CATALOGUES["self_modifying"]

DEFAULT = "bfloat16 64xlinear C16 running default"


def test_the_default_on_hopper():
    # Triton 3.6 moves operands through shared memory, which costs registers.
    allowed = (96, 800) if BEFORE_3_7 else (16, 64)
    for kernel, spills, shared in zip(("learn", "learn_adjoint"), allowed, (48, 100)):
        found = compiled(catalogue, "sm_90", kernel, DEFAULT)
        assert found.spill_bytes <= spills
        assert found.shared_bytes <= shared * 1024
        assert set(found.tensor_core) == {"mma"}  # warps do not wait for one another in a product


@pytest.mark.parametrize(("architecture", "kind"), [("sm_80", "mma"), ("gfx942", "mfma")])
def test_other_architectures(architecture, kind):
    found = compiled(catalogue, architecture, "learn", "bfloat16 32xlinear C16 running default")
    assert set(found.tensor_core) == {kind}


def test_catalogue_has_every_kernel_rule_and_read():
    entries = list(catalogue("sm_90"))
    assert {e.kernel for e in entries} == {"learn", "learn_adjoint"}
    words = {word for e in entries for word in e.variant.split()}
    assert words >= {"bfloat16", "float32", "default", "literal", "titans", "gelu", "snapshot", "running"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    for entry in catalogue(architecture):
        within_limits(architecture, entry)
