"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_there_is_an_example_of_each_op_and_of_the_model():
    text = "".join(EXAMPLES)
    for name in (
        "delta_memory",
        "deep_memory",
        "deep_memory_step",
        "self_modifying_memory",
        "self_modifying_memory_step",
        "continuum_memory",
        "HopeForCausalLM",
    ):
        assert name in text


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[1])
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
