"""Entries of a catalogue compiled for GPUs that are not here, and held to what those GPUs have."""

import triton

from nl_kernels.triton_support.targets import TARGETS, TENSOR_MEMORY
from tools.ahead_of_time import compile_call
from tools.kernel_resources import resources_of

# The compiler of Triton 3.6 spills more of the memories' backward kernels.
BEFORE_3_7 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def within_limits(architecture, entry):
    """Resources of an entry, which fit the architecture."""
    found = resources_of(compile_call(entry.call, architecture))
    label = f"{entry.kernel} {entry.variant}"
    assert found.shared_bytes <= TARGETS[architecture].shared_memory, label
    assert found.tensor_memory <= TENSOR_MEMORY, label
    assert found.scalar_products == 0, label
    return found


def compiled(catalogue, architecture, kernel, variant):
    """Resources of the one entry of this kernel and variant."""
    found = [e for e in catalogue(architecture) if (e.kernel, e.variant) == (kernel, variant)]
    assert len(found) == 1, f"the catalogue has {len(found)} of {kernel} {variant}"
    return within_limits(architecture, found[0])
