"""The code of docs/ecosystem.md with the tools that are installed (make lanes LANES=ecosystem: all)."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs/ecosystem.md"
SECTIONS = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
CODE = {
    name: re.findall(r"```python\n(.*?)```", text, re.S) for name, text in zip(SECTIONS[::2], SECTIONS[1::2])
}
NEEDS = {"Trainer": ["accelerate"], "PEFT": ["peft"], "TRL": ["trl"], "lm-eval": ["trl", "lm_eval"]}


def test_every_section_is_run():
    assert {name for name, blocks in CODE.items() if blocks} == set(NEEDS)


@pytest.mark.parametrize("section", NEEDS)
def test_a_section_runs_as_it_stands(section, tmp_path, monkeypatch):
    for package in NEEDS[section]:
        pytest.importorskip(package, reason=f"needs {package}: make lanes LANES=ecosystem")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks = CODE[section]
    if section == "lm-eval":  # which measures what TRL's section has saved
        blocks = CODE["TRL"] + blocks
    names = {}
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)
    if section == "lm-eval":
        assert 0 <= names["found"]["results"]["plus"]["acc,none"] <= 1
