"""Decays, the hidden layer and its error signal, writes and running reads, on tiles (see the package)."""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_between,
    decay_from_start,
    decay_matrix,
    invert_unit_lower,
    matmul,
    total_log,
)

_NORM_EPS: tl.constexpr = tl.constexpr(1e-6)  # memory_rule.NORM_EPS
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1/√(2π)


@triton.jit
def spread(log, BLOCK_C: tl.constexpr):
    """Products of the factors whose logs are ``log`` [C]: ``before, after, strict, full, to_end, final``.

    As :class:`nl_kernels.delta_chunk.Spread`: [C], [C], [C, C], [C, C], [C] and one number.
    """
    row = tl.arange(0, BLOCK_C)
    total, residue, total_before, residue_before = cumulate_log(log)
    all_total, all_residue = total_log(log)
    before = decay_from_start(total_before)
    after = decay_from_start(total)
    strict = decay_matrix(total_before, residue_before, total, residue, row[:, None] > row[None, :])
    full = decay_matrix(total, residue, total, residue, row[:, None] >= row[None, :])
    to_end = decay_between(all_total, all_residue, total, residue)
    return before, after, strict, full, to_end, decay_from_start(all_total)


@triton.jit
def mixed_spread(full, to_end, carried_after, carried_full, applied, PRECISION: tl.constexpr):
    """The weights in S of earlier writes and of the incoming U: ``after, full, to_end, final``.

    Of decays ``full`` and ``to_end``, of momenta ``carried_after`` and ``carried_full``, and of which tokens
    count, ``applied`` [C]: an empty slot must not add U again.
    """
    entering = tl.where(applied[:, None], carried_full, 0.0)
    entering_start = tl.where(applied, carried_after, 0.0)
    mixed_after = tl.sum(full * entering_start[None, :], 1)
    mixed_full = matmul(full, entering, PRECISION)
    mixed_to_end = tl.sum(to_end[:, None] * entering, 0)
    return mixed_after, mixed_full, mixed_to_end, tl.sum(to_end * entering_start, 0)


@triton.jit
def row_dot(a, b):
    """The inner products [C] of the rows of two tiles."""
    return tl.sum(a * b, 1)


@triton.jit
def unit(x):
    """Rows scaled to unit length, and the scales [C]."""
    scale = tl.rsqrt(row_dot(x, x) + _NORM_EPS)
    return x * scale[:, None], scale


@triton.jit
def activated(z, ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr):
    """``n(σ(z))`` [C, h], σ'(z), σ''(z) and 1/‖σ(z)‖ [C] (1 when it is not normalised)."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        value = z * s
        slope = s + value * (1 - s)
        curvature = (2 * slope - value) * (1 - s)
    else:
        cdf = 0.5 * (1 + tl.erf(z * _SQRT_HALF))
        density = _DENSITY_AT_0 * tl.exp(-0.5 * z * z)
        value = z * cdf
        slope = cdf + z * density
        curvature = density * (2 - z * z)
    squares = row_dot(value, value)
    if NORMALIZED:
        scale = tl.rsqrt(squares + _NORM_EPS)
        value = value * scale[:, None]
    else:
        scale = tl.full(squares.shape, 1.0, tl.float32)
    return value, slope, curvature, scale


@triton.jit
def length_factor(x, BOUND: tl.constexpr):
    """What scales the rows of ``x`` down to length ``BOUND`` [C]: exactly 1 where they are not too long.

    A ``BOUND`` of 0 stands for no bound.
    """
    squares = row_dot(x, x)
    if BOUND > 0:
        too_long = squares > BOUND * BOUND
        factor = tl.where(too_long, BOUND * tl.rsqrt(tl.where(too_long, squares, 1.0)), 1.0)
    else:
        factor = tl.full(squares.shape, 1.0, tl.float32)
    return factor


@triton.jit
def error_signal(back, value, slope, scale, NORMALIZED: tl.constexpr, BOUND: tl.constexpr):
    """The error signal at z from ``back`` [C, h], the one at n(σ(z)): ``signal, tangent, along, factor``.

    ``value, slope, scale`` are of :func:`activated`. The last two are [C]; ``signal`` is bounded.
    """
    along = row_dot(value, back)
    tangent = back
    if NORMALIZED:
        tangent = (back - value * along[:, None]) * scale[:, None]
    signal = tangent * slope
    factor = length_factor(signal, BOUND)
    return signal * factor[:, None], tangent, along, factor


@triton.jit
def proximal_rate(rate, x):
    """``η/(1 + η‖x‖²)`` [C]."""
    return rate / (1 + rate * row_dot(x, x))


@triton.jit
def erase_matrices(gram, rate, strict, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """``K = strict ∘ gram`` and ``(I + K diag(η))⁻¹`` [C, C], from x xᵀ, η [C] and decays ``strict``."""
    gram = gram * strict
    return gram, invert_unit_lower(gram * rate[None, :], BLOCK_C, PRECISION, 4)


@triton.jit
def write_forward(state, x, signal, rate, before, inverse, ERASES: tl.constexpr, PRECISION: tl.constexpr):
    """ω, u and the recall x Sᵀ [C, out] of a chunk that starts at ``state`` [out, in]; x [C, in], δ [C, out].

    The state after the chunk is :func:`carry_state`. Without erasing nothing is recalled.
    """
    recalled = tl.zeros(signal.shape, tl.float32)
    if ERASES:
        recalled = matmul(x, tl.trans(state), PRECISION)
        signal = matmul(inverse, signal + before[:, None] * recalled, PRECISION)
    return signal, signal * -rate[:, None], recalled


@triton.jit
def carry_state(state, written, x, to_end, final, PRECISION: tl.constexpr):
    """The state after a chunk, ``final S + uᵀ (to_end x)`` [out, in]."""
    return final * state + matmul(tl.trans(written), to_end[:, None] * x, PRECISION)


@triton.jit
def momentum_forward(
    state,
    velocity,
    x,
    signal,
    rate,
    final,
    mixed_to_end,
    mixed_final,
    carried_to_end,
    carried_final,
    PRECISION: tl.constexpr,
):
    """S and U after a chunk, and its writes w [C, out], with momentum and without erasing.

    ``final`` is of the decay spread, ``mixed_…`` of the mixed one, ``carried_…`` of that of momentum.
    """
    write = signal * -rate[:, None]
    turned = tl.trans(write)
    state = final * state + mixed_final * velocity
    state += matmul(turned, mixed_to_end[:, None] * x, PRECISION)
    velocity = carried_final * velocity + matmul(turned, carried_to_end[:, None] * x, PRECISION)
    return state, velocity, write


@triton.jit
def read_forward(queries, state, x, written, after, full, PRECISION: tl.constexpr):
    """``S_t q_t`` after each token [C, out], the recall q Sᵀ [C, out] and the scores full ∘ q xᵀ [C, C].

    An anchor adds q W_0ᵀ. With momentum (and without erasing) ``full`` is the mixed one, and
    ``mixed after ∘ q Uᵀ`` is to be added.
    """
    recalled = matmul(queries, tl.trans(state), PRECISION)
    scores = full * matmul(queries, tl.trans(x), PRECISION)
    y = after[:, None] * recalled + matmul(scores, written, PRECISION)
    return y, recalled, scores
