"""The shared derivatives on tiles, interpreted, against the eager functions of the same names in fp64."""

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels import adjoint, forward
from nl_kernels.memory import layer
from nl_kernels.memory.decays import TINY, chunk_coefficients, coefficient_adjoint
from nl_kernels.memory_rule import MemoryRule, activate, bound_length, inverse_norm

pytestmark = pytest.mark.interpreter

C, IN, OUT = 16, 16, 32


@triton.jit
def _load(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _store(x, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], value)


@triton.jit
def _hidden(
    z, back, grad, at_value, outs, C: tl.constexpr, H: tl.constexpr,
    ACTIVATION: tl.constexpr, NORMALIZED: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    value, slope, curvature, scale = forward.activated(_load(z, C, H), ACTIVATION, NORMALIZED)
    given = _load(back, C, H)
    signal, tangent, along, factor = forward.error_signal(given, value, slope, scale, NORMALIZED, BOUND)
    at_back, by_signal, at_slope, radial = adjoint.signal_adjoint(
        _load(grad, C, H), signal, tangent, along, factor, given, value, slope, curvature, scale,
        NORMALIZED, BOUND,
    )  # fmt: skip
    _store(outs, at_back, C, H)
    total = _load(at_value, C, H) + by_signal
    _store(
        outs + C * H, adjoint.hidden_adjoint(total, value, slope, scale, radial, NORMALIZED) + at_slope, C, H
    )
    plain = adjoint.hidden_adjoint(_load(at_value, C, H), value, slope, scale, None, NORMALIZED)
    _store(outs + 2 * C * H, plain, C, H)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("normalized", "bound"), [(True, 1.0), (True, None), (False, 0.5)])
def test_hidden_layer_and_error_signal(activation, normalized, bound):
    """Against autograd through both: the value and the error signal meet in z."""
    rule = MemoryRule(activation=activation, normalize_hidden=normalized, error_bound=bound)
    z, back, grad, at_value = (torch.randn(C, OUT, dtype=torch.float64) for _ in range(4))
    outs = torch.empty(3, C, OUT)
    given = [x.float() for x in (z, back, grad, at_value)]
    _hidden[(1,)](*given, outs, C, OUT, activation, normalized, bound or 0.0)
    z.requires_grad_()
    back.requires_grad_()
    value, slope = activate(z, rule.activation)
    scale = inverse_norm(value) if rule.normalize_hidden else 1
    value = value * scale
    tangent = back - value * (value * back).sum(-1, keepdim=True) if rule.normalize_hidden else back
    signal = bound_length(scale * tangent * slope, rule.error_bound)
    both = torch.autograd.grad((signal, value), (back, z), (grad, at_value), retain_graph=True)
    (plain,) = torch.autograd.grad(value, z, at_value)
    for found, expected in zip(outs, (*both, plain)):
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def coefficients(momentum=False):
    log = -torch.rand(1, C, dtype=torch.float64)
    mu = 0.9 * torch.rand(1, C, dtype=torch.float64) if momentum else None
    return log, mu, chunk_coefficients(log, mu, None)


def draw(*shapes):
    return [torch.randn(1, *shape, dtype=torch.float64) for shape in shapes]


def assert_tiles(found, expected):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        b = b.reshape(a.shape).float()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, i=index: f"part {i}: {m}")


@triton.jit
def _write(
    grad, grad_written, state, x, signal, rate, log,
    at_state, at_x, at_signal, at_rate, at_strict, at_gram, at_before, at_to_end, at_final,
    C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, ERASES: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, C)
    before, _, strict, _, to_end, final = forward.spread(tl.load(log + row), C)
    tile, eta, weight = _load(x, C, IN), tl.load(rate + row), _load(state, OUT, IN)
    gram, inverse = forward.erase_matrices(
        forward.matmul(tile, tl.trans(tile), "ieee"), eta, strict, C, "ieee"
    )
    surprise, written, recalled = forward.write_forward(
        weight, tile, _load(signal, C, OUT), eta, before, inverse, ERASES, "ieee"
    )
    outer = None
    if grad_written is not None:
        outer = _load(grad_written, C, OUT)
    found = adjoint.write_adjoint(
        _load(grad, OUT, IN), outer, weight, tile, surprise, written, recalled, eta, before, to_end, final,
        gram, inverse, ERASES, "ieee",
    )  # fmt: skip
    _store(at_state, found[0], OUT, IN)
    _store(at_x, found[1], C, IN)
    _store(at_signal, found[2], C, OUT)
    tl.store(at_rate + row, found[3])
    _store(at_strict, found[4], C, C)
    _store(at_gram, found[5], C, C)
    tl.store(at_before + row, found[6])
    tl.store(at_to_end + row, found[7])
    tl.store(at_final, found[8])


