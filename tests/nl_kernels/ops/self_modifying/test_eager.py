"""The chunked path against the definition: values, states, every gradient; clocks, cuts, padding, packing."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nl_kernels import MemoryRule, SelfModifyingWeights, self_modifying_memory
from nl_kernels.doctor import tensors_of
from nl_kernels.memory import chunk_adjoint, generate
from tests.nl_kernels.chunked_memories import (
    assert_autocast_changes_no_backward_pass,
    assert_same,
    at_rates_up_to_two,
    cast,
    compare,
    join,
    leaves_like,
    results,
    tokens,
)
from tools.op_inputs import self_modifying_inputs

DEFAULT, LITERAL = MemoryRule(), MemoryRule.literal()
RULES = {
    "default": DEFAULT,
    "literal": LITERAL,
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
    "gelu, not anchored, not bounded": MemoryRule(activation="gelu", anchored=False, error_bound=None),
    "input": MemoryRule(erase="input", proximal=True, residual=True, error_bound=0.3),
    "titans": MemoryRule(erase="none", momentum="sum"),
}
# Kinds of memory that take other ways through the engine.
KINDS = pytest.mark.parametrize(
    "kind", [{"momentum": True}, {}, {"hidden": None}], ids=["momentum", "two layers", "linear"]
)
SHARED = ("weights", "rate_max", "rate_bias", "retention_bias")


def make(batch, length, heads=2, width=3, hidden=4, **options):
    return self_modifying_inputs(
        batch, length, heads, width, hidden, dtype=torch.float64, requires_grad=True, **options
    )


@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
@pytest.mark.parametrize("read", ["snapshot", "running"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_equals_the_definition(rule, read, momentum):
    compare(
        self_modifying_memory,
        make(2, 9, momentum=momentum),
        tolerance=1e-9,
        rule=rule,
        read=read,
        chunk_size=4,
    )


@pytest.mark.parametrize("kind", [{}, {"hidden": None}, {"hidden": None, "momentum": True}])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rates_up_to_two_equal_the_definition(rule, kind):
    """Values and all gradients, those of the retention, which limits a rate to 1 + α, included."""
    inputs = at_rates_up_to_two(make(2, 9, **kind))
    compare(self_modifying_memory, inputs, tolerance=1e-8, rule=rule, read="running", chunk_size=4)


def with_scale(inputs):
    query = inputs["query"]
    rng = torch.Generator().manual_seed(5)
    scale = 3 * torch.rand(query.shape[:-1], generator=rng, dtype=torch.float64)
    scale[:, 2] = 0
    return {**inputs, "write_scale": scale.requires_grad_()}


@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
@pytest.mark.parametrize("read", ["snapshot", "running"])
@pytest.mark.parametrize("erase", ["per_layer", "none"])
def test_a_scale_of_writes_equals_the_definition(erase, read, momentum):
    inputs = with_scale(make(2, 9, hidden=None, momentum=momentum))
    clocks = {"chunk_size": 2, "generator_chunk_size": 4}
    compare(self_modifying_memory, inputs, tolerance=1e-9, rule=MemoryRule(erase=erase), read=read, **clocks)


def test_a_scale_of_writes_scales_what_is_read_and_nothing_else():
    """Of an empty memory without an erase: twice the scale, twice the answer; 0 answers nothing."""
    inputs = make(1, 8, hidden=None)
    inner = torch.zeros_like(inputs["weights"].memory.inner)
    inputs["weights"] = inputs["weights"]._replace(memory=inputs["weights"].memory._replace(inner=inner))
    options = {
        "rule": MemoryRule(erase="none"),
        "read": "running",
        "chunk_size": 8,
        "output_final_state": True,
    }
    found = {}
    for scale in (0.0, 1.0, 2.0, None):
        given = None if scale is None else torch.full(inputs["query"].shape[:-1], scale).double()
        found[scale] = self_modifying_memory(**inputs, write_scale=given, **options)
    assert found[0.0][0].abs().max() == 0
    torch.testing.assert_close(found[2.0][0], 2 * found[1.0][0])
    torch.testing.assert_close(found[None][0], found[1.0][0])
    # The others, which the next chunk's keys and values come from, learn the same.
    torch.testing.assert_close(found[2.0][1].running.gate, found[1.0][1].running.gate)


def test_no_rate_is_above_one_plus_the_retention():
    """One key again and again: its content changes its sign with every token, and never grows."""
    inputs = at_rates_up_to_two(make(1, 40, heads=1, hidden=None))
    inputs = {n: x if n in SHARED or x is None else x[:, :1].expand_as(x) for n, x in inputs.items()}
    inputs |= {
        name: torch.full((1,), value).double() for name, value in (("rate_bias", 40.0), ("rate_max", 2.0))
    }
    _, state = self_modifying_memory(**inputs, chunk_size=100, read="running", output_final_state=True)
    _, first = self_modifying_memory(**tokens(inputs, 0, 1), chunk_size=100, output_final_state=True)
    # Of 40 writes of one error along one key the factor -1 leaves none, 1 + α - η > 1 would leave many.
    assert max(x.norm() for x in tensors_of(state.running)) <= max(
        x.norm() for x in tensors_of(first.running)
    )


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_targets_that_learn_are_the_definition_s_alone(impl):
    inputs = make(1, 5)
    options = {"chunk_size": 4, "detach_targets": False, "output_final_state": True}
    expected = self_modifying_memory(**inputs, **options, impl="reference")
    assert torch.equal(self_modifying_memory(**inputs, **options)[0], expected[0])
    with pytest.raises(NotImplementedError, match=r"detach_targets: .*use impl='reference'"):
        self_modifying_memory(**inputs, **options, impl=impl)


@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
@pytest.mark.parametrize("read", ["snapshot", "running"])
def test_linear_memories_equal_the_definition(read, momentum):
    for rule in (*RULES.values(), MemoryRule(erase="per_layer", anchored=False, proximal=True)):
        inputs = make(2, 7, hidden=None, momentum=momentum)
        compare(self_modifying_memory, inputs, rule=rule, read=read, chunk_size=3)


@KINDS
@pytest.mark.parametrize("clocks", [(2, 6), (6, 2), (1, 3)])
def test_two_clocks_equal_the_definition(clocks, kind):
    own, others = clocks
    inputs = make(1, 13, **kind)
    compare(self_modifying_memory, inputs, read="running", chunk_size=own, generator_chunk_size=others)


@KINDS
@pytest.mark.parametrize("every", [1, 2, 3])
def test_truncation_equals_the_definition(every, kind):
    inputs = make(2, 13, **kind)
    compare(self_modifying_memory, inputs, chunk_size=4, generator_chunk_size=2, truncate_every=every)
    mask = torch.tensor([[1] * 13, [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    _, state = self_modifying_memory(
        **tokens(inputs, 0, 5, SHARED),
        mask=mask[:, :5],
        chunk_size=4,
        generator_chunk_size=2,
        output_final_state=True,
    )
    inputs["initial_state"] = leaves_like(state)
    compare(
        self_modifying_memory, inputs, mask=mask, chunk_size=4, generator_chunk_size=2, truncate_every=every
    )


@KINDS
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(("clocks", "every"), [((2, 6), 1), ((2, 6), 2), ((1, 4), 3), ((2, 8), 6)])
def test_no_gradient_crosses_a_cut_between_the_generators_boundaries(clocks, every, start, kind):
    options = {"chunk_size": clocks[0], "generator_chunk_size": clocks[1], "truncate_every": every}
    options["rule"] = MemoryRule(anchored=False)  # an anchor would have what crosses
    inputs = make(2, 21, **kind)
    if start:
        head = tokens(inputs, 0, start, SHARED)
        _, state = self_modifying_memory(**head, **options, output_final_state=True)
        inputs = {**tokens(inputs, start, 21, SHARED), "initial_state": leaves_like(state)}
    compare(self_modifying_memory, inputs, read="running", tolerance=1e-9, **options)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(1, 10),
    chunk_size=st.integers(1, 5),
    factor=st.integers(1, 2),
    width=st.integers(1, 4),
    hidden=st.integers(1, 5),
    checkpoint_every=st.sampled_from([None, 1, 2]),
    read=st.sampled_from(["snapshot", "running"]),
    seed=st.integers(0, 100),
)
def test_any_shape_equals_the_definition(
    length, chunk_size, factor, width, hidden, checkpoint_every, read, seed
):
    inputs = make(1, length, 1, width, hidden, seed=seed, momentum=seed % 2 == 1)
    # Tiny widths come near kinks and poles of the norms: what matters here is shape.
    rule = MemoryRule(error_bound=None, activation="gelu", normalize_hidden=False)
    clocks = (chunk_size, chunk_size * factor)[:: 1 if seed % 2 else -1]
    compare(
        self_modifying_memory,
        inputs,
        tolerance=1e-8,
        largest=1e3,
        rule=rule,
        read=read,
        chunk_size=clocks[0],
        generator_chunk_size=clocks[1],
        checkpoint_every=checkpoint_every,
    )


def test_weights_by_sequence():
    inputs = make(2, 6)
    inputs["weights"] = SelfModifyingWeights(
        *(
            type(m)(*((w.detach() + 0.1 * torch.randn(2, *w.shape)).requires_grad_() for w in m))
            for m in inputs["weights"]
        )
    )
    compare(self_modifying_memory, inputs, chunk_size=4)


@KINDS
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("at", [3, 4])
def test_gradients_reach_the_initial_state(at, anchored, kind):
    options = {
        "rule": dataclasses.replace(DEFAULT, anchored=anchored),
        "chunk_size": 2,
        "generator_chunk_size": 4,
    }
    inputs = make(2, 11, **kind)
    _, state = self_modifying_memory(**tokens(inputs, 0, at, SHARED), **options, output_final_state=True)
    rest = {**tokens(inputs, at, 11, SHARED), "initial_state": leaves_like(state)}
    compare(self_modifying_memory, rest, **options)


@pytest.mark.parametrize("read", ["snapshot", "running"])
@pytest.mark.parametrize(("impl", "hidden"), [("eager", 4), ("eager", None), ("reference", 4)])
def test_split_equals_whole_at_every_cut(impl, hidden, read):
    inputs = make(1, 10, hidden=hidden)
    options = {"read": read, "chunk_size": 2, "generator_chunk_size": 4, "impl": impl}
    values, gradients, _ = results(self_modifying_memory, inputs, **options)

    def cut_op(cut):
        def op(output_final_state, **named):
            given = {n: named.pop(n) for n in inputs}
            head, state = self_modifying_memory(
                **tokens(given, 0, cut, SHARED), **named, output_final_state=True
            )
            tail, state = self_modifying_memory(
                **tokens(given, cut, 10, SHARED), **named, initial_state=state, output_final_state=True
            )
            return torch.cat([head, tail], 1), state

        return op

    for cut in range(1, 10) if impl == "eager" else (3, 8):
        found, found_gradients, _ = results(cut_op(cut), inputs, **options)
        assert_same(found, values)
        assert_same(found_gradients, gradients)


@pytest.mark.parametrize("clocks", [(4, 4), (2, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize(("read", "hidden"), [("snapshot", 4), ("running", 4), ("running", None)])
def test_decoding_equals_the_forward_pass_when_sequences_are_apart(read, hidden, clocks):
    length, heads = 9, [4, 1, 3]
    inputs = make(3, length, hidden=hidden)
    options = {
        "read": read,
        "chunk_size": clocks[0],
        "generator_chunk_size": clocks[1],
        "output_final_state": True,
    }
    with torch.no_grad():
        rows = [rows_of(inputs, i) for i in range(3)]
        whole = [self_modifying_memory(**row, **options) for row in rows]
        starts = [
            self_modifying_memory(**tokens(row, 0, head, SHARED), **options)[1]
            for row, head in zip(rows, heads)
        ]
        state = join(starts)
        for step in range(length - max(heads)):
            token = {
                n: x
                if n in SHARED or x is None
                else torch.cat([x[i : i + 1, h + step : h + step + 1] for i, h in enumerate(heads)])
                for n, x in inputs.items()
            }
            o, state = self_modifying_memory(**token, initial_state=state, **options)
            for i, head in enumerate(heads):
                torch.testing.assert_close(o[i, 0], whole[i][0][0, head + step], rtol=0, atol=1e-11)


def rows_of(inputs, i, pick=slice(None)):
    """The inputs of sequence i alone, and of its tokens ``pick``."""
    return {n: x if n in SHARED or x is None else x[i : i + 1, pick] for n, x in inputs.items()}


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]],
    "interior": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
}


@KINDS
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("resume", [False, True], ids=["", "resumed apart"])
def test_padding_equals_separate_sequences(padding, resume, kind):
    mask = torch.tensor(MASKS[padding], dtype=torch.bool)
    inputs = make(3, 7, **kind)
    options = {"chunk_size": 4, "generator_chunk_size": 2, "read": "running", "output_final_state": True}
    states = [None] * 3
    if resume:
        earlier = make(1, 7, seed=1, **kind) | {n: inputs[n] for n in SHARED}
        states = [self_modifying_memory(**tokens(earlier, 0, n, SHARED), **options)[1] for n in (1, 3, 7)]
        states = [leaves_like(state) for state in states]
    with torch.no_grad():
        for name in ("query", "key_input", "value_input", "gate_input"):
            inputs[name][~mask] = torch.nan  # what padding holds does not matter
    initial = leaves_like(join(states)) if resume else None
    o, state = self_modifying_memory(**inputs, **options, mask=mask, initial_state=initial)
    assert torch.equal(o[~mask], torch.zeros_like(o[~mask]))
    for i in range(3):
        if mask[i].any():
            row = rows_of(inputs, i, mask[i])
            expected, final = self_modifying_memory(**row, **options, initial_state=states[i])
            torch.testing.assert_close(o[i][mask[i]], expected[0], rtol=0, atol=1e-11)
            for a, b in zip(tensors_of(state), tensors_of(final)):
                torch.testing.assert_close(a[i], b[0], rtol=0, atol=1e-11)
            assert state.position[i] == final.position[0]
    del options["output_final_state"]
    compare(self_modifying_memory, {**inputs, "initial_state": initial}, mask=mask, **options)


def test_packed_equals_separate():
    inputs = make(1, 11, momentum=True)
    cu_seqlens = torch.tensor([0, 4, 5, 11])
    options = {"chunk_size": 3, "read": "running"}
    values, gradients, _ = results(self_modifying_memory, inputs, cu_seqlens=cu_seqlens, **options)

    def separate(output_final_state, **named):
        given = {n: named.pop(n) for n in inputs}
        runs = [
            self_modifying_memory(**tokens(given, a, b, SHARED), **named, output_final_state=True)
            for a, b in zip([0, 4, 5], [4, 5, 11])
        ]
        return torch.cat([o for o, _ in runs], 1), join([state for _, state in runs])

    expected, expected_gradients, _ = results(separate, inputs, **options)
    assert_same(values, expected)
    assert_same(gradients, expected_gradients)


@pytest.mark.parametrize("hidden", [4, None])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_checkpoints_change_nothing(every, hidden):
    inputs = make(2, 17, hidden=hidden)
    expected = results(self_modifying_memory, inputs, chunk_size=2, checkpoint_every=8)
    found = results(self_modifying_memory, inputs, chunk_size=2, checkpoint_every=every)
    for a, b in zip(found[:2], expected[:2]):
        assert_same(a, b, 1e-13)


def test_every_leaf_gets_a_gradient_that_a_finite_difference_confirms():
    inputs = make(1, 12, hidden=4)
    inputs.pop("momentum")
    weights = torch.randn(1, 12, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss():
        # From the third chunk on everything has been written with everything.
        return (self_modifying_memory(**inputs, chunk_size=3)[0] * weights)[:, 6:].sum()

    leaves = tensors_of(inputs)
    gradients = torch.autograd.grad(loss(), leaves)
    assert len(leaves) == 4 + 3 + 10
    step = 1e-6
    for leaf, gradient in zip(leaves, gradients):
        direction = gradient / gradient.norm()
        assert gradient.norm() > 1e-6
        with torch.no_grad():
            leaf += step * direction
            above = loss()
            leaf -= 2 * step * direction
            below = loss()
            leaf += step * direction
        found = (above - below) / (2 * step)
        assert abs(found - gradient.norm()) < 1e-5 * gradient.norm() + 1e-8


@pytest.mark.parametrize("read", ["snapshot", "running"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"error_bound": 0.4, "activation": "gelu", "residual": True},
        {"anchored": False, "error_bound": None},
    ],
    ids=["default", "gelu, residual", "not anchored, not bounded"],
)
def test_the_written_out_derivative_equals_the_definition(options, read):
    rule = MemoryRule(**options)
    compare(self_modifying_memory, make(2, 8), rule=rule, read=read, chunk_size=4, checkpoint_every=1)


def test_only_what_needs_gradients_gets_them():
    inputs = make(1, 8)
    for x in (inputs["query"], inputs["rate_max"], *inputs["weights"].value):
        x.requires_grad_(False)
    compare(self_modifying_memory, inputs, chunk_size=4)


@pytest.mark.parametrize("layer", ["inner", "outer"])
def test_frozen_layers_leave_the_other_layers_their_gradients(layer):
    inputs = make(1, 8)
    for memory in inputs["weights"]:
        getattr(memory, layer).requires_grad_(False)
    compare(self_modifying_memory, inputs, chunk_size=4)


def test_a_backward_pass_under_autocast_is_the_same():
    inputs = cast(make(2, 9, momentum=True), torch.float32)
    assert_autocast_changes_no_backward_pass(self_modifying_memory, inputs)


TWO_LAYER = [
    *(
        (chunk_adjoint, piece)
        for piece in ("hidden_adjoint", "signal_adjoint", "write_adjoint", "gram_adjoint")
    ),
    (generate, "hidden_adjoint"),
]
LINEAR = [
    *(
        (chunk_adjoint, piece)
        for piece in ("bound_adjoint", "coefficient_adjoint", "gram_adjoint", "read_adjoint")
    ),
    (generate, "row_dot"),
]


@pytest.mark.parametrize(
    ("module", "piece", "hidden"),
    [*((*x, 4) for x in TWO_LAYER), *((*x, None) for x in LINEAR)],
)
def test_a_wrong_gradient_is_noticed(monkeypatch, module, piece, hidden):
    true_backward = getattr(module, piece)

    def wrong(*args):
        found = true_backward(*args)
        if isinstance(found, torch.Tensor):
            return 1.01 * found
        changed = (1.01 * found[0], *found[1:])
        return type(found)(*changed) if hasattr(found, "_fields") else changed

    monkeypatch.setattr(module, piece, wrong)
    inputs = make(1, 8, hidden=hidden)
    with pytest.raises(AssertionError, match="differs by"):
        compare(self_modifying_memory, inputs, chunk_size=4, read="running", rule=MemoryRule(error_bound=0.3))


@pytest.mark.parametrize("hidden", [None, 4])
def test_one_token_that_is_padding_behind_a_state(hidden):
    """It writes nothing and does not count, and the token beside it does."""
    options = {"chunk_size": 4, "mask": torch.tensor([[False], [True]])}
    _, state = self_modifying_memory(**make(2, 1, hidden=hidden), chunk_size=4, output_final_state=True)
    inputs = {**make(2, 1, hidden=hidden, seed=1), "initial_state": leaves_like(state)}
    _, after = self_modifying_memory(**inputs, **options, output_final_state=True)
    assert after.position.tolist() == [1, 2]
    compare(self_modifying_memory, inputs, tolerance=1e-9, **options)
