"""One token at a time on the CPU, against the definition: every option, clocks, places, gaps."""

import itertools

import pytest
import torch

from nl_kernels import DeepMemoryWeights, MemoryRule, SelfModifyingWeights
from nl_kernels import self_modifying_memory as op
from nl_kernels import self_modifying_memory_step as step
from nl_kernels.doctor import tensors_of
from tests.nl_kernels.chunked_memories import (
    assert_same,
    assert_steps_equal_the_definition,
    at_rates_up_to_two,
    tokens,
)
from tools.op_inputs import self_modifying_inputs

RULES = {
    "default": MemoryRule(),
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
    "literal": MemoryRule.literal(),
    "gelu, not anchored, not bounded": MemoryRule(activation="gelu", anchored=False, error_bound=None),
    "input": MemoryRule(erase="input", proximal=True, residual=True, error_bound=0.3),
    "titans": MemoryRule(erase="none", momentum="sum"),
}
SHARED = ("weights", "rate_max", "rate_bias", "retention_bias")


def make(batch, length, heads=2, width=3, hidden=4, **options):
    return self_modifying_inputs(batch, length, heads, width, hidden, dtype=torch.float64, **options)


def token(inputs, t):
    return {n: x if n in SHARED or x is None else x[:, t] for n, x in inputs.items()}


