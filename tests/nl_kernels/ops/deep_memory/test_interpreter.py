"""The Triton kernels, interpreted, against the token loop in fp64."""

import dataclasses
import functools
import itertools
from contextlib import nullcontext

import pytest
import torch

from nl_kernels import DeepMemoryWeights, MemoryRule, deep_memory
from nl_kernels.doctor import tensors_of
from nl_kernels.memory.kernels.launch import Inputs
from nl_kernels.ops.deep_memory import DeepMemoryState
from tests.nl_kernels.bank_calls import assert_calls_fill_their_buffers, assert_operators_pass_opcheck
from tests.nl_kernels.budgets import RoundedProducts, assert_within_budget
from tools.catalogue.memories import options_of
from tools.op_inputs import deep_memory_inputs

pytestmark = pytest.mark.interpreter

LITERAL = dataclasses.replace(MemoryRule.literal(), proximal=False)
TITANS = dataclasses.replace(LITERAL, erase="none")
RULES = {
    "default": MemoryRule(),
    "errors at the snapshot": MemoryRule(error_at="snapshot"),
    "literal": LITERAL,
    "titans": TITANS,
    "gelu, tight bound": MemoryRule(activation="gelu", error_bound=0.3),
}
C = 5  # no power of two


def inputs(length, *, batch=1, heads=1, width=10, hidden=12, value_width=None, resumed_at=None, **options):
    """Inputs, some tokens of which forget much or drop their momentum; maybe a state."""
    x = deep_memory_inputs(batch, length, heads, width, hidden, value_width, **options)
    if length > 3:
        x["log_decay"][:, 1] = -3.0
        if x["momentum"] is not None:
            x["momentum"][:, 2] = 0.0
    if resumed_at is not None:
        rng = torch.Generator().manual_seed(2)

        def part():
            return DeepMemoryWeights(
                *(
                    None if w is None else 0.2 * torch.randn(batch, *w.shape, generator=rng)
                    for w in x["weights"]
                )
            )

        velocity = None if x["momentum"] is None else part()
        x["initial_state"] = DeepMemoryState(part(), part(), torch.tensor(resumed_at), velocity)
    return x


