"""Each bad argument is refused by name, before any work."""

import pytest
import torch

from nl_kernels import DeepMemoryWeights, SelfModifyingState, self_modifying_memory
from tools.op_inputs import self_modifying_inputs

INPUTS = self_modifying_inputs(2, 5, 2, 3, 4)
WEIGHTS = INPUTS["weights"]
LINEAR = self_modifying_inputs(2, 5, 2, 3, None)["weights"]
_, STATE = self_modifying_memory(**INPUTS, chunk_size=4, output_final_state=True)
WIDE = DeepMemoryWeights(torch.zeros(2, 7, 3), torch.zeros(2, 1, 7))

CASES = {
    "rank": ({"query": torch.zeros(2, 5, 3)}, ValueError, r"query: expected \[B, T, H, D\]"),
    "shape": ({"gate_input": torch.zeros(2, 5, 2, 4)}, ValueError, "gate_input: expected shape"),
    "kind": ({"key_input": None}, TypeError, "key_input: expected a tensor, got NoneType"),
    "weights": ({"weights": tuple(WEIGHTS)}, TypeError, "weights: expected SelfModifyingWeights"),
    "gate width": (
        {"weights": WEIGHTS._replace(rate=WEIGHTS.key)},
        ValueError,
        "weights.rate.outer: expected shape",
    ),
    "hidden": ({"weights": WEIGHTS._replace(rate=WIDE)}, ValueError, "weights.rate: expected hidden width 4"),
    "mixed": (
        {"weights": WEIGHTS._replace(value=LINEAR.value)},
        ValueError,
        "weights.value: the memories must be all two-layer or all linear",
    ),
    "clocks": ({"generator_chunk_size": 6}, ValueError, "generator_chunk_size: .*multiple.*6 and 4"),
    "clock kind": ({"generator_chunk_size": 2.0}, TypeError, "generator_chunk_size: expected an int"),
    "truncation": ({"truncate_every": 0}, ValueError, "truncate_every: expected at least 1"),
    "rate range": ({"rate_max": 2.5}, ValueError, "rate_max: expected values in"),
    "rate kind": ({"rate_max": "1"}, TypeError, "rate_max: expected a float or a tensor"),
    "bias shape": ({"rate_bias": torch.zeros(3)}, ValueError, "rate_bias: expected shape"),
    "momentum": ({"momentum": torch.ones(2, 5, 2)}, ValueError, "momentum: expected values in"),
    "scale shape": ({"write_scale": torch.ones(2, 5)}, ValueError, "write_scale: expected shape"),
    "scale range": ({"write_scale": -torch.ones(2, 5, 2)}, ValueError, "write_scale: expected values in"),
    "scale of two layers": (
        {"write_scale": torch.ones(2, 5, 2)},
        ValueError,
        "write_scale: of linear memories",
    ),
    "read": ({"read": "before"}, ValueError, "read: expected one of"),
    "mask": ({"mask": torch.ones(2, 5)}, TypeError, "mask: expected a bool tensor"),
    "state without a snapshot": (
        {"initial_state": STATE._replace(snapshot=None)},
        TypeError,
        "initial_state.snapshot: expected MemoryStack, got NoneType",
    ),
    "state kind": ({"initial_state": STATE.running}, TypeError, "initial_state: expected SelfModifyingState"),
    "state of linear memories": (
        {"initial_state": STATE._replace(running=STATE.running._replace(first=None))},
        ValueError,
        "initial_state.running.first: made by linear memories",
    ),
    "state shape": (
        {"initial_state": STATE._replace(snapshot=STATE.snapshot._replace(gate=torch.zeros(2, 2, 2, 5)))},
        ValueError,
        "initial_state.snapshot.gate: expected shape",
    ),
    "another chunk size": (
        {"initial_state": STATE._replace(position=torch.tensor([0, 5]))},
        ValueError,
        "initial_state.position: .*another chunk size",
    ),
    "not covered by the kernels": (
        {"impl": "triton", "detach_targets": False},
        NotImplementedError,
        "the reference alone has targets that learn; use impl='reference'",
    ),
    "no such implementation": ({"impl": "cuda"}, ValueError, "impl: expected one of"),
}


@pytest.mark.parametrize(("change", "kind", "message"), CASES.values(), ids=CASES.keys())
def test_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        self_modifying_memory(**{**INPUTS, "chunk_size": 4, **change})


def test_bounds_are_where_the_tokens_are():
    inputs = self_modifying_inputs(1, 5, 2, 3, 4)
    with pytest.raises(ValueError, match="cu_seqlens: expected a tensor on cpu, got one on meta"):
        self_modifying_memory(**inputs, chunk_size=4, cu_seqlens=torch.tensor([0, 5], device="meta"))


def test_the_state_is_what_it_says():
    assert isinstance(STATE, SelfModifyingState)
    assert STATE.position.tolist() == [1, 1]
    assert STATE.running.first.shape == (2, 2, 5, 4, 3)
    assert STATE.running.last.shape == (2, 2, 3, 3, 4)
    assert STATE.running.gate.shape == (2, 2, 2, 4)
