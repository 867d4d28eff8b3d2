"""The definition against autograd of the inner loss, and against closed forms."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from nl_kernels import DeepMemoryWeights, MemoryRule, deep_memory, delta_memory
from tools.op_inputs import deep_memory_inputs

LITERAL = MemoryRule.literal()
PLAIN = MemoryRule(anchored=False, error_bound=None)


def written_out(weights, x, rule):
    """M(x) for one head of one sequence, from the formula."""
    inner, outer = weights
    hidden = {"silu": F.silu, "gelu": F.gelu}[rule.activation](inner @ x)
    if rule.normalize_hidden:
        hidden = hidden / (hidden.square().sum() + 1e-6).sqrt()
    return outer @ hidden + (x if rule.residual else 0), hidden


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_linear_memories_of_errors_at_the_anchor_are_gated_delta_memories(chunk_size, impl):
    """Δ_t = Δ_{t-1}(α − η k kᵀ) + η (v − W_0 k) kᵀ, however many tokens a chunk has."""
    rule = MemoryRule(error_at="anchor", error_bound=None)
    x = deep_memory_inputs(2, 13, 2, 5, None, dtype=torch.float64)
    x["k"] = F.normalize(x["k"], dim=-1)
    anchor = x["weights"].inner
    options = {"rule": rule, "read": "running", "chunk_size": chunk_size, "impl": impl}
    o, state = deep_memory(**x, **options, output_final_state=True)
    rate = x["rate"][..., None]
    written = rate * (x["v"] - torch.einsum("hij,bthj->bthi", anchor, x["k"]))
    expected, change = delta_memory(
        x["q"], x["k"], written, x["log_decay"], x["rate"], output_final_state=True, impl="reference"
    )
    expected = expected + torch.einsum("hij,bthj->bthi", anchor, x["q"])
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.running.inner, change, rtol=0, atol=1e-12)


def test_a_key_that_comes_back_is_answered_with_its_value():
    """At a rate of 1 without decay; the snapshot's error takes out again what the erase has taken out."""
    x = deep_memory_inputs(1, 6, 1, 4, None, dtype=torch.float64)
    x["k"] = x["q"] = F.normalize(x["k"][:, :1], dim=-1).expand(1, 6, 1, 4)
    x["v"] = x["v"][:, :1].expand(1, 6, 1, 4)
    x["rate"], x["log_decay"] = torch.ones_like(x["rate"]), torch.zeros_like(x["log_decay"])
    x["weights"] = DeepMemoryWeights(torch.zeros_like(x["weights"].inner), None)
    share = {}
    for name in ("anchor", "snapshot"):
        rule = MemoryRule(error_at=name, error_bound=None)
        o, _ = deep_memory(**x, rule=rule, read="running", chunk_size=1)
        share[name] = [round((y @ v / (v @ v)).item(), 6) for y, v in zip(o[0, :, 0], x["v"][0, :, 0])]
    assert share == {"anchor": [1.0] * 6, "snapshot": [1.0, 0.0] * 3}