def convert(value, dtype=None):
    """Nested tensors as new leaves, floating ones in ``dtype``."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
    if isinstance(value, dict):
        return {name: convert(x, dtype) for name, x in value.items()}
    if value is None:
        return None
    return type(value)(*(convert(x, dtype) for x in value))


def results_and_gradients(x, dtype=None, **options):
    """Results, and all gradients under a cotangent for each of them, in order."""
    x = convert(x, dtype)
    o, state = deep_memory(**x, output_final_state=True, **options)
    values, leaves = [o, *tensors_of(state)], tensors_of(x)
    rng = torch.Generator().manual_seed(1)
    cotangents = [(8 * torch.randn(r.shape, generator=rng)).round() / 8 for r in values]
    loss = sum((r * c.to(r.dtype)).sum() for r, c in zip(values, cotangents))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [r.detach() for r in values], list(gradients)


def assert_kernels_within_budget(x, rounded=None, factor=2.5, **options):
    """``rounded``: the dtype to which the products of the kernels round their operands."""
    triton = results_and_gradients(x, impl="triton", **options)
    with nullcontext() if rounded is None else RoundedProducts(rounded):
        eager = results_and_gradients(x, impl="eager", **options)
    options.pop("checkpoint_every", None)
    expected = results_and_gradients(x, torch.float64, impl="reference", **options)
    for kind, *parts in zip(("result", "gradient"), triton, eager, expected):
        for index, (a, b, c) in enumerate(zip(*parts, strict=True)):
            # Of a handful of numbers eager gets some right by luck.
            most = factor if c.numel() >= 32 else max(factor, 6.0)
            assert_within_budget(a, b, c, factor=most, name=f"{kind} {index} of shape {tuple(c.shape)}")


# Every rule with both reads and with both kinds of layers, but not with all four pairs of them.
RULES_READS_LAYERS = list(itertools.product(RULES, ("snapshot", "running"), (12, None)))
QUICK = {
    (name, read, hidden)
    for name, read, hidden in RULES_READS_LAYERS
    if (read == "running") == ((hidden is None) == (name in ("literal", "titans")))
}


@pytest.mark.parametrize(
    ("name", "read", "hidden"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in RULES_READS_LAYERS],
)
def test_results_and_every_gradient(name, read, hidden):
    """Resumed within a chunk and left within another one."""
    x = inputs(6, hidden=hidden, resumed_at=[3])
    assert_kernels_within_budget(x, rule=RULES[name], read=read, chunk_size=C)


@pytest.mark.parametrize("length", [1, C - 1, C, C + 1, 3 * C + 7])
def test_lengths(length):
    x = inputs(length, value_width=7)
    assert_kernels_within_budget(x, read="running", chunk_size=C, checkpoint_every=2)


def test_states_are_recomputed():
    x = inputs(12, hidden=None, width=3, value_width=20)
    rule = dataclasses.replace(TITANS, residual=False, anchored=True)
    assert_kernels_within_budget(x, rule=rule, chunk_size=4, checkpoint_every=3)


def test_forgetting_everything_is_exact():
    x = inputs(7, hidden=None)
    x["log_decay"][:, [2, 3, 6]] = -torch.inf
    options = {"read": "running", "chunk_size": C}
    triton = results_and_gradients(x, impl="triton", **options)
    x["log_decay"] = x["log_decay"].clamp(min=-200.0)  # e^-200 is no number of fp32 either
    expected = results_and_gradients(x, torch.float64, impl="reference", **options)
    for a, b in zip((*triton[0], *triton[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)


def test_fp16():
    """tf32 has the mantissa of fp16."""
    assert_kernels_within_budget(inputs(C + 1, dtype=torch.float16), torch.float16, chunk_size=C)


def test_several_blocks_of_rows_and_larger_chunks():
    x = inputs(20, width=17, hidden=20)
    assert_kernels_within_budget(x, read="running", chunk_size=32)


@pytest.mark.parametrize("read", ["snapshot", pytest.param("running", marks=pytest.mark.slow)])
def test_without_erasing(read):
    rule = dataclasses.replace(MemoryRule(), erase="none")
    assert_kernels_within_budget(inputs(8), rule=rule, read=read, chunk_size=C)


@pytest.mark.parametrize("hidden", [12, None])
def test_padding_moves_nothing(hidden):
    """Sequences that end in a later chunk, at a boundary, in their first chunk, and one without a token."""
    mask = torch.zeros(4, 8)
    mask[0, [2, 3, 5, 6, 7]] = 1
    mask[1, 1] = mask[2, 0] = 1
    x = inputs(8, batch=4, hidden=hidden, resumed_at=[3, 4, 1, 1])
    assert_kernels_within_budget(x, mask=mask > 0, chunk_size=C)


def test_packed_sequences():
    x = inputs(9, hidden=None)
    cu_seqlens = torch.tensor([0, 1, 7, 9])
    assert_kernels_within_budget(x, cu_seqlens=cu_seqlens, read="running", chunk_size=C)


def test_one_token_each_at_different_positions():
    x = inputs(1, batch=7, hidden=None, resumed_at=[0, 1, 2, 3, 4, 4, 0])
    assert_kernels_within_budget(x, chunk_size=C)


NAMES = ("q", "k", "v", "rate", "log_decay", "inner", "outer", "snapshot inner", "snapshot outer", "state")


@functools.cache
def found():
    """Gradients of the kernels, of eager and in fp64, by name, of a case that has all of them."""
    x = inputs(C + 1, resumed_at=[3])
    options = {"rule": dataclasses.replace(LITERAL, anchored=True), "chunk_size": C}
    calls = (("triton", None), ("eager", None), ("reference", torch.float64))
    parts = [results_and_gradients(x, dtype, impl=impl, **options)[1] for impl, dtype in calls]
    return [dict(zip(NAMES, gradients)) for gradients in parts]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_of_one_percent_in_any_gradient_is_seen(name):
    triton, eager, expected = found()
    factor = 2.5 if expected[name].numel() >= 32 else 6.0
    assert_within_budget(triton[name], eager[name], expected[name], factor=factor)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(1.01 * triton[name], eager[name], expected[name], factor=factor)


def bank_inputs(hidden):
    """What the kernels take of heads that start within a chunk, and the options."""
    x = deep_memory_inputs(1, 7, 2, 10, hidden)
    tokens = [x[n] for n in ("q", "k", "v")] + [None] + [x[n] for n in ("rate", "log_decay")]
    layers = [None if w is None else w.detach() for w in x["weights"]]
    bank = layers if hidden else [None, layers[0]]
    banks = [None if w is None else w.clone() for w in (*bank, *bank, *bank)]
    options = options_of(torch.float32, MemoryRule(), C, 9, "sm_90", read="running", offset=2)
    return Inputs.of((*tokens, *[None] * 4, *banks)), options._replace(checkpoint_every=2)


@pytest.mark.parametrize("hidden", [12, None], ids=["two layers", "linear"])
def test_every_element_is_written_and_nothing_else(hidden):
    assert_calls_fill_their_buffers(*bank_inputs(hidden))


def test_refuses_what_the_kernels_do_not_serve():
    cases = {
        "q, k, v: on sm_90 with chunks of 4 .* heads .*up to 128 wide, got 129": (inputs(2, width=129), {}),
        "q, k, v: on sm_90 with chunks of 17 .* heads .*up to 64 wide, got 65": (
            inputs(2, value_width=65),
            {"chunk_size": 17},
        ),
        "weights: .* hidden layers .*up to 128 wide, got 129": (inputs(2, hidden=129), {}),
        "chunk_size: on sm_90 .* chunks up to 32, got 33": (inputs(2), {"chunk_size": 33}),
        "momentum: the Triton kernels have none": (inputs(2, momentum=True), {}),
        "rule.erase: .* got 'input'": (inputs(2), {"rule": MemoryRule(erase="input")}),
        "rule.proximal": (inputs(2), {"rule": MemoryRule.literal()}),
        "got float64": (inputs(2, dtype=torch.float64), {}),
    }
    for message, (x, options) in cases.items():
        with pytest.raises(NotImplementedError, match=f"{message}.*; use impl='eager'"):
            deep_memory(**x, **{"chunk_size": 4, **options}, impl="triton")


@pytest.mark.parametrize(
    "hidden", [pytest.param(12, marks=pytest.mark.slow), None], ids=["two layers", "linear"]
)
def test_operators_pass_opcheck(hidden):
    assert_operators_pass_opcheck(*bank_inputs(hidden))


def test_compiles_without_a_graph_break():
    x = inputs(4)
    options = {"impl": "triton", "chunk_size": 4}
    expected = results_and_gradients(x, **options)
    compiled = torch.compile(deep_memory, fullgraph=True, backend="aot_eager")
    x = convert(x)
    o, state = compiled(**x, output_final_state=True, **options)
    for value, wanted in zip([o, *tensors_of(state)], expected[0], strict=True):
        assert torch.equal(value, wanted)
