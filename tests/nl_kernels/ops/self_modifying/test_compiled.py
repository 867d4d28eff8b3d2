"""The kernels as compiled for sm_80, run on the CPU, against the token loop in fp64."""

import pytest
import torch

from nl_kernels import self_modifying_memory, self_modifying_memory_step
from tests.nl_kernels.chunked_memories import assert_steps_equal_the_definition
from tests.nl_kernels.emulation import FACTORS, cases, every_dtype, marks
from tests.nl_kernels.ops.self_modifying.test_interpreter import (
    RULES,
    RULES_AND_READS,
    assert_kernels_within_budget,
    make,
)
from tools.op_inputs import self_modifying_inputs

pytestmark = marks
QUICK = {(None, "literal", "running"), (5, "default", "snapshot")}


def assert_within(inputs, **options):
    """Operands are bf16 for bf16 callers, and tf32, which has the mantissa of fp16, for fp16 callers."""
    dtype = inputs["query"].dtype
    assert_kernels_within_budget(inputs, FACTORS[dtype], dtype, **options)


@pytest.mark.parametrize(("hidden", "name", "read"), cases(RULES_AND_READS, lambda *case: case in QUICK))
@every_dtype
def test_rules(hidden, name, read, dtype):
    inputs = make(6, hidden, outer_scale=0.3, dtype=dtype)
    assert_within(inputs, rule=RULES[name], read=read, chunk_size=4)


@pytest.mark.parametrize("clocks", [(2, 4), (4, 2)])
@every_dtype
@pytest.mark.slow
def test_two_clocks_and_packed_sequences(clocks, dtype):
    options = {"chunk_size": clocks[0], "generator_chunk_size": clocks[1], "read": "running"}
    assert_within(make(9, None, dtype=dtype), cu_seqlens=torch.tensor([0, 3, 9]), **options)


@every_dtype
@pytest.mark.slow
def test_chunks_of_32(dtype):
    assert_within(make(40, None, width=17, outer_scale=0.1, dtype=dtype), read="running", chunk_size=32)


@pytest.mark.parametrize("hidden", [None, pytest.param(5, marks=pytest.mark.slow)])
@every_dtype
def test_steps_equal_the_token_loop(hidden, dtype):
    assert_steps_equal_the_definition(
        self_modifying_memory,
        self_modifying_memory_step,
        self_modifying_inputs(2, 6, 2, 16, hidden, dtype=dtype),
        [2, 1],
        4,
        masked=False,
        inplace=True,
        tolerance=2 * torch.finfo(dtype).eps + 2e-5,
        impl="triton",
        read="running",
        chunk_size=2,
    )
