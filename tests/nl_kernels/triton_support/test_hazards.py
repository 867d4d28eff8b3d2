"""Which versions are warned of, on which GPUs, and how often."""

import warnings

import pytest
import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from nl_kernels.triton_support import hazards, kernel_call

OPERANDS, GROUPS = "wgmma operands overwritten", "wgmma groups not awaited"


@pytest.mark.parametrize(
    ("versions", "capability", "names"),
    [
        (("3.7.1", "12.8"), (9, 0), [OPERANDS, GROUPS]),
        (("3.6.0+git123", "12.9"), (9, 0), [OPERANDS, GROUPS]),
        (("3.7.1", "13.1"), (9, 0), [OPERANDS, GROUPS]),
        (("3.7.1", "13.3"), (9, 0), [GROUPS]),
        (("3.8.0", "13.3"), (9, 0), []),
        (("3.7.1", "12.4"), (9, 0), [GROUPS]),
        (("3.7.1", "12.8"), (8, 0), []),
        (("3.7.1", "12.8"), (10, 0), []),
    ],
)
def test_known_hazards(versions, capability, names):
    found = hazards.known_hazards(*versions, capability)
    assert list(found) == names


def test_launches_warn_once(monkeypatch):
    """Of the Triton and the assembler that are installed."""
    hazards.warn_of_hazards.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    installed = hazards.known_hazards(triton.__version__, get_ptxas(90).version, (9, 0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            kernel_call.run_calls([], torch.device("cuda"))
    assert len(seen) == len(installed)
    assert [str(w.message).split(":")[0] for w in seen] == list(installed)
