"""The tiled kernels, for chunks too large for one program, interpreted, against the token loop in fp64."""

import dataclasses
import functools
import itertools
import logging

import pytest
import torch

from nl_kernels import MemoryRule, deep_memory, dispatch
from nl_kernels.chunk_kernels import tiled_launch, tiled_layer, tiled_layer_adjoint, tiled_velocity
from nl_kernels.ops.deep_memory import launch
from nl_kernels.testing import assert_within_budget, deep_memory_inputs
from tests.nl_kernels.ops.deep_memory.test_interpreter import (
    NAMES,
    RULES,
    assert_kernels_within_budget,
    inputs,
    results_and_gradients,
    run_guarded,
)

pytestmark = pytest.mark.interpreter

SLOW = pytest.mark.slow
C = 5  # no power of two; brought to 16 rows


@pytest.fixture
def tiled(monkeypatch):
    """The tiled kernels at sizes that one program would take: a tile is then the whole of most matrices."""
    monkeypatch.setattr(launch, "regime_of", lambda **_: "tiled")
    monkeypatch.setattr(launch, "MIN_TILED_CHUNK", 1)


QUICK = {
    ("default", "running", 12),
    ("default", "snapshot", None),
    ("literal", "snapshot", 12),
    ("literal", "running", None),
    ("gelu, input, tight bound", "snapshot", None),
    ("titans", "snapshot", None),
    ("titans", "running", 12),
}
RULES_READS_LAYERS = itertools.product(
    ("default", "literal", "titans", "gelu, input, tight bound"), ("snapshot", "running"), (12, None)
)


@pytest.mark.parametrize(
    ("rule", "read", "hidden"),
    [pytest.param(*x, marks=() if x in QUICK else SLOW) for x in RULES_READS_LAYERS],
)
def test_results_and_every_gradient(tiled, rule, read, hidden):
    """Resumed within a chunk and left within another one."""
    x = inputs(6, hidden=hidden, momentum=rule == "titans", resumed_at=[3])
    assert_kernels_within_budget(x, rule=RULES[rule], read=read, chunk_size=C)


@pytest.mark.parametrize("length", [1, C, *(pytest.param(n, marks=SLOW) for n in (C - 1, C + 1, 3 * C + 7))])
def test_lengths(tiled, length):
    x = inputs(length, hidden=None, value_width=7)
    assert_kernels_within_budget(x, read="running", chunk_size=C, checkpoint_every=2)


@pytest.mark.parametrize(
    ("length", "width", "hidden", "chunk"),
    [
        pytest.param(67, 68, 20, 64, marks=SLOW),
        pytest.param(75, 24, 40, 72, marks=SLOW),
        pytest.param(35, 260, 264, 16, marks=SLOW),  # tiles of 128
        pytest.param(260, 24, 40, 128, marks=SLOW),
        pytest.param(260, 40, 72, 256, marks=SLOW),
    ],
)
def test_several_tiles_and_blocks(length, width, hidden, chunk):
    """Sizes that one program does not take; where tiles and blocks of the solve are not full."""
    x = inputs(length, width=width, hidden=hidden, value_width=9)
    assert_kernels_within_budget(x, read="running", chunk_size=chunk)


@pytest.mark.parametrize("hidden", [20, None], ids=["erases", "momentum"])
def test_several_tiles_and_blocks_of_sixteen(tiled, monkeypatch, hidden):
    """The same at sizes for every day: a chunk of two tiles, and of two blocks of the solve."""
    monkeypatch.setattr(tiled_layer, "SOLVE_BLOCK", 16)
    for module in (tiled_layer_adjoint, tiled_velocity):
        monkeypatch.setattr(module, "pair_tile", lambda length: 16)
    monkeypatch.setattr(tiled_launch, "tiles_of", lambda *_: tiled_launch.Tiles(16, 16, 16, 4, 1))
    x = inputs(20, hidden=hidden, momentum=hidden is None, resumed_at=[1])
    rule = MemoryRule(erase="none") if hidden is None else None
    assert_kernels_within_budget(x, rule=rule, read="running", chunk_size=24)


def test_states_are_recomputed(tiled):
    x = inputs(18, hidden=None, momentum=True)
    rule = MemoryRule(erase="none")
    assert_kernels_within_budget(x, rule=rule, chunk_size=C, checkpoint_every=3)


@pytest.mark.parametrize("read", ["snapshot", pytest.param("running", marks=SLOW)])
def test_without_erasing(tiled, read):
    rule = dataclasses.replace(MemoryRule(), erase="none")
    assert_kernels_within_budget(inputs(8), rule=rule, read=read, chunk_size=C)


