"""Chunks through torch.compile: the same values, in few calls."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from nl_kernels import continuum_memory
from nl_kernels.ops.continuum import compiled, eager
from tests.nl_kernels.continuum_levels import (
    WIDTH,
    close,
    forget_all_but_the_last,
    make_level,
    random_tensor,
    rates,
    require_grad,
    run_with_gradients,
)

LENGTH = 9


def level_of(rule, **options):
    retention = torch.tensor(0.7, dtype=torch.float64)
    return make_level(1, rule=rule, chunk_size=2, rate=rates(2, LENGTH), retention=retention, **options)


def chunk_calls(levels, x):
    """Calls of kernels in the code that a chunk is compiled to: forward and backward."""

    def step(x):
        y, _ = continuum_memory(x, levels, impl="compiled")
        y.sum().backward()

    _, codes = run_and_get_code(step, x.requires_grad_())
    bodies = [code.split("def call(")[-1].split("del async_compile")[0] for code in codes]
    return [len(re.findall(r"extern_kernels\.\w+\(|(?:cpp|triton)_\w*fused\w*\(", body)) for body in bodies]


def test_levels_that_are_alike_share_what_is_compiled(monkeypatch):
    torch._dynamo.reset()
    learn = torch.compile(eager.learn, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(compiled, "_compiled", learn)
    x = random_tensor(2, LENGTH, WIDTH, seed=0)
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            found = run_with_gradients(x, [level_of("sgd")], "compiled")
    expected = run_with_gradients(x, [level_of("sgd")], "eager")
    close(found[0], expected[0], 1e-12)
    close(found[2], expected[2], 1e-10)


def test_a_compiled_call_goes_on_from_a_state():
    """Whose positions the host must know: a sequence of three tokens and one of five, chunks of two."""
    x, level = random_tensor(2, LENGTH, WIDTH, seed=0), make_level(1, rule="sgd", chunk_size=2, rate=0.5)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    options = {"output_final_state": True, "impl": "eager"}
    _, state = continuum_memory(x[:, :5], [level], mask=mask, **options)
    expected, after = continuum_memory(x[:, 5:], [level], initial_state=state, **options)
    compiled = torch.compile(continuum_memory, backend="eager")
    found, goes_on = compiled(x[:, 5:], [level], initial_state=state, **options)
    close(found, expected, 1e-12)
    assert torch.equal(goes_on[0].position, after[0].position)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "gated"), [("sgd", False), ("momentum", True), ("muon", False), ("dgd", True)]
)
def test_equals_eager(rule, gated, monkeypatch):
    torch._dynamo.reset()
    forget_all_but_the_last(monkeypatch)
    x = random_tensor(2, LENGTH, WIDTH, seed=0)
    levels = [level_of(rule, gated=gated), make_level(2)]
    found, expected = (run_with_gradients(x, levels, impl) for impl in ("compiled", "eager"))
    close(found[0], expected[0], 1e-12)
    close(found[2], expected[2], 1e-10)


@pytest.mark.slow
def test_a_chunk_takes_few_calls():
    torch._dynamo.reset()
    (level,), _ = require_grad([level_of("sgd")])
    counts = chunk_calls([level], random_tensor(2, LENGTH, WIDTH, seed=0))
    assert len(counts) == 4  # of the level's own weights, and of those of each sequence
    assert sorted(counts)[1] <= 14, counts  # forward
    assert sorted(counts)[3] <= 24, counts  # backward; eager calls 27 and 99