@pytest.mark.parametrize("outer", [False, True], ids=["", "running read"])
@pytest.mark.parametrize("erases", [False, True], ids=["decay alone", "erases"])
def test_write(erases, outer):
    grad, grad_written, state, x, signal = draw((OUT, IN), (C, OUT), (OUT, IN), (C, IN), (C, OUT))
    x, rate = x / 4, torch.rand(1, C, 1, dtype=torch.float64)
    log, _, spreads = coefficients()
    erase = layer.erase_matrices(x @ x.mT, rate, spreads.decay.strict) if erases else None
    given = layer.LayerInput(x, signal, rate, spreads, erase, None, None)
    _, _, write = layer.write(state, None, given)
    outer = grad_written if outer else None

    def add_reads(decaying, written):
        if outer is not None:
            decaying += outer

    found = layer.write_adjoint(grad, None, add_reads, state, None, given, write)
    zeros = {"strict": log.new_zeros(C, C), "before": log.new_zeros(C)} | found.decay
    gram = log.new_zeros(C, C) if found.gram is None else found.gram
    expected = [found.state, found.x, found.signal, found.rate, zeros["strict"], gram]
    expected += [zeros[name] for name in ("before", "to_end", "final")]
    shapes = [(OUT, IN), (C, IN), (C, OUT), (C,), (C, C), (C, C), (C,), (C,), (1,)]
    outs = [torch.empty(shape) for shape in shapes]
    given = [None if t is None else t.float() for t in (grad, outer, state, x, signal, rate, log)]
    _write[(1,)](*given, *outs, C, IN, OUT, erases)
    assert_tiles(outs, expected)


@triton.jit
def _read(
    grad, queries, state, x, written, log, at_queries, at_state, at_x, at_written, at_after, at_full,
    C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, C)
    _, after, _, full, _, _ = forward.spread(tl.load(log + row), C)
    query, weight, tile, u = (
        _load(queries, C, IN),
        _load(state, OUT, IN),
        _load(x, C, IN),
        _load(written, C, OUT),
    )
    _, recalled, scores = forward.read_forward(query, weight, tile, u, after, full, "ieee")
    found = adjoint.read_adjoint(
        _load(grad, C, OUT), query, weight, tile, u, recalled, scores, after, full, "ieee"
    )
    _store(at_queries, found[0], C, IN)
    _store(at_state, found[1], OUT, IN)
    _store(at_x, found[2], C, IN)
    _store(at_written, found[3], C, OUT)
    tl.store(at_after + row, found[4])
    _store(at_full, found[5], C, C)


def test_running_read():
    given = draw((C, OUT), (C, IN), (OUT, IN), (C, IN), (C, OUT))
    grad, queries, state, x, written = given
    log, _, spreads = coefficients()
    _, read = layer.read(queries, state, None, None, x, written, None, spreads)
    expected = layer.read_adjoint(grad, state, None, None, x, written, None, spreads, read)
    parts = (expected.queries, expected.state, expected.x, expected.decaying)
    outs = [torch.empty(shape) for shape in [(C, IN), (OUT, IN), (C, IN), (C, OUT), (C,), (C, C)]]
    _read[(1,)](*(t.float() for t in given), log.float(), *outs, C, IN, OUT)
    assert_tiles(outs, [*parts, expected.decay["after"], expected.decay["full"]])


@triton.jit
def _pieces(gram, x, grad, rate, at_x, at_rate, by_rate, C: tl.constexpr, IN: tl.constexpr):
    row = tl.arange(0, C)
    tile, eta = _load(x, C, IN), tl.load(rate + row)
    _store(at_x, adjoint.gram_adjoint(_load(gram, C, C), tile, "ieee"), C, IN)
    found = adjoint.proximal_adjoint(tl.load(grad + row), eta, tile, forward.proximal_rate(eta, tile))
    tl.store(at_rate + row, found[0])
    _store(by_rate, found[1], C, IN)


def test_gram_and_proximal_rate():
    gram, x, grad = draw((C, C), (C, IN), (C, 1))
    rate = torch.rand(1, C, 1, dtype=torch.float64)
    outs = [torch.empty(shape) for shape in [(C, IN), (C,), (C, IN)]]
    _pieces[(1,)](*(t.float() for t in (gram, x, grad, rate)), *outs, C, IN)
    proximal = layer.proximal_adjoint(grad, rate, x, layer.proximal_rate(rate, x))
    assert_tiles(outs, [layer.gram_adjoint(gram, x), *proximal])


@triton.jit
def _decays(before, after, strict, full, to_end, final, out, C: tl.constexpr):
    row = tl.arange(0, C)
    found = adjoint.decay_adjoint(
        tl.load(before + row), tl.load(after + row), _load(strict, C, C), _load(full, C, C),
        tl.load(to_end + row), tl.load(final), C, "ieee",
    )  # fmt: skip
    tl.store(out + row, found)
    absent = adjoint.decay_adjoint(None, None, None, None, None, tl.load(final), C, "ieee")
    tl.store(out + C + row, absent)


def test_log_decays():
    before, after, strict, full, to_end, final = draw((C, 1), (C, 1), (C, C), (C, C), (C, 1), (1, 1))
    strict, full = strict.tril(-2), full.tril()
    out = torch.empty(2, C)
    _decays[(1,)](*(t.float() for t in (before, after, strict, full, to_end, final)), out, C)
    parts = {"before": before, "after": after, "strict": strict, "full": full, "to_end": to_end}
    spreads = coefficients()[2]
    expected, _ = coefficient_adjoint(spreads, None, None, parts | {"final": final}, {}, {})
    only, _ = coefficient_adjoint(spreads, None, None, {"final": final}, {}, {})
    assert_tiles(out[:, None], [expected, only])


