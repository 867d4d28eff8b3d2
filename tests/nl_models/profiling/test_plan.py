"""The plan of a training step against what the allocator really gives out, and memory that stays bounded."""

import pytest
import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from nl_kernels.memory.segments import KEPT_MEGABYTES
from nl_models import HopeConfig
from nl_models.layers import ContinuumMemory, LevelConfig
from nl_models.profile import main
from nl_models.profiling.plan import Allocations, follow_training_step, plan_training_step

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LEVELS = [
    {"hidden_size": 24, "chunk_size": 16, "rule": "muon", "gated": True},
    {"hidden_size": 32, "chunk_size": 32, "rule": "dgd"},
    {"hidden_size": 40},
]
CASES = {
    "default": ({}, 2, 96, False),
    "one long sequence": ({}, 1, 256, False),
    "a checkpoint a block": ({"continuum_checkpoint_every": 2}, 2, 96, True),
    "recomputed": ({"continuum_checkpoint_every": 1}, 2, 160, False),
    "first-order": ({"continuum_detach_updates": True, "hidden_size": 48}, 2, 96, False),
    "other levels": ({"continuum_levels": LEVELS, "continuum_variant": "nested"}, 2, 96, False),
    "titans": ({"layer_types": "titans", "memory_hidden_size": 32}, 2, 64, False),
    "hybrid": ({"layer_types": ["gated_delta_net", "full_attention"]}, 3, 64, False),
}


def allocated_peak(action):
    """The most bytes that the CPU allocator has given out at a time while ``action`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_the_peak_of_the_allocator(case):
    options, batch, length, checkpoints = CASES[case]
    config, step = HopeConfig(**{**SMALL, **options}), (batch, length, "fp32", checkpoints)
    real = allocated_peak(lambda: follow_training_step(config, *step))
    plan = plan_training_step(
        config, batch=batch, length=length, precision="fp32", block_checkpoints=checkpoints, kernels=False
    )
    assert 0.95 * real < plan.peak < 1.05 * real
    assert plan.parameters < plan.parameters + plan.optimizer < plan.peak


@pytest.mark.slow
def test_a_deep_model_is_planned_from_two_shallow_ones():
    config = HopeConfig(**{**SMALL, "num_hidden_layers": 7})
    sizes = {"batch": 1, "length": 64}
    found = plan_training_step(config, **sizes, kernels=False)
    with FakeTensorMode():
        expected = follow_training_step(config, 1, 64, "bf16", False)
    assert found.parameters == expected.parameters
    assert found.calls == expected.calls
    assert abs(found.peak - expected.peak) < 0.02 * expected.peak
    assert plan_training_step(config, **sizes, block_checkpoints=True, kernels=False).peak < found.peak


def test_kernels_are_planned_without_a_gpu():
    sizes = {"batch": 1, "length": 256}
    config = HopeConfig(**SMALL, continuum_detach_updates=True)
    with_kernels, eager = (plan_training_step(config, **sizes, kernels=k) for k in (True, False))
    assert with_kernels.parameters == eager.parameters
    assert with_kernels.calls < eager.calls / 4
    checkpoints = plan_training_step(config, **sizes, block_checkpoints=True)
    assert with_kernels.calls < checkpoints.calls < 2 * with_kernels.calls
    with pytest.raises(ValueError, match="length: expected at least 1"):
        plan_training_step(config, batch=1, length=0)
    with pytest.raises(ValueError, match="precision: expected one of"):
        plan_training_step(config, batch=1, length=1, precision="fp8")


def continuum():
    torch.manual_seed(0)
    return ContinuumMemory(8, [LevelConfig(hidden_size=128, chunk_size=1, predict_next=False)])


def peak_of(layer, length):
    x = torch.randn(1, length, 8)
    with Allocations() as allocations:
        layer(x)[0].sum().backward()
    return allocations.peak


def test_the_continuum_does_not_keep_a_copy_of_its_weights_a_chunk(monkeypatch):
    layer = continuum()
    copies = 2 * 128 * 8 * 4
    assert peak_of(layer, 256) - peak_of(layer, 64) > 192 * copies
    monkeypatch.setitem(KEPT_MEGABYTES, "continuum", 0)
    assert peak_of(layer, 256) - peak_of(layer, 64) < 64 * copies


def test_a_checkpoint_round_the_continuum_drops_its_states(monkeypatch):
    monkeypatch.setitem(KEPT_MEGABYTES, "continuum", 0)
    layer, x = continuum(), torch.randn(1, 64, 8, requires_grad=True)
    with Allocations() as allocations:
        y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
        assert allocations.live < 2 * 2 * 128 * 8 * 4
        y.sum().backward()
    found, x.grad = x.grad, None
    layer(x)[0].sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_the_command():
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--plan", "tiny", "--batch", "1", "--length", "128"])
    assert result.exit_code == 0, result.output
    assert "A training step of tiny, 1 × 128 tokens, bf16" in result.output
    assert "a checkpoint a block" in result.output
    result = CliRunner().invoke(app, ["--plan", "huge"])
    assert result.exit_code != 0
    assert "expected one of" in result.output
