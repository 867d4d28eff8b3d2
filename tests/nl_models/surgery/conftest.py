"""Fixtures of the conversion tests."""

import pytest
import torch

from tests.nl_models.surgery.models import CONFIGS, VOCABULARY


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (3, 11), generator=generator)
