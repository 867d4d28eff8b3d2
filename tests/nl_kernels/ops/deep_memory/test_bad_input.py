"""Each bad argument is refused by name, before any work."""

import pytest
import torch

from nl_kernels import (
    DeepMemoryState,
    DeepMemoryWeights,
    MemoryRule,
    deep_memory,
    self_modifying_memory,
)
from tools.op_inputs import deep_memory_inputs, self_modifying_inputs

INPUTS = deep_memory_inputs(2, 5, 2, 3, 4)
_, STATE = deep_memory(**INPUTS, chunk_size=4, output_final_state=True)
INNER, OUTER = INPUTS["weights"]
ZERO = torch.zeros(2, 5, 2)

CASES = {
    "rank": ({"q": torch.zeros(2, 5, 3)}, ValueError, r"q: expected \[B, T, H, D\]"),
    "no tokens": ({"q": torch.zeros(2, 0, 2, 3)}, ValueError, "q: .*empty"),
    "kind": ({"k": [1.0]}, TypeError, "k: expected a tensor, got list"),
    "dtype": ({"k": torch.zeros(2, 5, 2, 3, dtype=torch.int32)}, TypeError, "k: .*int32"),
    "shape": ({"v": torch.zeros(2, 4, 2, 3)}, ValueError, r"v: expected shape \(2, 5, 2, 3\)"),
    "rate sign": ({"rate": ZERO - 0.1}, ValueError, "rate: expected values in"),
    "rate nan": ({"rate": ZERO + torch.nan}, ValueError, "rate: expected values in"),
    "rate inf": ({"rate": ZERO + torch.inf}, ValueError, "rate: expected values in"),
    "growth": ({"log_decay": ZERO + 0.1}, ValueError, "log_decay: expected values in"),
    "momentum": ({"momentum": ZERO + 1}, ValueError, "momentum: expected values in"),
    "weights": ({"weights": (INNER, OUTER)}, TypeError, "weights: expected DeepMemoryWeights"),
    "inner": ({"weights": DeepMemoryWeights(INNER[:1], OUTER)}, ValueError, "weights.inner: expected shape"),
    "outer": ({"weights": DeepMemoryWeights(INNER, OUTER.mT)}, ValueError, "weights.outer: expected shape"),
    "linear": ({"weights": DeepMemoryWeights(INNER, None)}, ValueError, "weights.inner: expected shape"),
    "rule": ({"rule": "literal"}, TypeError, "rule: expected a MemoryRule, got str"),
    "residual": (
        {
            "v": torch.zeros(2, 5, 2, 6),
            "rule": MemoryRule(residual=True),
            "weights": DeepMemoryWeights(INNER, torch.zeros(2, 6, 4)),
        },
        ValueError,
        "v: a rule with a residual needs width 3",
    ),
    "read": ({"read": "after"}, ValueError, "read: expected one of"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
    "chunk kind": ({"chunk_size": 4.0}, TypeError, "chunk_size: expected an int"),
    "checkpoint": ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected at least 1"),
    "mask kind": ({"mask": torch.ones(2, 5)}, TypeError, "mask: expected a bool tensor"),
    "mask shape": ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
    "packed rows": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens: packed input needs B = 1"),
    "state without a snapshot": (
        {"initial_state": STATE._replace(snapshot=None)},
        TypeError,
        "initial_state.snapshot: expected DeepMemoryWeights, got NoneType",
    ),
    "state kind": ({"initial_state": STATE.running}, TypeError, "initial_state: expected DeepMemoryState"),
    "state momentum": ({"initial_state": STATE, "momentum": ZERO}, ValueError, "without momentum"),
    "state shape": (
        {"initial_state": STATE._replace(running=DeepMemoryWeights(STATE.running.inner[:1], None))},
        ValueError,
        "initial_state.running.inner: expected shape",
    ),
    "state layers": (
        {"initial_state": STATE._replace(running=DeepMemoryWeights(STATE.running.inner, None))},
        ValueError,
        "initial_state.running.outer: made by linear memories",
    ),
    "another chunk size": (
        {"initial_state": STATE._replace(position=torch.tensor([1, 4]))},
        ValueError,
        "initial_state.position: .*another chunk size",
    ),
    "position kind": (
        {"initial_state": STATE._replace(position=torch.zeros(2))},
        TypeError,
        "initial_state.position: expected an int64",
    ),
    "no device": (
        {"impl": "triton"},
        RuntimeError,
        "impl='triton' for deep_memory: the tensors are on 'cpu'",
    ),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of"),
}


@pytest.mark.parametrize(("change", "kind", "message"), CASES.values(), ids=CASES.keys())
def test_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        deep_memory(**{**INPUTS, "chunk_size": 4, **change})


def test_packed_input_and_padding_exclude_each_other():
    inputs = deep_memory_inputs(1, 5, 2, 3, 4)
    with pytest.raises(ValueError, match="mask: not together with cu_seqlens"):
        deep_memory(
            **inputs,
            chunk_size=4,
            cu_seqlens=torch.tensor([0, 5]),
            mask=torch.ones(1, 5, dtype=torch.bool),
        )
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        deep_memory(**inputs, chunk_size=4, cu_seqlens=torch.tensor([0, 3, 3, 5]))
    with pytest.raises(ValueError, match="cu_seqlens: expected a tensor on cpu, got one on meta"):
        deep_memory(**inputs, chunk_size=4, cu_seqlens=torch.tensor([0, 5], device="meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation: expected one of"),
        ({"erase": "all"}, "erase: expected one of"),
        ({"error_at": "start"}, "error_at: expected one of"),
        ({"error_at": "anchor", "anchored": False}, "error_at: 'anchor' needs anchored=True; use 'snapshot'"),
        ({"error_bound": 0.0}, "error_bound: expected a positive"),
        ({"error_bound": float("inf")}, "error_bound: expected a positive"),
    ],
)
def test_rules_are_checked_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryRule(**options)


def test_memories_of_two_layers_have_no_errors_at_the_anchor():
    for own in (True, False):
        inputs = (self_modifying_inputs if own else deep_memory_inputs)(1, 3, 1, 4, 5)
        op = self_modifying_memory if own else deep_memory
        with pytest.raises(ValueError, match=r"rule.error_at: .* at the 'snapshot', got 'anchor'"):
            op(**inputs, chunk_size=2, rule=MemoryRule(error_at="anchor"))


@pytest.mark.parametrize("name", ["anchored", "proximal", "residual", "normalize_hidden"])
def test_what_is_true_or_false_is_a_bool(name):
    with pytest.raises(TypeError, match=f"{name}: expected a bool, got str"):
        MemoryRule(**{name: "false"})


def test_the_state_is_what_it_says():
    assert isinstance(STATE, DeepMemoryState)
    assert STATE.position.tolist() == [1, 1]
    assert STATE.running.inner.shape == (2, 2, 4, 3)
    assert STATE.running.outer.shape == (2, 2, 3, 4)
