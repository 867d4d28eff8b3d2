"""The one-token kernel in Triton's interpreter: against the definition, what it writes, what it refuses."""

import dataclasses

import pytest
import torch

from nl_kernels import MemoryRule
from nl_kernels import deep_memory as op
from nl_kernels import deep_memory_step as step
from nl_kernels.doctor import tensors_of
from tests.nl_kernels.chunked_memories import assert_same, assert_steps_equal_the_definition, tokens
from tools.op_inputs import deep_memory_inputs

pytestmark = pytest.mark.interpreter

RULES = {
    "default": MemoryRule(),
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
    "literal": dataclasses.replace(MemoryRule.literal(), proximal=False),
    "gelu": MemoryRule(activation="gelu", residual=True, error_bound=0.3),
    "titans": MemoryRule(erase="none", anchored=False, normalize_hidden=False),
}


def token(inputs, t):
    return {n: x if n == "weights" or x is None else x[:, t] for n, x in inputs.items()}


# A step is the chunk kernel with one token, whose rules test_interpreter.py has.
CASES = [(name, hidden) for name in RULES for hidden in (None, 5)]
EVERY_DAY = {("default", 5), ("gelu", None), ("literal", None)}


@pytest.mark.parametrize(
    ("name", "hidden"),
    [pytest.param(*case, marks=() if case in EVERY_DAY else pytest.mark.slow) for case in CASES],
)
def test_equals_the_definition(name, hidden):
    rule = RULES[name]
    for index, read in enumerate(["snapshot", "running"]):
        out = 3 if rule.residual else 5
        inputs = deep_memory_inputs(2, 9, 2, 3, hidden, out, seed=index)
        assert_steps_equal_the_definition(
            op,
            step,
            inputs,
            [4, 1],
            5,
            masked=index == 0,
            inplace=index == 0,
            tolerance=2e-5,
            impl="triton",
            rule=rule,
            read=read,
            chunk_size=4 if index % 2 else 2,
        )


def test_half_precision_inputs():
    inputs = deep_memory_inputs(2, 6, 2, 16, None, dtype=torch.float16)
    assert_steps_equal_the_definition(
        op, step, inputs, [2, 1], 4, masked=False, inplace=True, tolerance=2e-3, impl="triton",
        read="running", chunk_size=2,
    )  # fmt: skip


@pytest.fixture
def started():
    inputs = deep_memory_inputs(2, 4, 2, 5, 3)
    _, state = op(**tokens(inputs, 0, 3), chunk_size=4, output_final_state=True)
    return {**token(inputs, 3), "state": state.clone(), "chunk_size": 4, "impl": "triton"}


def test_functional_equals_in_place_and_leaves_the_state(started):
    before = [x.clone() for x in tensors_of(started["state"])]
    o, after = step(**started)
    assert_same(tensors_of(started["state"]), before, 0)
    o2, after2 = step(**started, inplace=True)
    assert torch.equal(o, o2)
    assert_same(tensors_of(after2), tensors_of(after), 0)
    assert after2.position is started["state"].position
    assert after.position.tolist() == after2.position.tolist()


def test_compiles_without_a_graph_break(started):
    expected, end = step(**started)
    found, after = torch.compile(step, fullgraph=True, backend="aot_eager")(**started)
    assert_same([found, *tensors_of(after)], [expected, *tensors_of(end)], 0)


def test_refuses_what_it_does_not_cover(started):
    with pytest.raises(NotImplementedError, match=r"rule.erase: .* got 'input'; use impl='eager'"):
        step(**{**started, "rule": MemoryRule(erase="input")})
    wide = deep_memory_inputs(1, 2, 1, 129, None)
    _, state = op(**tokens(wide, 0, 1), chunk_size=2, output_final_state=True)
    with pytest.raises(NotImplementedError, match=r"q, k, v: .* up to 128 wide, got 129; use impl='eager'"):
        step(**token(wide, 1), state=state, chunk_size=2, impl="triton")
