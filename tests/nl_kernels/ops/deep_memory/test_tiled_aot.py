"""The tiled kernels compile for GPUs that are not here, within what those GPUs have."""

import functools

import pytest
import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.deep_memory.catalogue import catalogue, tiled_schedules
from nl_kernels.triton_support.targets import TARGETS
from tests.nl_kernels.tiled_kernels import assert_within_limits

pytestmark = pytest.mark.aot

SPILLS = {
    "forward": {"sm_90": 0, "sm_80": 0, "sm_89": 0, "sm_100": 64, "gfx942": 0},
    "backward": {"sm_90": 32, "sm_80": 96, "sm_89": 96, "sm_100": 96, "gfx942": 32},
}
"""Bytes a thread may spill in bf16."""


LAUNCHES = [(256, "running", 23, 52), (256, "snapshot", 21, 44), (None, "running", 10, 24)]
"""Hidden layer, read, and kernels a chunk forward and backward."""


check = functools.partial(assert_within_limits, catalogue, SPILLS)


def test_hopper_spills_nothing_forward():
    check("sm_90", "bfloat16 64x256 C64 running default forward")


def test_hopper_spills_nothing_in_the_largest_products():
    names = ("hidden layer", "error", "gram", "solve", "read", "carry")
    check("sm_90", "bfloat16 512x1536 C2048 running default forward", names)


def test_hopper_spills_little_backward():
    names = (
        "read to queries",
        "read pairs",
        "gram pairs",
        "write to input",
        "solve adjoint",
        "state adjoint",
    )
    check("sm_90", "bfloat16 64x256 C64 running default backward", names)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
def test_other_architectures(architecture):
    names = ("gram", "invert blocks", "solve", "read", "carry")
    check(architecture, "bfloat16 128x512 C64 running default forward", names)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("sizes", ["64x256 C64", "128x512 C64", "512x1536 C2048"])
def test_every_kernel_in_bfloat16(architecture, sizes):
    check(architecture, f"bfloat16 {sizes} running default")


@pytest.mark.parametrize(("hidden", "read", "forward", "backward"), LAUNCHES)
def test_kernels_are_launched_a_fixed_number_of_times_a_chunk(hidden, read, forward, backward):
    counts = []
    for chunks in (2, 3):
        schedules = tiled_schedules(
            "sm_90", torch.bfloat16, 64, hidden, 64, read, MemoryRule(), chunks=chunks, checkpoint_every=1
        )
        counts.append([len(schedule.calls) for schedule in schedules.values()])
    assert [b - a for a, b in zip(*counts)] == [forward, backward]