@pytest.mark.parametrize("hidden", [None, 4], ids=["linear", "two-layer"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_the_definition(rule, hidden):
    clocks = itertools.cycle([(4, 4), (2, 4), (4, 2), (1, 3)])
    cases = itertools.product(["snapshot", "running"], [False, True], range(2))
    for index, (read, momentum, _) in enumerate(cases):
        chunk_size, generator_chunk_size = next(clocks)
        steps = 3 * max(chunk_size, generator_chunk_size) + 5
        inputs = make(3, steps + 4, hidden=hidden, momentum=momentum, seed=index)
        if hidden is None and index % 2:
            inputs["write_scale"] = inputs["query"][..., 0].abs()
        if rule.error_bound is None:
            inputs["rate_max"] = 0.05 * inputs["rate_max"]  # without a bound targets grow with the memory
        assert_steps_equal_the_definition(
            op,
            step,
            inputs,
            [4, 1, 3],
            steps,
            masked=index % 3 != 0,
            inplace=index in (1, 2, 4, 7),
            rule=rule,
            read=read,
            chunk_size=chunk_size,
            generator_chunk_size=generator_chunk_size,
        )


@pytest.mark.parametrize("hidden", [None, 4], ids=["linear", "two-layer"])
def test_rates_up_to_two_equal_the_definition(hidden):
    inputs = at_rates_up_to_two(make(3, 21, hidden=hidden))
    assert_steps_equal_the_definition(
        op, step, inputs, [4, 1, 3], 17, masked=True, inplace=True, read="running", chunk_size=4
    )


@pytest.mark.parametrize("hidden", [None, 4], ids=["linear", "two-layer"])
@pytest.mark.parametrize("inplace", [False, True])
def test_sequences_together_equal_the_chunked_op(hidden, inplace):
    """All at one place, without gaps: the boundary is met by all or by none."""
    options = {"chunk_size": 6, "generator_chunk_size": 3, "read": "running"}
    inputs = make(2, 3 * 6 + 5, hidden=hidden)
    expected, end = op(**inputs, **options, output_final_state=True)
    first, state = op(**tokens(inputs, 0, 1), **options, output_final_state=True)
    state = state.clone()
    outputs = [first[:, 0]]
    for t in range(1, expected.shape[1]):
        o, state = step(**token(inputs, t), **options, state=state, inplace=inplace)
        outputs.append(o)
    assert_same([torch.stack(outputs, 1), *tensors_of(state)], [expected, *tensors_of(end)])


def test_weights_by_sequence_and_shared_ones():
    inputs = make(2, 9)
    own = DeepMemoryWeights(*(w + 0.1 * torch.randn(2, *w.shape) for w in inputs["weights"].value))
    for weights in (
        inputs["weights"]._replace(value=own),
        SelfModifyingWeights(
            *(DeepMemoryWeights(*(w.expand(2, *w.shape) for w in m)) for m in inputs["weights"])
        )._replace(value=own),
    ):
        given = {**inputs, "weights": weights}
        expected, _ = op(**given, chunk_size=4, read="running")
        _, state = op(**tokens(given, 0, 3), chunk_size=4, read="running", output_final_state=True)
        for t in range(3, 9):
            o, state = step(**token(given, t), state=state, chunk_size=4, read="running")
            torch.testing.assert_close(o, expected[:, t], rtol=0, atol=1e-11)


@pytest.fixture
def started():
    inputs = make(2, 6, momentum=True)
    _, state = op(**tokens(inputs, 0, 5), chunk_size=4, output_final_state=True)
    return {**token(inputs, 5), "state": state, "chunk_size": 4}


def test_numbers_are_gate_parameters_too(started):
    numbers = {"rate_max": 0.7, "rate_bias": -0.3, "retention_bias": 2}
    expected, _ = step(
        **{**started, **{n: torch.full((2,), float(x)) for n, x in numbers.items()}}, read="running"
    )
    found, _ = step(**{**started, **numbers}, read="running")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # 0.7 in fp32


def test_the_given_state_stays_as_it_is(started):
    before = [x.clone() for x in tensors_of(started["state"])]
    step(**started)
    for x, y in zip(tensors_of(started["state"]), before):
        assert torch.equal(x, y)


def test_gradients_flow_where_they_are_needed(started):
    started["retention_bias"].requires_grad_()
    o, _ = step(**started, read="running")
    (found,) = torch.autograd.grad(o.sum(), started["retention_bias"])
    o, _ = step(**started, read="running", impl="reference")
    expected = torch.autograd.grad(o.sum(), started["retention_bias"])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert found.abs().sum() > 0
    started["state"] = started["state"].clone()
    with pytest.raises(ValueError, match="inplace: not where gradients are needed"):
        step(**started, inplace=True)


def test_low_precision_inputs_keep_a_full_precision_state():
    inputs = self_modifying_inputs(1, 6, 2, 8, None)
    _, state = op(**tokens(inputs, 0, 5), chunk_size=4, output_final_state=True)

    def cast(x, dtype):
        if isinstance(x, torch.Tensor):
            return x.to(dtype)
        if isinstance(x, tuple):
            return type(x)(*(cast(part, dtype) for part in x))
        return x

    half = {n: cast(x, torch.bfloat16) for n, x in token(inputs, 5).items()}
    exact = {n: cast(x, torch.float32) for n, x in half.items()}
    expected, _ = step(**exact, state=state, chunk_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        o, after = step(**half, state=state, chunk_size=4)
    assert o.dtype == torch.bfloat16
    assert {x.dtype for x in tensors_of(after)} == {torch.float32}
    torch.testing.assert_close(o, expected.bfloat16(), rtol=0, atol=1e-2)


def test_compiles_without_a_graph_break(started):
    expected, end = step(**started)
    found, after = torch.compile(step, fullgraph=True, backend="aot_eager")(**started)
    assert_same([found, *tensors_of(after)], [expected, *tensors_of(end)], 1e-12)


BAD = {
    "rank": ({"query": torch.zeros(2, 1, 2, 3)}, ValueError, r"query: expected \[B, H, D\]"),
    "kind": ({"query": None}, TypeError, "query: expected a tensor, got NoneType"),
    "shape": ({"gate_input": torch.zeros(2, 3)}, ValueError, r"gate_input: expected shape \(2, 2, 3\)"),
    "mask": ({"mask": torch.ones(2, 1, dtype=torch.bool)}, ValueError, r"mask: expected shape"),
    "read": ({"read": "after"}, ValueError, "read: expected one of"),
    "clocks": ({"generator_chunk_size": 3}, ValueError, "generator_chunk_size: one of it and chunk_size"),
    "gate": ({"rate_bias": torch.zeros(3)}, ValueError, r"rate_bias: expected shape \(2,\)"),
    "gate kind": ({"rate_max": "1"}, TypeError, r"rate_max: expected a float or a tensor \[H\]"),
    "state": ({"state": None}, TypeError, "state: expected SelfModifyingState, got NoneType"),
    "momentum": ({"momentum": None}, ValueError, "state: made with momentum, but this call is without"),
    "chunk": ({"chunk_size": 1}, ValueError, "state.position: .* made with another chunk size"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    "memory": ({"inplace": True}, ValueError, "state.running.first: inplace needs .* state.clone"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(started, change, kind, message):
    state = started["state"].clone()
    shared = state._replace(running=state.snapshot)
    with pytest.raises(kind, match=message):
        step(**{**started, "state": shared, **change})
