"""The derivatives of :mod:`nl_kernels.chunk_kernels.forward` written out, on tiles (see the package).

An adjoint has the shape of what it belongs to. Adjoints of decays are kept as their products with the
decays, as in :mod:`nl_kernels.delta_adjoint`, so that exact zeros stay harmless; :func:`decay_adjoint` takes
them all at once.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import row_dot
from nl_kernels.triton_support.language import matmul, sum_over_spans

_TINY: tl.constexpr = tl.constexpr(1e-30)  # delta_chunk.TINY


@triton.jit
def hidden_adjoint(grad, value, slope, scale, radial, NORMALIZED: tl.constexpr):
    """The adjoint of z from that of n(σ(z)) [C, h].

    ``radial`` [C] is ‖σ(z)‖⁻¹'s own adjoint times itself (:func:`signal_adjoint`), or ``None``.
    """
    if NORMALIZED:
        along = row_dot(value, grad)
        if radial is not None:
            along += radial
        grad = (grad - value * along[:, None]) * scale[:, None]
    return grad * slope


@triton.jit
def bound_adjoint(grad, bounded, factor, BOUND: tl.constexpr):
    """The adjoint of x from that of ``bounded = factor x`` [C, width]; ``BOUND`` 0: no bound."""
    if BOUND > 0:
        along = tl.where(factor < 1, row_dot(bounded, grad) * (-1 / (BOUND * BOUND)), 0.0)
        grad = (grad + bounded * along[:, None]) * factor[:, None]
    return grad


@triton.jit
def signal_adjoint(
    grad,
    signal,
    tangent,
    along,
    factor,
    back,
    value,
    slope,
    curvature,
    scale,
    NORMALIZED: tl.constexpr,
    BOUND: tl.constexpr,
):
    """Adjoints from that of the error signal: of ``back``, of n(σ(z)), of z through σ', and ``radial`` [C].

    ``signal, tangent, along, factor`` are of :func:`~nl_kernels.chunk_kernels.forward.error_signal`.
    """
    grad = bound_adjoint(grad, signal, factor, BOUND)
    at_z = grad * tangent
    at_back = grad * slope
    if NORMALIZED:
        radial = row_dot(at_z, slope)
        across = row_dot(value, at_back)
        at_value = (at_back * along[:, None] + back * across[:, None]) * -scale[:, None]
        at_back = (at_back - value * across[:, None]) * scale[:, None]
    else:
        radial = tl.zeros(scale.shape, tl.float32)
        at_value = tl.zeros(value.shape, tl.float32)
    return at_back, at_value, at_z * curvature, radial


@triton.jit
def write_adjoint(
    grad,
    grad_written,
    state,
    x,
    surprise,
    written,
    recalled,
    rate,
    before,
    to_end,
    final,
    gram,
    inverse,
    ERASES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adjoints of a write from those of the state after the chunk [out, in] and of u [C, out] (or ``None``).

    ``surprise, written, recalled`` are ω, u and x Sᵀ of
    :func:`~nl_kernels.chunk_kernels.forward.write_forward`, ``gram, inverse`` of
    :func:`~nl_kernels.chunk_kernels.forward.erase_matrices`.

    Returns those of ``state``, ``x`` (without its part in the gram matrix), ``signal``, ``rate``; K̄ K, which
    is that of ``strict`` times itself, and K̄ [C, C], which times the decays is that of x xᵀ; and those of
    ``before``, ``to_end`` and ``final`` times themselves.
    """
    at_x = matmul(written, grad, PRECISION) * to_end[:, None]
    at_to_end = row_dot(at_x, x)
    at_signal = matmul(to_end[:, None] * x, tl.trans(grad), PRECISION)
    if grad_written is not None:
        at_signal += grad_written
    at_rate = -row_dot(at_signal, surprise)
    at_signal *= -rate[:, None]
    at_state = grad * final
    at_final = tl.sum(tl.sum(at_state * state, 1), 0)
    if ERASES:
        at_signal = matmul(tl.trans(inverse), at_signal, PRECISION)
        at_recalled = before[:, None] * at_signal
        at_before = row_dot(at_recalled, recalled)
        at_x += matmul(at_recalled, state, PRECISION)
        at_state += matmul(tl.trans(at_recalled), x, PRECISION)
        at_gram = matmul(at_signal, tl.trans(surprise), PRECISION)
        at_strict = at_gram * gram
        at_rate -= tl.sum(at_strict, 0)
        at_strict *= -rate[None, :]
        at_gram *= -rate[None, :]
    else:
        at_before = tl.zeros(rate.shape, tl.float32)
        at_gram = tl.zeros([x.shape[0], x.shape[0]], tl.float32)
        at_strict = at_gram
    return at_state, at_x, at_signal, at_rate, at_strict, at_gram, at_before, at_to_end, at_final


