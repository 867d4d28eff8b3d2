"""The tiled kernels compile for GPUs that are not here, within what those GPUs have."""

import functools

import pytest
import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying.catalogue import catalogue, tiled_schedules
from nl_kernels.triton_support.targets import TARGETS
from tests.nl_kernels.tiled_kernels import assert_within_limits

pytestmark = pytest.mark.aot

SPILLS = {
    "forward": {"sm_90": 0, "sm_80": 16, "sm_89": 16, "sm_100": 64, "gfx942": 0},
    "backward": {"sm_90": 32, "sm_80": 96, "sm_89": 96, "sm_100": 96, "gfx942": 32},
}
"""Bytes a thread may spill in bf16."""

LAUNCHES = [
    (256, "running", "per_layer", 31, 79),
    (256, "snapshot", "per_layer", 26, 61),
    (None, "running", "per_layer", 13, 35),
    (256, "running", "none", 31, 92),
    (None, "running", "none", 14, 45),
]
"""Hidden layer, read, erase (without: momentum), and kernels a chunk forward and backward."""


check = functools.partial(assert_within_limits, catalogue, SPILLS)


def test_hopper_spills_nothing_forward():
    names = ("served", "made", "generate", "coefficients", "pair", "pair activation", "bound", "signal")
    check("sm_90", "bfloat16 128x512 C64 running default forward", names)


def test_hopper_spills_nothing_in_the_largest_products():
    names = ("pair", "made", "hidden gram", "solve", "read", "carry")
    check("sm_90", "bfloat16 512x1536 C2048 running default forward", names)


def test_hopper_spills_little_backward():
    names = (
        "written adjoint",
        "gram pairs",
        "signal adjoint",
        "pair adjoint",
        "key and value adjoint",
        "gates adjoint",
        "input adjoint",
        "state adjoint",
    )
    check("sm_90", "bfloat16 128x512 C64 running default backward", names)


def test_linear_memories_spill_nothing_on_hopper():
    check(
        "sm_90",
        "bfloat16 128xlinear C64 running default forward",
        ("error", "bound", "generate", "read", "carry"),
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
def test_other_architectures(architecture):
    names = ("generate", "coefficients", "signal", "read", "carry")
    check(architecture, "bfloat16 128x512 C64 running default forward", names)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    "words",
    [
        "128x512 C64 running default",
        "512x1536 C2048 running default",
        "128xlinear C64 running default",
        "128x512 C64 running titans",
    ],
)
def test_every_kernel_in_bfloat16(architecture, words):
    check(architecture, f"bfloat16 {words}")


@pytest.mark.parametrize(("hidden", "read", "erase", "forward", "backward"), LAUNCHES)
def test_kernels_are_launched_a_fixed_number_of_times_a_chunk(hidden, read, erase, forward, backward):
    counts = []
    for chunks in (2, 3):
        schedules = tiled_schedules(
            "sm_90",
            torch.bfloat16,
            64,
            hidden,
            64,
            read,
            MemoryRule(erase=erase),
            chunks=chunks,
            checkpoint_every=1,
        )
        counts.append([len(schedule.calls) for schedule in schedules.values()])
    assert [b - a for a, b in zip(*counts)] == [forward, backward]


@pytest.mark.parametrize(
    ("sizes", "of_tokens", "of_states"), [((512, 1536, 2048), 1.98e9, 0.19e9), ((128, 512, 64), 18e6, 16e6)]
)
def test_bytes_that_a_chunk_moves_forward(sizes, of_tokens, of_states):
    """What its kernels are given, a row: matrices of tokens, and states and weights."""
    width, hidden, chunk = sizes
    planned = tiled_schedules(
        "sm_90",
        torch.bfloat16,
        width,
        hidden,
        chunk,
        "running",
        MemoryRule(),
        chunks=3,
        checkpoint_every=1,
    )["forward"]
    second = [i for i, call in enumerate(planned.calls) if call.arguments.get("chunk") == 1]
    found = {True: 0, False: 0}
    for call in planned.calls[second[0] : second[-1] + 1]:
        for x in call.arguments.values():
            if isinstance(x, torch.Tensor) and x.ndim > 2:
                # Placed tokens are those of three chunks, kept states of three slots.
                share = 3 if x.ndim == 4 or x.shape[1] == 3 * chunk else 1
                of_chunk = x.ndim == 3 and x.shape[1] in (chunk, 3 * chunk)
                found[of_chunk] += x.numel() * x.element_size() / share / 8
    assert abs(found[True] / of_tokens - 1) < 0.05
    assert abs(found[False] / of_states - 1) < 0.05
