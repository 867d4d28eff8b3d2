"""The emulator against PyTorch, and what it must find."""

import numpy as np
import pytest
import torch

from nl_kernels.doctor import relative_error
from tests.tools.ptx_emulator import kernels
from tools.ptx_emulator.driver import emulated
from tools.ptx_emulator.memory import Fault
from tools.ptx_emulator.ptx import Address, parse
from tools.ptx_emulator.translate import Code, Unsupported

pytestmark = pytest.mark.compiled


def launch(kernel, *args, grid=(1,), finds=None, **options):
    """Run a kernel; ``finds``: what must be found, by default nothing."""
    with emulated(seed=1) as launches:
        kernel[grid](*args, **options)
    (record,) = launches
    if finds is None:
        assert not record.findings
    else:
        assert any(finds in line for line in record.findings), record.findings
    return record


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums(dtype):
    x, y, o = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype), nan(1000, dtype=dtype)
    record = launch(kernels.add_kernel, x, y, o, 1000, B=256, grid=(4,))
    assert torch.equal(o, (x.float() + y.float()).to(dtype))
    assert record.programs == 4
    assert record.instructions["global"] > 0
    assert record.instructions["mma"] == record.instructions["shared"] == 0


@pytest.mark.parametrize(
    ("dtype", "precision", "limit"),
    [
        (torch.bfloat16, "tf32", 1e-6),
        (torch.float16, "tf32", 1e-6),
        (torch.float32, "tf32", 1e-3),
        (torch.float32, "tf32x3", 3e-6),
        (torch.float32, "ieee", 1e-6),
    ],
)
@pytest.mark.parametrize(
    ("sizes", "warps", "stages", "blocks"),
    [
        ((70, 50, 100), 4, 3, (64, 32, 32)),
        ((64, 128, 96), 8, 1, (64, 64, 16)),
        ((33, 64, 64), 2, 2, (16, 64, 64)),
    ],
)
def test_products(dtype, precision, limit, sizes, warps, stages, blocks):
    m, n, k = sizes
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), nan(m, n)
    record = launch(
        kernels.product_kernel, a, b, c, m, n, k, *blocks, precision,
        num_warps=warps, num_stages=stages, grid=(-(-m // blocks[0]), -(-n // blocks[1])),
    )  # fmt: skip
    assert relative_error(c, a.double() @ b.double()) < limit
    assert (record.instructions["mma"] > 0) == (precision != "ieee")


def test_tf32_operands_lose_their_low_bits():
    """1 + 2^-10 − 2^-20 is nearest to 1 + 2^-10 in tf32, and is taken for 1."""
    a, b, c = torch.full((16, 16), 1 + 2**-10 - 2**-20), torch.eye(16), nan(16, 16)
    launch(kernels.product_kernel, a, b, c, *[16] * 6, "tf32", num_warps=1)
    assert torch.equal(c, torch.ones(16, 16))


def test_reductions():
    x, o = torch.randn(5, 300), nan(5, 300)
    launch(kernels.softmax_kernel, x, o, 300, B=512, grid=(5,))
    assert relative_error(o, x.double().softmax(1)) < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 32), (1, 512), (256, 4), (16, 16)])
def test_cumulative_sums(shape, axis):
    x, o = torch.randn(shape), nan(*shape, dtype=torch.float64)
    launch(kernels.scan_kernel, x, o, *shape, AXIS=axis)
    assert relative_error(o, x.double().cumsum(axis)) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transpose_through_shared_memory(dtype):
    x, o = torch.randn(64, 32).to(dtype), nan(32, 64, dtype=dtype)
    record = launch(kernels.transpose_kernel, x, o, 64, 32)
    assert torch.equal(o, x.T)
    assert record.instructions["shared"] > 0
    assert record.instructions["barriers"] > 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-900, 900, (128,), generator=generator).to(dtype) for _ in range(2))
    b[b == 0] = 7
    o = torch.zeros(6, 128, dtype=dtype)
    launch(kernels.integers_kernel, a, b, o, 128)
    quotient = torch.div(a, b, rounding_mode="trunc")
    chosen = torch.where(a < b, torch.minimum(a, -b), a.abs())
    third = (a.float() / 3).to(dtype)
    expected = [quotient, a - quotient * b, a >> 3, (a ^ b) << 2, chosen, third]
    assert torch.equal(o, torch.stack(expected))


def test_loops_that_end_apart():
    x, o = torch.tensor([1.0, 3.0, 100.0, 5.0]), nan(4)
    launch(kernels.halving_kernel, x, o, grid=(4,))
    assert o.tolist() == [0, 2, -7, 3]


