"""The public API, as a program of somebody else uses it (public_api.py, which ``make lint`` checks)."""

import ast
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("public_api.py")
PARTS = ("layers", "optim", "continual", "surgery")
PACKAGES = ("nl_kernels", "nl_models", *(f"nl_models.{part}" for part in PARTS))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_used(package):
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == package
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    public = set(importlib.import_module(package).__all__)
    assert imported == public
    assert used >= public


def test_it_runs(tmp_path):
    specification = importlib.util.spec_from_file_location("public_api", SOURCE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main(tmp_path)
