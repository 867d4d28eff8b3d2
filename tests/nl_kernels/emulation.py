"""What the tests of compiled kernels on the CPU share: dtypes, and how far from fp64 each may be."""

import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Three-pass tf32 loses two bits of fp32's 24.
FACTORS = {torch.bfloat16: 3.0, torch.float16: 3.0, torch.float32: 4.0}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
marks = [pytest.mark.compiled, pytest.mark.usefixtures("emulated")]


def cases(every, quick):
    """The cases of a list, those that are not ``quick`` (a predicate) with ``--slow`` only."""
    found = []
    for case in every:
        values = tuple(getattr(case, "values", case))
        found.append(pytest.param(*values, marks=() if quick(*values) else pytest.mark.slow))
    return found