def test_a_missing_barrier_is_found():
    x, o = torch.randn(256), nan(256)
    expected = x.flip(0)
    launch(kernels.turn_in_place_kernel, x, o, 256, True)
    assert torch.equal(x, expected)
    launch(kernels.turn_in_place_kernel, x, o, 256, False, finds="without a barrier since")
    launch(kernels.turn_in_place_kernel, x, o, 256, False, finds="gives other bits")


def test_an_access_outside_of_a_tensor_ends_the_launch():
    x, o = torch.randn(128), nan(128)
    with pytest.raises(Fault, match="load outside tensor"):
        launch(kernels.shifted_kernel, x, o, 1, 128)
    with pytest.raises(Fault, match="of no tensor"):
        launch(kernels.shifted_kernel, x, o, 2**40, 128)


def test_programs_that_touch_each_other_are_found():
    o = torch.zeros(256, dtype=torch.int32)
    launch(kernels.overlapping_kernel, o, 64, grid=(3,), finds="a program stores what another has stored")


def test_sums_that_differ_between_lanes_are_found():
    torch.manual_seed(0)  # of other numbers the last bits may agree
    x, o = torch.randn(4, 32), nan(4)
    launch(kernels.sum_of_squares_kernel, x, o, 4, 32, False)
    launch(kernels.sum_of_squares_kernel, x, o, 4, 32, True, finds="different values")


def test_tensors_are_as_one_launch_left_them():
    """The second run, in another order, starts from what the first one started from."""
    x, o = torch.randn(128), nan(128)
    before = x.clone()
    launch(kernels.turn_in_place_kernel, x, o, 128, True)
    assert torch.equal(x, before.flip(0))


TEXT = """
.version 8.7
.visible .entry a_kernel(.param .u64 .ptr .global .align 1 a_kernel_param_0, .param .u32 a_kernel_param_1)
.reqntid 64
{
  .reg .pred %p<2>;
  .reg .b32 %r<4>;
  ld.param.b32 %r1, [a_kernel_param_1];
  { .reg .b32 own; mov.b32 own, 7; add.s32 %r2, %r1, own; }
$L_0:
  @!%p1 bra $L_1;
  bar.sync 0; // all of them
  bra.uni $L_0;
$L_1:
  st.shared.v2.b32 [%r2 + 8], { %r1, %r2 };
  ret;
}
"""


def test_parsing():
    function = parse(TEXT)
    assert function.parameters == ["a_kernel_param_0", "a_kernel_param_1"]
    assert function.threads == 64
    assert [b.end and b.end.op[0] for b in function.blocks] == [None, "bra", "bar", "bra", "ret", None]
    assert [b.target for b in function.blocks] == [-1, 4, -1, 1, -1, -1]
    assert function.blocks[1].end.negated
    (store,) = function.blocks[4].instructions
    assert store.args == [Address("%r2", 8), ["%r1", "%r2"]]
    assert function.widths["own__1"] == 32


def test_an_unknown_instruction_is_named():
    code = Code(TEXT.replace("add.s32", "brev.b32"))
    with pytest.raises(Unsupported, match=r"brev\.b32 %r2"):
        code.block(0, False)


def test_rounding_of_bf16_is_that_of_pytorch():
    from tools.ptx_emulator.arithmetic import from_bf16, to_bf16

    bits = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(0)).int()
    x = torch.cat([bits.view(torch.float32), torch.tensor([float("inf"), float("nan"), 0.0, 1e-40])])
    x = x[~x.isnan()]
    found = torch.from_numpy(from_bf16(to_bf16(x.numpy())))
    assert torch.equal(found, x.bfloat16().float())
    assert np.isnan(from_bf16(to_bf16(np.float32("nan"))))


@pytest.mark.parametrize("selectors", [0x5410, 0x7632, 0x0123, 0xC8F4])
def test_bytes_of_two_registers(selectors):
    from tools.ptx_emulator.arithmetic import permute

    a, b = np.random.default_rng(0).integers(0, 2**32, (2, 32), dtype=np.uint32)
    eight = np.stack([a, b], 1).view(np.uint8).reshape(32, 8)
    signed = [np.where(eight[:, s & 7] > 127, 255, 0) if s & 8 else eight[:, s] for s in nibbles(selectors)]
    expected = np.stack(signed, 1).astype(np.uint8).view(np.uint32)[:, 0]
    assert np.array_equal(permute(a, b, np.uint32(selectors)), expected)
    assert np.array_equal(permute(a, b, np.full(32, selectors, np.uint32)), expected)


def nibbles(number):
    return [number >> 4 * i & 15 for i in range(4)]
