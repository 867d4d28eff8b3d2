"""The chunked path against the token loop: values, gradients, cuts, packing, precision."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nl_kernels import delta_memory, delta_memory_step
from nl_kernels.doctor import relative_error
from nl_kernels.ops.delta_memory import eager, rows
from tests.nl_kernels.budgets import assert_within_budget
from tools.op_inputs import delta_memory_inputs, to_float64

TENSORS = ("q", "k", "v", "log_decay", "erase", "momentum", "initial_state", "initial_momentum")


def run(x, **options):
    """o, S and U of a call, without the absent ones."""
    o, final = delta_memory(**x, output_final_state=True, **options)
    return [o, *(final if isinstance(final, tuple) else (final,))]


def results_and_gradients(x, **options):
    """All results by name, and all gradients for cotangents that are the same in every call."""
    leaves = {name: value for name, value in x.items() if value is not None}
    results = dict(zip(("o", "S", "U"), run(x, **options)))
    rng = torch.Generator().manual_seed(1)
    loss = 0
    for result in results.values():
        eighths = (8 * torch.randn(result.shape, generator=rng)).round() / 8  # exact in every dtype
        loss = loss + (result * eighths.to(result.dtype)).sum()
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return {n: r.detach() for n, r in results.items()} | {f"d{n}": g for n, g in zip(leaves, gradients)}


def assert_equal_in_fp64(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name in expected:
        error = relative_error(actual[name], expected[name])
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_chunks_equal_the_token_loop(data, monkeypatch):
    draw = data.draw
    packed = draw(st.booleans(), label="packed")
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4), label="lengths") if packed else None
    length = sum(lengths) if packed else draw(st.integers(1, 40), label="T")
    batch = 1 if packed else draw(st.integers(1, 2), label="B")
    heads = draw(st.integers(1, 4), label="H")
    x = delta_memory_inputs(
        batch,
        length,
        heads,
        draw(st.integers(1, 7), label="Dk"),
        draw(st.integers(1, 7), label="Dv"),
        key_heads=draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0]), label="G"),
        momentum=draw(st.booleans(), label="momentum"),
        initial_state=draw(st.booleans(), label="initial state"),
        sequences=len(lengths) if packed else None,
        dtype=torch.float64,
        seed=draw(st.integers(0, 1000), label="seed"),
    )
    for t in draw(st.lists(st.integers(0, length - 1), max_size=3), label="forget at"):
        x["log_decay"][:, t] = -torch.inf
    if x["momentum"] is not None:
        for t in draw(st.lists(st.integers(0, length - 1), max_size=3), label="no momentum at"):
            x["momentum"][:, t] = 0
    for value in x.values():
        if value is not None:
            value.requires_grad_()
    options = {
        "read": draw(st.sampled_from(["running", "before"]), label="read"),
        "scale": draw(st.sampled_from([1.0, 0.3]), label="scale"),
        "chunk_size": draw(st.sampled_from([1, 2, 5, 8, 16]), label="C"),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)]) if packed else None,
    }
    given = {name: None if value is None else value.detach().clone() for name, value in x.items()}
    monkeypatch.setitem(rows.SEGMENT_ELEMENTS, "cpu", draw(st.sampled_from([1, 500, 2**17]), label="segment"))
    actual = results_and_gradients(x, impl="eager", **options)
    for name, value in given.items():
        assert value is None or torch.equal(value, x[name]), f"{name} was changed"
    assert_equal_in_fp64(actual, results_and_gradients(x, impl="reference", **options))


@pytest.mark.parametrize("chunk_size", [64, 100, 128])
def test_chunks_of_full_size_equal_the_token_loop(chunk_size):
    x = delta_memory_inputs(1, 150, 1, 8, momentum=True, dtype=torch.float64, requires_grad=True)
    actual = results_and_gradients(x, impl="eager", chunk_size=chunk_size)
    assert_equal_in_fp64(actual, results_and_gradients(x, impl="reference"))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("read", ["running", "before"])
def test_gradcheck(momentum, read):
    x = delta_memory_inputs(
        1, 5, 1, 2, 3, momentum=momentum, initial_state=True, dtype=torch.float64, requires_grad=True
    )
    names = [name for name in TENSORS if x[name] is not None]

    def function(*values):
        return tuple(run(dict(zip(names, values)), impl="eager", chunk_size=2, read=read))

    assert torch.autograd.gradcheck(function, tuple(x[name] for name in names))


def assert_gradients_are_right():
    x = delta_memory_inputs(
        2, 21, 2, 4, 3, momentum=True, initial_state=True, dtype=torch.float64, requires_grad=True
    )
    actual = results_and_gradients(x, impl="eager", chunk_size=8)
    assert_equal_in_fp64(actual, results_and_gradients(x, impl="reference"))


@pytest.mark.parametrize("broken", range(len(TENSORS)), ids=TENSORS)
def test_the_gradient_check_sees_an_error_of_one_percent(broken, monkeypatch):
    assert_gradients_are_right()
    backward = eager.delta_memory_backward

    def scaled(*args, **options):
        gradients = list(backward(*args, **options))
        gradients[broken] = 1.01 * gradients[broken]
        return tuple(gradients)

    monkeypatch.setattr(eager, "delta_memory_backward", scaled)
    with pytest.raises(AssertionError, match=f"d{TENSORS[broken]}:"):
        assert_gradients_are_right()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("cut", [1, 8, 13, 16, 22])
def test_a_sequence_cut_anywhere_and_resumed_equals_the_whole(momentum, cut):
    x = delta_memory_inputs(2, 23, 2, 4, 3, momentum=momentum, initial_state=True, dtype=torch.float64)
    whole = run(x, chunk_size=8)

    def part(tokens, states):
        cut_inputs = {name: value if value is None else value[:, tokens] for name, value in x.items()}
        return run(cut_inputs | dict(zip(("initial_state", "initial_momentum"), states)), chunk_size=8)

    first = part(slice(0, cut), [s for s in (x["initial_state"], x["initial_momentum"]) if s is not None])
    second = part(slice(cut, None), first[1:])
    pieces = [torch.cat([first[0], second[0]], 1), *second[1:]]
    for actual, expected in zip(pieces, whole):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("read", ["running", "before"])
def test_token_by_token_equals_the_whole(momentum, read):
    options = {"key_heads": 2, "momentum": momentum, "initial_state": True}
    x = delta_memory_inputs(2, 12, 4, 4, 3, dtype=torch.float64, **options)
    whole = run(x, chunk_size=4, read=read, scale=0.5)
    state, momentum_state = x["initial_state"], x["initial_momentum"]
    given = [s if s is None else s.clone() for s in (state, momentum_state)]
    outputs = []
    for t in range(12):
        token = {name: None if x[name] is None else x[name][:, t] for name in TENSORS[:6]}
        o, final = delta_memory_step(
            **token, state=state, momentum_state=momentum_state, read=read, scale=0.5
        )
        state, momentum_state = final if momentum else (final, None)
        outputs.append(o)
    for actual, expected in zip([torch.stack(outputs, 1), state, momentum_state], whole):
        assert relative_error(actual, expected) < 1e-12
    assert torch.equal(x["initial_state"], given[0]), "the caller's state was changed"
    assert not momentum or torch.equal(x["initial_momentum"], given[1])


def test_a_step_has_gradients_when_they_are_needed():
    x = delta_memory_inputs(2, 1, 2, 4, 3, momentum=True, initial_state=True, dtype=torch.float64)
    token = {name: x[name][:, 0].requires_grad_() for name in TENSORS[:6]}
    states = {
        "state": x["initial_state"].requires_grad_(),
        "momentum_state": x["initial_momentum"].requires_grad_(),
    }
    leaves = (*token.values(), *states.values())
    gradients = {}
    for impl in ("eager", "reference"):
        o, (state, momentum_state) = delta_memory_step(**token, **states, impl=impl)
        gradients[impl] = torch.autograd.grad((o.sum(), state.square().sum(), momentum_state.sum()), leaves)
    for actual, expected in zip(gradients["eager"], gradients["reference"]):
        assert relative_error(actual, expected) < 1e-12


def test_packed_sequences_equal_separate_ones():
    bounds = [0, 5, 6, 30, 47]
    x = delta_memory_inputs(
        1, 47, 2, 4, 3, momentum=True, initial_state=True, sequences=4, dtype=torch.float64
    )
    packed = run(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), chunk_size=8)
    separate = []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = {name: x[name][:, start:end] for name in TENSORS[:6]}
        states = {name: x[name][n : n + 1] for name in TENSORS[6:]}
        separate.append(run(tokens | states, chunk_size=8))
    for actual, parts, axis in zip(packed, zip(*separate), (1, 0, 0)):
        assert relative_error(actual, torch.cat(parts, axis)) < 1e-12


def test_forgetting_everything_is_exact_and_its_gradient_is_zero():
    """−inf and 0 are not approximations: nothing of the past is left, and no gradient is NaN."""
    x = delta_memory_inputs(1, 40, 2, 8, initial_state=True, momentum=True)
    x["log_decay"][:, [3, 4, 20]] = -torch.inf
    x["erase"][:, 20] = 0
    x["momentum"][:, [0, 20]] = 0
    for value in x.values():
        value.requires_grad_()
    out = results_and_gradients(x, impl="eager", chunk_size=16)
    assert all(torch.isfinite(value).all() for value in out.values())
    assert (out["dlog_decay"][:, [3, 4, 20]] == 0).all()
    assert (out["dmomentum"][:, 20] != 0).any()
    past_changed = {name: None if value is None else value.detach().clone() for name, value in x.items()}
    past_changed["v"][:, :20] += 1
    after = delta_memory(**past_changed, impl="eager", chunk_size=16)[0]
    assert torch.equal(after[:, 20:], out["o"][:, 20:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [False, True])
def test_sixteen_bit_inputs_cost_one_rounding_of_each_result(dtype, momentum):
    x = delta_memory_inputs(
        2, 70, 2, 16, momentum=momentum, initial_state=True, dtype=dtype, requires_grad=True
    )
    actual = results_and_gradients(x, impl="eager", chunk_size=32)
    expected = results_and_gradients(to_float64(x), impl="reference")
    widened = {
        n: None if value is None else value.detach().float().requires_grad_() for n, value in x.items()
    }
    loop = results_and_gradients(widened, impl="reference")
    for name in expected:
        leaf = x["v"] if name == "o" else x.get(name.removeprefix("d"))
        assert actual[name].dtype == (torch.float32 if leaf is None else leaf.dtype), name
        rounded = loop[name].to(actual[name].dtype)
        assert_within_budget(actual[name], rounded, expected[name], factor=4, name=name)


@pytest.mark.parametrize("momentum", [False, True])
def test_fp32_in_chunks_is_as_accurate_as_the_fp32_token_loop(momentum):
    x = delta_memory_inputs(1, 200, 2, 32, momentum=momentum, initial_state=True, requires_grad=True)
    actual = results_and_gradients(x, impl="eager")
    loop = results_and_gradients(x, impl="reference")
    expected = results_and_gradients(to_float64(x), impl="reference")
    for name in expected:
        token_dim = 1 if expected[name].shape[1] == 200 else None
        assert_within_budget(
            actual[name], loop[name], expected[name], factor=4, token_dim=token_dim, name=name
        )


def test_repeated_keys_do_not_amplify_rounding():
    """The same key at full erase makes A all ones below the diagonal; its powers have entries like 1e18."""
    x = delta_memory_inputs(1, 128, 1, 16, requires_grad=True)
    with torch.no_grad():
        x["k"].copy_(x["k"][:, :1].expand_as(x["k"]))
        x["erase"].fill_(1.0)
    actual = results_and_gradients(x, impl="eager")
    expected = results_and_gradients(to_float64(x), impl="reference")
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 2e-5, name


def test_nothing_is_saved_but_the_inputs():
    """Nothing but the inputs is kept between forward and backward, shared keys once."""
    x = delta_memory_inputs(1, 64, 2, 16, key_heads=1, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        delta_memory(**x, impl="eager")
    inputs = {value.data_ptr() for value in x.values() if value is not None}
    assert saved
    assert {t.data_ptr() for t in saved} <= inputs
