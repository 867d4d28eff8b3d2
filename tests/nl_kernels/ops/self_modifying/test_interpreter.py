"""The Triton kernels, interpreted, against the token loop in fp64."""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from contextlib import nullcontext

import pytest
import torch

from nl_kernels import MemoryRule, self_modifying_memory
from nl_kernels.doctor import relative_error, tensors_of
from nl_kernels.memory.kernels.launch import Inputs
from nl_kernels.memory.state import map_tensors
from tests.nl_kernels.bank_calls import assert_calls_fill_their_buffers, assert_operators_pass_opcheck
from tests.nl_kernels.budgets import RoundedProducts
from tests.nl_kernels.chunked_memories import at_rates_up_to_two, leaves_like, tokens
from tools.catalogue.memories import options_of
from tools.op_inputs import self_modifying_inputs

pytestmark = pytest.mark.interpreter

SLOW = pytest.mark.slow

RULES = {
    "default": MemoryRule(),
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
    "literal": dataclasses.replace(MemoryRule.literal(), proximal=False),
    "gelu": MemoryRule(activation="gelu", residual=True, anchored=False, error_bound=0.3),
    "titans": MemoryRule(erase="none"),
}
SHARED = ("weights", "rate_max", "rate_bias", "retention_bias")
KINDS = [pytest.param(None, id="linear"), pytest.param(5, id="two layers")]


def make(length, hidden, batch=1, heads=1, width=7, **options):
    return self_modifying_inputs(batch, length, heads, width, hidden, requires_grad=True, **options)


def in_float64(value):
    """The same numbers in fp64, as new leaves where there were leaves."""
    if isinstance(value, torch.Tensor):
        wide = value.detach().double() if value.is_floating_point() else value
        return wide.requires_grad_(value.requires_grad) if value.is_floating_point() else wide
    if isinstance(value, dict):
        return {name: in_float64(x) for name, x in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(in_float64, value))
    return value


def values_and_gradients(inputs, **options):
    """Outputs, then gradients of all leaves under the same cotangents in every dtype, and the final state."""
    leaves = [x for x in tensors_of(inputs) if x.requires_grad]
    o, state = self_modifying_memory(**inputs, **options, output_final_state=True)
    values = [o, *tensors_of(state)]
    generator = torch.Generator().manual_seed(0)
    cotangents = [(8 * torch.randn(x.shape, generator=generator)).round() / 8 for x in values]
    gradients = torch.autograd.grad(
        values, leaves, [c.to(x.dtype) for x, c in zip(values, cotangents)], materialize_grads=True
    )
    # A gate parameter's gradient is one number, a sum that cancels: the three are compared as one tensor.
    numbers = torch.cat([x for x in gradients if x.ndim == 1])
    gradients = [*(x for x in gradients if x.ndim > 1), numbers]
    return [*(x.detach() for x in values), *gradients], state


def resumed_at(place, inputs, **options):
    """The inputs after ``place`` tokens, resumed from a state that takes gradients in all its parts."""
    given = {**options, "impl": "eager", "output_final_state": True}
    _, state = self_modifying_memory(**tokens(inputs, 0, place, SHARED), **given)
    return {**tokens(inputs, place, None, SHARED), "initial_state": leaves_like(state)}


def assert_kernels_within_budget(inputs, factor=4.0, rounded=None, **options):
    """Each result errs at most ``factor`` times as much as eager's worst one, and one rounding."""
    triton, state = values_and_gradients(inputs, impl="triton", **options)
    with nullcontext() if rounded is None else RoundedProducts(rounded):
        eager, _ = values_and_gradients(inputs, impl="eager", **options)
    expected, final = values_and_gradients(in_float64(inputs), impl="reference", **options)
    assert state.position.tolist() == final.position.tolist()
    assert len(triton) == len(expected)
    worst = max(relative_error(a, b) for a, b in zip(eager, expected))
    for index, (found, like, true) in enumerate(zip(triton, eager, expected)):
        assert found.dtype == like.dtype
        budget = factor * (worst + torch.finfo(found.dtype).eps)
        error = relative_error(found, true)
        assert error <= budget, f"tensor {index} of shape {tuple(true.shape)}: {error:.2e} > {budget:.2e}"


