"""The kernels as compiled for sm_80, run on the CPU, against the definition in fp64."""

import pytest

from tests.nl_kernels.emulation import FACTORS, cases, every_dtype, marks
from tests.nl_kernels.ops.newton_schulz.test_interpreter import SHAPES, assert_kernels_within_budget

pytestmark = marks


@pytest.mark.parametrize("shape", cases([(x,) for x in SHAPES], lambda shape: len(shape) < 4), ids=str)
@every_dtype
def test_error_budget(dtype, shape):
    assert_kernels_within_budget(shape, dtype, factor=FACTORS[dtype])
