"""A compiled step is the step; the state is as large as the docstrings say."""

import pytest
import torch

from tests.nl_models.optim.problems import KINDS, groups_of, parameters, set_gradients


@pytest.mark.parametrize("name", ["muon", "m3", "delta-rms", "deep"])
def test_a_compiled_step_is_the_step(name):
    kind, options = KINDS[name]
    problems = [[part[:2] for part in parameters(torch.float32)] for _ in range(2)]
    optimizers = [kind(groups_of(*params), lr=0.02, **options) for params in problems]
    steps = torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step
    for seed in range(5):
        for (matrices, others), step in zip(problems, steps):
            set_gradients([*matrices, *others], torch.Generator().manual_seed(seed))
            step()
    for first, second in zip(*((*matrices, *others) for matrices, others in problems)):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "per_weight", "per_matrix"),
    [
        ("muon", 4, 0),
        ("m3", 12, 8),
        ("m3-second", 16, 8),
        ("delta", 4, 0),
        ("delta-rms", 8, 4),
        ("deep", 0, 2 * 4 * 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_state(name, per_weight, per_matrix, dtype):
    kind, options = KINDS[name]
    matrices, _ = parameters(dtype)
    optimizer = kind(matrices, lr=0.02, **options)
    set_gradients(matrices, torch.Generator().manual_seed(0))
    optimizer.step()
    for p in matrices:
        held = sum(value.numel() * value.element_size() for value in optimizer.state[p].values())
        assert held == per_weight * p.numel() + per_matrix
