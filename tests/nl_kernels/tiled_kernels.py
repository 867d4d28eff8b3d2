"""Tiled kernels of an op, compiled for GPUs that are not here, held to what those GPUs have."""

from nl_kernels.triton_support.ahead_of_time import compile_call
from nl_kernels.triton_support.resources import resources_of
from nl_kernels.triton_support.targets import TARGETS, TENSOR_MEMORY

KINDS = {
    "sm_80": {"mma"},
    "sm_89": {"mma"},
    "sm_90": {"wgmma", "mma"},
    "sm_100": {"tcgen05", "mma"},
    "gfx942": {"mfma"},
}


def assert_within_limits(catalogue, spills, architecture, words, names=None):
    """Compile what ``catalogue`` has of ``words``, or the ``names`` alone, which must all be there.

    ``spills``: bytes a thread may spill, by pass and architecture.
    """
    entries = [e for e in catalogue(architecture) if e.variant.startswith(words)]
    if names is not None:
        entries = [e for e in entries if e.variant.rsplit(": ")[1] in names]
        assert {e.variant.rsplit(": ")[1] for e in entries} == set(names)
    assert entries
    for entry in entries:
        found = resources_of(compile_call(entry.call, architecture))
        assert found.shared_bytes <= TARGETS[architecture].shared_memory, entry.variant
        assert found.tensor_memory <= TENSOR_MEMORY, entry.variant
        assert found.scalar_products == 0, entry.variant
        budget = spills[entry.variant.split(": ")[0].split()[-1]][architecture]
        assert found.spill_bytes <= budget, f"{entry.variant}: {found.spill_bytes}"
        if entry.kernel == "product":
            # A tile of less than 64 rows or columns needs no warp group.
            constants = entry.call.constants
            fewest = min(constants["M"], constants["N"])
            kinds = KINDS[architecture] if fewest < 64 else KINDS[architecture] - {"mma"} or {"mma"}
            terms = sum(constants[f"K{i}"] > 0 for i in range(4))
            assert set(found.tensor_core) <= kinds, entry.variant
            assert found.tensor_core or not terms, entry.variant
            assert found.products >= terms, entry.variant
