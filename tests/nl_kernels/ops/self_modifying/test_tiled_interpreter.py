"""The tiled kernels, for chunks too large for one program, interpreted, against the token loop in fp64."""

import dataclasses
import functools
import itertools
import logging

import pytest
import torch

from nl_kernels import MemoryRule, dispatch, self_modifying_memory
from nl_kernels.chunk_kernels import (
    tiled_call,
    tiled_launch,
    tiled_layer,
    tiled_layer_adjoint,
    tiled_velocity,
)
from nl_kernels.ops.self_modifying import (
    launch,
    triton_tiled_adjoint_buffers,
    triton_tiled_backward,
    triton_tiled_buffers,
    triton_tiled_chunk_adjoint,
    triton_tiled_forward,
)
from nl_kernels.ops.self_modifying.rows import TiledInputs, tiled_inputs
from nl_kernels.ops.self_modifying.state import map_stack
from nl_kernels.testing import GuardedBuffer, relative_error, tensors_of
from nl_kernels.triton_support.kernel_call import run_calls
from tests.nl_kernels.chunked_memories import leaves_like, tokens
from tests.nl_kernels.ops.self_modifying.test_interpreter import (
    MASK,
    RULES,
    SHARED,
    assert_kernels_within_budget,
    in_float64,
    make,
    operator_arguments,
    values_and_gradients,
)

pytestmark = pytest.mark.interpreter

SLOW = pytest.mark.slow
C = 5  # no power of two; brought to 16 rows


@pytest.fixture
def tiled(monkeypatch):
    """The tiled kernels at sizes that one program would take: a tile is then the whole of most matrices."""
    monkeypatch.setattr(launch, "regime_of", lambda **_: "tiled")
    monkeypatch.setattr(launch, "MIN_TILED_CHUNK", 1)


# The default with two layers and running reads is below, where mistakes are planted.
QUICK = {("default", "snapshot", None), ("literal", "running", None), ("literal", "snapshot", 6)}
RULES_READS_LAYERS = itertools.product(
    ("default", "literal", "gelu, input", "titans"), ("snapshot", "running"), (6, None)
)


def resumed_at(place, inputs, **options):
    """The inputs after ``place`` tokens, resumed from a state that takes gradients in all its parts."""
    given = {**options, "impl": "eager", "output_final_state": True}
    _, state = self_modifying_memory(**tokens(inputs, 0, place, SHARED), **given)
    return {**tokens(inputs, place, None, SHARED), "initial_state": leaves_like(state)}


@pytest.mark.parametrize(
    ("rule", "read", "hidden"),
    [pytest.param(*x, marks=() if x in QUICK else SLOW) for x in RULES_READS_LAYERS],
)
def test_results_and_every_gradient(tiled, rule, read, hidden):
    """Resumed within a chunk and left within another one."""
    options = {"rule": RULES[rule], "read": read, "chunk_size": C}
    inputs = make(9, hidden, outer_scale=0.3, momentum=rule == "titans")
    if rule == "titans":
        with torch.no_grad():
            inputs["momentum"][:, 5] = 0
    assert_kernels_within_budget(resumed_at(3, inputs, **options), **options)


@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=SLOW) for n in (C - 1, C, C + 1, 3 * C + 7))])
def test_lengths(tiled, length):
    inputs = make(length, None, heads=2)
    assert_kernels_within_budget(inputs, read="running", chunk_size=C, checkpoint_every=2)


@pytest.mark.parametrize(
    ("hidden", "momentum"),
    [pytest.param(20, False, marks=SLOW), (None, False), pytest.param(None, True, marks=SLOW)],
)
def test_several_tiles_and_blocks_of_sixteen(tiled, monkeypatch, hidden, momentum):
    """A chunk of two tiles, and of two blocks of the solve; rows of tokens in several blocks of columns."""
    for module in (tiled_layer, triton_tiled_buffers):
        monkeypatch.setattr(module, "SOLVE_BLOCK", 16)
    users = (triton_tiled_adjoint_buffers, triton_tiled_chunk_adjoint)
    for module in (tiled_layer_adjoint, tiled_velocity, *users):
        monkeypatch.setattr(module, "pair_tile", lambda length: 16)
    monkeypatch.setattr(tiled_layer_adjoint, "ROW_NUMBERS", 16)
    monkeypatch.setattr(tiled_launch, "tiles_of", lambda *_: tiled_launch.Tiles(16, 16, 16, 4, 1))
    rule = RULES["titans"] if momentum else None
    inputs = make(24, hidden, width=17, momentum=momentum)
    assert_kernels_within_budget(inputs, rule=rule, read="running", chunk_size=24)


