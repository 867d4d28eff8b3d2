"""Old names of arguments are errors that say the new ones; new ones are what help and tracing see."""

import inspect

import pytest

from nl_kernels import (
    continuum_reset,
    deep_memory,
    deep_memory_step,
    delta_memory,
    delta_memory_step,
    optimal_coefficients,
)
from nl_kernels.testing import deep_memory_inputs, delta_memory_inputs


@pytest.mark.parametrize("op", [delta_memory, delta_memory_step, deep_memory, deep_memory_step])
def test_the_log_of_the_retention(op):
    make = delta_memory_inputs if "delta" in op.__name__ else deep_memory_inputs
    inputs = make(1, 2, 1, 4) if "delta" in op.__name__ else make(1, 2, 1, 4, None)
    inputs["log_decay"] = inputs.pop("log_retention")
    with pytest.raises(TypeError, match=r"log_decay: is called log_retention since version 0\.2"):
        op(**inputs)
    assert "log_retention" in inspect.signature(op).parameters


def test_the_lower_end_of_a_schedule():
    with pytest.raises(TypeError, match="lower: is called lower_singular_value since"):
        optimal_coefficients(3, lower=0.1)
    assert optimal_coefficients(3, lower_singular_value=0.1) == optimal_coefficients(3, 0.1)


def test_the_sequences_that_begin_anew():
    with pytest.raises(TypeError, match="rows: is called sequences since"):
        continuum_reset((), [], rows=None)
