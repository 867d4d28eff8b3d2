"""The resource report: what it reads from compiled kernels, what it refuses, what it writes."""

import json
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
import typer
from typer.testing import CliRunner

from nl_kernels.triton_support.kernel_call import KernelCall
from tools import kernel_report as report
from tools.ahead_of_time import compile_call, signature_of
from tools.catalogue import CatalogueEntry
from tools.kernel_resources import resources_of

pytestmark = pytest.mark.aot


@triton.jit
def product_kernel(a, absent, out, scale, rows, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(a + at, mask=at < rows, other=0.0)
    tl.store(out + at, scale * tl.dot(tile, tile, input_precision=PRECISION))


def planned(precision, size=64):
    a = torch.empty(size, size, device="meta")
    arguments = {"a": a, "absent": None, "out": a, "scale": 1.0, "rows": 3}
    return KernelCall(product_kernel, (1,), arguments, {"SIZE": size, "PRECISION": precision}, 4, 1)


def test_signature_follows_the_arguments():
    assert signature_of(planned("tf32")) == {
        "a": "*fp32",
        "absent": "constexpr",
        "out": "*fp32",
        "scale": "fp32",
        "rows": "i32",
        "SIZE": "constexpr",
        "PRECISION": "constexpr",
    }


class Tensors(NamedTuple):
    a: torch.Tensor
    absent: torch.Tensor | None


@triton.jit
def named_kernel(tensors, out, SIZES: tl.constexpr):
    at = tl.arange(0, SIZES.BLOCK)
    tile = tl.load(tensors.a + at)
    if tensors.absent is not None:
        tile += tl.load(tensors.absent + at)
    tl.store(out + at, tile)


class Sizes(NamedTuple):
    BLOCK: int


def test_named_tuples_of_tensors_and_sizes_compile():
    """Absent tensors are known when compiling, and pointers as aligned as those outside of tuples."""
    a = torch.empty(256, device="meta")
    call = KernelCall(
        named_kernel, (1,), {"tensors": Tensors(a, None), "out": a}, {"SIZES": Sizes(256)}, 1, 1
    )
    assert signature_of(call)["tensors"] == Tensors("*fp32", "constexpr")
    compiled = compile_call(call, "sm_90")
    assert compiled.asm["ttir"].count("tt.load") == 1
    assert "ld.global.v4" in compiled.asm["ptx"]


def test_resources_tell_tensor_cores_from_scalar_products():
    on_tensor_cores = resources_of(compile_call(planned("tf32"), "sm_90"))
    assert on_tensor_cores.products == 1
    assert on_tensor_cores.scalar_products == 0
    assert on_tensor_cores.tensor_core["wgmma"] > 0
    assert on_tensor_cores.registers > 0
    assert on_tensor_cores.shared_bytes >= 2 * 64 * 64 * 4
    scalar = resources_of(compile_call(planned("ieee"), "sm_90"))
    assert scalar.scalar_products == 1
    assert not scalar.tensor_core


def test_resources_on_amd():
    found = resources_of(compile_call(planned("ieee", 32), "gfx942"))
    assert found.tensor_core["mfma"] > 0
    assert found.spill_bytes == 0


@pytest.fixture
def command(monkeypatch):
    """The command line, with one good kernel, one without tensor cores, and one that does not compile."""
    calls = {"good": planned("tf32"), "scalar": planned("ieee"), "broken": planned("no such precision")}
    entries = [CatalogueEntry("an_op", name, call) for name, call in calls.items()]
    monkeypatch.setattr(report, "collect_catalogue", lambda architecture: entries)
    app = typer.Typer()
    app.command()(report.main)
    return lambda *words: CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_report_of_a_good_kernel(command, tmp_path):
    output = tmp_path / "report.json"
    result = command("good", "--target", "sm_90", "--json", str(output))
    assert result.exit_code == 0
    assert "1 kernels, 0 with problems" in result.output
    (row,) = json.loads(output.read_text())
    assert row["kernel"] == "product"
    assert row["target"] == "sm_90"
    assert row["resources"]["tensor_core"]["wgmma"] > 0


def test_report_fails_on_problems(command):
    result = command("--target", "sm_90")
    assert result.exit_code == 1
    assert "3 kernels, 2 with problems" in result.output


@pytest.mark.parametrize("words", [("--target", "sm_1"), ("no such kernel", "--target", "sm_90")])
def test_report_refuses_what_selects_nothing(command, words):
    result = command(*words)
    assert result.exit_code == 2
    assert "expected one of" in result.output or "no kernel matches" in result.output
