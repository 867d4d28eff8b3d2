"""What the tests of streams learn and learn from."""

import pytest
import torch

from evaluations.learners import make_base


@pytest.fixture
def base():
    torch.manual_seed(0)
    return make_base(20, 16, 64).eval()


def documents(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randint(20, (int(n),), generator=rng) for n in torch.randint(4, 12, (count,), generator=rng)
    ]
