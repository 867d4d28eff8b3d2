"""The shared functions on tiles, interpreted, against the eager functions of the same names."""

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels import forward
from nl_kernels.memory import decays, hidden, layer
from nl_kernels.memory_rule import MemoryRule

pytestmark = pytest.mark.interpreter

C, WIDTH, OUT = 16, 16, 32


@triton.jit
def _load(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _store(x, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(x + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], value)


@triton.jit
def _spread(log, before, after, strict, full, to_end, final, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    found = forward.spread(tl.load(log + row), SIZE)
    tl.store(before + row, found[0])
    tl.store(after + row, found[1])
    _store(strict, found[2], SIZE, SIZE)
    _store(full, found[3], SIZE, SIZE)
    tl.store(to_end + row, found[4])
    tl.store(final, found[5])


@triton.jit
def _mixed(log, log_momentum, applied, after, full, to_end, final, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    decay = forward.spread(tl.load(log + row), SIZE)
    carried = forward.spread(tl.load(log_momentum + row), SIZE)
    found = forward.mixed_spread(
        decay[3], decay[4], carried[1], carried[3], tl.load(applied + row) != 0, "ieee"
    )
    tl.store(after + row, found[0])
    _store(full, found[1], SIZE, SIZE)
    tl.store(to_end + row, found[2])
    tl.store(final, found[3])


@triton.jit
def _hidden(
    z,
    back,
    value,
    slope,
    curvature,
    scale,
    signal,
    tangent,
    along,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BOUND: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    hidden = forward.activated(_load(z, ROWS, COLUMNS), ACTIVATION, NORMALIZED)
    _store(value, hidden[0], ROWS, COLUMNS)
    _store(slope, hidden[1], ROWS, COLUMNS)
    _store(curvature, hidden[2], ROWS, COLUMNS)
    tl.store(scale + row, hidden[3])
    given = _load(back, ROWS, COLUMNS)
    made = forward.error_signal(given, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)
    _store(signal, made[0], ROWS, COLUMNS)
    _store(tangent, made[1], ROWS, COLUMNS)
    tl.store(along + row, made[2])
    tl.store(factor + row, made[3])


@triton.jit
def _write(
    state,
    x,
    signal,
    rate,
    log,
    gram,
    inverse,
    used,
    surprise,
    written,
    recalled,
    after,
    reads,
    scores,
    ERASES: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUTS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    before, full_start, strict, full, to_end, final = forward.spread(tl.load(log + row), ROWS)
    held, key = _load(state, OUTS, IN), _load(x, ROWS, IN)
    eta = forward.proximal_rate(tl.load(rate + row), key)
    tl.store(used + row, eta)
    kept, solved = forward.erase_matrices(tl.dot(key, tl.trans(key)), eta, strict, ROWS, "ieee")
    _store(gram, kept, ROWS, ROWS)
    _store(inverse, solved, ROWS, ROWS)
    delta = _load(signal, ROWS, OUTS)
    made = forward.write_forward(held, key, delta, eta, before, solved, ERASES, "ieee")
    _store(surprise, made[0], ROWS, OUTS)
    _store(written, made[1], ROWS, OUTS)
    _store(recalled, made[2], ROWS, OUTS)
    _store(after, forward.carry_state(held, made[1], key, to_end, final, "ieee"), OUTS, IN)
    found = forward.read_forward(key + 1.0, held, key, made[1], full_start, full, "ieee")
    _store(reads, found[0], ROWS, OUTS)
    _store(scores, found[2], ROWS, ROWS)


@triton.jit
def _momentum(
    state,
    velocity,
    x,
    signal,
    rate,
    log,
    log_momentum,
    after,
    velocity_after,
    write,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUTS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    decay = forward.spread(tl.load(log + row), ROWS)
    carried = forward.spread(tl.load(log_momentum + row), ROWS)
    mixed = forward.mixed_spread(decay[3], decay[4], carried[1], carried[3], row >= 0, "ieee")
    found = forward.momentum_forward(
        _load(state, OUTS, IN),
        _load(velocity, OUTS, IN),
        _load(x, ROWS, IN),
        _load(signal, ROWS, OUTS),
        tl.load(rate + row),
        decay[5],
        mixed[2],
        mixed[3],
        carried[4],
        carried[5],
        "ieee",
    )
    _store(after, found[0], OUTS, IN)
    _store(velocity_after, found[1], OUTS, IN)
    _store(write, found[2], ROWS, OUTS)


def logs():
    log = -torch.rand(C)
    log[5] = -torch.inf
    log[9] = -50.0
    return log


def empty_like(expected):
    return [torch.full_like(x, float("nan")).contiguous() for x in expected]


def assert_equal(found, expected):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            a, b.reshape(a.shape), rtol=1e-5, atol=1e-5, msg=lambda m, i=index: f"{i}: {m}"
        )


def test_spread():
    log = logs()
    expected = decays.chunk_coefficients(log, None, None).decay
    found = empty_like(expected)
    _spread[(1,)](log, *found, C)
    assert_equal(found, expected)


def test_mixed_spread():
    log, momentum, applied = logs(), torch.rand(C), (torch.arange(C) < 12).float()
    momentum[3] = 0
    expected = decays.chunk_coefficients(log, momentum, applied).mixed
    expected = (expected.after, expected.full, expected.to_end, expected.final)
    found = empty_like(expected)
    _mixed[(1,)](log, (momentum + decays.TINY).log(), applied, *found, C)
    assert_equal(found, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("bound", [None, 1.0])
def test_hidden_layer_and_error_signal(activation, normalized, bound):
    rule = MemoryRule(activation=activation, normalize_hidden=normalized, error_bound=bound)
    z, back = 2 * torch.randn(C, WIDTH), torch.randn(C, WIDTH)
    z[3] = 0
    back[4] *= 0.01
    at_z = hidden.activated(z.clone(), rule)
    signal = hidden.error_signal(back, at_z, rule)
    one = torch.ones(C, 1)
    scale = one if at_z.scale is None else at_z.scale
    factor = one if signal.factor is None else signal.factor
    along = hidden.row_dot(at_z.value, back)
    expected = (*at_z[:3], scale, signal.value, signal.tangent, along, factor)
    found = empty_like(expected)
    _hidden[(1,)](z, back, *found, C, WIDTH, activation, normalized, bound or 0.0)
    assert_equal(found, expected)
    assert (found[-1] < 1).any() == (bound is not None)


@pytest.mark.parametrize("erases", [True, False])
def test_write_and_read(erases):
    state, x, signal = torch.randn(OUT, WIDTH), torch.randn(C, WIDTH), torch.randn(C, OUT)
    rate, log = torch.rand(C), logs()
    coefficients = decays.chunk_coefficients(log[None], None, None)
    used = layer.proximal_rate(rate[None, :, None], x[None])
    erase = layer.erase_matrices((x @ x.T)[None], used, coefficients.decay.strict)
    given = layer.LayerInput(x[None], signal[None], used, coefficients, erase if erases else None, None, None)
    after, _, write = layer.write(state[None], None, given)
    recalled = torch.zeros(C, OUT) if write.recalled is None else write.recalled
    reads, read = layer.read((x + 1)[None], state[None], None, None, x[None], *write[:2], coefficients)
    expected = (*erase, used, write.surprise, write.decaying, recalled, after, reads, read.scores)
    found = empty_like(expected)
    _write[(1,)](state, x, signal, rate, log, *found, erases, C, WIDTH, OUT)
    assert_equal(found, expected)


def test_momentum():
    state, velocity = torch.randn(OUT, WIDTH), torch.randn(OUT, WIDTH)
    x, signal = torch.randn(C, WIDTH), torch.randn(C, OUT)
    rate, log, momentum = torch.rand(C), logs(), torch.rand(C)
    coefficients = decays.chunk_coefficients(log[None], momentum[None], None)
    given = layer.LayerInput(x[None], signal[None], rate[None, :, None], coefficients, None, None, None)
    after, velocity_after, write = layer.write(state[None], velocity[None], given)
    expected = (after, velocity_after, write.written)
    found = empty_like(expected)
    _momentum[(1,)](state, velocity, x, signal, rate, log, momentum.log(), *found, C, WIDTH, OUT)
    assert_equal(found, expected)
