"""The tiled kernels compile for GPUs that are not here, within what those GPUs have."""

import pytest
import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying import launch
from nl_kernels.triton_support.ahead_of_time import compile_call
from nl_kernels.triton_support.resources import resources_of
from nl_kernels.triton_support.targets import TARGETS, TENSOR_MEMORY

pytestmark = pytest.mark.aot

KINDS = {"sm_80": {"mma"}, "sm_90": {"wgmma", "mma"}, "sm_100": {"tcgen05", "mma"}, "gfx942": {"mfma"}}
SPILLS = {
    "forward": {"sm_90": 0, "sm_80": 16, "sm_100": 64, "gfx942": 0},
    "backward": {"sm_90": 32, "sm_80": 96, "sm_100": 96, "gfx942": 32},
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


def check(architecture, words, names=None):
    """Compile what the catalogue has of ``words``, and hold it to the architecture's limits."""
    entries = [e for e in launch.catalogue(architecture) if e.variant.startswith(words)]
    if names is not None:
        entries = [e for e in entries if e.variant.rsplit(": ")[1] in names]
        assert {e.variant.rsplit(": ")[1] for e in entries} == set(names)
    assert entries
    for entry in entries:
        found = resources_of(compile_call(entry.call, architecture))
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, entry.variant
        assert found.tensor_memory <= TENSOR_MEMORY, entry.variant
        assert found.scalar_products == 0, entry.variant
        budget = SPILLS[entry.variant.split(": ")[0].split()[-1]][architecture]
        assert found.spill_bytes <= budget, f"{entry.variant}: {found.spill_bytes}"
        if entry.kernel == "product":
            # The gates' one row is a tile for which no warp group is needed.
            constants = entry.call.constants
            fewest = min(constants["M"], constants["N"])
            kinds = KINDS[architecture] if fewest < 64 else KINDS[architecture] - {"mma"} or {"mma"}
            assert set(found.tensor_core) <= kinds, entry.variant
            assert found.products >= sum(constants[f"K{i}"] > 0 for i in range(4))


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
        schedules = launch.tiled_schedules(
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
    planned = launch.tiled_schedules(
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
