"""The definition against closed forms: what a step is, before anything is batched."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from nl_kernels import ContinuumLevel, continuum_flush, continuum_memory

WIDTH, HIDDEN = 5, 7


def make_level(seed=0, *, gated=False, hidden=HIDDEN, **options):
    """A level with random fp64 tensors that need gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, shift=0.0):
        values = shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    return ContinuumLevel(
        norm=normal(WIDTH, scale=0.1, shift=1.0),
        up=normal(hidden, WIDTH, scale=0.5),
        down=normal(WIDTH, hidden, scale=0.5),
        gate=normal(hidden, WIDTH, scale=0.5) if gated else None,
        key=normal(WIDTH, WIDTH, scale=0.5),
        value=normal(WIDTH, WIDTH, scale=0.5),
        **options,
    )


def tokens(*shape, seed=1):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner_loss(level, up, down, gate, inner):
    """½‖f(k) − v‖² summed over the tokens ``inner`` [N, D], written out without the op."""
    key = F.rms_norm(inner @ level.key.mT, (WIDTH,), None, 1e-6)
    hidden = F.gelu(key @ up.mT) if gate is None else F.silu(key @ gate.mT) * (key @ up.mT)
    return 0.5 * (hidden @ down.mT - inner @ level.value.mT).square().sum(), key, hidden


def state_after(x, level, **options):
    return continuum_memory(x, [level], output_final_state=True, impl="reference", **options)[1][0]


@pytest.mark.parametrize("gated", [False, True])
def test_a_step_of_sgd_is_the_gradient_of_the_inner_loss(gated):
    level = make_level(gated=gated, chunk_size=4, rate=0.3, rule="sgd", error_bound=None)
    x = tokens(1, 4)
    inner = F.rms_norm(x[0], (WIDTH,), level.norm, 1e-6)
    parts = [level.up, level.down] + ([level.gate] if gated else [])
    loss = inner_loss(level, level.up, level.down, level.gate, inner)[0]
    gradients = torch.autograd.grad(loss, parts)
    state = state_after(x, level)
    for name, part, gradient in zip(("up", "down", "gate"), parts, gradients):
        torch.testing.assert_close(getattr(state, name)[0], part - 0.3 * gradient, rtol=0, atol=1e-12)


def test_a_step_that_predicts_has_the_next_tokens_as_targets():
    """At their rates; the last token of a chunk has none, also where the chunk is cut short by a flush."""
    level = make_level(chunk_size=4, rate=tokens(1, 4)[..., 0].abs(), error_bound=None, predict_next=True)
    x = tokens(1, 4)
    inner = F.rms_norm(x[0], (WIDTH,), level.norm, 1e-6)
    for count, state in (
        (4, state_after(x, level)),
        (3, continuum_flush((state_after(x[:, :3], cut(level, 3)),), [level], impl="reference")[0]),
    ):
        key = F.rms_norm(inner[: count - 1] @ level.key.mT, (WIDTH,), None, 1e-6)
        error = F.gelu(key @ level.up.mT) @ level.down.mT - inner[1:count] @ level.value.mT
        loss = 0.5 * (level.rate[0, 1:count, None] * error.square()).sum()
        gradients = torch.autograd.grad(loss, [level.up, level.down], retain_graph=True)
        for found, part, gradient in zip((state.up, state.down), (level.up, level.down), gradients):
            torch.testing.assert_close(found[0], part - gradient, rtol=0, atol=1e-12)


def cut(level, length):
    """The level with the rates of the first tokens."""
    return dataclasses.replace(level, rate=level.rate[:, :length])


def test_a_level_that_predicts_answers_with_what_came_next():
    """a b a b … then a: nearer to the value of b than to that of a; without, the other way round."""
    pair = tokens(2)
    x = pair[None, torch.arange(9) % 2]

    def likeness(predict_next):
        level = make_level(chunk_size=8, rate=0.1, predict_next=predict_next)
        level = dataclasses.replace(level, key=None, down=torch.zeros_like(level.down))
        answer = (continuum_memory(x, [level], impl="reference")[0] - x)[0, -1]
        values = F.rms_norm(pair, (WIDTH,), level.norm, 1e-6) @ level.value.mT
        return torch.cosine_similarity(answer, values)

    of_a, of_b = likeness(True)
    assert of_b > 0.5 > of_a
    of_a, of_b = likeness(False)
    assert of_a > 0.5 > of_b


