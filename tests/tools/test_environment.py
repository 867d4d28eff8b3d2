"""An environment is whole, or is made anew, and nothing of the user's is emptied."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import environment
from tools.environment import InstallError, make


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A package of one module, so that nothing is fetched."""
    path = tmp_path_factory.mktemp("wheels") / "tiny-1.0-py3-none-any.whl"
    about = "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny.py", "VALUE = 1\n")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return path


def has_tiny(python: Path) -> bool:
    return subprocess.run([python, "-c", "import tiny"], capture_output=True).returncode == 0


def test_an_environment_is_whole_or_made_anew(wheel, tmp_path, capfd, monkeypatch):
    folder, steps = tmp_path / "env", [["--no-index", str(wheel)]]
    with pytest.raises(InstallError, match="the next make starts anew"):
        make(folder, [["--no-index", "no-such-package"]])
    assert not (folder / ".installed").exists()

    python = make(folder, steps)
    assert "was not finished" in capfd.readouterr().out
    assert has_tiny(python)
    assert make(folder, steps) == python
    assert capfd.readouterr().out == ""

    # Killed half-way: pip would call a package installed that lacks its files.
    (folder / ".installed").unlink()
    next(folder.rglob("tiny.py")).unlink()
    make(folder, steps)
    assert has_tiny(python)
    capfd.readouterr()

    def begins(*_, **__):
        raise InstallError("begins")

    def reason(place: Path = folder) -> str:
        with pytest.raises(InstallError, match="begins"):
            make(place, steps)
        return capfd.readouterr().out

    monkeypatch.setattr(environment, "_run", begins)  # here only whether it is made anew, and why
    stamp = folder / ".installed"
    made = stamp.read_text()
    stamp.write_text(json.dumps({**json.loads(made), "python": "3.9"}))
    assert "it was 3.9" in reason()
    stamp.write_text(json.dumps({**json.loads(made), "inputs": "others"}))
    assert "the lock has changed" in reason()
    stamp.write_text(made)
    moved = folder.rename(tmp_path / "moved")
    assert f"it was made in {folder}" in reason(moved)  # its scripts name the old folder
    moved.rename(folder)
    python.unlink()
    python.symlink_to(tmp_path / "nowhere")
    assert "does not start" in reason()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env/letter").write_text("mine")
    with pytest.raises(InstallError, match="left alone: move it away"):
        make(tmp_path / "env", [])
    assert (tmp_path / "env/letter").read_text() == "mine"


def test_the_makefile_says_which_python_it_needs(tmp_path):
    """A Python that is too old, as by its own word: one line, no traceback, nothing made."""
    old = tmp_path / "python-old"
    old.write_text(
        f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9); $1"\n'
    )
    old.chmod(0o755)
    called = subprocess.run(
        ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'env'}"],
        cwd=environment.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert called.returncode
    assert "needs Python >= 3.10; set PYTHON=" in called.stderr
    assert not (tmp_path / "env").exists()