@triton.jit
def momentum_adjoint(
    grad,
    grad_velocity,
    grad_written,
    state,
    velocity,
    x,
    signal,
    write,
    rate,
    final,
    mixed_to_end,
    mixed_final,
    carried_to_end,
    carried_final,
    PRECISION: tl.constexpr,
):
    """Adjoints of a write with momentum and without erasing, from those of S, U and w (or ``None``).

    Returns those of ``state``, ``velocity``, ``x``, ``signal``, ``rate``; of ``final`` times itself; and
    plain ones of ``mixed_to_end``, ``mixed_final``, ``carried_to_end`` and ``carried_final``.
    """
    by_state, by_velocity = matmul(write, grad, PRECISION), matmul(write, grad_velocity, PRECISION)
    at_mixed_to_end, at_carried_to_end = row_dot(by_state, x), row_dot(by_velocity, x)
    at_x = mixed_to_end[:, None] * by_state + carried_to_end[:, None] * by_velocity
    at_write = matmul(mixed_to_end[:, None] * x, tl.trans(grad), PRECISION)
    at_write += matmul(carried_to_end[:, None] * x, tl.trans(grad_velocity), PRECISION)
    if grad_written is not None:
        at_write += grad_written
    at_state = grad * final
    at_final = tl.sum(tl.sum(at_state * state, 1), 0)
    at_velocity = grad_velocity * carried_final + grad * mixed_final
    at_mixed_final = tl.sum(tl.sum(grad * velocity, 1), 0)
    at_carried_final = tl.sum(tl.sum(grad_velocity * velocity, 1), 0)
    at_rate = -row_dot(at_write, signal)
    return (
        at_state,
        at_velocity,
        at_x,
        at_write * -rate[:, None],
        at_rate,
        at_final,
        at_mixed_to_end,
        at_mixed_final,
        at_carried_to_end,
        at_carried_final,
    )


@triton.jit
def read_adjoint(grad, queries, state, x, written, recalled, scores, after, full, PRECISION: tl.constexpr):
    """Adjoints of :func:`~nl_kernels.chunk_kernels.forward.read_forward` from that of the read [C, out].

    Returns those of ``queries``, ``state``, ``x``, ``written``; of ``after`` and ``full`` times themselves.
    An anchor adds grad · W_0 to the first and has gradᵀ · queries as its own.
    """
    at_recalled = after[:, None] * grad
    at_after = row_dot(at_recalled, recalled)
    at_state = matmul(tl.trans(at_recalled), queries, PRECISION)
    at_written = matmul(tl.trans(scores), grad, PRECISION)
    weighted = matmul(grad, tl.trans(written), PRECISION)
    at_full = weighted * scores
    weighted *= full
    at_queries = matmul(at_recalled, state, PRECISION) + matmul(weighted, x, PRECISION)
    at_x = matmul(tl.trans(weighted), queries, PRECISION)
    return at_queries, at_state, at_x, at_written, at_after, at_full


