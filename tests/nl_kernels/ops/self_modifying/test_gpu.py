"""On a CUDA device: error budgets, the default choice, determinism, memory."""

import dataclasses

import pytest
import torch

from nl_kernels import MemoryRule, self_modifying_memory
from nl_kernels.doctor import relative_error, tensors_of
from tests.nl_kernels.budgets import RoundedProducts
from tools.op_inputs import self_modifying_inputs

pytestmark = pytest.mark.gpu

TITANS = MemoryRule(erase="none")
LITERAL = dataclasses.replace(MemoryRule.literal(), proximal=False)
SHARED = ("weights", "rate_max", "rate_bias", "retention_bias")


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
    o, state = self_modifying_memory(**x, output_final_state=True, **options)
    values, leaves = [o, *tensors_of(state)], tensors_of(x)
    rng = torch.Generator("cuda").manual_seed(1)
    cotangents = [(8 * torch.randn(r.shape, generator=rng, device="cuda")).round() / 8 for r in values]
    loss = sum((r * c.to(r.dtype)).sum() for r, c in zip(values, cotangents))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in values), *gradients]


def draw(batch, length, heads, width, hidden, dtype=torch.float32):
    return self_modifying_inputs(batch, length, heads, width, hidden, outer_scale=0.1, dtype=dtype)


# Compiling a pair of kernels takes up to a minute: few cases, each with something of its own.
CASES = {
    "default linear": (torch.bfloat16, MemoryRule(), "running", 64, None, (16, 16)),
    "default linear fp32": (torch.float32, MemoryRule(), "running", 48, None, (16, 16)),
    "two clocks, wide": (torch.bfloat16, MemoryRule(), "snapshot", 128, None, (16, 32)),
    "large chunks": (torch.bfloat16, MemoryRule(), "running", 32, None, (32, 32)),
    "titans": (torch.bfloat16, TITANS, "running", 64, None, (16, 16)),
    "default two-layer": (torch.bfloat16, MemoryRule(), "running", 64, 64, (16, 16)),
    "literal two-layer": (torch.float32, LITERAL, "snapshot", 40, 24, (8, 8)),
}


@pytest.mark.parametrize(("dtype", "rule", "read", "width", "hidden", "clocks"), CASES.values(), ids=CASES)
def test_error_budget(dtype, rule, read, width, hidden, clocks):
    x = draw(2, 150, 2, width, hidden, dtype)
    options = {"rule": rule, "read": read, "chunk_size": clocks[0], "generator_chunk_size": clocks[1]}
    if rule == LITERAL:
        x = {n: t if n in SHARED or t is None else t[:, :24] for n, t in x.items()}  # it diverges soon after
    expected = results_and_gradients(x, torch.float64, impl="eager", **options)
    with RoundedProducts(dtype):
        eager = results_and_gradients(x, impl="eager", **options)
    # Three-pass tf32 loses two bits of fp32's 24, and a recurrence multiplies what is lost.
    factor = 8.0 if dtype == torch.float32 else 4.0
    worst = max(relative_error(a, b) for a, b in zip(eager, expected))
    actual = results_and_gradients(x, impl="triton", **options)
    for index, (found, true) in enumerate(zip(actual, expected, strict=True)):
        budget = factor * (worst + torch.finfo(found.dtype).eps)
        assert relative_error(found, true) <= budget, f"tensor {index} of shape {tuple(true.shape)}"


def test_the_default_is_the_kernels_where_they_cover_the_call():
    x = draw(1, 40, 2, 32, None)
    expected = results_and_gradients(x, chunk_size=16, impl="triton")
    for a, b in zip(results_and_gradients(x, chunk_size=16), expected, strict=True):
        assert torch.equal(a, b)
    uncovered = results_and_gradients(x, chunk_size=16, rule=MemoryRule(erase="input"))
    assert all(torch.isfinite(t).all() for t in uncovered)


@pytest.mark.parametrize("hidden", [None, 32])
def test_deterministic(hidden):
    """Threads of a program hand states on through memory: a missing barrier would show here."""
    x = draw(4, 1000, 8, 32, hidden)
    first = results_and_gradients(x, chunk_size=16, read="running", impl="triton")
    for _ in range(3):
        again = results_and_gradients(x, chunk_size=16, read="running", impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_resumed_apart_and_padded():
    options = {"chunk_size": 8, "generator_chunk_size": 16, "read": "running"}
    x = draw(2, 70, 2, 32, None)
    mask = torch.ones(2, 70, dtype=torch.bool, device="cuda")
    mask[1, 20:33] = False
    head = {n: t if n in SHARED or t is None else t[:, :27] for n, t in x.items()}
    tail = {n: t if n in SHARED or t is None else t[:, 27:] for n, t in x.items()}
    _, state = self_modifying_memory(
        **to(head), mask=mask[:, :27], output_final_state=True, impl="eager", **options
    )
    tail["initial_state"] = state
    found = results_and_gradients(tail, mask=mask[:, 27:], impl="triton", **options)
    expected = results_and_gradients(tail, torch.float64, mask=mask[:, 27:], impl="eager", **options)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(a, b) < 1e-3, f"tensor {index}"


def test_memory_ceiling():
    """Forward and backward keep some states a segment, not one a chunk."""
    x = to(draw(1, 16384, 8, 64, None))
    tokens = sum(t.nbytes for t in tensors_of({n: x[n] for n in x if n not in SHARED}))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    self_modifying_memory(**x, chunk_size=16, read="running")[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * tokens
