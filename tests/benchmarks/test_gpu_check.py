"""One step's failure or time limit neither hides nor stops the others."""

from benchmarks.gpu_check import Step, run_step


def test_a_step_says_how_it_ended_and_keeps_what_it_printed(tmp_path):
    steps = {
        "passed": "print('seen', '{output}')",
        "failed": "print('seen'); raise SystemExit(3)",
        "out of time": "import time; print('seen'); time.sleep(60)",
    }
    for state, code in steps.items():
        outcome = run_step(Step(state, ("-c", code), 60), tmp_path, 60 if state != "out of time" else 4)
        assert outcome.state == state
        assert outcome.seconds < 60
        assert (tmp_path / f"{state}.log").read_text().startswith("seen")
    assert str(tmp_path) in (tmp_path / "passed.log").read_text()
