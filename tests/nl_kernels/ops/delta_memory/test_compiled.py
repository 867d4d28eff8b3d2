"""The kernels as compiled for sm_80, run on the CPU, against the token loop in fp64."""

import pytest
import torch

from nl_kernels import delta_memory, delta_memory_step
from tests.nl_kernels.budgets import RoundedProducts, assert_within_budget
from tests.nl_kernels.emulation import FACTORS, cases, every_dtype, marks
from tests.nl_kernels.ops.delta_memory.test_interpreter import LENGTHS, assert_kernels_within_budget, inputs
from tools.op_inputs import to_float64
from tools.ptx_emulator.instructions import LANES

pytestmark = [pytest.mark.compiled(but=LANES), *marks]

# Of a single token too few numbers are made for a norm to mean something; steps are compared one by one.
LONGER = [case for case in LENGTHS if case[2] > 1]


def assert_within(x, **options):
    assert_kernels_within_budget(x, factor=FACTORS[x["q"].dtype], **options)


@pytest.mark.parametrize(
    ("momentum", "read", "length"),
    cases(LONGER, lambda momentum, read, length: length == 17 and momentum == (read == "before")),
)
@every_dtype
def test_results_and_every_gradient(momentum, read, length, dtype):
    x = inputs(length, momentum=momentum, dtype=dtype)
    assert_within(x, read=read, scale=0.7, chunk_size=16)


@pytest.mark.parametrize("momentum", [False, pytest.param(True, marks=pytest.mark.slow)])
@every_dtype
def test_chunks_of_several_blocks(momentum, dtype):
    assert_within(inputs(70, momentum=momentum, dtype=dtype), chunk_size=64)


@pytest.mark.parametrize("momentum", [False, True])
@every_dtype
@pytest.mark.slow
def test_widths_of_several_tiles(momentum, dtype):
    assert_within(inputs(20, momentum=momentum, key=70, value=67, dtype=dtype), chunk_size=16)


@pytest.mark.parametrize("momentum", [pytest.param(False, marks=pytest.mark.slow), True])
@every_dtype
def test_packed_sequences(momentum, dtype):
    x = inputs(40, momentum=momentum, sequences=4, dtype=dtype)
    cu_seqlens = torch.tensor([0, 1, 17, 33, 40], dtype=torch.int32)
    assert_within(x, cu_seqlens=cu_seqlens, chunk_size=16, scale=0.7, read="before")


@pytest.mark.parametrize("momentum", [False, pytest.param(True, marks=pytest.mark.slow)])
@every_dtype
def test_heads_that_share_keys_and_queries(momentum, dtype):
    assert_within(inputs(20, momentum=momentum, heads=4, key_heads=2, dtype=dtype), chunk_size=16)


@every_dtype
@pytest.mark.slow
def test_a_long_sequence_of_one_head(dtype):
    """Whose scan may be cut into parts that run side by side."""
    x = inputs(3072, momentum=False, key=16, value=16, dtype=dtype)
    options = {"output_final_state": True, "chunk_size": 16}
    with torch.no_grad():
        found = delta_memory(**x, **options, impl="triton")
        with RoundedProducts(dtype):
            eager = delta_memory(**x, **options, impl="eager")
        exact = delta_memory(**to_float64(x), **options, impl="eager")
    for results in zip(found, eager, exact):
        assert_within_budget(*results, factor=FACTORS[dtype])


@pytest.mark.parametrize("read", ["running", "before"])
@pytest.mark.parametrize("momentum", [False, True])
@every_dtype
def test_steps_equal_the_token_loop(momentum, read, dtype):
    x = inputs(4, momentum=momentum, batch=2, heads=2, key_heads=1, value=40, dtype=dtype)
    expected, final = delta_memory(
        **to_float64(x), read=read, scale=0.7, output_final_state=True, impl="reference"
    )
    state, momentum_state = x["initial_state"], x["initial_momentum"]
    tolerance = 2 * torch.finfo(dtype).eps + 1e-5
    for t in range(4):
        token = {n: None if x[n] is None else x[n][:, t] for n in ("q", "k", "v", "log_decay", "erase")}
        token["momentum"] = x["momentum"][:, t] if momentum else None
        o, state = delta_memory_step(
            **token, state=state, momentum_state=momentum_state, read=read, scale=0.7, impl="triton"
        )
        state, momentum_state = state if momentum else (state, None)
        torch.testing.assert_close(o.double(), expected[:, t], rtol=tolerance, atol=tolerance)
    for actual, end in zip((state, momentum_state), final if momentum else (final,)):
        torch.testing.assert_close(actual.double(), end, rtol=1e-5, atol=1e-5)