@pytest.mark.parametrize(
    ("hidden", "length"),
    [*((None, n) for n in (1, 15, 16, 17, 55)), (5, 1), (5, 17), pytest.param(5, 35, marks=SLOW)],
)
def test_results_and_every_gradient(hidden, length):
    assert_kernels_within_budget(make(length, hidden), read="running", chunk_size=16)


RULES_AND_READS = [
    (None, "default", "snapshot"),
    pytest.param(None, "literal", "snapshot", marks=SLOW),
    (None, "literal", "running"),
    (None, "errors at the snapshot", "running"),
    pytest.param(None, "errors at the snapshot", "snapshot", marks=SLOW),
    (None, "gelu", "running"),
    (None, "titans", "snapshot"),
    pytest.param(None, "titans", "running", marks=SLOW),
    (5, "default", "snapshot"),
    (5, "literal", "running"),
    (5, "gelu", "running"),
    (5, "titans", "running"),
]


@pytest.mark.parametrize(("hidden", "name", "read"), RULES_AND_READS)
def test_rules(hidden, name, read):
    rule = RULES[name]
    inputs = make(6, hidden, outer_scale=0.3)
    assert_kernels_within_budget(inputs, rule=rule, read=read, chunk_size=4)


@pytest.mark.parametrize("read", [pytest.param("running", marks=SLOW), "snapshot"])
def test_a_scale_of_writes(read):
    inputs = make(11, None, batch=2, heads=2)
    scale = inputs["query"].detach()[..., 0].abs().contiguous()
    inputs["write_scale"] = scale.requires_grad_()
    clocks = {"chunk_size": 4, "generator_chunk_size": 8}
    assert_kernels_within_budget(inputs, read=read, **clocks)


def test_chunks_of_several_blocks_and_sequences():
    inputs = make(23, None, batch=2, heads=3, width=17)
    assert_kernels_within_budget(inputs, read="running", chunk_size=20)


