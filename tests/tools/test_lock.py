"""The lock holds all that ``make install`` brings, for every supported Python, within setup.py's ranges."""

import importlib.metadata
import json
import platform
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock
from tools.environment import LOCK, LOCKED, ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def read(path: Path) -> list[Requirement]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked(python: str) -> dict[str, str]:
    """The lock's version of every package for one Python on Linux."""
    about = default_environment() | {"python_version": python, "python_full_version": f"{python}.9"}
    about |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": "dev"}
    found: dict[str, str] = {}
    for line in read(LOCK):
        if line.marker is None or line.marker.evaluate(about):
            name = canonicalize_name(line.name)
            assert name not in found, f"{name} is locked twice for Python {python}"
            (pin,) = line.specifier
            assert pin.operator == "==", line
            found[name] = pin.version
    return found


def asked_for() -> list[Requirement]:
    """What setup.py asks for, by the default and for development."""
    script = (ROOT / "setup.py").read_text(encoding="utf-8")
    asked: dict = {}
    stand_ins = {"setup": asked.update, "find_packages": list, "__file__": str(ROOT / "setup.py")}
    exec(script.replace("from setuptools import find_packages, setup", ""), stand_ins)
    extras = asked["extras_require"]
    return [Requirement(text) for text in asked["install_requires"] + extras["dev"] + extras["docs"]]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_range(python):
    versions = locked(python)
    for requirement in asked_for():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_held_fast_is_locked_and_cuda_is_not(python):
    versions = locked(python)
    assert {r.name: next(iter(r.specifier)).version for r in read(ROOT / "constraints.in")}.items() <= (
        versions.items()
    )
    assert not [name for name in versions if name.startswith(("nvidia-", "cuda-"))]


def test_requirements_have_an_upper_end():
    """Without one, what breaks next year is installed next year. The installers themselves have none."""
    open_ended = {r.name for r in asked_for() if not any(s.operator in ("<", "==") for s in r.specifier)}
    assert open_ended == {"packaging", "pip", "setuptools"}


def test_what_is_installed_is_locked():
    """In the environment of the Makefile, all of it; elsewhere, what we need of it."""
    versions = locked(f"{sys.version_info.major}.{sys.version_info.minor}")
    stamp = Path(sys.prefix, ".installed")
    if stamp.exists() and json.loads(stamp.read_text())["steps"] == [list(step) for step in LOCKED]:
        # Of this environment alone: setuptools, once imported, puts what it brings along on the path as well.
        installed = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
        found = {canonicalize_name(d.name): d.version for d in installed}
        found.pop("nl-kernels")
    else:
        found = dict.fromkeys(needed("nl-kernels", {"dev"}, set()))
    for name, version in found.items():
        if platform.system() == "Linux" and name.startswith(("nvidia-", "cuda-")):
            continue  # torch pins them
        assert name in versions, f"{name} {version or ''} is not in the lock: 'make lock'"
        if version is not None:
            assert re.sub(r"\+.*", "", version) == versions[name], name


def needed(package: str, extras: set[str], seen: set[str]) -> set[str]:
    """All that a package needs, by what is installed here."""
    for text in importlib.metadata.requires(package) or []:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        )
        if wanted and name not in seen and not name.startswith(("nvidia-", "cuda-")):
            seen.add(name)
            try:
                needed(name, requirement.extras, seen)
            except importlib.metadata.PackageNotFoundError:
                continue
    return seen


def test_a_failed_resolution_leaves_the_lock_as_it_is(monkeypatch, tmp_path, capfd):
    before = LOCK.read_bytes()
    monkeypatch.setattr(lock, "ROOT", tmp_path)  # no setup.py there
    with pytest.raises(SystemExit, match="as it was"):
        lock.main()
    assert LOCK.read_bytes() == before
