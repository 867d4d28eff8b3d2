"""Pictures of streams: what they say, from rows made by hand."""

import numpy as np
import pytest

from evaluations import pictures
from evaluations.pictures import by_part, heat_maps
from evaluations.studies import CLASSES, LONG_CONTEXT, PERSONALISATION


def chooser(rows):
    return lambda task, model: rows.get((task, model), [])


def test_heat_maps_have_a_cell_a_length_and_depth(tmp_path):
    rows = [
        {"scores": {"512": 0.5, "fresh": 0.1, "512@0.00": share, "512@1.00": 1.0, "2K@0.00": 0.25}}
        for share in (0.0, 0.5)
    ]
    lengths, depths, shares = pictures._cells(rows)
    assert (lengths, depths) == (["512", "2K"], ["0.00", "1.00"])
    np.testing.assert_array_equal(shares, [[25.0, 25.0], [100.0, np.nan]])
    chosen = chooser({("needle", "hope"): rows, ("needle", "titans"): rows, ("tracking", "hope"): rows})
    assert heat_maps(chosen, LONG_CONTEXT, tmp_path / "heat.png").stat().st_size > 5000


def test_lines_are_of_what_was_learned_so_far_and_of_gains(tmp_path):
    matrix = [[0.0, 0.1], [1.0, 0.2], [0.5, 0.7]]
    assert pictures._line({"matrix": matrix}, []) == pytest.approx([100.0, 60.0])
    assert pictures._line({"matrix": [matrix[0], matrix[2]]}, []) == pytest.approx([60.0, 60.0])
    base = [{"seed": 0, "days": {"next day": [4.0, 3.0]}}]
    row = {"task": "rich", "seed": 0, "days": {"next day": [4.0, 2.5]}}
    assert pictures._line(row, base) == pytest.approx([0.0, 0.5])
    with pytest.raises(ValueError, match="rich: the picture needs the row of 'frozen' with seed 1"):
        pictures._line({**row, "seed": 1}, base)
    days = chooser({("rich", "frozen"): base, ("rich", "hope_2_levels"): [row]})
    assert by_part(days, PERSONALISATION, tmp_path / "days.png").stat().st_size > 5000
    classes = chooser({("digits", "fine_tuning"): [{"matrix": matrix}]})
    assert by_part(classes, CLASSES, tmp_path / "classes.png").stat().st_size > 5000
