"""The kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest
import torch

from nl_kernels import DeepMemoryWeights, MemoryRule
from nl_kernels.memory.kernels import call
from nl_kernels.memory.kernels.launch import limits_of
from nl_kernels.triton_support.targets import TARGETS
from tests.nl_kernels.compiled import BEFORE_3_7, compiled, within_limits
from tools.catalogue import CATALOGUES

pytestmark = pytest.mark.aot

catalogue = CATALOGUES["deep_memory"]

# Bytes a thread may spill, forward (8 from Triton 3.9 on) and backward.
SPILLS = {"64xlinear C16 running": (0, 0), "64x64 C16 running": (8, 1200 if BEFORE_3_7 else 800)}


@pytest.mark.parametrize("sizes", SPILLS)
def test_hopper_spills_little(sizes):
    for kernel, most in zip(("learn", "learn_adjoint"), SPILLS[sizes]):
        found = compiled(catalogue, "sm_90", kernel, f"bfloat16 {sizes} default")
        assert found.spill_bytes <= most
        assert set(found.tensor_core) == {"mma"}  # warps do not wait for one another in a product


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [pytest.param("sm_80", "mma", marks=pytest.mark.slow), ("sm_100", "mma"), ("gfx942", "mfma")],
)
def test_other_architectures(architecture, kind):
    found = compiled(catalogue, architecture, "learn", "bfloat16 64x64 C16 running default")
    assert set(found.tensor_core) == {kind}


def test_catalogue_has_every_kernel_and_every_rule_and_read():
    entries = list(catalogue("sm_90"))
    assert {e.kernel for e in entries} == {"learn", "learn_adjoint"}
    words = {word for e in entries for word in e.variant.split()}
    assert words >= {"bfloat16", "float32", "default", "literal", "titans", "gelu", "snapshot", "running"}


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("self_made", [False, True])
def test_limits_are_a_table_of_powers_of_two(architecture, self_made, monkeypatch):
    for linear in (True, False):
        kind = {"self_made": self_made, "linear": linear, "architecture": architecture}
        longest, none = limits_of(**kind, chunk=1000)
        assert none == 0
        widest = [limits_of(**kind, chunk=chunk)[1] for chunk in range(1, longest + 1)]
        assert widest == sorted(widest, reverse=True)
        assert all(width & (width - 1) == 0 for width in widest)
        monkeypatch.setattr(call, "architecture_of", lambda device: architecture)
        for width, refused in ((16, False), (129, True)):
            tokens = (*(torch.empty(1, 1, 1, width, device="meta") for _ in range(3)), None)
            weights = DeepMemoryWeights(
                torch.empty(1, 16, width), None if linear else torch.empty(1, width, 16)
            )
            weights = (weights,) * 5 if self_made else weights
            why = call.unsupported("q", tokens, weights, None, MemoryRule(), 1)
            assert "up to" in why if refused else why is None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    for entry in catalogue(architecture):
        within_limits(architecture, entry)