def test_forgetting_everything_is_exact(tiled):
    x = inputs(7, hidden=None)
    x["log_decay"][:, [2, 3, 6]] = -torch.inf
    options = {"read": "running", "chunk_size": C}
    triton = results_and_gradients(x, impl="triton", **options)
    x["log_decay"] = x["log_decay"].clamp(min=-200.0)  # e^-200 is no number of fp32 either
    expected = results_and_gradients(x, torch.float64, impl="reference", **options)
    for a, b in zip((*triton[0], *triton[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [pytest.param(12, marks=SLOW), None], ids=["erases", "momentum"])
def test_padding_moves_nothing(tiled, hidden):
    """Sequences that end in a later chunk, at a boundary, in their first chunk, and one without a token."""
    mask = torch.zeros(4, 8)
    mask[0, [2, 3, 5, 6, 7]] = 1
    mask[1, 1] = mask[2, 0] = 1
    x = inputs(8, batch=4, hidden=hidden, momentum=hidden is None, resumed_at=[3, 4, 1, 1])
    rule = MemoryRule(erase="none") if hidden is None else None
    assert_kernels_within_budget(x, rule=rule, read="running", mask=mask > 0, chunk_size=C)


def test_packed_sequences(tiled):
    x = inputs(9, hidden=None)
    x["momentum"] = 0.9 * torch.rand(1, 9, 1)
    cu_seqlens = torch.tensor([0, 1, 7, 9])
    assert_kernels_within_budget(
        x, rule=MemoryRule(erase="none"), cu_seqlens=cu_seqlens, read="running", chunk_size=C
    )


def test_one_token_each_at_different_positions(tiled):
    x = inputs(1, batch=7, hidden=None, resumed_at=[0, 1, 2, 3, 4, 4, 0])
    assert_kernels_within_budget(x, chunk_size=C)


def test_fp16(tiled):
    assert_kernels_within_budget(inputs(C + 1, hidden=None, dtype=torch.float16), chunk_size=C)


@functools.cache
def found():
    """Gradients of the kernels, of eager and in fp64, by name, of a case that has all of them."""
    x = inputs(C + 1, momentum=True, resumed_at=[3])
    options = {"rule": MemoryRule(erase="none"), "chunk_size": C}
    calls = (("triton", None), ("eager", None), ("reference", torch.float64))
    parts = [results_and_gradients(x, dtype, impl=impl, **options)[1] for impl, dtype in calls]
    return [dict(zip(NAMES, gradients)) for gradients in parts]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_of_one_percent_in_any_gradient_is_seen(tiled, name):
    triton, eager, expected = found()
    assert_within_budget(triton[name], eager[name], expected[name])
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(1.01 * triton[name], eager[name], expected[name])


def flat_inputs(hidden, ragged=False, tokens=7, momentum=False):
    """What the kernels take, of two rows that start within a chunk, and the options."""
    rows = 2
    x = deep_memory_inputs(1, tokens, rows, 10, hidden, momentum=momentum)
    sequences = [x[n] if x[n] is None else x[n][0].transpose(0, 1).contiguous() for n in NAMES[:6]]
    layers = [None if w is None else w.detach() for w in x["weights"]]
    slots = [torch.tensor([3, 0]), torch.tensor([7, 5]), None] if ragged else [None] * 3
    given = launch.Inputs(
        *sequences,
        *(None if w is None else w.clone() for w in layers),
        *(None if w is None or not momentum else w.clone() for w in layers),
        *(None if w is None else w.clone() for w in layers),
        *(None if w is None else w.clone() for w in layers),
        *slots,
    )
    options = launch.Options.of(
        MemoryRule(erase="none" if momentum else "per_layer"),
        offset=0 if ragged else 3,
        chunk_size=C,
        read="running",
        checkpoint_every=2,
        precision="ieee",
        regime="tiled",
    )
    return given, options


@pytest.mark.parametrize(("hidden", "momentum"), [(12, False), (None, False), (None, True)])
def test_every_element_is_written_and_nothing_else(hidden, momentum):
    from nl_kernels.ops.deep_memory import triton_tiled_backward, triton_tiled_forward

    given, options = flat_inputs(hidden, ragged=hidden is None and not momentum, momentum=momentum)
    shared = {"architecture": "sm_90"}
    schedule, results = triton_tiled_forward.plan_forward(given, options, keep=True, **shared)
    assert run_guarded(schedule.calls, given) > 12
    states = [None if x is None else torch.randn(x.shape) for x in results]
    schedule, gradients = triton_tiled_backward.plan_backward(
        states[0], states[1:5], states[5:7], given, states[7:], options, **shared
    )
    carried = [*gradients[6:10], *gradients[12:14]]
    assert run_guarded(schedule.calls, [*given, *states], running=carried) > 20


def test_operators_pass_opcheck():
    given, options = flat_inputs(None, tokens=2)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.nl_kernels
    torch.library.opcheck(ops.deep_memory_forward, (*given, *options, True), test_utils=tests)
    results = ops.deep_memory_forward(*given, *options, True)
    present = [x if x.numel() else None for x in results]
    torch.library.opcheck(
        ops.deep_memory_backward, (*present[:7], *given, *present[7:], *options), test_utils=tests
    )


def test_compiles_without_a_graph_break():
    x = inputs(2, hidden=None)
    options = {"impl": "triton", "chunk_size": 72}
    expected, _ = deep_memory(**x, **options)
    compiled = torch.compile(deep_memory, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x, **options)[0], expected)


def test_sizes_decide_which_kernels_and_it_is_said_once(caplog):
    dispatch._say_kernels_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "nl_kernels"):
        for chunk in (16, 80, 80):
            deep_memory(**inputs(2, hidden=None), chunk_size=chunk, impl="triton")
    assert [r.getMessage() for r in caplog.records] == [
        "deep_memory: row kernels",
        "deep_memory: tiled kernels",
    ]
