"""On a CUDA device: error budgets, the default choice, determinism, large offsets, memory."""

import dataclasses
import logging

import pytest
import torch

from nl_kernels import DeepMemoryWeights, MemoryRule, deep_memory, dispatch
from nl_kernels.doctor import tensors_of
from tests.nl_kernels.budgets import RoundedProducts, assert_within_budget
from tools.op_inputs import deep_memory_inputs

pytestmark = pytest.mark.gpu

LITERAL = dataclasses.replace(MemoryRule.literal(), proximal=False)
TITANS = dataclasses.replace(LITERAL, erase="none")


def to(value, dtype=None):
    """Nested tensors as new leaves on the device, floating ones in ``dtype``."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value.cuda()
        return value.detach().to("cuda", dtype or value.dtype, copy=True).requires_grad_()
    if isinstance(value, dict):
        return {name: to(x, dtype) for name, x in value.items()}
    return None if value is None else type(value)(*(to(x, dtype) for x in value))


def results_and_gradients(x, dtype=None, **options):
    x = to(x, dtype)
    o, state = deep_memory(**x, output_final_state=True, **options)
    values, leaves = [o, *tensors_of(state)], tensors_of(x)
    rng = torch.Generator("cuda").manual_seed(1)
    cotangents = [(8 * torch.randn(r.shape, generator=rng, device="cuda")).round() / 8 for r in values]
    loss = sum((r * c.to(r.dtype)).sum() for r, c in zip(values, cotangents))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in values), *gradients]


# Compiling a pair of kernels takes some ten seconds: few cases, each with something of its own.
CASES = {
    "default": (torch.bfloat16, MemoryRule(), "running", 64, 64, 16),
    "default linear": (torch.bfloat16, MemoryRule(), "snapshot", 64, None, 16),
    "default linear fp32": (torch.float32, MemoryRule(), "running", 48, None, 16),
    "large chunks": (torch.bfloat16, MemoryRule(), "running", 64, None, 32),
    "literal": (torch.bfloat16, LITERAL, "snapshot", 64, 64, 16),
    "titans": (torch.bfloat16, TITANS, "running", 64, 32, 16),
}


@pytest.mark.parametrize(("dtype", "rule", "read", "width", "hidden", "chunk"), CASES.values(), ids=CASES)
def test_error_budget(dtype, rule, read, width, hidden, chunk):
    x = deep_memory_inputs(2, 150, 2, width, hidden, outer_scale=0.1, dtype=dtype)
    with torch.no_grad():
        x["rate"] *= 0.2  # what is not bounded diverges otherwise
    options = {"rule": rule, "read": read, "chunk_size": chunk}
    expected = results_and_gradients(x, torch.float64, impl="eager", **options)
    with RoundedProducts(dtype):
        eager = results_and_gradients(x, impl="eager", **options)
    # Three-pass tf32 loses two bits of fp32's 24, and a recurrence multiplies what is lost.
    factor = 8.0 if dtype == torch.float32 else 4.0
    for index, actual in enumerate(results_and_gradients(x, impl="triton", **options)):
        assert_within_budget(actual, eager[index], expected[index], name=f"tensor {index}", factor=factor)


def test_the_default_is_triton_where_it_serves(caplog):
    dispatch._say_once.cache_clear()
    x = to(deep_memory_inputs(1, 20, 1, 64, 64))
    with caplog.at_level(logging.DEBUG, "nl_kernels"):
        deep_memory(**x, chunk_size=16)
        deep_memory(**x, chunk_size=8)
        deep_memory(**x, chunk_size=8192)
    said = [r.getMessage().split(" the ")[1] for r in caplog.records if " the " in r.getMessage()]
    assert said == ["triton implementation", "eager implementation"]


def test_deterministic():
    x = deep_memory_inputs(2, 500, 4, 64, 64, dtype=torch.bfloat16)
    first = results_and_gradients(x, chunk_size=16, read="running", impl="triton")
    second = results_and_gradients(x, chunk_size=16, read="running", impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_states_recomputed_give_the_same_gradients():
    x = deep_memory_inputs(2, 300, 2, 64, 64, dtype=torch.bfloat16)
    options = {"chunk_size": 16, "read": "running", "impl": "triton"}
    kept = results_and_gradients(x, checkpoint_every=1, **options)
    again = results_and_gradients(x, checkpoint_every=7, **options)
    for a, b in zip(kept, again):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits():
    """2^31 numbers of keys and more: the last sequence of a batch equals the same sequence alone."""
    batch, length, heads, width = 17, 2**17, 16, 64
    assert batch * length * heads * width > 2**31
    if torch.cuda.mem_get_info()[0] < 120 * 2**30:
        pytest.skip("needs 120 GiB of free device memory")
    one = to(deep_memory_inputs(1, length, heads, width, None, dtype=torch.bfloat16))
    many = {
        n: x if x is None or isinstance(x, DeepMemoryWeights) else x.expand(batch, *x.shape[1:])
        for n, x in one.items()
    }
    with torch.no_grad():
        expected, _ = deep_memory(**one, chunk_size=64, read="running", impl="triton")
        actual, _ = deep_memory(**many, chunk_size=64, read="running", impl="triton")
    assert torch.equal(actual[-1], expected[0])


def test_memory_ceiling():
    """The states kept for the backward pass stay within what the launcher allows, and the rest is linear."""
    from nl_kernels.memory.kernels.launch import KEPT_BYTES

    x = to(deep_memory_inputs(2, 8192, 8, 64, 64, dtype=torch.bfloat16))
    given = sum(t.nbytes for t in tensors_of(x))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    deep_memory(**x, chunk_size=16, read="running", impl="triton")[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 14 * given + KEPT_BYTES
