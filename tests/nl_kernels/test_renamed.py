"""Old names of arguments are errors that say the new ones; new ones are what help and tracing see."""

import inspect

import pytest

from nl_kernels import continuum_reset, optimal_coefficients


def test_the_lower_end_of_a_schedule():
    with pytest.raises(TypeError, match=r"lower: is called lower_singular_value since version 0\.2"):
        optimal_coefficients(3, lower=0.1)
    assert optimal_coefficients(3, lower_singular_value=0.1) == optimal_coefficients(3, 0.1)
    assert "lower_singular_value" in inspect.signature(optimal_coefficients).parameters


def test_the_sequences_that_begin_anew():
    with pytest.raises(TypeError, match="rows: is called sequences since"):
        continuum_reset((), [], rows=None)
