"""One token of either chunked memory on a GPU: as the definition, in a graph, in half precision."""

import pytest
import torch

import nl_kernels
from nl_kernels.doctor import tensors_of
from tests.nl_kernels.chunked_memories import assert_same, cast, tokens
from tools.op_inputs import deep_memory_inputs, self_modifying_inputs

pytestmark = pytest.mark.gpu

OPS = {
    "deep_memory": (nl_kernels.deep_memory, nl_kernels.deep_memory_step, deep_memory_inputs),
    "self_modifying_memory": (
        nl_kernels.self_modifying_memory,
        nl_kernels.self_modifying_memory_step,
        self_modifying_inputs,
    ),
}
SHARED = ("weights", "rate_max", "rate_bias", "retention_bias")


@pytest.fixture(params=OPS)
def memory(request):
    """An op, its step, and what makes inputs of both."""
    return OPS[request.param]


def move(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {name: move(x) for name, x in value.items()}
    return type(value)(*map(move, value)) if isinstance(value, tuple) else value


def token(inputs, t):
    return {n: x if n in SHARED or x is None else x[:, t].contiguous() for n, x in inputs.items()}


@pytest.mark.parametrize("hidden", [None, 64, 128], ids=["linear", "64", "128"])
@pytest.mark.parametrize("width", [40, 64, 128])
@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
def test_steps_equal_the_definition(memory, width, hidden, momentum):
    op, step, make = memory
    inputs = make(3, 40, 4, width, hidden, momentum=momentum)
    options = {"chunk_size": 8, "read": "running", "rule": nl_kernels.MemoryRule(momentum="sum")}
    wide = cast(inputs, torch.float64)
    expected, end = op(**wide, **options, impl="reference", output_final_state=True)
    _, state = op(**tokens(wide, 0, 3), **options, impl="reference", output_final_state=True)
    state, inputs = move(cast(state, torch.float32).clone()), move(inputs)
    for t in range(3, 40):
        o, state = step(**token(inputs, t), **options, state=state, inplace=t % 2 == 0, impl="triton")
        torch.testing.assert_close(o.double().cpu(), expected[:, t], rtol=1e-4, atol=1e-4)
    assert_same([x.cpu() for x in tensors_of(state)], tensors_of(end), 1e-4)
    assert state.position.tolist() == end.position.tolist()


@pytest.mark.parametrize("hidden", [None, 64], ids=["linear", "two-layer"])
def test_in_a_graph(memory, hidden):
    """Positions advance, and snapshots are taken, from replay to replay, at fixed addresses."""
    op, step, make = memory
    inputs = move(make(2, 24, 4, 64, hidden))
    options = {"chunk_size": 4, "read": "running"}
    _, start = op(**tokens(inputs, 0, 2), **options, impl="eager", output_final_state=True)
    static = {n: x if n in SHARED or x is None else x.clone() for n, x in token(inputs, 2).items()}
    mask = torch.ones(2, dtype=torch.bool, device="cuda")
    state = start.clone()
    step(**static, **options, mask=mask, state=start.clone(), inplace=True, impl="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = step(**static, **options, mask=mask, state=state, inplace=True, impl="triton")
    expected = start
    for t in range(2, 24):
        now = token(inputs, t)
        for name, x in static.items():
            if name not in SHARED and x is not None:
                x.copy_(now[name])
        mask.copy_(torch.tensor([True, t % 3 != 0]))
        graph.replay()
        found, expected = step(**now, **options, mask=mask, state=expected, impl="eager")
        torch.testing.assert_close(o, found, rtol=1e-4, atol=1e-4)
    assert_same(tensors_of(state), tensors_of(expected), 1e-4)
    assert state.position.tolist() == expected.position.tolist()


def test_half_precision_is_the_default_on_a_gpu(memory):
    op, step, make = memory
    inputs = move(cast(make(2, 12, 4, 64, None), torch.bfloat16))
    options = {"chunk_size": 4, "read": "running"}
    _, state = op(**tokens(inputs, 0, 3), **options, impl="eager", output_final_state=True)
    other = state
    for t in range(3, 12):
        o, state = step(**token(inputs, t), **options, state=state)
        expected, other = step(**token(inputs, t), **options, state=other, impl="eager")
        assert o.dtype == torch.bfloat16
        torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-2)
