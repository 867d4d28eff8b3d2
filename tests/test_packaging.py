"""What is published: a wheel with all that its user needs, and files that agree with the code."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from nl_kernels import __version__

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_has_both_packages_their_types_the_command_and_the_license(wheel):
    names = set(wheel.namelist())
    info = f"nl_kernels-{__version__}.dist-info"
    assert {"nl_kernels/py.typed", "nl_models/py.typed", f"{info}/licenses/LICENSE"} <= names
    assert "nl = nl_models.cli:app" in wheel.read(f"{info}/entry_points.txt").decode()
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    about = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{info}/")).metadata
    assert about["License-Expression"] == "MIT"
    assert "Typing :: Typed" in about.get_all("Classifier")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"
    names = {author["family-names"] for author in citation["preferred-citation"]["authors"]}
    assert names == {"Behrouz", "Razaviyayn", "Zhong", "Mirrokni"}


def test_what_runs_before_a_commit_is_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    lint = re.search(r"^lint:.*?\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M | re.S).group()
    (repository,) = config["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    for hook in repository["hooks"]:
        program, *arguments = hook["entry"].replace(" --force-exclude", "").split()
        assert " ".join([f"$(BIN)/{Path(program).name}", *arguments]) in lint