def test_two_steps_on_a_token_are_one_at_a_larger_rate():
    """Of a linear memory, a unit key and no decay: ``(1 − η)² = 1 − η(2 − η)``, whatever the value."""
    rule = MemoryRule(error_bound=None)
    x = deep_memory_inputs(2, 7, 2, 5, None, dtype=torch.float64)
    x["k"], x["log_decay"] = F.normalize(x["k"], dim=-1), torch.zeros_like(x["log_decay"])
    options = {"rule": rule, "read": "running", "chunk_size": 4}
    tokens = {name: x[name].repeat_interleave(2, 1) for name in ("q", "k", "v", "rate", "log_decay")}
    twice = {**x, **tokens}
    found = deep_memory(**twice, **options)[0][:, 1::2]
    x["rate"] = x["rate"] * (2 - x["rate"])
    torch.testing.assert_close(found, deep_memory(**x, **options)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normalize_hidden", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_write_is_the_gradient_of_half_the_squared_error(activation, normalize_hidden, residual):
    rule = dataclasses.replace(
        PLAIN, activation=activation, normalize_hidden=normalize_hidden, residual=residual, erase="none"
    )
    inputs = deep_memory_inputs(1, 1, 1, 4, 6, dtype=torch.float64)
    inputs["log_decay"].zero_()
    _, state = deep_memory(**inputs, rule=rule, chunk_size=2, output_final_state=True, impl="reference")

    weights = [w[0].clone().requires_grad_() for w in inputs["weights"]]
    prediction, _ = written_out(weights, inputs["k"][0, 0, 0], rule)
    loss = 0.5 * (prediction - inputs["v"][0, 0, 0]).square().sum()
    for before, gradient, after in zip(weights, torch.autograd.grad(loss, weights), state.running):
        torch.testing.assert_close(after[0, 0], before - inputs["rate"].item() * gradient, rtol=0, atol=1e-12)


def test_the_step_of_a_layer_is_the_exact_proximal_step():
    # W⁺ = argmin ½‖Wx‖² + ⟨δ, Wx⟩ + ‖W − W₀‖² / 2η: delta gradient descent, at any norm of x.
    inputs = deep_memory_inputs(1, 1, 1, 4, 6, dtype=torch.float64)
    inputs["k"] *= 1.7
    inputs["log_decay"].zero_()
    _, state = deep_memory(**inputs, rule=LITERAL, chunk_size=1, output_final_state=True, impl="reference")

    weights = [w[0] for w in inputs["weights"]]
    k, v, rate = inputs["k"][0, 0, 0], inputs["v"][0, 0, 0], inputs["rate"].item()
    prediction, hidden = written_out(weights, k, LITERAL)
    error = prediction - v
    z = (weights[0] @ k).requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(z).sum(), z)
    deltas = ((weights[1].T @ error) * slope, error)
    for before, delta, x, after in zip(weights, deltas, (k, hidden), state.running):
        found = after[0, 0].clone().requires_grad_()
        objective = (
            0.5 * (found @ x).square().sum()
            + delta.dot(found @ x)
            + (found - before).square().sum() / (2 * rate)
        )
        (gradient,) = torch.autograd.grad(objective, found)
        assert gradient.abs().max() < 1e-12


