"""How a call is cut into segments: everything is covered once, and memory decides what is recomputed."""

import itertools

import pytest
import torch

from nl_kernels import deep_memory
from nl_kernels.memory.segments import Footprint, plan_segments
from tools.op_inputs import deep_memory_inputs


@pytest.mark.parametrize("kept", [0, 3, 100])
@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("tokens", [1, 4, 9, 40])
def test_segments_cover_the_call_and_kept_ones_come_last(tokens, offset, every, kept):
    segments = plan_segments(tokens, 4, offset, every, Footprint(state=1, chunk=1, kept=kept))
    assert segments[0].start == 0
    assert segments[-1].stop == tokens
    assert all(a.stop == b.start for a, b in itertools.pairwise(segments))
    assert all(s.slot == offset + s.start for s in segments)
    assert all((s.slot + s.length * (i + 1)) % 4 == 0 for s in segments[:-1] for i in range(s.chunks))
    flags = [s.kept for s in segments]
    assert flags == sorted(flags)
    whole = [s for s in segments if s.length == 4]
    if every is not None:
        assert all(s.chunks <= every for s in whole)
    else:
        assert sum(s.chunks for s in whole if s.kept) == min(kept, sum(s.chunks for s in whole))


def test_recomputed_segments_balance_states_and_activations():
    segments = plan_segments(64, 1, 0, None, Footprint(state=4, chunk=1, kept=0))
    assert {s.chunks for s in segments} == {16}
    assert not any(s.kept for s in segments)


def test_a_compiled_training_step_is_not_compiled_again_for_new_tensors():
    torch._dynamo.reset()
    step = torch.compile(lambda inputs: deep_memory(**inputs, chunk_size=8, impl="eager")[0], backend="eager")
    for seed in range(2):
        inputs = deep_memory_inputs(1, 16, 1, 4, 4, seed=seed, dtype=torch.float32)
        inputs["k"].requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            step(inputs).sum().backward()
        assert inputs["k"].grad.isfinite().all()
