"""The kernels as compiled for sm_80, run on the CPU, against the token loop in fp64."""

import pytest
import torch

from nl_kernels import deep_memory, deep_memory_step
from tests.nl_kernels.chunked_memories import assert_steps_equal_the_definition
from tests.nl_kernels.emulation import FACTORS, cases, every_dtype, marks
from tests.nl_kernels.ops.deep_memory.test_interpreter import (
    RULES,
    RULES_READS_LAYERS,
    C,
    assert_kernels_within_budget,
    inputs,
)
from tools.op_inputs import deep_memory_inputs

pytestmark = marks
QUICK = {("default", "running", 12), ("literal", "snapshot", None)}


def assert_within(x, **options):
    """Operands are bf16 for bf16 callers, and tf32, which has the mantissa of fp16, for fp16 callers."""
    dtype = x["q"].dtype
    assert_kernels_within_budget(x, dtype, FACTORS[dtype], **options)


@pytest.mark.parametrize(("name", "read", "hidden"), cases(RULES_READS_LAYERS, lambda *case: case in QUICK))
@every_dtype
def test_results_and_every_gradient(name, read, hidden, dtype):
    x = inputs(6, hidden=hidden, resumed_at=[3], dtype=dtype)
    assert_within(x, rule=RULES[name], read=read, chunk_size=C)


@every_dtype
@pytest.mark.slow
def test_chunks_of_32(dtype):
    assert_within(inputs(40, width=17, hidden=20, dtype=dtype), read="running", chunk_size=32)


@every_dtype
@pytest.mark.slow
def test_sequences_that_lie_differently(dtype):
    x = inputs(9, hidden=None, dtype=dtype)
    assert_within(x, cu_seqlens=torch.tensor([0, 1, 7, 9]), read="running", chunk_size=C)


@pytest.mark.parametrize("hidden", [None, pytest.param(5, marks=pytest.mark.slow)])
@every_dtype
def test_steps_equal_the_token_loop(hidden, dtype):
    assert_steps_equal_the_definition(
        deep_memory,
        deep_memory_step,
        deep_memory_inputs(2, 6, 2, 16, hidden, dtype=dtype),
        [2, 1],
        4,
        masked=False,
        inplace=True,
        tolerance=2 * torch.finfo(dtype).eps + 2e-5,
        impl="triton",
        read="running",
        chunk_size=2,
    )
