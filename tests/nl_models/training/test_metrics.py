"""The metrics log: no duplicates after a resume, no trust in half a line."""

import pytest

from nl_models.training.metrics import metrics_log, read_metrics


def test_reopening_drops_later_steps_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics_log(path, last_step=0) as write:
        for step in (1, 2, 3):
            write({"step": step, "loss": 1 / 3})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    with metrics_log(path, last_step=2) as write:
        write({"step": 3, "loss": 0.5})
    assert read_metrics(path) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 1 / 3},
        {"step": 3, "loss": 0.5},
    ]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a metrics record"):
        read_metrics(path)
