"""The map of the code base cannot rot: every op has the same files, tests mirror sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(p for p in (ROOT / "src/nl_kernels/ops").iterdir() if p.is_dir() and p.name != "__pycache__")
REQUIRED = {"__init__.py", "api.py", "reference.py", "eager.py", "README.md"}
ALLOWED = REQUIRED | {
    "triton_forward.py",
    "triton_backward.py",
    "triton_pair_gradients.py",
    "triton_state_gradients.py",
    "triton_rate_gradients.py",
    "triton_step.py",
    "registration.py",
    "triton_chunk.py",
    "launch.py",
    "catalogue.py",
    "rows.py",
    "eager_step.py",
    "eager_chunk.py",
    "eager_momentum.py",
    "state.py",
    "eager_backward.py",
    "generate.py",
    "coefficients.py",
    "stack.py",
    "update.py",
    "mlp.py",
    "checks.py",
    "triton_update.py",
    "orthogonal.py",
    "schedule.py",
    "loop.py",
    "chunk_walk.py",
    "first_order.py",
    "grid.py",
}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules imported anywhere in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.name)
def test_each_op_has_the_same_files(op):
    names = {p.name for p in op.iterdir() if p.name != "__pycache__"}
    assert names >= REQUIRED, f"missing in {op.name}: {sorted(REQUIRED - names)}"
    assert names <= ALLOWED, f"unknown names in {op.name}: {sorted(names - ALLOWED)}"


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.name)
def test_each_op_has_tests_and_a_benchmark(op):
    tests = ROOT / "tests/nl_kernels/ops" / op.name
    assert (tests / "test_reference.py").is_file()
    assert (tests / "test_eager.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op.name}.py").is_file()


@pytest.mark.parametrize("op", OPS, ids=lambda p: p.name)
def test_the_public_function_has_the_name_of_its_folder(op):
    public = ast.parse((op / "api.py").read_text())
    functions = {node.name for node in public.body if isinstance(node, ast.FunctionDef)}
    expected = {"self_modifying": "self_modifying_memory", "continuum": "continuum_memory"}
    assert expected.get(op.name, op.name) in functions


def test_implementations_never_import_each_other():
    for op in OPS:
        prefix = f"nl_kernels.ops.{op.name}."
        for name in ("reference.py", "eager.py"):
            others = {"reference", "eager", "triton_forward", "triton_backward", "triton_step"} - {name[:-3]}
            assert not imported_modules(op / name) & {prefix + other for other in others}, (op.name, name)


def test_kernels_do_not_know_the_models_and_references_do_not_know_triton():
    for path in (ROOT / "src/nl_kernels").rglob("*.py"):
        modules = imported_modules(path)
        assert not any(m.split(".")[0] == "nl_models" for m in modules), path
        if path.name in ("reference.py", "eager.py"):
            assert not any(m.split(".")[0] == "triton" for m in modules), path


def test_class_variables_say_their_type():
    """Under Python 3.10 transformers cannot read the annotations of a class that has a bare ``ClassVar``."""
    for path in (ROOT / "src").rglob("*.py"):
        bare = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).split(".")[-1] == "ClassVar"
        ]
        assert not bare, f"{path}: lines {bare}"


def test_the_map_names_every_folder_and_module_of_the_packages_and_every_example():
    described = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for package in ("nl_kernels", "nl_models"):
        for path in (ROOT / "src" / package).iterdir():
            if path.suffix == ".py" and path.name not in ("__init__.py", "version.py"):
                assert f"`{path.name}`" in described, path
            elif path.is_dir() and path.name != "__pycache__":
                assert f"{path.name}/" in described, path
    for path in (ROOT / "examples").rglob("*.py"):
        assert f"`{path.name}`" in described, path
