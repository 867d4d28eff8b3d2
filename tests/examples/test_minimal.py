"""The pages of the method compute what the package computes; they run, and stay a page long."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nl_kernels
from examples.minimal.continuum import continuum_memory
from examples.minimal.deep_memory import deep_memory
from examples.minimal.delta_memory import delta_memory, token_by_token
from examples.minimal.self_modifying_memory import NAMES, self_modifying_memory
from nl_kernels import ContinuumLevel, DeepMemoryWeights, SelfModifyingWeights

FOLDER = Path(__file__).parents[2] / "examples/minimal"
PAGES = sorted(FOLDER.glob("*.py"))
B, H, T, D, V, HIDDEN = 2, 3, 29, 6, 5, 7


class Draw:
    """Random leaves in fp64, in the order in which they are asked for."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.leaves = []

    def __call__(self, *shape, of=lambda x: x):
        values = of(torch.randn(shape, generator=self.generator, dtype=torch.float64))
        self.leaves.append(values.detach().requires_grad_())
        return self.leaves[-1]


def unit(x):
    return F.normalize(x, dim=-1)


def log_decay(x):
    return -0.1 * x.abs()


def by_token(x):
    """[B, H, T, ..] of a page as the package has it, [B, T, H, ..], and back."""
    return x.transpose(1, 2)


def compare(leaves, found, expected):
    """Results, and their gradients by every leaf."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).cos().view(x.shape) for x in expected]
    gradients = []
    for results in (found, expected):
        loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_delta_memory(chunk_size):
    draw = Draw()
    q, k, v = draw(B, H, T, D), draw(B, H, T, D, of=unit), draw(B, H, T, V)
    g, beta, start = draw(B, H, T, of=log_decay), draw(B, H, T, of=torch.sigmoid), draw(B, H, V, D)
    inputs = (q, k, v, g, beta)
    o, state = nl_kernels.delta_memory(
        *map(by_token, inputs), initial_state=start, output_final_state=True, chunk_size=16
    )
    compare(draw.leaves, delta_memory(*inputs, start, chunk_size), (by_token(o), state))
    torch.testing.assert_close(
        token_by_token(*inputs), delta_memory(*inputs, None, chunk_size)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("read", ["snapshot", "running"])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_deep_memory(chunk_size, read):
    draw = Draw()
    q, k, v = draw(B, H, T, D), draw(B, H, T, D, of=unit), draw(B, H, T, V)
    rate, g = draw(B, H, T, of=torch.sigmoid), draw(B, H, T, of=log_decay)
    weights = draw(H, HIDDEN, D), draw(H, V, HIDDEN)
    inputs, options = (q, k, v, rate, g), {"chunk_size": chunk_size, "read": read}
    o, changes = deep_memory(*inputs, *weights, **options)
    expected, state = nl_kernels.deep_memory(
        *map(by_token, inputs), DeepMemoryWeights(*weights), output_final_state=True, **options
    )
    compare(draw.leaves, (o, *changes), (by_token(expected), *state.running))


@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_self_modifying_memory(chunk_size):
    draw = Draw()
    inputs = [draw(B, H, T, D) for _ in range(4)]
    out = {name: 1 if name in ("rate", "retention") else D for name in NAMES}
    initial = {name: [draw(H, HIDDEN, D), draw(H, out[name], HIDDEN)] for name in NAMES}
    o, changes = self_modifying_memory(*inputs, initial, chunk_size)
    expected, state = nl_kernels.self_modifying_memory(
        *map(by_token, inputs),
        SelfModifyingWeights(**{name: DeepMemoryWeights(*pair) for name, pair in initial.items()}),
        chunk_size=chunk_size,
        output_final_state=True,
    )
    order = SelfModifyingWeights._fields
    stacked = (
        torch.stack([changes[name][0] for name in order], 2),
        torch.stack([changes[name][1] for name in order[:3]], 2),
        torch.cat([changes[name][1] for name in order[3:]], 2),
    )
    compare(draw.leaves, (o, *stacked), (by_token(expected), *state.running))


@pytest.mark.parametrize("nested", [False, True])
def test_continuum_memory(nested):
    draw = Draw()
    x = draw(B, T, D)
    levels = [
        {
            "norm": draw(D),
            "up": draw(HIDDEN, D),
            "down": draw(D, HIDDEN),
            "key": draw(D, D),
            "value": draw(D, D),
            "chunk_size": size,
            "rate": draw(of=lambda r: 0.02 * r.exp()),
            "retention": draw(of=torch.sigmoid),
            "predict_next": size == 4,
        }
        for size in (4, 12)
    ]
    options = {"variant": "nested" if nested else "sequential"}
    y, weights = continuum_memory(x, levels, nested=nested)
    expected, state = nl_kernels.continuum_memory(
        x, [ContinuumLevel(**level) for level in levels], output_final_state=True, **options
    )
    flat = [w for pair in weights for w in pair]
    compare(draw.leaves, (y, *flat), (expected, *(w for level in state for w in (level.up, level.down))))

    first, carried = continuum_memory(x[:, :12], levels, nested=nested)
    second, _ = continuum_memory(x[:, 12:], levels, carried, nested=nested)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_shows_what_it_says(page, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, page], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d+ ", line)]
    assert max(map(len, done.stdout.splitlines())) <= 110
    first, last = ([float(x) for x in row if x not in "AB"] for row in (rows[0], rows[-1]))
    if page.stem == "delta_memory":
        assert float(re.search(r"difference (\S+)", done.stdout)[1]) < 1e-5
        assert first[2] > first[1] + 0.1
    elif page.stem == "deep_memory":
        assert first[1] < 0.1
        assert first[-1] > 0.9
    elif page.stem == "self_modifying_memory":
        assert last[1] > first[1] + 0.4
    else:  # after a change of subject the fast level is the worse at the old one, and the slow one is not
        fast, slow = ([float(row[i]) for row in rows] for i in (2, 4))
        assert fast[4] > fast[3] + 0.2
        assert slow[7] < slow[0] - 0.1


def test_pages_are_pages_of_plain_pytorch():
    assert {page.stem for page in PAGES} == {
        "continuum",
        "deep_memory",
        "delta_memory",
        "self_modifying_memory",
    }
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 120, page
        assert max(map(len, lines)) <= 110, page
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert imported <= {"torch", "math", "time"}, page
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 40
    assert all(f"[{page.name}]({page.name})" in readme for page in PAGES)