MASK = torch.tensor([[1] * 9, [0, 0, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("hidden", "clocks"),
    [
        pytest.param(None, (4, 4), marks=SLOW),
        (None, (2, 4)),
        pytest.param(None, (4, 2), marks=SLOW),
        pytest.param(5, (2, 4), marks=SLOW),
    ],
)
def test_padding_resumed_apart(hidden, clocks):
    """Sequences at different positions of both clocks, gradients into every part of the initial state."""
    options = {"chunk_size": clocks[0], "generator_chunk_size": clocks[1], "read": "running"}
    if clocks == (2, 4):
        options |= {"truncate_every": 3, "rule": dataclasses.replace(MemoryRule(), anchored=False)}
    inputs = make(9, hidden, batch=2)
    _, state = self_modifying_memory(
        **tokens(inputs, 0, 4, SHARED), **options, mask=MASK[:, :4], output_final_state=True, impl="eager"
    )
    # A snapshot of its own also where a clock has just struck: there it is the running state otherwise.
    state = state._replace(snapshot=map_tensors(lambda x: 1.25 * x, state.snapshot))
    inputs["initial_state"] = leaves_like(state)
    assert_kernels_within_budget(inputs, mask=MASK, **options)
    if clocks == (4, 2):
        one = tokens(inputs, 4, 5, (*SHARED, "initial_state"))
        assert_kernels_within_budget(one, mask=MASK[:, 4:5], **options)


@pytest.mark.parametrize(
    ("clocks", "place", "truncate", "every"),
    [((2, 6), 3, 4, 1), ((6, 3), 0, 3, 2), pytest.param((6, 2), 5, None, 2, marks=SLOW)],
)
@pytest.mark.parametrize("read", ["snapshot", pytest.param("running", marks=SLOW)])
def test_two_clocks(clocks, place, truncate, every, read):
    """All sequences at the same place: within periods, over several; cut, and recomputed."""
    options = {"chunk_size": clocks[0], "generator_chunk_size": clocks[1], "read": read}
    inputs = make(14, None, outer_scale=0.3)
    if place:
        inputs = resumed_at(place, inputs, **options)
    assert_kernels_within_budget(inputs, truncate_every=truncate, checkpoint_every=every, **options)


@pytest.mark.parametrize(
    ("hidden", "read"),
    [(None, "snapshot"), *(pytest.param(5, x, marks=SLOW) for x in ("snapshot", "running"))],
)
def test_without_erasing(hidden, read):
    rule = dataclasses.replace(MemoryRule(), erase="none", error_bound=0.3)
    assert_kernels_within_budget(make(6, hidden), rule=rule, read=read, chunk_size=4)


def test_packed_sequences():
    cu_seqlens = torch.tensor([0, 3, 4, 8])
    assert_kernels_within_budget(make(8, None, heads=2), cu_seqlens=cu_seqlens, chunk_size=3, read="running")


def test_two_layers_wider_than_a_tile():
    assert_kernels_within_budget(make(5, 20, width=17), read="running", chunk_size=4)


@pytest.mark.parametrize("hidden", KINDS)
def test_few_checkpoints(hidden):
    options = {"chunk_size": 2, "generator_chunk_size": 4, "read": "snapshot", "checkpoint_every": 1}
    assert_kernels_within_budget(make(7, hidden), **options)


def test_16_bit_inputs():
    inputs = make(9, None, dtype=torch.float16)
    o, _ = self_modifying_memory(**inputs, chunk_size=4, read="running", impl="triton")
    assert o.dtype == torch.float16
    # tf32 has the mantissa of fp16.
    assert_kernels_within_budget(inputs, rounded=torch.float16, chunk_size=4, read="running")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.5 * torch.ones(1, 2, 1)}, "momentum: .* have none; use impl='eager'"),
        ({"rule": MemoryRule(erase="input")}, "rule.erase: .* got 'input'"),
        ({"rule": MemoryRule.literal()}, "rule.proximal"),
        ({"detach_targets": False}, "the reference alone"),
        ({"chunk_size": 33}, "of linear memories take chunks up to 32, got 33; use impl='eager'"),
        ({**make(2, 5), "chunk_size": 17}, "of two-layer memories take chunks up to 16, got 17"),
        (make(2, 65), "chunks of 4 .* of two-layer memories up to 64 wide, got 65; use impl='eager'"),
        (
            {**make(2, None, width=65), "chunk_size": 17},
            "with chunks of 17 .* of linear memories up to 32 wide, got 65",
        ),
    ],
)
def test_refuses_what_the_kernels_do_not_cover(change, message):
    with pytest.raises(NotImplementedError, match=message):
        self_modifying_memory(**{**make(2, None), "chunk_size": 4, **change}, impl="triton")


