"""The update kernel compiles for GPUs that are not here, without spills and with whole-vector accesses."""

import pytest

from nl_kernels.ops.continuum import launch
from nl_kernels.triton_support.ahead_of_time import compile_call
from nl_kernels.triton_support.resources import resources_of
from nl_kernels.triton_support.targets import TARGETS

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    entries = list(launch.catalogue(architecture))
    assert {e.variant.split()[0] for e in entries} == {"plain", "momentum"}
    for entry in entries:
        compiled = compile_call(entry.call, architecture)
        found = resources_of(compiled)
        assert found.spill_bytes == 0, entry.variant
        assert found.registers <= 96, entry.variant
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, entry.variant
        if architecture.startswith("sm") and "341" not in entry.variant:
            text = compiled.asm["ptx"]
            scalar = text.count("ld.global.b32") - text.count("ld.global.v4.b32")
            assert text.count("ld.global.v4") >= 16, entry.variant
            assert scalar <= 3, entry.variant  # the norms: one a row


@pytest.mark.parametrize("width", [1, 3, 16, 341, 1024, 2049, 16_384])
def test_a_tile_has_whole_rows(width):
    tile = launch.update_tile(width)
    assert tile.block_n >= width
    assert tile.block_n & (tile.block_n - 1) == 0
    assert tile.block_m >= 1
    assert tile.block_m * tile.block_n <= max(2048, tile.block_n)
