"""The metrics log: no duplicates after a resume, no trust in half a line."""

import contextlib

import pytest

from nl_models.training import metrics
from nl_models.training.metrics import metrics_log, read_metrics, tracker


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


@pytest.mark.parametrize("has_files", [True, False])
def test_a_tracker_is_given_the_figures_of_every_record(has_files, tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    accelerate.PartialState._reset_state()  # as in a process that has only begun
    calls = []

    class Recorder:
        """As accelerate's trackers are, most of which say in its log what they do."""

        requires_logging_directory = has_files

        def __init__(self, *where):
            calls.append(where)

        def start(self):
            calls.append("start")
            accelerate.logging.get_logger(__name__).debug("started")

        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finish")

    monkeypatch.setattr(metrics, "tracker_class", {"mine": Recorder}.__getitem__)
    with contextlib.suppress(KeyboardInterrupt), tracker("mine", tmp_path) as write:
        write({"kind": "train", "step": 3, "loss": 0.5})
        raise KeyboardInterrupt  # it is finished all the same
    where = ("tracker", tmp_path) if has_files else (tmp_path.name,)
    assert calls == [where, "start", ({"train/step": 3, "train/loss": 0.5}, 3), "finish"]
