"""The Triton kernels, interpreted, against the token loop in fp64."""

import dataclasses
import functools
import importlib.util
import inspect

import pytest
import torch

from nl_kernels import MemoryRule, self_modifying_memory
from nl_kernels.ops.self_modifying import launch, registration
from nl_kernels.ops.self_modifying.state import map_stack
from nl_kernels.testing import GuardedBuffer, relative_error, self_modifying_inputs, tensors_of
from tests.nl_kernels.chunked_memories import leaves_like, tokens

pytestmark = pytest.mark.interpreter

SLOW = pytest.mark.slow

RULES = {
    "default": MemoryRule(),
    "literal": MemoryRule.literal(),
    "gelu, input": MemoryRule(
        activation="gelu", erase="input", proximal=True, residual=True, anchored=False, error_bound=0.3
    ),
    "titans": MemoryRule(erase="none", projection_residual=False, target_residual=False, momentum="sum"),
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


def assert_kernels_within_budget(inputs, factor=4.0, **options):
    """Each result errs at most ``factor`` times as much as eager's worst one, and one rounding."""
    triton, state = values_and_gradients(inputs, impl="triton", **options)
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


@pytest.mark.parametrize(
    ("hidden", "name", "read"),
    [
        (None, "default", "snapshot"),
        pytest.param(None, "literal", "snapshot", marks=SLOW),
        (None, "literal", "running"),
        (None, "gelu, input", "running"),
        (None, "titans", "snapshot"),
        pytest.param(None, "titans", "running", marks=SLOW),
        (5, "default", "snapshot"),
        (5, "literal", "running"),
        (5, "gelu, input", "running"),
        (5, "titans", "running"),
    ],
)
def test_rules(hidden, name, read):
    rule = RULES[name]
    inputs = make(6, hidden, momentum=rule.erase == "none", outer_scale=0.3)
    if rule.erase == "none":
        with torch.no_grad():
            inputs["momentum"][:, 2] = 0
    assert_kernels_within_budget(inputs, rule=rule, read=read, chunk_size=4)


def test_chunks_of_several_blocks_and_sequences():
    inputs = make(23, None, batch=2, heads=3, width=17)
    assert_kernels_within_budget(inputs, read="running", chunk_size=20)


MASK = torch.tensor([[1] * 9, [0, 0, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("hidden", "clocks", "momentum"),
    [
        pytest.param(None, (4, 4), False, marks=SLOW),
        (None, (2, 4), False),
        (None, (2, 4), True),
        (None, (4, 2), False),
        (5, (2, 4), False),
        pytest.param(5, (4, 2), True, marks=SLOW),
    ],
)
def test_padding_resumed_apart(hidden, clocks, momentum):
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


def test_states_in_memory_equal_states_in_registers(monkeypatch):
    inputs = make(6, None)
    expected, _ = values_and_gradients(inputs, impl="triton", chunk_size=4, read="running")
    config_of = launch.config_of
    monkeypatch.setattr(
        launch, "config_of", lambda **sizes: dataclasses.replace(config_of(**sizes), resident=False)
    )
    found, _ = values_and_gradients(inputs, impl="triton", chunk_size=4, read="running")
    for a, b in zip(found, expected):
        assert relative_error(a, b) < 1e-6


def test_16_bit_inputs():
    inputs = make(9, None, dtype=torch.float16)
    o, _ = self_modifying_memory(**inputs, chunk_size=4, read="running", impl="triton")
    assert o.dtype == torch.float16
    assert_kernels_within_budget(inputs, chunk_size=4, read="running")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.5 * torch.ones(1, 2, 1)}, "erase='none' alone"),
        (
            {"momentum": 0.5 * torch.ones(1, 2, 1), "rule": MemoryRule(erase="none")},
            "momentum='sum' alone, got 'average'; use impl='eager'",
        ),
        ({"detach_targets": False}, "the reference alone"),
        ({"chunk_size": 33}, "of linear memories take chunks up to 32, got 33; use impl='eager'"),
        ({**make(2, 5), "chunk_size": 17}, "of two-layer memories take chunks up to 16, got 17"),
        (make(2, 65), "chunks of 4 .* of two-layer memories up to 64 wide, got 65; use impl='eager'"),
        (
            {**make(2, None, width=65), "chunk_size": 17},
            "with chunks of 17 .* of linear memories up to 64 wide, got 65",
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


def operator_arguments(hidden, *, momentum=False, length=7):
    """Arguments of the forward operator: two sequences that lie differently, resumed."""
    generator = torch.Generator().manual_seed(0)
    chunk = 4 if hidden is None else 6

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    def stack():
        if hidden is None:
            return [None, draw(2, 1, 3, 5, 5), draw(2, 1, 2, 5)]
        return [draw(2, 1, 5, hidden, 5), draw(2, 1, 3, 5, hidden), draw(2, 1, 2, hidden)]

    spans = torch.tensor([[0, 1, 7], [0, 2, 5]])
    tensors = [*(draw(2, length, 1, 5) for _ in range(4)), draw(2, length, 1).sigmoid() if momentum else None]
    tensors += [spans, torch.ones(1), torch.zeros(1), torch.ones(1)]
    tensors += [*stack(), *stack(), *(stack() if momentum else [None] * 3), *stack()]
    rule = RULES["titans" if momentum else "default"]
    options = launch.Options(
        *(rule.activation, rule.normalize_hidden, rule.residual, rule.projection_residual),
        *(rule.target_residual, rule.erase, rule.proximal, 1.0, "running", chunk, chunk, 0, 1, "tf32x3"),
        *(0, length),
    )
    return tensors, options


def run_guarded(calls, given):
    """Run with every buffer between guard bands, all but the given ones full of NaN; returns them."""
    buffers = {}
    for call in calls:
        for name, tensor in call.arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and id(tensor) not in buffers:
                made = GuardedBuffer(tensor.shape, dtype=tensor.dtype)
                if any(tensor is g for g in given):
                    made = GuardedBuffer.holding(tensor)
                buffers[id(tensor)] = (name, made)
        call.kernel[call.grid](
            **{n: buffers[id(t)][1].tensor if id(t) in buffers else t for n, t in call.arguments.items()},
            **call.constants,
        )
    return buffers


@pytest.mark.parametrize(
    ("hidden", "momentum"),
    [(None, False), (5, False), *(pytest.param(x, True, marks=SLOW) for x in (None, 5))],
)
def test_every_element_is_written_and_nothing_else(hidden, momentum):
    from nl_kernels.ops.self_modifying import triton_backward, triton_forward

    tensors, options = operator_arguments(hidden, momentum=momentum)
    tensors[5] = None
    calls, (o, *made) = triton_forward.plan_forward(*tensors, options=options, architecture="sm_90")
    for name, buffer in run_guarded(calls, tensors).values():
        buffer.check(name)
    triton_forward.run_calls(calls, o.device)
    kept = made[9:]
    gradients = [None if x is None else torch.randn(x.shape) for x in made[:9]]
    grad_o = torch.randn(o.shape)
    calls, results_ = triton_backward.plan_backward(
        grad_o, gradients, *tensors, *kept, options=options, architecture="sm_90"
    )
    zeroed = [x for x in results_[5:] if x is not None]
    buffers = run_guarded(calls, [*tensors, *kept, *gradients, grad_o, *zeroed])
    for name, buffer in buffers.values():
        if not name.startswith(("kept", "final", "snapshot")):  # scratch of rows that are shorter
            buffer.check(name)


@pytest.mark.parametrize("hidden", [KINDS[0], pytest.param(5, id="two layers", marks=SLOW)])
def test_operators_pass_opcheck(hidden):
    tensors, options = operator_arguments(hidden, momentum=True)
    arguments = (*tensors, *options.as_tuple())
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.nl_kernels.self_modifying_forward
    torch.library.opcheck(forward, arguments, test_utils=tests)
    made = forward(*arguments)
    gradients = [None if x.numel() == 0 else torch.ones_like(x) for x in made[1:10]]
    backward = (torch.ones_like(made[0]), *gradients, *tensors, *made[10:], *options.as_tuple())
    torch.library.opcheck(torch.ops.nl_kernels.self_modifying_backward, backward, test_utils=tests)


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


# One deliberate mistake for each gradient: (kernel source, its corruption).
MISTAKES = {
    "query": ("unit_adjoint(at_q, q, query_scale)", "at_q"),
    "key input": ("at_x = matmul(at_made, key_base, PRECISION)", "at_x = 1.01 * at_made"),
    "value input": ("at_v -= at_difference", "at_v -= 0.99 * at_difference"),
    "gate input": ("at_log * tl.sigmoid(-z_retention)", "1.01 * at_log * tl.sigmoid(-z_retention)"),
    "rates": ("at_rate * largest_rate * fraction", "1.01 * at_rate * largest_rate * fraction"),
    "states": ("at_state + by_state, at_base, by_anchor", "at_state + 1.01 * by_state, at_base, by_anchor"),
    "anchor": ("by_anchor = at_base + at_anchor", "by_anchor = at_base + 1.01 * at_anchor"),
    "weights": ("at_base = matmul(tl.trans(at_v), xv", "at_base = 1.01 * matmul(tl.trans(at_v), xv"),
}


@pytest.mark.parametrize(("source", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_any_gradient_is_seen(source, mistake, tmp_path, monkeypatch):
    from nl_kernels.ops.self_modifying import triton_backward, triton_linear_backward

    text = inspect.getsource(triton_linear_backward)
    assert source in text
    path = tmp_path / "mistaken.py"
    path.write_text(text.replace(source, mistake))
    spec = importlib.util.spec_from_file_location("mistaken", path)
    mistaken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mistaken)
    monkeypatch.setattr(triton_backward, "linear_backward_kernel", mistaken.linear_backward_kernel)
    with pytest.raises(AssertionError, match="tensor"):
        assert_kernels_within_budget(make(6, None), chunk_size=4, read="running")


def test_tensors_of_a_call_are_those_of_the_schema():
    """The registration counts tensors: it and the launchers agree on how many there are."""
    tensors, options = operator_arguments(None)
    schema = torch.ops.nl_kernels.self_modifying_forward.default._schema
    assert len(schema.arguments) == len(tensors) + len(options.as_tuple())
    assert len(schema.returns) == registration._MADE
