"""Small kernels for the tests of the emulator."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.load(x + i, mask=i < n).to(tl.float32) + tl.load(y + i, mask=i < n).to(tl.float32)
    tl.store(o + i, total.to(o.dtype.element_ty), mask=i < n)


@triton.jit
def product_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        right = tl.load(b + k[:, None] * N + n, mask=(k[:, None] < K) & (n < N), other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n, total, mask=(m[:, None] < M) & (n < N))


@triton.jit
def softmax_kernel(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    at = tl.program_id(0) * n + i
    value = tl.load(x + at, mask=i < n, other=-float("inf"))
    e = tl.exp(value - tl.max(value, 0))
    tl.store(o + at, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def scan_kernel(x, o, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(o + at, tl.cumsum(tl.load(x + at).to(tl.float64), AXIS))


@triton.jit
def transpose_kernel(x, o, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)
    turned = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)
    tl.store(o + turned, tl.trans(tl.load(x + at)))


@triton.jit
def integers_kernel(x, y, o, COUNT: tl.constexpr):
    """Quotients, remainders, shifts and comparisons of signed numbers, one after the other in ``o``."""
    i = tl.arange(0, COUNT)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(o + i, a // b)
    tl.store(o + COUNT + i, a % b)
    tl.store(o + 2 * COUNT + i, a >> 3)
    tl.store(o + 3 * COUNT + i, (a ^ b) << 2)
    tl.store(o + 4 * COUNT + i, tl.where(a < b, tl.minimum(a, -b), tl.abs(a)))
    tl.store(o + 5 * COUNT + i, (a.to(tl.float32) / 3).to(tl.int64))


@triton.jit
def halving_kernel(x, o):
    """Programs, and threads of each, that go round a loop a different number of times."""
    value = tl.load(x + tl.program_id(0))
    steps = 0.0
    while value > 1.0:
        value = value * 0.5
        steps += 1.0
    if steps > 3:
        steps = -steps
    tl.store(o + tl.program_id(0), steps)


@triton.jit
def turn_in_place_kernel(x, o, B: tl.constexpr, WAITS: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i))
    if WAITS:
        tl.debug_barrier()
    tl.store(x + i, tl.load(o + (B - 1 - i)))


@triton.jit
def shifted_kernel(x, o, shift, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i + shift))


@triton.jit
def overlapping_kernel(o, B: tl.constexpr):
    """Every program stores its number where the next one begins, too."""
    i = tl.program_id(0) * B + tl.arange(0, 2 * B)
    tl.store(o + i, i * 0 + tl.program_id(0))


@triton.jit
def sum_of_squares_kernel(x, o, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FUSES: tl.constexpr):
    """Two lanes that add their squares, each fusing its own with the sum, differ in the last bit."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(x + at)
    square = value * value if FUSES else tl.fma(value, value, 0.0)
    tl.store(o + tl.arange(0, ROWS), tl.sum(square, 1))
