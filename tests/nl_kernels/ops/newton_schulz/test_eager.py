"""Batched PyTorch against the definition; hard inputs; what the groups of steps may not do."""

import itertools

import pytest
import torch

from nl_kernels import newton_schulz, optimal_coefficients
from nl_kernels.doctor import relative_error
from nl_kernels.ops.newton_schulz import MUON_COEFFICIENTS, eager

SHAPES = [
    (1, 1),
    (1, 9),
    (9, 1),
    (8, 8),
    (3, 5, 7),
    (2, 3, 40, 17),
    (2, 130, 600),
    (260, 300),
    (0, 3, 4),
    (2, 0, 3),
]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coefficients", ["muon", "optimal"])
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_fp64_equals_the_definition(steps, coefficients, shape):
    x = random(*shape)
    options = {"steps": steps, "coefficients": coefficients}
    actual = newton_schulz(x, **options)
    assert actual.shape == x.shape
    assert actual.is_contiguous()
    assert relative_error(actual, newton_schulz(x, impl="reference", **options)) < 1e-10


# With well-conditioned input; fp32 loses its last digits to the steps, the 16-bit types are rounded in each.
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 6e-3)]
)
@pytest.mark.parametrize("shape", [(2, 64, 200), (300, 70), (2, 256, 300)], ids=str)
def test_other_dtypes(shape, dtype, limit):
    x = random(*shape, dtype=dtype)
    for coefficients in ("muon", "optimal"):
        actual = newton_schulz(x, coefficients=coefficients)
        expected = newton_schulz(x.double(), coefficients=coefficients, impl="reference")
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < limit


def test_the_dtype_of_products_is_a_choice():
    x = random(2, 64, 96, dtype=torch.float32)
    rounded = newton_schulz(x, compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    expected = newton_schulz(x, impl="reference")
    assert relative_error(newton_schulz(x), expected) < 1e-5 < 1e-3 < relative_error(rounded, expected) < 3e-2
    finer = newton_schulz(x.half(), compute_dtype=torch.float64)
    assert torch.equal(finer, newton_schulz(x.half().double()).half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["zero", "rank one", "tiny", "huge", "one huge element", "smallest", "largest"]
)
def test_hard_inputs_stay_finite(kind, dtype):
    x = random(3, 24, 40, dtype=dtype)
    limits = torch.finfo(dtype)
    x = {
        "zero": torch.zeros_like(x),
        "rank one": x[:, :, :1] * x[:, :1],
        "tiny": x * 1e-30,
        "huge": x * 1e30,
        "one huge element": torch.where(x == x.max(), torch.full_like(x, 1e30), x),
        "smallest": torch.full_like(x, limits.smallest_normal),
        "largest": torch.full_like(x, limits.max),
    }[kind]
    for impl, steps, coefficients in itertools.product(
        ("eager", "reference"), (1, 5, 12), ("muon", "optimal")
    ):
        y = newton_schulz(x, steps=steps, coefficients=coefficients, impl=impl)
        assert torch.isfinite(y).all(), (impl, steps, coefficients)
        assert torch.linalg.matrix_norm(y.double(), 2).max() < (1.3 if steps > 1 else 4.5)
    if kind == "zero":
        assert not newton_schulz(x).any()
    else:
        scaled = newton_schulz(x, eps=limits.tiny)
        assert torch.linalg.matrix_norm(scaled.double(), 2).min() > 0.6


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_input_does_not_matter_above_eps(scale):
    x = random(2, 10, 20, dtype=torch.float32)
    torch.testing.assert_close(newton_schulz(x * scale, eps=1e-38), newton_schulz(x), rtol=1e-4, atol=1e-5)


def test_below_eps_the_result_fades_to_zero():
    x = random(10, 20, dtype=torch.float32)
    x = x / x.norm()
    norms = [newton_schulz(x * scale).norm().item() for scale in (1e-7, 1e-9, 1e-11, 1e-13)]
    assert norms[0] > 0.8 * newton_schulz(x).norm().item()
    assert norms[1] > 10 * norms[2] > 100 * norms[3] > 0


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize(("rows", "columns"), [(48, 200), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_in_the_band(dtype, rows, columns, condition):
    """Those from 0.2 % of the norm on; smaller ones grow, and none exceeds the band."""
    u = torch.linalg.qr(random(rows, rows, seed=1))[0]
    v = torch.linalg.qr(random(columns, rows, seed=2))[0]
    s = condition ** -torch.linspace(0, 1, rows, dtype=torch.float64)
    x = ((u * s) @ v.mT).to(dtype)
    after = (u.mT @ newton_schulz(x).double() @ v).diagonal()
    reached = s / s.norm() >= (0.002 if dtype == torch.float32 else 0.01)
    slack = 1e-3 if dtype == torch.float32 else 0.06
    assert reached.any()
    assert after[reached].min() > 0.68 - slack
    assert torch.linalg.matrix_norm(newton_schulz(x).double(), 2) < 1.21 + slack
    # Rounding the input to bf16 alone moves the small ones.
    if dtype == torch.float32:
        low = s / s.norm() < 1e-3
        growth = after[low] / (s / s.norm())[low]
        assert growth.numel() == 0 or (growth.max() < 3.4445**5 * 1.02 and growth.min() > 50)


def test_steps_share_products_only_while_noise_stays_small():
    for schedule in ([MUON_COEFFICIENTS] * 20, optimal_coefficients(12)):
        lengths = list(eager.group_lengths(schedule, torch.float32))
        assert sum(lengths) == len(schedule)
        start = 0
        for length in lengths:
            growth = 1.0
            for a, _, _ in schedule[start : start + length - 1]:
                growth *= a * a
            assert growth * torch.finfo(torch.float32).eps <= 1e-2
            start += length
    assert list(eager.group_lengths([MUON_COEFFICIENTS] * 5, torch.bfloat16)) == [1] * 5
    assert list(eager.group_lengths([MUON_COEFFICIENTS] * 5, torch.float32)) == [5]


def test_wide_matrices_take_groups_and_square_ones_do_not():
    def groups(columns):
        return [len(g) for g in eager.groups_of([MUON_COEFFICIENTS] * 5, 64, columns, torch.float32, 1)]

    assert groups(64) == [1] * 5
    assert groups(256) == [5]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_a_symmetric_product_by_blocks_is_the_product(blocks):
    left = random(2, 30, 50)
    product = eager._symmetric_product(left, left.mT, blocks)
    torch.testing.assert_close(product, left @ left.mT)


def test_matrices_of_a_stack_do_not_see_one_another():
    x = random(9, 140, 300, dtype=torch.float32)
    together = newton_schulz(x)
    for one, expected in zip(x, together):
        torch.testing.assert_close(newton_schulz(one), expected, rtol=1e-5, atol=1e-6)
    x[3, 5, 7] = torch.nan
    assert torch.isnan(newton_schulz(x)).any(dim=(-2, -1)).nonzero().tolist() == [[3]]


def test_views_and_transposes_are_read_as_they_are():
    x = random(3, 20, 30)
    expected = newton_schulz(x)
    assert torch.equal(newton_schulz(x.mT), expected.mT)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert torch.equal(newton_schulz(strided), expected)
    before = x.clone()
    newton_schulz(x)
    assert torch.equal(x, before)