@pytest.mark.parametrize(
    ("hidden", "rule"),
    [
        (None, "default"),
        (6, "literal"),
        pytest.param(6, "gelu, input", marks=SLOW),
        pytest.param(None, "titans", marks=SLOW),
        pytest.param(6, "titans", marks=SLOW),
    ],
)
@pytest.mark.parametrize("read", ["running", pytest.param("snapshot", marks=SLOW)])
def test_operands_in_buffers_of_their_own(tiled, monkeypatch, hidden, rule, read):
    """As for bf16 callers, but rounded to what loses nothing: the interpreter has no products of bf16."""
    for module in (tiled_call, tiled_layer, tiled_layer_adjoint, tiled_velocity, triton_tiled_buffers):
        monkeypatch.setattr(module, "operand_dtype", lambda precision: torch.float64)
    inputs = make(6, hidden, momentum=rule == "titans")
    assert_kernels_within_budget(inputs, rule=RULES[rule], read=read, chunk_size=4)


@pytest.mark.parametrize(
    ("length", "width", "hidden", "chunk"),
    [
        pytest.param(67, 36, 20, 64, marks=SLOW),
        pytest.param(75, 24, 40, 72, marks=SLOW),
        pytest.param(140, 40, None, 128, marks=SLOW),
    ],
)
def test_sizes_that_one_program_does_not_take(length, width, hidden, chunk):
    """Where tiles and blocks of the solve are not full."""
    assert_kernels_within_budget(make(length, hidden, width=width), read="running", chunk_size=chunk)


@pytest.mark.parametrize(
    ("hidden", "momentum"),
    [pytest.param(6, False, marks=SLOW), (None, False), pytest.param(None, True, marks=SLOW)],
)
def test_states_are_recomputed(tiled, hidden, momentum):
    options = {"read": "running", "chunk_size": C, "rule": RULES["titans"] if momentum else None}
    assert_kernels_within_budget(make(11, hidden, momentum=momentum), checkpoint_every=2, **options)


@pytest.mark.parametrize(
    ("hidden", "read"),
    [*(pytest.param(6, x, marks=SLOW) for x in ("snapshot", "running")), (None, "snapshot")],
)
def test_without_erasing(tiled, hidden, read):
    rule = dataclasses.replace(MemoryRule(), erase="none", error_bound=0.3)
    assert_kernels_within_budget(make(6, hidden), rule=rule, read=read, chunk_size=C)


CLOCKS = itertools.product((None, 6), ((4, 4), (2, 4), (4, 2)), (False, True))


@pytest.mark.parametrize(
    ("hidden", "clocks", "momentum"),
    [pytest.param(*x, marks=() if x == (None, (2, 4), True) else SLOW) for x in CLOCKS],
)
def test_padding_resumed_apart(tiled, hidden, clocks, momentum):
    """Sequences at different positions of both clocks, gradients into every part of the initial state."""
    options = {"chunk_size": clocks[0], "generator_chunk_size": clocks[1], "read": "running"}
    if momentum:
        options["rule"] = RULES["titans"]
    if clocks == (2, 4):
        rule = dataclasses.replace(options.get("rule", MemoryRule()), anchored=False)
        options |= {"truncate_every": 3, "rule": rule}
    inputs = make(9, hidden, batch=2, momentum=momentum)
    _, state = self_modifying_memory(
        **tokens(inputs, 0, 4, SHARED), **options, mask=MASK[:, :4], output_final_state=True, impl="eager"
    )
    # A snapshot of its own also where a clock has just struck: there it is the running state otherwise.
    state = state._replace(snapshot=map_stack(lambda x: 1.25 * x, state.snapshot))
    inputs["initial_state"] = leaves_like(state)
    assert_kernels_within_budget(inputs, mask=MASK, **options)
    if clocks == (4, 2):
        one = tokens(inputs, 4, 5, (*SHARED, "initial_state"))
        assert_kernels_within_budget(one, mask=MASK[:, 4:5], **options)


@pytest.mark.parametrize(
    ("clocks", "place", "truncate", "every"),
    [((2, 6), 3, 4, 1), *(pytest.param(*x, marks=SLOW) for x in (((6, 2), 5, None, 2), ((6, 3), 0, 3, 2)))],
)
@pytest.mark.parametrize("read", ["snapshot", pytest.param("running", marks=SLOW)])
def test_two_clocks(tiled, clocks, place, truncate, every, read):
    """All sequences at the same place: within periods, over several; cut, and recomputed."""
    options = {"chunk_size": clocks[0], "generator_chunk_size": clocks[1], "read": read}
    inputs = make(14, None)
    if place:
        inputs = resumed_at(place, inputs, **options)
    assert_kernels_within_budget(inputs, truncate_every=truncate, checkpoint_every=every, **options)


def test_packed_sequences(tiled):
    inputs = make(6, None, heads=2)
    cu_seqlens = torch.tensor([0, 3, 4, 6])
    assert_kernels_within_budget(inputs, cu_seqlens=cu_seqlens, chunk_size=2, read="running")


def test_16_bit_inputs(tiled):
    inputs = make(6, None, dtype=torch.float16)
    o, _ = self_modifying_memory(**inputs, chunk_size=4, read="running", impl="triton")
    assert o.dtype == torch.float16
    assert_kernels_within_budget(inputs, chunk_size=4, read="running")