def test_refuses_wide_heads_and_fp64():
    with pytest.raises(NotImplementedError, match="linear memories up to 128 wide, got 129"):
        self_modifying_memory(**make(2, None, width=129), chunk_size=4, impl="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        self_modifying_memory(**make(2, None, dtype=torch.float64), chunk_size=4, impl="triton")


def bank_inputs(hidden):
    """What the kernels take of two sequences that lie differently, and the options."""
    x = make(7, hidden, batch=2, width=5)
    tokens = [x[n].detach() for n in ("query", "key_input", "value_input", "gate_input")]
    gates = [x[n].detach() for n in ("rate_max", "rate_bias", "retention_bias")]
    generator = torch.Generator().manual_seed(0)

    def bank():
        first = None if hidden is None else 0.5 * torch.randn(2, 5 * hidden, 5, generator=generator)
        return [first, 0.5 * torch.randn(2, 17, hidden or 5, generator=generator)]

    options = options_of(torch.float32, MemoryRule(), 4, 7, "sm_90", read="running")
    spans = torch.tensor([[0, 1, 7], [0, 2, 5]])
    inputs = Inputs.of((*tokens, None, None, *gates, spans, *bank(), *bank(), *bank()))
    return inputs, options._replace(checkpoint_every=2)


@pytest.mark.parametrize("hidden", KINDS)
def test_every_element_is_written_and_nothing_else(hidden):
    inputs, options = bank_inputs(hidden)
    assert_calls_fill_their_buffers(inputs._replace(tokens=inputs.tokens._replace(spans=None)), options)


@pytest.mark.parametrize("hidden", [KINDS[0], pytest.param(5, id="two layers", marks=SLOW)])
def test_operators_pass_opcheck(hidden):
    assert_operators_pass_opcheck(*bank_inputs(hidden))


def test_compiles_without_a_graph_break():
    inputs = make(6, None)
    expected, _ = values_and_gradients(inputs, impl="triton", chunk_size=4)

    def call(**given):
        return self_modifying_memory(**given, impl="triton", chunk_size=4, output_final_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    o, state = compiled(**inputs)
    for found, value in zip([o, *tensors_of(state)], expected):
        assert torch.equal(found, value)


@functools.cache
def found():
    """Results and gradients of two layers by the kernels, by eager and in fp64, of a case that has all."""
    options = {"read": "running", "chunk_size": 5}
    inputs = resumed_at(3, make(9, 6, outer_scale=0.3), **options)
    calls = ((inputs, "triton"), (inputs, "eager"), (in_float64(inputs), "reference"))
    return [values_and_gradients(x, impl=impl, **options)[0] for x, impl in calls]


@pytest.mark.parametrize("index", range(28))
def test_a_mistake_of_one_percent_in_any_gradient_is_seen(index):
    triton, eager, expected = found()
    assert len(triton) == 28
    worst = max(relative_error(a, b) for a, b in zip(eager, expected))
    budget = 4 * (worst + torch.finfo(torch.float32).eps)
    assert relative_error(triton[index], expected[index]) <= budget
    assert relative_error(1.01 * triton[index], expected[index]) > 100 * budget


@pytest.mark.parametrize("hidden", KINDS)
def test_rates_up_to_two(hidden):
    inputs = at_rates_up_to_two(make(7, hidden, heads=2))
    assert_kernels_within_budget(inputs, chunk_size=4, read="running")


# One deliberate mistake for each gradient: (module, its source, the corruption).
MISTAKES = {
    "query": ("adjoint", "d_query = query_adjoint(d_query", "d_query = query_adjoint(1.01 * d_query"),
    "key input": ("tokens_adjoint", "d_key = unit_adjoint(d_key", "d_key = 1.01 * unit_adjoint(d_key"),
    "value input": ("tokens_adjoint", "d_value += token_shares", "d_value += 1.01 * token_shares"),
    "gate input": ("tokens_adjoint", "tl.where(exists, (d_log", "1.01 * tl.where(exists, (d_log"),
    "rates": ("tokens_adjoint", "d_rate_gate = d_limit", "d_rate_gate = 1.01 * d_limit"),
    "states": ("learn_adjoint", "grad += product(d_running, x", "grad += 1.01 * product(d_running, x"),
    "anchor": ("learn_adjoint", "by_anchor += product(d_read", "by_anchor += 1.01 * product(d_read"),
    "weights": ("learn_adjoint", "at_base += product(made, by", "at_base += 1.01 * product(made, by"),
}


@pytest.mark.parametrize(("module", "source", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_any_gradient_is_seen(module, source, mistake, tmp_path, monkeypatch):
    from nl_kernels.memory.kernels import adjoint, learn_adjoint, tokens_adjoint

    changed = {}
    originals = {"learn_adjoint": learn_adjoint, "tokens_adjoint": tokens_adjoint, "adjoint": adjoint}
    for name, original in originals.items():
        text = inspect.getsource(original)
        if name == module:
            assert text.count(source) == 1
            text = text.replace(source, mistake)
        path = tmp_path / f"mistaken_{name}.py"
        for part in ("learn_adjoint", "tokens_adjoint"):
            text = text.replace(f"nl_kernels.memory.kernels.{part}", f"mistaken_{part}")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        changed[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, changed[name])
        spec.loader.exec_module(changed[name])
    monkeypatch.setattr(adjoint, "learn_adjoint_kernel", changed["adjoint"].learn_adjoint_kernel)
    with pytest.raises(AssertionError, match="tensor"):
        assert_kernels_within_budget(make(6, None), chunk_size=4, read="running")
