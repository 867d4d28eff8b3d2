"""Barriers and waits taken out of compiled kernels, one by one: the emulator reports them."""

import re

import numpy as np
import pytest
import torch

from nl_kernels import delta_memory, newton_schulz
from tools.op_inputs import delta_memory_inputs
from tools.ptx_emulator import driver
from tools.ptx_emulator.launch import Launch

pytestmark = pytest.mark.compiled

MOST = 4  # of each kind, of each kernel
PATTERNS = {"barrier": r"^\s*bar\.sync[^;]*;", "wait": r"^\s*cp\.async\.wait_group[^;]*;"}


def mutants(text):
    """PTX texts that lack one barrier or one wait for what is copied."""
    for name, pattern in PATTERNS.items():
        places = [match.span() for match in re.finditer(pattern, text, re.MULTILINE)]
        for begin, end in places[:: max(1, -(-len(places) // MOST))]:
            yield name, text[:begin] + text[end:]


def outcomes(compiled, grid, arguments):
    """Of each mutant of a launch its kernel, what was taken out, and whether it was noticed."""
    given = compiled.metadata.shared, grid, driver.parameters_of(compiled, arguments)
    launch = Launch(compiled.asm["ptx"], *given)
    before = launch.memory.contents()
    assert not launch.run().findings.lines()
    right = launch.memory.contents()
    for name, text in mutants(compiled.asm["ptx"]):
        launch.memory.restore(before)
        noticed = bool(Launch(text, *given).run().findings.lines())
        if not noticed:
            launch.memory.restore(before)
            Launch(text, *given, order=np.random.default_rng(0)).run()
            noticed = not all(map(np.array_equal, launch.memory.contents(), right))
        yield compiled.name, name, noticed
    launch.memory.restore(right)


def call_newton_schulz():
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    newton_schulz(x, steps=1, impl="triton")


def call_delta_memory():
    x = delta_memory_inputs(1, 80, 1, 32, initial_state=True, dtype=torch.bfloat16)
    delta_memory(**x, impl="triton")


@pytest.mark.parametrize(("call", "waits"), [(call_newton_schulz, False), (call_delta_memory, True)])
def test_what_is_missing_is_noticed(call, waits, monkeypatch):
    """Nearly every one: compilers place barriers also where the accesses happen to be apart."""
    found, seen = [], set()
    run_compiled = driver.run_compiled

    def run(compiled, grid, arguments, seed):
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            found.extend(outcomes(compiled, grid, arguments))
            return None
        return run_compiled(compiled, grid, arguments, None)

    monkeypatch.setattr(driver, "run_compiled", run)
    with driver.emulated(seed=None):
        call()
    assert {kind for _, kind, _ in found} == {"barrier", *(["wait"] if waits else [])}
    unnoticed = [x for x in found if not x[2]]
    assert len(found) >= 10
    assert len(unnoticed) <= len(found) // 10, found
