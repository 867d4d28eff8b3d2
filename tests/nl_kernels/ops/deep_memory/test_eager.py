"""The chunked path against the definition: values, states and every gradient; cuts, padding, packing."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nl_kernels import DeepMemoryWeights, MemoryRule, deep_memory
from nl_kernels.doctor import relative_error, tensors_of
from nl_kernels.memory import chunk_adjoint
from tests.nl_kernels.chunked_memories import (
    assert_autocast_changes_no_backward_pass,
    assert_same,
    cast,
    compare,
    join,
    leaves_like,
    results,
    tokens,
)
from tools.op_inputs import deep_memory_inputs

DEFAULT, LITERAL, SUM = MemoryRule(), MemoryRule.literal(), MemoryRule(momentum="sum")
RULES = {
    "default": DEFAULT,
    "literal": LITERAL,
    "gelu, not anchored, not bounded": MemoryRule(activation="gelu", anchored=False, error_bound=None),
    "input": MemoryRule(erase="input", residual=True, error_bound=0.3),
    "input, proximal": MemoryRule(erase="input", proximal=True, normalize_hidden=False),
    "titans": MemoryRule(erase="none", residual=True, anchored=False, normalize_hidden=False, momentum="sum"),
    "sum": SUM,
    "none": MemoryRule(erase="none"),
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
}


# Kinds of memory, momentum and read that take other ways through the engine.
PATHS = pytest.mark.parametrize(
    ("kind", "path"),
    [
        ({"momentum": True}, {"read": "running"}),
        ({"momentum": True}, {"read": "snapshot", "rule": SUM}),
        ({}, {"read": "running"}),
        ({"hidden": None, "momentum": True}, {"read": "snapshot", "rule": SUM}),
        ({"hidden": None}, {"read": "running"}),
    ],
    ids=["average, running", "sum, snapshot", "running", "linear, sum, snapshot", "linear, running"],
)


def make(batch, length, heads=2, width=3, hidden=4, **options):
    return deep_memory_inputs(
        batch, length, heads, width, hidden, dtype=torch.float64, requires_grad=True, **options
    )


@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
@pytest.mark.parametrize("read", ["snapshot", "running"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_the_definition(rule, read, momentum):
    compare(deep_memory, make(2, 11, momentum=momentum), rule=rule, read=read, chunk_size=4)


@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
@pytest.mark.parametrize("read", ["snapshot", "running"])
def test_the_linear_memory_equals_the_definition(read, momentum):
    for rule in RULES.values():
        inputs = make(2, 9, hidden=None, momentum=momentum)
        compare(deep_memory, inputs, rule=rule, read=read, chunk_size=4)


@PATHS
def test_rates_up_to_two_equal_the_definition(kind, path):
    inputs = make(2, 11, **kind)
    inputs["rate"] = (2 * inputs["rate"].detach()).requires_grad_()
    assert inputs["rate"].max() > 1.8
    compare(deep_memory, inputs, chunk_size=4, tolerance=1e-9, **path)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(1, 14),
    chunk_size=st.integers(1, 7),
    width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    hidden=st.integers(1, 6),
    checkpoint_every=st.sampled_from([None, 1, 2, 5]),
    read=st.sampled_from(["snapshot", "running"]),
    seed=st.integers(0, 100),
)
def test_any_shape_equals_the_definition(
    length, chunk_size, width, value_width, hidden, checkpoint_every, read, seed
):
    inputs = make(1, length, 1, width, hidden, value_width=value_width, seed=seed, momentum=seed % 2 == 1)
    # Tiny widths come near kinks and poles of the norms: what matters here is shape.
    rule = MemoryRule(error_bound=None, activation="gelu", normalize_hidden=seed % 3 == 0)
    options = {"rule": rule, "read": read, "chunk_size": chunk_size, "checkpoint_every": checkpoint_every}
    compare(deep_memory, inputs, tolerance=1e-9, largest=1e3, **options)


def test_weights_by_sequence():
    inputs = make(2, 6)
    inputs["weights"] = DeepMemoryWeights(
        *((w.detach() + 0.1 * torch.randn(2, *w.shape)).requires_grad_() for w in inputs["weights"])
    )
    compare(deep_memory, inputs, chunk_size=4)


@PATHS
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("at", [3, 4])
def test_gradients_reach_the_initial_state(at, anchored, kind, path):
    rule = dataclasses.replace(path.get("rule", DEFAULT), anchored=anchored)
    options = {**path, "rule": rule, "chunk_size": 4}
    inputs = make(2, 12, **kind)
    _, state = deep_memory(**tokens(inputs, 0, at), **options, output_final_state=True)
    rest = {**tokens(inputs, at, 12), "initial_state": leaves_like(state)}
    compare(deep_memory, rest, **options)


def test_forgetting_everything_is_exact():
    inputs = make(1, 9, momentum=True)
    with torch.no_grad():
        inputs["log_decay"][:, 2] = inputs["log_decay"][:, 3] = inputs["log_decay"][:, 6] = -torch.inf
        inputs["momentum"][:, 1] = inputs["momentum"][:, 5] = 0
    inputs["log_decay"].requires_grad_(False)
    compare(deep_memory, inputs, chunk_size=4)


@PATHS
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_split_equals_whole_at_every_cut(impl, kind, path):
    inputs = make(1, 10, **kind)
    options = {**path, "chunk_size": 4, "impl": impl}
    values, gradients, _ = results(deep_memory, inputs, **options)

    def cut_op(cut):
        def op(output_final_state, **named):
            given = {n: named.pop(n) for n in inputs}
            head, state = deep_memory(**tokens(given, 0, cut), **named, output_final_state=True)
            tail, state = deep_memory(
                **tokens(given, cut, 10), **named, initial_state=state, output_final_state=True
            )
            return torch.cat([head, tail], 1), state

        return op

    for cut in range(1, 10) if impl == "eager" else (3, 8):
        found, found_gradients, _ = results(cut_op(cut), inputs, **options)
        assert_same(found, values)
        assert_same(found_gradients, gradients)


@PATHS
def test_decoding_equals_the_forward_pass_when_sequences_are_apart(kind, path):
    # Three sequences, at positions 0, 1 and 3 of their chunks when decoding starts.
    length, chunk_size, heads = 9, 4, [4, 1, 3]
    inputs = make(3, length, **kind)
    options = {**path, "chunk_size": chunk_size, "output_final_state": True}
    with torch.no_grad():
        rows = [
            {n: x if n == "weights" or x is None else x[i : i + 1] for n, x in inputs.items()}
            for i in range(3)
        ]
        whole = [deep_memory(**row, **options) for row in rows]
        starts = [deep_memory(**tokens(row, 0, head), **options)[1] for row, head in zip(rows, heads)]
        state = join(starts)
        for step in range(length - max(heads)):
            token = {
                n: x
                if n == "weights" or x is None
                else torch.cat([x[i : i + 1, h + step : h + step + 1] for i, h in enumerate(heads)])
                for n, x in inputs.items()
            }
            o, state = deep_memory(**token, initial_state=state, **options)
            for i, head in enumerate(heads):
                torch.testing.assert_close(o[i, 0], whole[i][0][0, head + step], rtol=0, atol=1e-11)


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]],
    "interior": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
}


@PATHS
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("resume", [False, True], ids=["", "resumed apart"])
def test_padding_equals_separate_sequences(padding, resume, kind, path):
    mask = torch.tensor(MASKS[padding], dtype=torch.bool)
    inputs = make(3, 7, **kind)
    options = {"chunk_size": 3, **path}
    states = [None] * 3
    if resume:
        earlier = make(1, 5, seed=1, **kind) | {"weights": inputs["weights"]}
        states = [
            leaves_like(deep_memory(**tokens(earlier, 0, n), **options, output_final_state=True)[1])
            for n in (1, 3, 5)
        ]
        inputs["initial_state"] = leaves_like(join(states))
    with torch.no_grad():
        for name in ("q", "k", "v"):
            inputs[name][~mask] = torch.nan  # what padding holds does not matter
    values, gradients, state = results(deep_memory, inputs, mask=mask, **options)
    assert torch.equal(values[0][~mask], torch.zeros_like(values[0][~mask]))
    compare(deep_memory, inputs, mask=mask, **options)
    for name, gradient in zip(("q", "k", "v"), gradients):
        assert gradient[~mask].abs().sum() == 0, name
    for i in range(3):
        row = {
            n: x if n in ("weights", "initial_state") or x is None else x[i : i + 1, mask[i]]
            for n, x in inputs.items()
        }
        row["initial_state"] = states[i]
        if not mask[i].any():
            continue
        o, final = deep_memory(**row, **options, output_final_state=True)
        torch.testing.assert_close(values[0][i][mask[i]], o[0].detach(), rtol=0, atol=1e-11)
        for a, b in zip(tensors_of(state), tensors_of(final)):
            torch.testing.assert_close(a[i], b[0], rtol=0, atol=1e-11)
        assert state.position[i] == final.position[0]


def test_packed_equals_separate():
    inputs = make(1, 11, momentum=True)
    cu_seqlens = torch.tensor([0, 4, 5, 11])
    options = {"chunk_size": 3, "read": "running"}
    values, gradients, _ = results(deep_memory, inputs, cu_seqlens=cu_seqlens, **options)

    def separate(output_final_state, **named):
        given = {n: named.pop(n) for n in inputs}
        runs = [
            deep_memory(**tokens(given, a, b), **named, output_final_state=True)
            for a, b in zip([0, 4, 5], [4, 5, 11])
        ]
        return torch.cat([o for o, _ in runs], 1), join([state for _, state in runs])

    expected, expected_gradients, _ = results(separate, inputs, **options)
    assert_same(values, expected)
    assert_same(gradients, expected_gradients)
    _, state = deep_memory(**inputs, cu_seqlens=cu_seqlens, output_final_state=True, **options)
    again, _ = deep_memory(**inputs, cu_seqlens=cu_seqlens, initial_state=state, impl="reference", **options)
    found, _ = deep_memory(**inputs, cu_seqlens=cu_seqlens, initial_state=state, **options)
    torch.testing.assert_close(found, again, rtol=0, atol=1e-11)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_checkpoints_change_nothing(every):
    inputs = make(2, 17)
    expected = results(deep_memory, inputs, chunk_size=2, checkpoint_every=8)
    found = results(deep_memory, inputs, chunk_size=2, checkpoint_every=every)
    for a, b in zip(found[:2], expected[:2]):
        assert_same(a, b, 1e-13)


def test_only_what_needs_gradients_gets_them():
    inputs = make(1, 9)
    for name in ("q", "rate", "log_decay"):
        inputs[name].requires_grad_(False)
    compare(deep_memory, inputs, chunk_size=2)


@pytest.mark.parametrize("layer", ["inner", "outer"])
def test_a_frozen_layer_leaves_the_other_one_its_gradient(layer):
    inputs = make(1, 8)
    getattr(inputs["weights"], layer).requires_grad_(False)
    compare(deep_memory, inputs, chunk_size=4)


def test_a_backward_pass_under_autocast_is_the_same():
    inputs = cast(make(2, 9, momentum=True), torch.float32)
    assert_autocast_changes_no_backward_pass(deep_memory, inputs)


def test_a_second_derivative_is_refused():
    inputs = make(1, 6)
    o, _ = deep_memory(**inputs, chunk_size=2, checkpoint_every=1)
    (gradient,) = torch.autograd.grad(o.square().sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_transforms_work_on_the_reference():
    inputs = make(2, 3)
    weights = inputs.pop("weights")

    def loss(key):
        return deep_memory(**{**inputs, "k": key}, weights=weights, chunk_size=2, impl="reference")[0].sum()

    (expected,) = torch.autograd.grad(loss(inputs["k"]), inputs["k"])
    torch.testing.assert_close(torch.func.grad(loss)(inputs["k"].detach()), expected)


def test_low_precision_inputs_keep_a_full_precision_state():
    inputs = make(1, 40, width=8, hidden=8)
    half = {n: x.detach().to(torch.bfloat16) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    half["weights"] = DeepMemoryWeights(*(w.detach().to(torch.bfloat16) for w in inputs["weights"]))
    exact = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in half.items()}
    exact["weights"] = DeepMemoryWeights(*(w.double() for w in half["weights"]))
    o, state = deep_memory(**half, chunk_size=8, output_final_state=True)
    expected, expected_state = deep_memory(**exact, chunk_size=8, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in tensors_of(state))
    assert relative_error(o, expected) < 2**-8
    assert relative_error(state.running.inner, expected_state.running.inner) < 1e-5


PIECES = ["hidden_adjoint", "signal_adjoint", "bound_adjoint", "gram_adjoint", "coefficient_adjoint"]


@pytest.mark.parametrize(
    ("piece", "read"), [*itertools.product(PIECES, ["snapshot", "running"]), ("read_adjoint", "running")]
)
def test_a_wrong_gradient_is_noticed(monkeypatch, piece, read):
    true_adjoint = getattr(chunk_adjoint, piece)

    def wrong(*args):
        found = true_adjoint(*args)
        if isinstance(found, torch.Tensor):
            return 1.01 * found
        changed = (1.01 * found[0], *found[1:])
        return type(found)(*changed) if hasattr(found, "_fields") else changed

    monkeypatch.setattr(chunk_adjoint, piece, wrong)
    rule = MemoryRule(error_bound=0.3)
    with pytest.raises(AssertionError, match="differs by"):
        compare(deep_memory, make(1, 6, momentum=True), chunk_size=4, rule=rule, read=read)


@pytest.mark.parametrize("hidden", [None, 4])
def test_one_token_that_is_padding_behind_a_state(hidden):
    """It writes nothing and does not count, and the token beside it does."""
    options = {"chunk_size": 4, "mask": torch.tensor([[False], [True]])}
    _, state = deep_memory(**make(2, 1, hidden=hidden), chunk_size=4, output_final_state=True)
    inputs = {**make(2, 1, hidden=hidden, seed=1), "initial_state": leaves_like(state)}
    _, after = deep_memory(**inputs, **options, output_final_state=True)
    assert after.position.tolist() == [1, 2]
    compare(deep_memory, inputs, **options)
