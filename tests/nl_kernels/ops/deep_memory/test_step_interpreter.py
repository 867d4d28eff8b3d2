"""The one-token kernel in Triton's interpreter: against the definition, what it writes, what it refuses."""

import itertools

import pytest
import torch

from nl_kernels import MemoryRule
from nl_kernels import deep_memory as op
from nl_kernels import deep_memory_step as step
from nl_kernels.testing import GuardedBuffer, deep_memory_inputs, tensors_of
from tests.nl_kernels.chunked_memories import assert_same, assert_steps_equal_the_definition, tokens

pytestmark = pytest.mark.interpreter

RULES = {
    "default": MemoryRule(momentum="sum"),
    "literal": MemoryRule.literal(),
    "gelu, input": MemoryRule(
        activation="gelu", erase="input", proximal=True, residual=True, error_bound=0.3, momentum="sum"
    ),
    "titans": MemoryRule(erase="none", residual=True, anchored=False, normalize_hidden=False),
}


def token(inputs, t):
    return {n: x if n == "weights" or x is None else x[:, t] for n, x in inputs.items()}


# Activations are of two layers alone; the other rules every day with one.
CASES = [(name, hidden) for name in RULES for hidden in (None, 5)]
DEAREST = {("literal", 5), ("titans", 5)}


@pytest.mark.parametrize(
    ("name", "hidden"),
    [pytest.param(*case, marks=pytest.mark.slow if case in DEAREST else ()) for case in CASES],
)
def test_equals_the_definition(name, hidden):
    rule = RULES[name]
    cases = list(itertools.product(["snapshot", "running"], [False, True]))
    for index, (read, momentum) in enumerate(cases if rule == RULES["default"] else cases[1:3]):
        out = 3 if rule.residual else 5
        inputs = deep_memory_inputs(2, 9, 2, 3, hidden, out, momentum=momentum, seed=index)
        assert_steps_equal_the_definition(
            op,
            step,
            inputs,
            [4, 1],
            5,
            masked=index != 2,
            inplace=index < 2,
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
    inputs = deep_memory_inputs(2, 4, 2, 5, 3, momentum=True)
    rule = MemoryRule(erase="none")
    _, state = op(**tokens(inputs, 0, 3), chunk_size=4, rule=rule, output_final_state=True)
    return {**token(inputs, 3), "state": state.clone(), "chunk_size": 4, "rule": rule, "impl": "triton"}


def options_of(started):
    from nl_kernels.ops.deep_memory.launch import Options

    options = {"offset": 0, "chunk_size": 4, "read": "running", "checkpoint_every": None, "precision": "ieee"}
    return Options.of(started["rule"], **options)


def plan(started):
    """The calls of a step, and all of its tensors by name."""
    from nl_kernels.ops.deep_memory import launch, triton_step

    state = started["state"]
    inputs = launch.StepInputs(
        *(started[n] for n in ("q", "k", "v", "rate", "log_decay", "momentum")),
        *started["weights"],
        *state.snapshot,
        *state.running,
        *state.momentum,
        state.position,
        torch.ones(2, dtype=torch.uint8),
    )
    options = options_of(started)
    return triton_step.plan_step(inputs, options)[0]


def test_writes_where_it_may_and_nowhere_else(started):
    call, _ = plan(started)
    written = {"inner", "outer", "o"}
    written |= {f"{part}_{name}" for part in ("inner", "outer") for name in ("snapshot", "velocity")}
    buffers = {
        name: GuardedBuffer(x.shape, dtype=x.dtype) if name == "o" else GuardedBuffer.holding(x)
        for name, x in call.arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    changed = {n: buffers[n].tensor if n in buffers else x for n, x in call.arguments.items()}
    call.kernel[call.grid](**changed, **call.constants)
    for name, buffer in buffers.items():
        buffer.check(name)
        same = torch.equal(buffer.tensor, call.arguments[name])
        assert same != (name in written), f"{name}: {'not written' if same else 'written'}"


def test_functional_equals_in_place_and_leaves_the_state(started):
    before = [x.clone() for x in tensors_of(started["state"])]
    o, after = step(**started)
    assert_same(tensors_of(started["state"]), before, 0)
    o2, after2 = step(**started, inplace=True)
    assert torch.equal(o, o2)
    assert_same(tensors_of(after2), tensors_of(after), 0)
    assert after2.position is started["state"].position
    assert after.position.tolist() == after2.position.tolist()


def test_passes_opcheck(started):
    from nl_kernels.ops.deep_memory import launch

    call, _ = plan(started)
    arguments = tuple(call.arguments[name] for name in launch.StepInputs._fields) + tuple(options_of(started))
    torch.library.opcheck(torch.ops.nl_kernels.deep_memory_step, arguments)


def test_compiles_without_a_graph_break(started):
    expected, end = step(**started)
    found, after = torch.compile(step, fullgraph=True, backend="aot_eager")(**started)
    assert_same([found, *tensors_of(after)], [expected, *tensors_of(end)], 0)


def test_refuses_what_it_does_not_cover(started):
    with pytest.raises(
        NotImplementedError, match=r"momentum: .*'sum' alone, got 'average'; use impl='eager'"
    ):
        step(**{**started, "rule": MemoryRule()})
    wide = deep_memory_inputs(1, 2, 1, 129, None)
    _, state = op(**tokens(wide, 0, 1), chunk_size=2, output_final_state=True)
    with pytest.raises(NotImplementedError, match=r"q, k, v: .* up to 128 wide, got 129; use impl='eager'"):
        step(**token(wide, 1), state=state, chunk_size=2, impl="triton")
    deep = deep_memory_inputs(1, 2, 1, 64, 257)
    _, state = op(**tokens(deep, 0, 1), chunk_size=2, output_final_state=True)
    with pytest.raises(NotImplementedError, match="hidden layers up to 256 wide, got 257"):
        step(**token(deep, 1), state=state, chunk_size=2, impl="triton")