@triton.jit
def velocity_read_adjoint(grad, queries, velocity, x, written, mixed_after, PRECISION: tl.constexpr):
    """What momentum adds to :func:`read_adjoint`, which then has the mixed ``full``.

    Returns adjoints of ``queries`` and ``velocity``, and plain ones of ``mixed_after`` and of the mixed
    ``full`` (times itself, as :func:`read_adjoint` gives it, it does not serve: it is a sum of products).
    """
    at_recalled = mixed_after[:, None] * grad
    at_after = row_dot(grad, matmul(queries, tl.trans(velocity), PRECISION))
    at_queries = matmul(at_recalled, velocity, PRECISION)
    at_velocity = matmul(tl.trans(at_recalled), queries, PRECISION)
    products = matmul(queries, tl.trans(x), PRECISION)
    at_full = matmul(grad, tl.trans(written), PRECISION) * products
    return at_queries, at_velocity, at_after, at_full


@triton.jit
def gram_adjoint(gram, x, PRECISION: tl.constexpr):
    """The adjoint of x [C, in] from that of x xᵀ [C, C]."""
    return matmul(gram + tl.trans(gram), x, PRECISION)


@triton.jit
def proximal_adjoint(grad, rate, x, effective):
    """Adjoints of η [C] and x from that of :func:`~nl_kernels.chunk_kernels.forward.proximal_rate` [C]."""
    share = 1 / (1 + rate * row_dot(x, x))
    return grad * share * share, x * (-2 * grad * effective * effective)[:, None]


@triton.jit
def decay_adjoint(before, after, strict, full, to_end, final, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """The adjoint of the log decays [C] from those of a spread's parts, each times the part itself.

    Any part may be ``None``. A span from token j to token i holds the logs of j + 1 … i, and each of them
    gets the span's adjoint. Spans are summed directly: differences of sums would not vanish across a reset.
    """
    row = tl.arange(0, BLOCK_C)
    earlier = row[:, None] < row[None, :]  # the span ends after token i …
    up_to = row[:, None] <= row[None, :]
    begun = row[:, None] > row[None, :]  # … and began before it
    out = tl.zeros([BLOCK_C], tl.float32)
    if before is not None:
        out += tl.sum(tl.where(earlier, before[None, :], 0.0), 1)
    if after is not None:
        out += tl.sum(tl.where(up_to, after[None, :], 0.0), 1)
    if strict is not None:
        out += sum_over_spans(strict, earlier, begun, PRECISION)
    if full is not None:
        out += sum_over_spans(full, up_to, begun, PRECISION)
    if to_end is not None:
        out += tl.sum(tl.where(begun, to_end[None, :], 0.0), 1)
    if final is not None:
        out += final
    return out


@triton.jit
def mixed_adjoint(
    mixed_after,
    mixed_full,
    mixed_to_end,
    mixed_final,
    full,
    to_end,
    carried_after,
    carried_full,
    applied,
    PRECISION: tl.constexpr,
):
    """Adjoints of decays and momenta from plain ones ``mixed_…`` of
    :func:`~nl_kernels.chunk_kernels.forward.mixed_spread`'s results, whose arguments are the others.

    Returns those of ``full``, ``to_end``, ``carried_after`` and ``carried_full``, each times itself.
    """
    entering = tl.where(applied[:, None], carried_full, 0.0)
    entering_start = tl.where(applied, carried_after, 0.0)
    at_full = (
        matmul(mixed_full, tl.trans(entering), PRECISION) + mixed_after[:, None] * entering_start[None, :]
    )
    at_to_end = tl.sum(entering * mixed_to_end[None, :], 1) + mixed_final * entering_start
    at_carried = matmul(tl.trans(full), mixed_full, PRECISION) + to_end[:, None] * mixed_to_end[None, :]
    at_start = tl.sum(full * mixed_after[:, None], 0) + to_end * mixed_final
    # ``entering`` is 0 where nothing counts, and there its adjoint must be too.
    return full * at_full, to_end * at_to_end, entering_start * at_start, entering * at_carried


@triton.jit
def momentum_gradient(after, full, to_end, final, momentum, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """The adjoint of the momenta [C] from those of the parts of their spread, each times the part itself.

    A momentum of 0 is exact: its log is that of ``momentum + TINY``, as in :mod:`nl_kernels.delta_chunk`.
    """
    at_log = decay_adjoint(None, after, None, full, to_end, final, BLOCK_C, PRECISION)
    return at_log / (momentum + _TINY)
