"""The kernels' building blocks, interpreted."""

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels.triton_support.language import invert_unit_lower, matmul

pytestmark = pytest.mark.interpreter


@triton.jit
def _invert(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, invert_unit_lower(tl.load(a + at), SIZE, "ieee"))


@triton.jit
def _product(a, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, matmul(tl.load(a + at), tl.load(a + at), PRECISION))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_triangular_inverse(size):
    a = torch.randn(size, size).tril(-1) / size**0.5
    out = torch.empty_like(a)
    _invert[(1,)](a, out, size)
    expected = torch.linalg.inv(torch.eye(size) + a.double())
    assert (out - expected).norm() < 1e-6 * expected.norm()


def test_triangular_inverse_of_repeated_keys():
    """All ones below the diagonal: powers of A reach 10^17, the inverse is a bidiagonal."""
    a = torch.ones(64, 64).tril(-1)
    out = torch.empty_like(a)
    _invert[(1,)](a, out, 64)
    assert torch.equal(out, torch.eye(64) - torch.diag(torch.ones(63), -1))


@pytest.mark.parametrize("precision", ["fp16", "tf32", "rounded tf32", "tf32x3", "ieee"])
def test_products_accumulate_in_fp32(precision):
    a = torch.randn(16, 16)
    out = torch.empty(16, 16)
    _product[(1,)](a, out, 16, precision)
    operand = (a.half() if precision == "fp16" else a).double()
    if precision == "rounded tf32":
        ulp = 2.0 ** (a.double().abs().log2().floor() - 10)
        operand = (operand / ulp).round() * ulp
    assert (out - operand @ operand).norm() < 1e-6 * out.norm()
