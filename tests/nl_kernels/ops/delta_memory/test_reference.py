"""The definition itself, on cases that can be solved by hand."""

import pytest
import torch

from nl_kernels import chunk_gated_delta_rule, delta_memory
from tools.op_inputs import delta_memory_inputs


def float64_inputs(length=9, heads=2, key_width=4, value_width=3, **options):
    return delta_memory_inputs(2, length, heads, key_width, value_width, dtype=torch.float64, **options)


def test_without_erase_and_decay_it_is_linear_attention():
    x = float64_inputs()
    o, _ = delta_memory(
        x["q"], x["k"], x["v"], torch.zeros_like(x["erase"]), torch.zeros_like(x["erase"]), impl="reference"
    )
    scores = torch.einsum("bthd,bshd->bhts", x["q"], x["k"]).tril()
    expected = torch.einsum("bhts,bshv->bthv", scores, x["v"])
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_orthonormal_keys_are_recalled_exactly_and_the_last_write_wins(impl):
    width = 6
    keys = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    k = torch.cat([keys, keys[:2]])[None, :, None]  # the first two are written again
    values = torch.randn(1, width + 2, 1, 3, dtype=torch.float64)
    ones = torch.ones(1, width + 2, 1, dtype=torch.float64)
    _, state = delta_memory(k, k, values, 0 * ones, ones, output_final_state=True, impl=impl)
    recalled = keys @ state[0, 0].mT
    expected = torch.cat([values[0, width:, 0], values[0, 2:width, 0]])
    torch.testing.assert_close(recalled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_decay_of_zero_forgets_exactly(impl, momentum):
    """At α = 0 with β = 0 and μ = 0 only the token's own write is left."""
    x = float64_inputs(initial_state=True, momentum=momentum)
    x["log_decay"][:, 5] = -torch.inf
    x["erase"][:, 5] = 0
    if momentum:
        x["momentum"][:, 5] = 0
    o, _ = delta_memory(**x, impl=impl)
    expected = x["v"][:, 5] * (x["k"][:, 5] * x["q"][:, 5]).sum(-1, keepdim=True)
    torch.testing.assert_close(o[:, 5], expected, rtol=1e-14, atol=1e-14)


def test_momentum_alone_is_a_geometric_sum_of_writes():
    length, rate = 6, 0.5
    x = float64_inputs(length=length)
    zeros = torch.zeros_like(x["erase"])
    _, (state, momentum_state) = delta_memory(
        x["q"],
        x["k"],
        x["v"],
        zeros,
        zeros,
        momentum=zeros + rate,
        output_final_state=True,
        impl="reference",
    )
    ages = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    weights = {"U": rate**ages, "S": (1 - rate ** (ages + 1)) / (1 - rate)}
    for name, actual in (("S", state), ("U", momentum_state)):
        expected = torch.einsum("t,bthv,bthk->bhvk", weights[name], x["v"], x["k"])
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_reading_before_is_reading_the_state_of_the_previous_token(impl):
    x = float64_inputs(initial_state=True, momentum=True)
    before, _ = delta_memory(**x, read="before", scale=0.5, impl=impl)
    state = (x["initial_state"], x["initial_momentum"])
    for t in range(x["q"].shape[1]):
        expected = 0.5 * torch.einsum("bhvk,bhk->bhv", state[0], x["q"][:, t])
        torch.testing.assert_close(before[:, t], expected, rtol=1e-12, atol=1e-12)
        token = {n: x[n][:, t : t + 1] for n in ("q", "k", "v", "log_decay", "erase", "momentum")}
        _, state = delta_memory(
            **token, initial_state=state[0], initial_momentum=state[1], output_final_state=True, impl=impl
        )


def gated_delta_net(q, k, v, g, beta, scale, state):
    """Gated DeltaNet, written as its paper prints it; state ``[B, H, Dk, Dv]``."""
    outputs = []
    for t in range(q.shape[1]):
        erased = state - beta[:, t, :, None, None] * torch.einsum(
            "bhk,bhj,bhjv->bhkv", k[:, t], k[:, t], state
        )
        written = beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        state = g[:, t, :, None, None].exp() * erased + written
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("normalise", [False, True])
def test_chunk_gated_delta_rule_is_gated_delta_net(normalise):
    x = float64_inputs(length=70, initial_state=True)
    q, k, v, g, beta = (x[n] for n in ("q", "k", "v", "log_decay", "erase"))
    if normalise:
        q, k = 3 * q, 2 * k
    state = x["initial_state"].mT
    o, final = chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=normalise
    )
    if normalise:
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    expected, expected_final = gated_delta_net(q, k, v, g, beta, 4**-0.5, state)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, expected_final, rtol=1e-10, atol=1e-10)
    assert chunk_gated_delta_rule(q, k, v, g, beta)[1] is None


def test_chunk_gated_delta_rule_takes_packed_sequences_and_a_scale():
    x = float64_inputs(length=20)
    q, k, v, g, beta = (x[n][:1] for n in ("q", "k", "v", "log_decay", "erase"))
    bounds = torch.tensor([0, 7, 20])
    states = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    o, final = chunk_gated_delta_rule(
        q, k, v, g, beta, scale=2.0, initial_state=states, output_final_state=True, cu_seqlens=bounds
    )
    for n, tokens in enumerate((slice(0, 7), slice(7, 20))):
        expected, expected_final = gated_delta_net(
            *(y[:, tokens] for y in (q, k, v, g, beta)), 2.0, states[n : n + 1]
        )
        torch.testing.assert_close(o[:, tokens], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(final[n : n + 1], expected_final, rtol=1e-10, atol=1e-10)


def test_heads_of_values_that_share_one_of_queries_and_keys():
    """The same as with the shared heads repeated, and gradients of the shared ones; packed, with a state."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v, start = random(1, 11, 2, 4), random(1, 11, 2, 4), random(1, 11, 6, 3), random(2, 6, 4, 3)
    g, beta = -random(1, 11, 6).exp(), random(1, 11, 6).sigmoid()
    options = {"initial_state": start, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    options |= {"cu_seqlens": torch.tensor([0, 4, 11]), "chunk_size": 16}
    found = chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **options)
    repeated = (torch.stack([x[:, :, 0]] * 3 + [x[:, :, 1]] * 3, 2) for x in (q, k))
    expected = chunk_gated_delta_rule(*repeated, v, g=g, beta=beta, **options)
    gradients = []
    for results in (found, expected):
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in results)
        gradients.append(torch.autograd.grad(loss, [q, k, v, start], retain_graph=True))
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="head_first: chunk_gated_delta_rule has no such option"):
        chunk_gated_delta_rule(q, k, v, g, beta, head_first=True)
    with pytest.raises(ValueError, match="v: expected a multiple of q's 4 heads, got 6 heads"):
        chunk_gated_delta_rule(torch.cat([q, q], 2), torch.cat([k, k], 2), v, g, beta)
    with pytest.raises(ValueError, match=r"k: expected shape \(1, 11, 2, 4\), got \(1, 11, 1, 4\)"):
        chunk_gated_delta_rule(q, k[:, :, :1], v, g, beta)
