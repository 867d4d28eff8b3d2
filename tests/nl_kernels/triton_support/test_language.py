"""The kernels' building blocks, interpreted."""

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_matrix,
    invert_unit_lower,
    matmul,
    sum_over_spans,
)

pytestmark = pytest.mark.interpreter


@triton.jit
def _invert(a, out, SIZE: tl.constexpr, BASE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, invert_unit_lower(tl.load(a + at), SIZE, "ieee", BASE))


@triton.jit
def _decays(log, out, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    total, residue, _, _ = cumulate_log(tl.load(log + row))
    matrix = decay_matrix(total, residue, total, residue, row[:, None] >= row[None, :])
    tl.store(out + row[:, None] * SIZE + row[None, :], matrix)


@triton.jit
def _spans(pairs, out, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    tile = tl.load(pairs + row[:, None] * SIZE + row[None, :])
    ends, starts = row[:, None] <= row[None, :], row[:, None] > row[None, :]
    tl.store(out + row, sum_over_spans(tile, ends, starts, "ieee"))


@triton.jit
def _product(a, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, matmul(tl.load(a + at), tl.load(a + at), PRECISION))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("base", [4, 8, 16])
def test_triangular_inverse(base, size):
    a = torch.randn(size, size).tril(-1) / size**0.5
    out = torch.empty_like(a)
    _invert[(1,)](a, out, size, base)
    expected = torch.linalg.inv(torch.eye(size) + a.double())
    assert (out - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("base", [4, 16])
def test_triangular_inverse_of_repeated_keys(base):
    """All ones below the diagonal: powers of A reach 10^17, the inverse is a bidiagonal."""
    a = torch.ones(64, 64).tril(-1)
    out = torch.empty_like(a)
    _invert[(1,)](a, out, 64, base)
    assert torch.equal(out, torch.eye(64) - torch.diag(torch.ones(63), -1))


def test_decays_are_exact_across_zeros_and_after_long_sums():
    log = -torch.rand(16)
    log[3] = -80.0
    log[5] = -torch.inf
    log[9] = -torch.inf
    out = torch.empty(16, 16)
    _decays[(1,)](log, out, 16)
    for t in range(16):
        for j in range(16):
            expected = log[j + 1 : t + 1].double().sum().exp() if j <= t else torch.tensor(0.0)
            torch.testing.assert_close(out[t, j].double(), expected.double(), rtol=1e-5, atol=1e-40)
    assert (out[5:, :5] == 0).all()
    assert (out[9:, :9] == 0).all()


def test_sum_over_spans():
    pairs = torch.randn(16, 16).double().float()
    out = torch.empty(16)
    _spans[(1,)](pairs, out, 16)
    expected = torch.stack([pairs[i:, :i].sum() for i in range(16)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "tf32", "tf32x3", "ieee"])
def test_products_accumulate_in_fp32(precision):
    a = torch.randn(16, 16)
    out = torch.empty(16, 16)
    _product[(1,)](a, out, 16, precision)
    operand = (a.half() if precision == "fp16" else a).double()
    assert (out - operand @ operand).norm() < 1e-6 * out.norm()