@triton.jit
def _momentum(
    grad, grad_velocity, state, velocity, x, signal, rate, queries, grad_read, log, momentum, applied,
    at_state, at_velocity, at_x, at_signal, at_rate, at_log, at_momentum, at_queries,
    C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, C)
    weight, moving, tile, eta = (
        _load(state, OUT, IN),
        _load(velocity, OUT, IN),
        _load(x, C, IN),
        tl.load(rate + row),
    )
    mu, counts = tl.load(momentum + row), tl.load(applied + row) != 0
    _, after, _, full, to_end, final = forward.spread(tl.load(log + row), C)
    _, c_after, _, c_full, c_to_end, c_final = forward.spread(tl.log(mu + 1e-30), C)
    m_after, m_full, m_to_end, m_final = forward.mixed_spread(full, to_end, c_after, c_full, counts, "ieee")
    delta, query, at_y = _load(signal, C, OUT), _load(queries, C, IN), _load(grad_read, C, OUT)
    _, _, write = forward.momentum_forward(
        weight, moving, tile, delta, eta, final, m_to_end, m_final, c_to_end, c_final, "ieee"
    )
    _, recalled, scores = forward.read_forward(query, weight, tile, write, after, m_full, "ieee")
    by_query, by_state, by_x, by_write, g_after, _ = adjoint.read_adjoint(
        at_y, query, weight, tile, write, recalled, scores, after, m_full, "ieee"
    )
    more, by_velocity, g_m_after, g_m_full = adjoint.velocity_read_adjoint(
        at_y, query, moving, tile, write, m_after, "ieee"
    )
    found = adjoint.momentum_adjoint(
        _load(grad, OUT, IN), _load(grad_velocity, OUT, IN), by_write, weight, moving, tile, delta, write,
        eta, final, m_to_end, m_final, c_to_end, c_final, "ieee",
    )  # fmt: skip
    _store(at_state, found[0] + by_state, OUT, IN)
    _store(at_velocity, found[1] + by_velocity, OUT, IN)
    _store(at_x, found[2] + by_x, C, IN)
    _store(at_signal, found[3], C, OUT)
    tl.store(at_rate + row, found[4])
    _store(at_queries, by_query + more, C, IN)
    g_full, g_to_end, g_c_after, g_c_full = adjoint.mixed_adjoint(
        g_m_after, g_m_full, found[6], found[7], full, to_end, c_after, c_full, counts, "ieee"
    )
    tl.store(at_log + row, adjoint.decay_adjoint(None, g_after, None, g_full, g_to_end, found[5], C, "ieee"))
    g_momentum = adjoint.momentum_gradient(
        g_c_after, g_c_full, found[8] * c_to_end, found[9] * c_final, mu, C, "ieee"
    )
    tl.store(at_momentum + row, g_momentum)


@pytest.mark.parametrize("padded", [False, True])
def test_momentum_without_erasing(padded):
    """Against autograd through the coefficients, the write and the running read; some momenta are 0."""
    shapes = [(OUT, IN), (OUT, IN), (OUT, IN), (OUT, IN), (C, IN), (C, OUT), (C, IN), (C, OUT)]
    grad, grad_velocity, state, velocity, x, signal, queries, grad_read = draw(*shapes)
    rate = torch.rand(1, C, 1, dtype=torch.float64)
    log, momentum, _ = coefficients(momentum=True)
    momentum[0, [3, 4, 9]] = 0
    applied = torch.ones(1, C, dtype=torch.float64)
    if padded:
        applied[0, [0, 5, 14, 15]] = 0
        empty = applied == 0
        log[empty], momentum[empty], rate[empty] = 0, 1, 0
    leaves = [t.requires_grad_() for t in (state, velocity, x, signal, rate, log, momentum, queries)]
    decay, carried, mixed = chunk_coefficients(log, momentum, applied if padded else None)
    write = signal * -rate
    after = state * decay.final + velocity * mixed.final + write.mT @ (x * mixed.to_end)
    velocity_after = velocity * carried.final + write.mT @ (x * carried.to_end)
    y = decay.after * (queries @ state.mT) + mixed.after * (queries @ velocity.mT)
    y = y + (mixed.full * (queries @ x.mT)) @ write
    expected = torch.autograd.grad((after, velocity_after, y), leaves, (grad, grad_velocity, grad_read))
    outs = [torch.empty(t.shape) for t in leaves]
    given = (
        grad,
        grad_velocity,
        state,
        velocity,
        x,
        signal,
        rate,
        queries,
        grad_read,
        log,
        momentum,
        applied,
    )
    _momentum[(1,)](*(t.detach().float().contiguous() for t in given), *outs, C, IN, OUT)
    assert TINY == 1e-30
    assert_tiles(outs, expected)