def test_errors_longer_than_the_bound_are_scaled_down():
    rule = dataclasses.replace(PLAIN, erase="none", error_bound=0.5)
    inputs = deep_memory_inputs(1, 1, 1, 4, 6, dtype=torch.float64)
    inputs["log_decay"].zero_()
    written = []
    for scale in (1.0, 100.0, 200.0):
        inputs["v"] = torch.full_like(inputs["v"], scale)
        _, state = deep_memory(**inputs, rule=rule, chunk_size=1, output_final_state=True, impl="reference")
        written.append([a[0, 0] - b[0] for a, b in zip(state.running, inputs["weights"])])
    # A longer target changes the direction a little and the length not at all: |ηδ xᵀ| = η · bound · |x|.
    for matrices in written:
        assert torch.linalg.matrix_norm(matrices[1]) <= inputs["rate"].item() * 0.5 + 1e-12
        assert torch.linalg.matrix_norm(matrices[0]) <= inputs["rate"].item() * 0.5 + 1e-12
    torch.testing.assert_close(
        torch.linalg.matrix_norm(written[1][1]), torch.linalg.matrix_norm(written[2][1]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("erase", ["per_layer", "input", "none"])
def test_which_layers_erase(erase):
    # Without an error nothing is written, so that a change of the weights is an erase.
    rule = dataclasses.replace(PLAIN, erase=erase)
    inputs = deep_memory_inputs(1, 1, 1, 4, 6, dtype=torch.float64)
    inputs["log_decay"].zero_()
    weights = [w[0] for w in inputs["weights"]]
    prediction, hidden = written_out(weights, inputs["k"][0, 0, 0], rule)
    inputs["v"] = prediction.view(1, 1, 1, -1)
    _, state = deep_memory(**inputs, rule=rule, chunk_size=1, output_final_state=True, impl="reference")
    rate = inputs["rate"].item()
    layers = zip(weights, (inputs["k"][0, 0, 0], hidden), state.running)
    for layer, (before, x, after) in enumerate(layers):
        expected = before
        if erase == "per_layer" or (erase == "input" and layer == 0):
            expected = before - rate * torch.outer(before @ x, x)
        torch.testing.assert_close(after[0, 0], expected, rtol=0, atol=1e-12)


def test_orthonormal_pairs_are_recalled_exactly_by_the_linear_memory():
    width = 4
    inputs = deep_memory_inputs(1, width, 1, width, None, dtype=torch.float64)
    inputs["k"] = inputs["q"] = torch.eye(width, dtype=torch.float64).view(1, width, 1, width)
    inputs["weights"] = DeepMemoryWeights(torch.zeros(1, width, width, dtype=torch.float64), None)
    inputs["rate"], inputs["log_decay"] = (torch.ones(1, width, 1), torch.zeros(1, width, 1))
    _, state = deep_memory(**inputs, rule=PLAIN, chunk_size=2, output_final_state=True, impl="reference")
    o, _ = deep_memory(
        **{**inputs, "rate": torch.zeros(1, width, 1)},
        rule=PLAIN,
        chunk_size=2,
        initial_state=state,
        impl="reference",
    )
    torch.testing.assert_close(o, inputs["v"], rtol=0, atol=1e-12)


def test_gradients_are_taken_at_the_snapshot():
    # Two equal tokens with rate r in one chunk write the same error twice; in two the second sees less.
    rule = dataclasses.replace(PLAIN, erase="none")
    inputs = deep_memory_inputs(1, 2, 1, 4, None, dtype=torch.float64)
    for name in ("q", "k", "v", "rate"):
        inputs[name][:, 1] = inputs[name][:, 0]
    inputs["log_decay"].zero_()
    k, v, rate = inputs["k"][0, 0, 0], inputs["v"][0, 0, 0], inputs["rate"][0, 0, 0]
    error = inputs["weights"].inner[0] @ k - v
    for chunk_size, factor in ((2, 2 * rate), (1, 2 * rate - rate**2)):
        _, state = deep_memory(
            **inputs, rule=rule, chunk_size=chunk_size, output_final_state=True, impl="reference"
        )
        change = state.running.inner[0, 0] - inputs["weights"].inner[0]
        torch.testing.assert_close(change, -factor * torch.outer(error, k), rtol=0, atol=1e-12)


def test_an_anchored_memory_forgets_only_what_it_learned():
    inputs = deep_memory_inputs(1, 3, 1, 4, 6, dtype=torch.float64)
    inputs["log_decay"].fill_(-torch.inf)
    inputs["rate"].zero_()
    for rule, expected in (
        (MemoryRule(), written_out([w[0] for w in inputs["weights"]], inputs["q"][0, 2, 0], MemoryRule())[0]),
        (PLAIN, torch.zeros(4, dtype=torch.float64)),
    ):
        o, _ = deep_memory(**inputs, rule=rule, chunk_size=1, impl="reference")
        torch.testing.assert_close(o[0, 2, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", ["average", "sum"])
def test_momentum_accumulates_the_writes(momentum):
    rule = dataclasses.replace(PLAIN, erase="none", momentum=momentum)
    inputs = deep_memory_inputs(1, 3, 1, 4, None, momentum=True, dtype=torch.float64)
    inputs["log_decay"].zero_()
    _, state = deep_memory(**inputs, rule=rule, chunk_size=4, output_final_state=True, impl="reference")
    start = inputs["weights"].inner[0]
    velocity, weight = torch.zeros_like(start), start
    for t in range(3):
        k, v = inputs["k"][0, t, 0], inputs["v"][0, t, 0]
        decay = inputs["momentum"][0, t, 0]
        share = 1 - decay if momentum == "average" else 1
        velocity = decay * velocity - share * inputs["rate"][0, t, 0] * torch.outer(start @ k - v, k)
        weight = weight + velocity
    torch.testing.assert_close(state.running.inner[0, 0], weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.momentum.inner[0, 0], velocity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("read", ["snapshot", "running"])
def test_gradcheck(read):
    inputs = deep_memory_inputs(1, 3, 1, 2, 2, momentum=True, dtype=torch.float64, requires_grad=True)
    weights = inputs.pop("weights")
    names = list(inputs)

    def op(*tensors):
        named = dict(zip(names, tensors))
        o, state = deep_memory(
            **named,
            weights=DeepMemoryWeights(*tensors[len(names) :]),
            rule=MemoryRule(error_bound=0.7),
            read=read,
            chunk_size=2,
            output_final_state=True,
            impl="reference",
        )
        return (o, *state.snapshot, *state.running, *state.momentum)

    torch.autograd.gradcheck(op, (*inputs.values(), *weights), fast_mode=True)
