"""What only large calls and long sessions on a GPU would show: 32-bit overflows, grids, compilations."""

from collections import defaultdict

import pytest
import triton
import triton.language as tl

from nl_kernels.triton_support.kernel_call import KernelCall
from tests.nl_kernels import planned_calls as planned
from tests.nl_kernels.integer_ranges import overflows
from tools.catalogue import unallocated

pytestmark = pytest.mark.aot

TOKENS = 2**20  # with 8 sequences and 16 heads of 64: 2³³ numbers a tensor

LARGE = {
    "delta_memory": lambda: planned.delta_memory_calls(8, TOKENS, 16, 64),
    "deep_memory": lambda: planned.memory_calls(8, TOKENS, 16, 64, 64, 16, self_made=False),
    "self_modifying": lambda: planned.memory_calls(8, TOKENS, 16, 64, None, 16, self_made=True),
    "continuum": lambda: planned.continuum_calls(8, TOKENS, 4096, 16384),
    "newton_schulz": lambda: planned.newton_schulz_calls(2**16 - 1, 1024, 4096),
    "one token": lambda: planned.step_calls(2**16, 64, 64, 64),
}
MORE = {
    "delta_memory packed": lambda: planned.delta_memory_calls(1, 8 * TOKENS, 16, 64, sequences=1000),
    "deep_memory linear packed": lambda: planned.memory_calls(
        64, TOKENS, 16, 64, None, 16, self_made=False, packed=True
    ),
    "self_modifying two layers packed": lambda: planned.memory_calls(
        8, TOKENS, 16, 64, 64, 16, self_made=True, rule=planned.TITANS, packed=True
    ),
}


def by_kind(calls):
    """Calls that run the same compiled code, together."""
    kinds = defaultdict(list)
    for call in calls:
        kinds[planned.kind_of(call)].append(call)
    return kinds


@pytest.mark.parametrize(
    "calls",
    [*LARGE.values(), *(pytest.param(c, marks=pytest.mark.slow) for c in MORE.values())],
    ids=[*LARGE, *MORE],
)
def test_no_32_bit_integer_overflows_in_large_calls(calls):
    for group in by_kind(calls()).values():
        found = overflows(group, planned.ARCHITECTURE)
        assert not found, (group[0].kernel.__name__, found)


@triton.jit(do_not_specialize=["width"])
def row_kernel(x, width, WIDE: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    for start in range(0, width, 16):
        tl.store(x + program * width + start + tl.arange(0, 16), 0.0)


@pytest.mark.parametrize(("rows", "wide", "overflowing"), [(2**14, 0, 0), (2**20, 0, 1), (2**20, 1, 0)])
def test_an_overflow_is_found(rows, wide, overflowing):
    x = unallocated(1)
    call = KernelCall(row_kernel, (rows,), {"x": x, "width": 2**12}, {"WIDE": bool(wide)}, 4, 1)
    assert bool(overflows([call], "sm_90")) == bool(overflowing)


def test_a_grid_that_no_gpu_takes_is_refused():
    with pytest.raises(ValueError, match=r"row_kernel: expected a grid .* got \(1, 65536\)"):
        KernelCall(row_kernel, (1, 2**16), {}, {}, 4, 1)


# Of each: how many tokens, and at which offset.
GROWING = {
    "delta_memory": lambda tokens, offset: planned.delta_memory_calls(2, tokens, 4, 64),
    "delta_memory packed": lambda tokens, offset: planned.delta_memory_calls(
        1, tokens, 4, 64, sequences=2 + tokens % 5
    ),
    "deep_memory": lambda tokens, offset: planned.memory_calls(
        2, tokens, 4, 64, 64, 16, self_made=False, offset=offset % 16
    ),
    "self_modifying": lambda tokens, offset: planned.memory_calls(
        2, tokens, 4, 64, None, 16, self_made=True, offset=offset % 16
    ),
    "continuum": lambda tokens, offset: planned.continuum_calls(2, tokens, 64, 128),
    "one token": lambda tokens, offset: planned.step_calls(tokens, 4, 64, 64),
}


@pytest.mark.parametrize("calls", GROWING.values(), ids=GROWING)
def test_another_length_or_position_compiles_nothing(calls):
    met = ((160, 5), (187, 5), (160, 32), (171, 32))  # the call begins, and ends, at a boundary, or not
    known = {kind for sizes in met for kind in by_kind(calls(*sizes))}
    for tokens, offset in ((192, 5), (193, 64), (209, 31), (272, 7), (1024, 0)):
        new = set(by_kind(calls(tokens, offset))) - known
        assert not new, (tokens, offset, sorted(kind[0] for kind in new))


def test_no_kernel_is_compiled_for_the_value_of_an_integer():
    """Triton does so for 1 and for multiples of 16 unless told otherwise (members of tuples: always)."""
    calls = [call for plan in GROWING.values() for call in plan(160, 5)]
    calls += planned.newton_schulz_calls(2, 64, 64)
    for call in {id(call.kernel): call for call in calls}.values():
        fixed = {p.name for p in call.kernel.params if p.do_not_specialize}
        integers = {name for name, value in call.arguments.items() if isinstance(value, int)}
        assert integers <= fixed, (call.kernel.__name__, integers - fixed)
