"""Which launch tables serve which GPU, and that the smaller ones have the memory that their kernels need."""

import pytest
import torch

from nl_kernels.triton_support.targets import TARGETS, architecture_of
from tests.nl_kernels import planned_calls as planned
from tools.ahead_of_time import compile_call

CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_89",
    (8, 7): "sm_80",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (11, 0): "sm_80",
    (12, 0): "sm_89",
    (12, 1): "sm_89",
}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
def test_the_tables_of_a_gpu(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture_of(torch.device("cuda", 0)) == CAPABILITIES[capability]


def test_a_gpu_without_the_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        RuntimeError, match=r"compute capability 8.0 or later, cuda:1 has 7.5; use impl='eager'"
    ):
        architecture_of(torch.device("cuda", 1))


# Those with the largest tiles.
CALLS = {
    "newton_schulz": (planned.newton_schulz_calls, (24, 1024, 4096), slice(1, 3)),
    "continuum": (planned.continuum_calls, (8, 64, 1024, 16_384), slice(10, 11)),
}


@pytest.mark.aot
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_consumer_gpus_have_the_shared_memory(calls, monkeypatch):
    monkeypatch.setattr(planned, "ARCHITECTURE", "sm_89")
    plan, sizes, part = calls
    for call in plan(*sizes)[part]:
        assert call.constants["BLOCK_M"] == 128
        found = compile_call(call, "sm_89")
        assert 64 * 1024 <= found.metadata.shared <= TARGETS["sm_89"].shared_memory