@functools.cache
def found():
    """Results and gradients of the kernels, of eager and in fp64, of a case that has all of them."""
    options = {"read": "running", "chunk_size": C}
    inputs = resumed_at(3, make(9, 6, outer_scale=0.3), **options)
    calls = ((inputs, "triton"), (inputs, "eager"), (in_float64(inputs), "reference"))
    return [values_and_gradients(x, impl=impl, **options)[0] for x, impl in calls]


@pytest.mark.parametrize("index", range(28))
def test_a_mistake_of_one_percent_in_any_gradient_is_seen(tiled, index):
    triton, eager, expected = found()
    assert len(triton) == 28
    worst = max(relative_error(a, b) for a, b in zip(eager, expected))
    budget = 4 * (worst + torch.finfo(torch.float32).eps)
    assert relative_error(triton[index], expected[index]) <= budget
    assert relative_error(1.01 * triton[index], expected[index]) > 100 * budget


def run_guarded(calls, given, running=()):
    """Run with every buffer between guard bands, all but the given ones full of NaN; check them after.

    Those of ``running`` the kernels both read and write. Parts of a buffer stay parts of it.
    """
    buffers = {}

    def guarded(name, tensor):
        whole = tensor if tensor._base is None else tensor._base
        if id(whole) not in buffers:
            known = any(whole is g for g in (*given, *running))
            made = GuardedBuffer.holding(whole) if known else GuardedBuffer(whole.shape, dtype=whole.dtype)
            buffers[id(whole)] = (name, whole, made)
        to = buffers[id(whole)][2].tensor
        offset = to.storage_offset() + tensor.storage_offset() - whole.storage_offset()
        return to.as_strided(tensor.shape, tensor.stride(), offset)

    for call in calls:
        given_to_kernel = {
            name: guarded(name, x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in call.arguments.items()
        }
        call.kernel[call.grid](**given_to_kernel, **call.constants)
    for name, tensor, buffer in buffers.values():
        buffer.check(name)
        assert not any(tensor is g for g in given) or torch.equal(buffer.tensor, tensor), (
            f"{name} was changed"
        )
    return len(buffers)


WRITTEN = [(None, True), (None, False), (6, False), (6, True)]


@pytest.mark.parametrize(
    ("hidden", "momentum"), [pytest.param(*x, marks=SLOW if i else ()) for i, x in enumerate(WRITTEN)]
)
def test_every_element_is_written_and_nothing_else(hidden, momentum):
    tensors, options = operator_arguments(hidden, momentum=momentum)
    tensors[5] = None
    options = dataclasses.replace(options, regime="tiled")
    given = [None if x is None else x.clone() for x in tiled_inputs(*tensors)]
    given = TiledInputs(*given)
    schedule, results = triton_tiled_forward.plan_forward(given, options, architecture="sm_90")
    assert run_guarded(schedule.calls, given) > 25
    run_calls(schedule.calls, given.query.device)
    states = (results.running, results.velocity, results.snapshot)
    cotangents = [[torch.randn(x.shape) for x in part] for part in states]
    grad_o = torch.randn(results.o.shape)
    schedule, gradients = triton_tiled_backward.plan_backward(
        grad_o, *cotangents, given, results.kept, options, architecture="sm_90"
    )
    known = [*given, grad_o, *results.kept, *(x for part in cotangents for x in part)]
    running = [*gradients.running, *gradients.velocity, *gradients.anchor, *gradients.snapshot]
    assert run_guarded(schedule.calls, known, [*running, gradients.parameters]) > 60


@pytest.mark.parametrize("hidden", [None, pytest.param(6, marks=SLOW)])
def test_operators_pass_opcheck(hidden):
    tensors, options = operator_arguments(hidden, length=3)
    arguments = (*tensors, *dataclasses.replace(options, regime="tiled", slots=3).as_tuple())
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.nl_kernels.self_modifying_forward
    torch.library.opcheck(forward, arguments, test_utils=tests)
    made = forward(*arguments)
    gradients = [None if x.numel() == 0 else torch.ones_like(x) for x in made[1:10]]
    backward = (torch.ones_like(made[0]), *gradients, *tensors, *made[10:], *arguments[len(tensors) :])
    torch.library.opcheck(torch.ops.nl_kernels.self_modifying_backward, backward, test_utils=tests)


def test_compiles_without_a_graph_break():
    inputs = make(3, None)
    expected, _ = values_and_gradients(inputs, impl="triton", chunk_size=72)

    def call(**given):
        return self_modifying_memory(**given, impl="triton", chunk_size=72, output_final_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    o, state = compiled(**inputs)
    for value, like in zip([o, *tensors_of(state)], expected):
        assert torch.equal(value, like)


def test_sizes_decide_which_kernels_and_it_is_said_once(caplog):
    dispatch._say_kernels_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "nl_kernels"):
        for chunk in (16, 80, 80):
            self_modifying_memory(**make(2, None), chunk_size=chunk, impl="triton")
    said = [r.getMessage() for r in caplog.records if "kernels" in r.getMessage()]
    assert said == ["self_modifying_memory: row kernels", "self_modifying_memory: tiled kernels"]