@pytest.mark.parametrize("gated", [False, True])
def test_period_one_sgd_is_online_sgd(gated):
    level = make_level(gated=gated, chunk_size=1, rate=0.05, rule="sgd", error_bound=None)
    x = tokens(1, 6)
    weights = [
        w.detach().clone().requires_grad_() for w in (level.up, level.down, level.gate) if w is not None
    ]
    optimizer = torch.optim.SGD(weights, lr=0.05)
    outputs = []
    for inner, row in zip(F.rms_norm(x[0], (WIDTH,), level.norm, 1e-6).detach(), x[0]):
        gate = weights[2] if gated else None
        hidden = F.gelu(weights[0] @ inner) if gate is None else F.silu(gate @ inner) * (weights[0] @ inner)
        outputs.append(row + weights[1] @ hidden)
        optimizer.zero_grad()
        inner_loss(level, weights[0], weights[1], gate, inner[None])[0].backward()
        optimizer.step()
    y, _ = continuum_memory(x, [level], impl="reference")
    torch.testing.assert_close(y[0], torch.stack(outputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rates", [0.4, torch.tensor([[0.1, 0.0, 0.9, 3.0]], dtype=torch.float64)])
def test_a_step_of_dgd_minimises_its_proximal_problem(rates):
    level = make_level(chunk_size=4, rate=rates, rule="dgd", error_bound=None)
    x = tokens(1, 4)
    inner = F.rms_norm(x[0], (WIDTH,), level.norm, 1e-6)
    weights = [w.detach().requires_grad_() for w in (level.up, level.down)]
    _, key, hidden = inner_loss(level, *weights, None, inner)
    state = state_after(x, level)
    # gradients at the layers' outputs, by shifting the outputs
    shifts = [
        torch.zeros(4, HIDDEN).double().requires_grad_(),
        torch.zeros(4, WIDTH).double().requires_grad_(),
    ]
    shifted = F.gelu(key @ weights[0].mT + shifts[0]) @ weights[1].mT + shifts[1]
    loss = 0.5 * (shifted - inner @ level.value.mT).square().sum()
    signals = torch.autograd.grad(loss, shifts)
    eta = torch.as_tensor(rates, dtype=torch.float64).expand(1, 4)[0]
    for start, found, signal, inputs in zip(weights, (state.up, state.down), signals, (key, hidden)):

        def proximal(w, start=start, signal=signal, inputs=inputs):
            outputs = inputs.detach() @ w.mT
            terms = (signal * outputs).sum(-1) + 0.5 * outputs.square().sum(-1)
            return 0.5 * (w - start.detach()).square().sum() + (eta * terms).sum()

        minimum = found[0].detach().requires_grad_()
        gradient = torch.autograd.grad(proximal(minimum), minimum)[0]
        assert gradient.abs().max() < 1e-12
        assert (minimum - start).abs().max() > 1e-3


@pytest.mark.parametrize("gated", [False, True])
def test_the_error_bound_bounds_every_signal(gated):
    bound, rate = 0.25, 0.7
    free = make_level(gated=gated, chunk_size=1, rate=rate, rule="sgd", error_bound=None)
    tight = make_level(gated=gated, chunk_size=1, rate=rate, rule="sgd", error_bound=bound)
    x = 3 * tokens(1, 1)
    inner = F.rms_norm(x[0], (WIDTH,), free.norm, 1e-6)
    _, key, hidden = inner_loss(free, free.up, free.down, free.gate, inner)
    ratios = []
    for name, inputs in (("up", key), ("down", hidden), ("gate", key))[: 3 if gated else 2]:
        signals = []
        for level in (free, tight):
            change = getattr(level, name) - getattr(state_after(x, level), name)[0]
            signals.append(change @ inputs[0] / (rate * inputs.square().sum()))
        mean_square = signals[1].square().mean()
        assert mean_square <= bound**2 * (1 + 1e-9)
        ratios.append((signals[1] / signals[0]).max() / (signals[1] / signals[0]).min())
        if name == "down":
            assert mean_square >= bound**2 * (1 - 1e-9)  # the targets are far away: the bound is met
            assert ratios[-1] < 1 + 1e-9  # scaled down, not turned


def test_a_loose_bound_changes_nothing():
    x = tokens(1, 3)
    states = [state_after(x, make_level(chunk_size=1, rate=0.1, error_bound=bound)) for bound in (None, 1e3)]
    assert torch.equal(states[0].down, states[1].down)
    assert torch.equal(states[0].up, states[1].up)


@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_gradients_through_the_steps(rule):
    level = make_level(hidden=3, chunk_size=2, rate=0.2, rule=rule)
    x = tokens(1, 5).requires_grad_()
    rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def run(x, norm, up, down, key, value, rate):
        options = {"chunk_size": 2, "rate": rate, "rule": rule, "error_bound": 0.5}
        moved = ContinuumLevel(norm=norm, up=up, down=down, key=key, value=value, **options)
        y, (state,) = continuum_memory(x, [moved], output_final_state=True, impl="reference")
        return y, state.up, state.down, state.pending_inputs

    inputs = (x, level.norm, level.up, level.down, level.key, level.value, rate)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
