"""The kernels compile for GPUs that are not here, within what those GPUs have and without spills."""

import pytest
import torch

from nl_kernels.ops.continuum import launch
from nl_kernels.ops.continuum.triton_chunk import plan_chunk
from nl_kernels.triton_support.targets import TARGETS
from tools.ahead_of_time import compile_call
from tools.catalogue.continuum import catalogue
from tools.catalogue.entry import unallocated
from tools.kernel_resources import resources_of

pytestmark = pytest.mark.aot


KINDS = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
LARGE = "8x64x1024x4096"


def entries_of(architecture, *words):
    found = [e for e in catalogue(architecture) if all(word in e.variant for word in words)]
    assert found
    return found


@pytest.mark.parametrize(
    "architecture",
    [a if a in ("sm_90", "gfx942") else pytest.param(a, marks=pytest.mark.slow) for a in TARGETS],
)
def test_updates(architecture):
    for entry in [e for e in entries_of(architecture) if e.kernel == "update"]:
        compiled = compile_call(entry.call, architecture)
        found = resources_of(compiled)
        assert found.spill_bytes <= 8, entry.variant
        assert found.registers <= 104, entry.variant
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, entry.variant
        if architecture.startswith("sm") and "341" not in entry.variant:
            text = compiled.asm["ptx"]
            scalar = text.count("ld.global.b32") - text.count("ld.global.v4.b32")
            assert text.count("ld.global.v4") >= 16, entry.variant
            assert scalar <= 4, entry.variant  # the norms, one a row; the retention


@pytest.mark.parametrize("part", ["hidden", "out", "signal", "up", "input"])
def test_hopper_uses_tensor_cores_and_spills_nothing(part):
    (entry,) = entries_of("sm_90", "bfloat16", LARGE, "gated", f" {part}")
    found = resources_of(compile_call(entry.call, "sm_90"))
    assert found.spill_bytes == 0
    assert set(found.tensor_core) == {"wgmma"}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("part", ["signal", "down"])
def test_other_architectures(architecture, part):
    (entry,) = entries_of(architecture, "bfloat16", LARGE, "gated", f" {part}")
    found = resources_of(compile_call(entry.call, architecture))
    assert found.spill_bytes == 0
    assert set(found.tensor_core) == {KINDS[architecture]}


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "part", ["read and learned, with gate hidden", "with gate back", " learned error", "added up"]
)
def test_a_chunk_that_is_read_and_learned(architecture, part):
    entry = entries_of(architecture, "bfloat16", LARGE, part)[0]
    found = resources_of(compile_call(entry.call, architecture))
    assert found.spill_bytes == 0
    assert set(found.tensor_core) == {KINDS[architecture]}


@pytest.mark.parametrize("architecture", TARGETS)
def test_what_weighs_tokens_of_the_widest_hidden_layer_fits(architecture):
    width, hidden, bf16 = 4096, launch.MAX_WIDTH, torch.bfloat16
    x, value = (unallocated(*shape, dtype=bf16) for shape in ((8, 64, width), (width, width)))
    up, down = (unallocated(8, *shape, dtype=bf16) for shape in ((hidden, width), (width, hidden)))
    rates = unallocated(8, 64)
    calls, _ = plan_chunk(x, x, value, up, down, None, rates, 1.0, True, architecture=architecture)
    for call in calls[3:]:
        found = resources_of(compile_call(call, architecture))
        assert found.shared_bytes <= TARGETS[architecture].shared_memory
        assert found.spill_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_whole_catalogue(architecture):
    entries = entries_of(architecture)
    words = {word for entry in entries for word in entry.variant.split()}
    assert words >= {"bfloat16", "float16", "float32", "plain", "gated", "momentum"}
    for entry in entries:
        found = resources_of(compile_call(entry.call, architecture))
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, entry.variant
        assert found.scalar_products == 0, entry.variant
        # On sm_100 two products lack registers: "token_sum" of narrow matrices, one with its gate's adjoint.
        assert found.spill_bytes <= (64 if architecture == "sm_100" else 0), entry.variant


@pytest.mark.parametrize("precision", ["bf16", "tf32x3", "ieee"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_tiles_of_products_are_what_the_compiler_takes(architecture, precision):
    plan = launch.Plan(torch.empty(0), architecture)
    plan.precision = precision
    for m, n, k in ((1, 1, 1), (16, 341, 72), (64, 4096, 1024), (4096, 1024, 64)):
        for held in (1, 2, 3):
            tiles = plan.tiles(m, n, k, held=held)
            for block in tiles[:3]:
                assert block >= 16
                assert block & (block - 1) == 0


@pytest.mark.parametrize("width", [1, 3, 16, 341, 1024, 2049, 16_384])
def test_a_tile_has_whole_rows(width):
    rows, columns, _ = launch.update_tile(width)
    assert columns >= width
    assert columns & (columns - 1) == 0
    assert rows >= 1
    assert rows * columns <= max(2048, columns)
