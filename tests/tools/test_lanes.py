"""Lanes run what is there, and their words say what happened."""

import sys
from pathlib import Path

import pytest

from tools import lanes
from tools.environment import ROOT, InstallError
from tools.lanes import KERNELS, MODELS, Lane, Result, describe, report_newest, run

SUITE = """
import os
import pytest

@pytest.mark.{marker}
def test_good(): pass

@pytest.mark.{marker}
def test_bad(): assert False

@pytest.mark.{marker}
@pytest.mark.skip(reason="no")
def test_left_out(): pass

@pytest.mark.interpreter
def test_interpreting(): assert os.environ["TRITON_INTERPRET"] == "1"
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A lane of the environment that runs this, and a file of tests."""
    monkeypatch.setattr(lanes, "FOLDER", tmp_path)
    monkeypatch.setattr(lanes, "make", lambda *_: Path(sys.executable))

    def lane(tests: str, *markers: str) -> Lane:
        (tmp_path / "test_some.py").write_text(tests)
        return Lane("trial", ("thing==1",), (str(tmp_path / "test_some.py"),), markers)

    return lane


def test_outcomes_are_counted_over_all_processes_and_failures_named(suite):
    lane = suite(SUITE.format(marker="aot"), "interpreter", "aot")
    result = run(lane, "1")
    assert (result.passed, result.skipped, result.good) == (2, 1, False)
    assert len(result.failed) == 1
    line, name = describe(lane, result, 61.0).splitlines()
    assert line == "lane trial (thing==1): FAILED, 2 passed, 1 failed, 1 skipped in 61 s"
    assert name.endswith("test_some::test_bad")


def test_a_lane_that_runs_nothing_or_cannot_be_made_is_not_good(suite, monkeypatch):
    assert not run(suite("", "aot"), "1").good
    broken = run(suite("import no_such_module\n", "aot"), "1")
    assert not broken.good

    def refuse(*_):
        raise InstallError("no such version")

    monkeypatch.setattr(lanes, "make", refuse)
    lane = suite("", "aot")
    assert "cannot be installed here (no such version)" in describe(lane, run(lane, "1"), 0.0)


def test_the_report_on_the_newest_says_which_and_never_fails(monkeypatch, capsys):
    assert report_newest("5.99.0", Result(7)) == "newest transformers 5.99.0 passes: 7 tests"
    assert report_newest("5.99.0", Result(7, 0, ("a::b", "a::c"))) == (
        "newest transformers 5.99.0 breaks, of 9 tests:\n    a::b\n    a::c"
    )
    monkeypatch.setattr(lanes, "run", lambda *_: Result(1, 0, ("a::b",)))
    monkeypatch.setattr(lanes, "newest_transformers", lambda: "5.99.0")
    assert lanes.main(["--report"]) == 0
    assert "5.99.0 breaks, of 2 tests:\n    a::b" in capsys.readouterr().out
    assert lanes.main(["newest-transformers"]) == 1

    monkeypatch.setattr(lanes, "newest_transformers", lanes.locked_transformers)
    monkeypatch.setattr(lanes, "run", lambda *_: pytest.fail("tested again"))
    assert lanes.main(["--report"]) == 0
    assert "is the locked version" in capsys.readouterr().out

    def unreachable():
        raise ValueError("no network")

    monkeypatch.setattr(lanes, "newest_transformers", unreachable)
    assert lanes.main(["--report"]) == 0
    assert "no network" in capsys.readouterr().out


def test_an_unknown_lane_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(lanes, "newest_transformers", lambda: "5.99.0")
    with pytest.raises(SystemExit):
        lanes.main(["oldest"])
    assert (
        "oldest-transformers, newest-transformers, ecosystem, triton-3.6, newest-torch"
        in capsys.readouterr().err
    )


def test_lanes_name_tests_that_exist_and_the_lower_end_of_setup_py():
    assert not [path for path in MODELS + KERNELS if not (ROOT / path).exists()]
    lower = ".".join(lanes.OLDEST_TRANSFORMERS.split(".")[:2])
    assert f'"transformers>={lower},<6"' in (ROOT / "setup.py").read_text()
