"""On a CUDA device: error budgets, determinism, graph capture, large offsets, memory."""

import pytest
import torch

from nl_kernels import delta_memory, delta_memory_step
from nl_kernels.ops.delta_memory.triton_step import delta_memory_step as triton_step
from tests.nl_kernels.budgets import RoundedProducts, assert_within_budget
from tools.op_inputs import delta_memory_inputs, to_float64

pytestmark = pytest.mark.gpu


def results_and_gradients(x, **options):
    x = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in x.items()}
    leaves = {name: t for name, t in x.items() if t is not None}
    o, final = delta_memory(**x, output_final_state=True, **options)
    results = dict(zip(("o", "S", "U"), (o, *(final if isinstance(final, tuple) else (final,)))))
    rng = torch.Generator(o.device).manual_seed(1)
    loss = sum(
        (r * ((8 * torch.randn(r.shape, generator=rng, device=r.device)).round() / 8).to(r.dtype)).sum()
        for r in results.values()
    )
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return {n: r.detach() for n, r in results.items()} | {f"d{n}": g for n, g in zip(leaves, gradients)}


@pytest.mark.parametrize("width", [48, 64, 128, 256])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype, momentum, width):
    x = delta_memory_inputs(
        2, 300, 2, width, momentum=momentum, initial_state=True, dtype=dtype, device="cuda"
    )
    x["log_decay"][:, 77] = -torch.inf
    expected = results_and_gradients(to_float64(x), impl="eager")
    with RoundedProducts(torch.float32 if dtype == torch.float32 else dtype):
        eager = results_and_gradients(x, impl="eager")
    # Three-pass tf32 loses two bits of fp32's 24.
    factor = 8.0 if dtype == torch.float32 else 2.0
    for name, actual in results_and_gradients(x, impl="triton").items():
        assert_within_budget(actual, eager[name], expected[name], name=name, factor=factor)


def test_deterministic():
    x = delta_memory_inputs(2, 1000, 4, 128, momentum=True, dtype=torch.bfloat16, device="cuda")
    first, second = results_and_gradients(x), results_and_gradients(x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_step_in_a_graph():
    x = delta_memory_inputs(4, 3, 8, 128, momentum=True, initial_state=True, device="cuda")
    tokens = [
        [x[n][:, t].contiguous() for n in ("q", "k", "v", "log_decay", "erase", "momentum")] for t in range(3)
    ]
    static = [t.clone() for t in tokens[0]]
    state, velocity = x["initial_state"].clone(), x["initial_momentum"].clone()
    triton_step(*static, state, velocity, scale=1.0, read="running")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, new_state, new_velocity = triton_step(*static, state, velocity, scale=1.0, read="running")
        state.copy_(new_state)
        velocity.copy_(new_velocity)
    outputs = []
    for token in tokens:
        for buffer, value in zip(static, token):
            buffer.copy_(value)
        graph.replay()
        outputs.append(o.clone())
    expected, _ = delta_memory(**x, impl="eager")
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-4, atol=1e-4)


def test_offsets_beyond_32_bits():
    """2^31 key elements and more: the last sequence of a batch equals the same sequence alone."""
    batch, length, heads, width = 33, 2**15, 16, 128
    assert batch * length * heads * width > 2**31
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    one = delta_memory_inputs(1, length, heads, width, dtype=torch.bfloat16, device="cuda")
    many = {n: None if t is None else t.expand(batch, *t.shape[1:]).contiguous() for n, t in one.items()}
    expected, _ = delta_memory(**one)
    actual, _ = delta_memory(**many)
    assert torch.equal(actual[-1], expected[0])


def test_memory_ceiling():
    """Forward and backward keep a fixed multiple of the inputs, not a state a token."""
    x = delta_memory_inputs(1, 8192, 8, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    given = sum(t.nbytes for t in x.values() if t is not None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    delta_memory(**x)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 6 * given


def test_steps_equal_the_sequence():
    x = delta_memory_inputs(2, 65, 4, 64, dtype=torch.bfloat16, initial_state=True, device="cuda")
    expected, final = delta_memory(**x, output_final_state=True)
    state, outputs = x["initial_state"], []
    for t in range(65):
        token = {n: x[n][:, t] for n in ("q", "k", "v", "log_decay", "erase")}
        o, state = delta_memory_step(**token, state=state)
        outputs.append(o)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(state, final, rtol=2e-2, atol=2e-2)
