"""One token at a time on the CPU, against the definition: every option, places, gaps, in place or not."""

import itertools

import pytest
import torch

from nl_kernels import DeepMemoryWeights, MemoryRule, deep_memory, deep_memory_step
from nl_kernels.doctor import tensors_of
from tests.nl_kernels.chunked_memories import assert_same, assert_steps_equal_the_definition, tokens
from tools.op_inputs import deep_memory_inputs

RULES = {
    "default": MemoryRule(),
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
    "literal": MemoryRule.literal(),
    "gelu, not anchored, not bounded": MemoryRule(activation="gelu", anchored=False, error_bound=None),
    "input": MemoryRule(erase="input", residual=True, error_bound=0.3),
    "input, proximal": MemoryRule(erase="input", proximal=True, normalize_hidden=False),
    "titans": MemoryRule(erase="none", residual=True, anchored=False, normalize_hidden=False, momentum="sum"),
}
CHUNK = 4


def make(batch, length, heads=2, width=3, hidden=4, **options):
    return deep_memory_inputs(batch, length, heads, width, hidden, dtype=torch.float64, **options)


def token(inputs, t):
    return {n: x if n == "weights" or x is None else x[:, t] for n, x in inputs.items()}


@pytest.mark.parametrize("hidden", [None, 4], ids=["linear", "two-layer"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_the_definition(rule, hidden):
    steps = 3 * CHUNK + 5
    for index, (read, momentum, masked) in enumerate(
        itertools.product(["snapshot", "running"], [False, True], [False, True])
    ):
        inputs = make(3, steps + 4, hidden=hidden, momentum=momentum, seed=index)
        options = {"rule": rule, "read": read, "chunk_size": CHUNK}
        assert_steps_equal_the_definition(
            deep_memory,
            deep_memory_step,
            inputs,
            [4, 1, 3],
            steps,
            masked=masked,
            inplace=bool(index % 2),
            **options,
        )
    # The other half of "in place": what is not written into stays as it was.
    assert_steps_equal_the_definition(
        deep_memory, deep_memory_step, inputs, [4, 1, 3], steps, masked=True, inplace=False, **options
    )


def test_equals_the_chunked_op_at_any_chunk_size_and_width():
    for chunk, width, value_width, batch in ((1, 5, 2, 2), (3, 1, 4, 1), (7, 6, 6, 4)):
        inputs = make(batch, 3 * chunk + 5, width=width, value_width=value_width, momentum=True)
        expected, end = deep_memory(**inputs, chunk_size=chunk, read="running", output_final_state=True)
        first, state = deep_memory(
            **tokens(inputs, 0, 1), chunk_size=chunk, read="running", output_final_state=True
        )
        outputs = [first[:, 0]]
        for t in range(1, expected.shape[1]):
            o, state = deep_memory_step(**token(inputs, t), state=state, chunk_size=chunk, read="running")
            outputs.append(o)
        assert_same([torch.stack(outputs, 1), *tensors_of(state)], [expected, *tensors_of(end)], 1e-11)


def test_weights_by_sequence():
    inputs = make(2, 12)
    inputs["weights"] = DeepMemoryWeights(*(w + 0.1 * torch.randn(2, *w.shape) for w in inputs["weights"]))
    expected, _ = deep_memory(**inputs, chunk_size=CHUNK)
    _, state = deep_memory(**tokens(inputs, 0, 3), chunk_size=CHUNK, output_final_state=True)
    for t in range(3, 12):
        o, state = deep_memory_step(**token(inputs, t), state=state, chunk_size=CHUNK)
        torch.testing.assert_close(o, expected[:, t], rtol=0, atol=1e-11)


@pytest.fixture
def started():
    inputs = make(2, 6, momentum=True)
    _, state = deep_memory(**tokens(inputs, 0, 5), chunk_size=CHUNK, output_final_state=True)
    return {**token(inputs, 5), "state": state, "chunk_size": CHUNK}


def test_the_given_state_stays_as_it_is(started):
    before = [x.clone() for x in tensors_of(started["state"])]
    deep_memory_step(**started)
    for x, y in zip(tensors_of(started["state"]), before):
        assert torch.equal(x, y)


def test_a_step_in_place_never_writes_into_the_weights():
    """A memory without an anchor begins as its weights; within the first chunk they are its snapshot."""
    inputs, options = deep_memory_inputs(1, 4, 2, 3, 4), {"rule": MemoryRule(anchored=False), "chunk_size": 4}
    before = [w.clone() for w in inputs["weights"]]
    _, state = deep_memory(**tokens(inputs, 0, 3), **options, output_final_state=True)
    last = token(inputs, 3)
    with pytest.raises(ValueError, match=r"state.snapshot.inner: inplace needs .* state.clone\(\)"):
        deep_memory_step(**last, **options, state=state, inplace=True)
    found, _ = deep_memory_step(**last, **options, state=state.clone(), inplace=True)
    assert torch.equal(found, deep_memory_step(**last, **options, state=state)[0])
    assert all(map(torch.equal, inputs["weights"], before))


def test_forgetting_everything_is_exact(started):
    started["log_decay"] = torch.full_like(started["log_decay"], -torch.inf)
    found, _ = deep_memory_step(**started, read="running")
    expected, _ = deep_memory_step(**started, read="running", impl="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_flow_where_they_are_needed(started):
    started["v"].requires_grad_()
    o, _ = deep_memory_step(**started, read="running")
    (found,) = torch.autograd.grad(o.sum(), started["v"])
    o, _ = deep_memory_step(**started, read="running", impl="reference")
    torch.testing.assert_close(found, torch.autograd.grad(o.sum(), started["v"])[0], rtol=0, atol=1e-11)
    assert found.abs().sum() > 0
    started["state"] = started["state"].clone()
    with pytest.raises(ValueError, match="inplace: not where gradients are needed"):
        deep_memory_step(**started, inplace=True)


def test_low_precision_inputs_keep_a_full_precision_state():
    inputs = deep_memory_inputs(1, 6, 2, 8, 8)
    _, state = deep_memory(**tokens(inputs, 0, 5), chunk_size=CHUNK, output_final_state=True)
    half = {n: x.bfloat16() if isinstance(x, torch.Tensor) else x for n, x in token(inputs, 5).items()}
    half["weights"] = DeepMemoryWeights(*(w.bfloat16() for w in inputs["weights"]))
    exact = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in half.items()}
    exact["weights"] = DeepMemoryWeights(*(w.float() for w in half["weights"]))
    expected, _ = deep_memory_step(**exact, state=state, chunk_size=CHUNK)
    with torch.autocast("cpu", torch.bfloat16):
        o, after = deep_memory_step(**half, state=state, chunk_size=CHUNK)
    assert o.dtype == torch.bfloat16
    assert {x.dtype for x in tensors_of(after)} == {torch.float32}
    assert torch.equal(o, expected.bfloat16())


def test_compiles_without_a_graph_break(started):
    expected, end = deep_memory_step(**started)
    compiled = torch.compile(deep_memory_step, fullgraph=True, backend="aot_eager")
    found, after = compiled(**started)
    assert_same([found, *tensors_of(after)], [expected, *tensors_of(end)], 1e-12)


BAD = {
    "rank": ({"q": torch.zeros(2, 1, 2, 3)}, ValueError, r"q: expected \[B, H, D\]"),
    "kind": ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
    "shape": ({"rate": torch.zeros(2, 3)}, ValueError, r"rate: expected shape \(2, 2\)"),
    "mask": ({"mask": torch.ones(2, 1, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2,\)"),
    "read": ({"read": "after"}, ValueError, "read: expected one of"),
    "state": ({"state": None}, TypeError, "state: expected DeepMemoryState, got NoneType"),
    "momentum": ({"momentum": None}, ValueError, "state: made with momentum, but this call is without"),
    "chunk": ({"chunk_size": 1}, ValueError, "state.position: .* made with another chunk size"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    "memory": ({"inplace": True}, ValueError, "state.running.inner: inplace needs .* state.clone"),
    "reference": ({"impl": "reference", "inplace": True, "state": "clone"}, ValueError, "inplace: not where"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(started, change, kind, message):
    shared = started["state"]._replace(running=started["state"].snapshot)
    replaced = {**started, "state": shared, **change}
    if replaced["state"] == "clone":
        replaced["state"] = started["state"].clone()
    with pytest.raises(kind, match=message):
        deep_memory_step(**replaced)


def test_a_state_of_another_dtype_is_refused(started):
    started["q"] = started["q"].float()
    state = started["state"].clone()
    narrow = DeepMemoryWeights(*(x.float() for x in state.running))
    with pytest.raises(
        TypeError, match=r"state: expected torch\.float64 for these inputs, got torch\.float32"
    ):
        deep_memory_step(**{**started, "state": state._replace(running=narrow)})
