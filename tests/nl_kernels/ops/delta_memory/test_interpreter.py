"""The Triton kernels, interpreted, against the token loop in fp64."""

import importlib.util
import inspect
import itertools

import pytest
import torch

from nl_kernels import delta_memory, delta_memory_step
from nl_kernels.ops.delta_memory import launch
from tests.nl_kernels.budgets import GuardedBuffer, RoundedProducts, assert_within_budget
from tools.op_inputs import delta_memory_inputs, to_float64

pytestmark = pytest.mark.interpreter

TENSORS = ("q", "k", "v", "log_decay", "erase", "momentum", "initial_state", "initial_momentum")


def inputs(length, *, momentum, batch=1, heads=1, key=12, value=20, initial_state=True, **options):
    """Inputs in which some tokens forget everything, exactly or nearly, and some drop their momentum."""
    x = delta_memory_inputs(
        batch, length, heads, key, value, momentum=momentum, initial_state=initial_state, **options
    )
    if length > 5:
        x["log_decay"][:, length // 3] = -torch.inf
        x["log_decay"][:, length // 2, 0] = -60.0
        if momentum:
            x["momentum"][:, length // 4] = 0.0
    return x


def results_and_gradients(x, **options):
    """Results, and all gradients with a cotangent on each of them, by name."""
    x = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in x.items()}
    leaves = {name: t for name, t in x.items() if t is not None}
    o, final = delta_memory(**x, output_final_state=True, **options)
    results = dict(zip(("o", "S", "U"), (o, *(final if isinstance(final, tuple) else (final,)))))
    rng = torch.Generator().manual_seed(1)
    loss = sum(
        (r * ((8 * torch.randn(r.shape, generator=rng)).round() / 8).to(r.dtype)).sum()
        for r in results.values()
    )
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return {n: r.detach() for n, r in results.items()} | {f"d{n}": g for n, g in zip(leaves, gradients)}


def assert_kernels_within_budget(x, factor=2.0, **options):
    triton = results_and_gradients(x, impl="triton", **options)
    with RoundedProducts(x["q"].dtype):  # fp16: products round their operands, to fp16 or as finely
        eager = results_and_gradients(x, impl="eager", **options)
    options.pop("chunk_size")
    expected = results_and_gradients(to_float64(x), impl="reference", **options)
    assert triton.keys() == expected.keys()
    for name in expected:
        assert_within_budget(triton[name], eager[name], expected[name], name=name, factor=factor)


LENGTHS = list(itertools.product([False, True], ["running", "before"], [1, 15, 16, 17, 55]))


def quick(momentum, read, length):
    """Every length with momentum and reads before, the shortest and the longest with all of them."""
    return length in (1, 55) or (momentum and read == "before")


@pytest.mark.parametrize(
    ("momentum", "read", "length"),
    [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in LENGTHS],
)
def test_results_and_every_gradient(momentum, read, length):
    # Several heads where a single one has too few numbers for a norm to mean something.
    x = inputs(length, momentum=momentum, heads=3 if length == 1 else 1)
    assert_kernels_within_budget(x, read=read, scale=0.7, chunk_size=16)


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_batch_without_initial_state_odd_widths(momentum):
    x = inputs(19, momentum=momentum, batch=2, heads=1, key=7, value=33, initial_state=False)
    assert_kernels_within_budget(x, chunk_size=16)


def test_widths_of_several_tiles():
    assert_kernels_within_budget(inputs(9, momentum=True, heads=1, key=70, value=67), chunk_size=16)


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_chunks_of_several_blocks(momentum):
    """C = 32 merges inverted blocks; keys that repeat make powers of A grow."""
    x = inputs(70, momentum=momentum)
    x["k"][:, 20:60] = x["k"][:, 20:21]
    x["erase"][:, 20:60] = 1.0
    assert_kernels_within_budget(x, chunk_size=64)


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_packed_sequences(momentum):
    bounds = [0, 1, 17, 33, 40]
    x = inputs(40, momentum=momentum, sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert_kernels_within_budget(x, cu_seqlens=cu_seqlens, chunk_size=16, scale=0.7, read="before")


@pytest.mark.parametrize("bounds", [None, [0, 1, 70]], ids=["batch", "packed"])
@pytest.mark.parametrize("segments", [2, 4])
def test_segments_of_a_sequence_side_by_side(segments, bounds, monkeypatch):
    """Also where a sequence has fewer chunks than segments, and from no initial state."""
    monkeypatch.setattr(launch, "segments_of", lambda *sizes: segments)
    monkeypatch.setattr(launch, "_plan", launch._plan.__wrapped__)  # plans are kept
    x = inputs(70, momentum=False, heads=2, sequences=bounds and 2, initial_state=bounds is not None)
    cu_seqlens = bounds and torch.tensor(bounds)
    assert_kernels_within_budget(x, chunk_size=16, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_heads_that_share_keys_and_queries(momentum):
    x = inputs(19, momentum=momentum, heads=6, key_heads=2, batch=2)
    assert_kernels_within_budget(x, chunk_size=16)


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_fp16(momentum):
    x = inputs(20, momentum=momentum, dtype=torch.float16)
    assert_kernels_within_budget(x, chunk_size=16)


@pytest.mark.parametrize("read", ["running", "before"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_steps_equal_the_token_loop(momentum, read):
    x = inputs(7, momentum=momentum, batch=2, heads=3, key_heads=1, value=40)
    expected, final = delta_memory(
        **to_float64(x), read=read, scale=0.7, output_final_state=True, impl="reference"
    )
    state, momentum_state = x["initial_state"], x["initial_momentum"]
    outputs = []
    for t in range(7):
        token = {n: x[n][:, t] for n in ("q", "k", "v", "log_decay", "erase")}
        token["momentum"] = x["momentum"][:, t] if momentum else None
        o, state = delta_memory_step(
            **token, state=state, momentum_state=momentum_state, read=read, scale=0.7, impl="triton"
        )
        state, momentum_state = state if momentum else (state, None)
        outputs.append(o)
    torch.testing.assert_close(torch.stack(outputs, 1), expected.float(), rtol=1e-5, atol=1e-5)
    for actual, end in zip((state, momentum_state), final if momentum else (final,)):
        torch.testing.assert_close(actual, end.float(), rtol=1e-5, atol=1e-5)


def run_guarded(calls, given):
    """Run with every buffer between guard bands, all but the given ones full of NaN; check them after."""
    buffers = {}
    for call in calls:
        for name, tensor in call.arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and id(tensor) not in buffers:
                is_given = any(tensor is g for g in given)
                made = (
                    GuardedBuffer.holding(tensor)
                    if is_given
                    else GuardedBuffer(tensor.shape, dtype=tensor.dtype)
                )
                buffers[id(tensor)] = (name, tensor, is_given, made)
        call.kernel[call.grid](
            **{n: buffers[id(t)][3].tensor if id(t) in buffers else t for n, t in call.arguments.items()},
            **call.constants,
        )
    for name, tensor, is_given, buffer in buffers.values():
        buffer.check(name)
        assert not is_given or torch.equal(buffer.tensor, tensor), f"{name}: an input was changed"
    return len(buffers)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_every_element_is_written_and_nothing_else(momentum, packed):
    from nl_kernels.ops.delta_memory import triton_backward, triton_forward

    # Two sequences whose chunks fill the table exactly: an unused chunk's buffers stay unwritten.
    x = delta_memory_inputs(
        1, 34, 2, 12, 20, key_heads=1, momentum=momentum, initial_state=True, sequences=2 if packed else None
    )
    cu_seqlens = torch.tensor([0, 17, 34]) if packed else None
    tensors = [*x.values(), cu_seqlens]
    options = {"scale": 0.7, "read": "running", "chunk_size": 16, "architecture": "sm_90"}
    calls, (o, state, momentum_state) = triton_forward.plan_forward(*tensors, **options)
    assert run_guarded(calls, tensors) > 10
    cotangents = [t if t is None else torch.randn(t.shape) for t in (o, state, momentum_state)]
    calls, _ = triton_backward.plan_backward(*cotangents, *tensors, **options)
    assert run_guarded(calls, [*tensors, *cotangents]) > 20


def test_step_writes_every_element_and_nothing_else():
    from nl_kernels.ops.delta_memory import triton_step

    x = delta_memory_inputs(2, 1, 3, 7, 33, momentum=True, initial_state=True)
    tensors = [x[n].squeeze(1) if x[n].shape[1] == 1 else x[n] for n in TENSORS]
    call, _ = triton_step.plan_step(*tensors, scale=1.0, read="running", architecture="sm_90")
    assert run_guarded([call], tensors) == 11


def test_rates_and_states_of_other_dtypes():
    """Gradients come back in the dtype of their inputs, whatever the kernels use inside."""
    x = inputs(9, momentum=True)
    x = {name: t.double() if name in TENSORS[3:] else t for name, t in x.items()}
    for name, gradient in results_and_gradients(x, impl="triton").items():
        if name[0] == "d":
            assert gradient.dtype == x[name[1:]].dtype, name


def test_strided_inputs():
    x = inputs(9, momentum=False, heads=2)
    expected, _ = delta_memory(**x, impl="triton")
    strided = {n: None if t is None else t.mT.contiguous().mT for n, t in x.items()}
    actual, _ = delta_memory(**strided, impl="triton")
    assert torch.equal(actual, expected)


def test_refuses_what_the_kernels_cannot_hold():
    with pytest.raises(NotImplementedError, match="up to 256 wide, got 257"):
        delta_memory(**delta_memory_inputs(1, 2, 1, 257, 8), impl="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        delta_memory(**delta_memory_inputs(1, 2, 1, 8, dtype=torch.float64), impl="triton")


def test_operators_pass_opcheck():
    x = inputs(5, momentum=True, requires_grad=False)
    arguments = (*x.values(), None, 1.0, "running", 16, "triton")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.nl_kernels.delta_memory_forward, arguments, test_utils=tests)
    results = torch.ops.nl_kernels.delta_memory_forward(*arguments)
    torch.library.opcheck(
        torch.ops.nl_kernels.delta_memory_backward, (*results, *arguments), test_utils=tests
    )
    step = [x[n][:, 0] for n in TENSORS[:6]] + [
        x["initial_state"],
        x["initial_momentum"],
        1.0,
        "running",
        "triton",
    ]
    torch.library.opcheck(torch.ops.nl_kernels.delta_memory_step, tuple(step), test_utils=tests)


def test_compiles_without_a_graph_break():
    x = inputs(18, momentum=True)
    expected = results_and_gradients(x, impl="triton", chunk_size=16)

    def call(*tensors):
        o, (state, momentum_state) = delta_memory(
            **dict(zip(x, tensors)), output_final_state=True, impl="triton", chunk_size=16
        )
        return o, state, momentum_state

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name, result in zip(("o", "S", "U"), compiled(*x.values())):
        assert torch.equal(result, expected[name])


# One deliberate mistake for each gradient: (kernel source, its corruption, the gradient that shows it).
MISTAKES = [
    ("dq_tile += read_decay[:, None] * product", "pass", "dq"),
    ("dk_tile += tail[:, None] * product", "pass", "dk"),
    ("d_value_tile -= matmul(value_solve, d_right, STATE)", "pass", "dv"),
    ("d_log += decay_from_start(alpha, count - 1) * kept_term", "pass", "dlog_decay"),
    ("start_before * erase_term", "erase_term", "derase"),
    ("d_mu += mixed_tail * tl.sum(", "d_mu += 2 * mixed_tail * tl.sum(", "dmomentum"),
    ("d_state -= matmul(tl.trans(transform), d_pseudo_tile, STATE)", "pass", "dinitial_state"),
    ("(scale * carried)[:, None] * d_output", "scale * d_output", "dinitial_momentum"),
]


@pytest.mark.parametrize(("source", "mistake", "gradient"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_in_any_gradient_is_seen(source, mistake, gradient, tmp_path, monkeypatch):
    from nl_kernels.ops.delta_memory import (
        triton_backward,
        triton_pair_gradients,
        triton_rate_gradients,
        triton_state_gradients,
    )

    modules = (triton_pair_gradients, triton_state_gradients, triton_rate_gradients)
    (text,) = (text for text in map(inspect.getsource, modules) if source in text)
    path = tmp_path / "mistaken.py"
    path.write_text(text.replace(source, mistake))
    spec = importlib.util.spec_from_file_location("mistaken", path)
    mistaken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mistaken)

    x = delta_memory_inputs(1, 18, 1, 4, 4, momentum=True, initial_state=True)
    expected = results_and_gradients(x, impl="eager")
    for name, kernel in vars(mistaken).items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_backward, name, kernel)
    monkeypatch.setattr(triton_backward, "_backward", triton_backward._backward.__wrapped__)  # nothing kept
    actual = results_and_gradients(x, impl="triton", chunk_size=16)
    error = (actual[gradient] - expected[gradient]).norm() / expected[gradient].norm()
    assert not error < 1e-3
