"""The decays of a chunk, interpreted."""

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels.ops.delta_memory.triton_decays import decay_between, store_cumulated, sum_over_spans

pytestmark = pytest.mark.interpreter


@triton.jit
def _decays(log, decays, out, SIZE: tl.constexpr, BEFORE: tl.constexpr):
    row = tl.arange(0, SIZE)
    store_cumulated(decays, row, tl.load(log + row), SIZE)
    tl.debug_barrier()
    matrix = decay_between(decays, row[:, None] - BEFORE, row[None, :], SIZE)
    tl.store(out + row[:, None] * SIZE + row[None, :], matrix)


@triton.jit
def _spans(pairs, out, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    tile = tl.load(pairs + row[:, None] * SIZE + row[None, :])
    ends, starts = row[:, None] <= row[None, :], row[:, None] > row[None, :]
    tl.store(out + row, sum_over_spans(tile, ends, starts, "ieee"))


@pytest.mark.parametrize("before", [False, True])
def test_decays_are_exact_across_zeros_and_after_long_sums(before):
    log = -torch.rand(16)
    log[3] = -80.0
    log[5] = -torch.inf
    log[9] = -torch.inf
    out = torch.empty(16, 16)
    _decays[(1,)](log, torch.empty(2, 16), out, 16, before)
    for t in range(16):
        for j in range(16):
            to = t - before
            expected = log[j + 1 : to + 1].double().sum().exp() if j <= to else torch.tensor(0.0)
            torch.testing.assert_close(out[t, j].double(), expected.double(), rtol=1e-5, atol=1e-40)
    assert (out[5 + before :, :5] == 0).all()
    assert (out[9 + before :, :9] == 0).all()


def test_sum_over_spans():
    pairs = torch.randn(16, 16).double().float()
    out = torch.empty(16)
    _spans[(1,)](pairs, out, 16)
    expected = torch.stack([pairs[i:, :i].sum() for i in range(16)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
