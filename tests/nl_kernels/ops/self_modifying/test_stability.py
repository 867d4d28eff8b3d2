"""The default stays bounded, untrained, on inputs that break the literal rule."""

import pytest
import torch

from nl_kernels import DeepMemoryWeights, MemoryRule, SelfModifyingWeights, self_modifying_memory
from nl_kernels.doctor import tensors_of

WIDTH = 16


def stream(kind, length, seed=0):
    """Key, value, query and gate inputs [4, 1, T, 1, D] of one kind of hardship."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, 1, WIDTH, generator=rng)
    if kind == "eight repeated tokens":
        x = x[:, torch.arange(length) % 8]
    elif kind == "one constant token":
        x = x[:, :1].expand(1, length, 1, WIDTH)
    return torch.stack([x, -x if kind == "v = -k" else x, x, x])


def initial_weights(seed=1, linear=False):
    rng = torch.Generator().manual_seed(seed)

    def memory(out):
        if linear:
            return DeepMemoryWeights(torch.randn(1, out, WIDTH, generator=rng) * 0.3, None)
        return DeepMemoryWeights(
            torch.randn(1, WIDTH, WIDTH, generator=rng) * WIDTH**-0.5,
            torch.randn(1, out, WIDTH, generator=rng) * 0.3,
        )

    return SelfModifyingWeights(
        key=memory(WIDTH), value=memory(WIDTH), memory=memory(WIDTH), rate=memory(1), retention=memory(1)
    )


def largest_state(
    kind,
    length,
    rule,
    *,
    chunk_size=16,
    read="snapshot",
    piece=4096,
    linear=False,
    rate_max=1.0,
    rate_bias=9.0,
    retention_bias=9.0,
    decay=None,
):
    """Largest norm of a state tensor at the end of any piece, or output; NaN and Inf count as infinite."""
    weights, state, largest = initial_weights(linear=linear), None, 0.0
    with torch.no_grad():
        for start in range(0, length, piece):
            key, value, query, gate = stream(kind, min(piece, length - start), seed=start)
            momentum = None if decay is None else torch.full(query.shape[:3], decay)
            o, state = self_modifying_memory(
                query,
                key,
                value,
                gate,
                weights,
                rule=rule,
                chunk_size=chunk_size,
                momentum=momentum,
                read=read,
                rate_max=rate_max,
                rate_bias=rate_bias,  # η and α as near to their largest as they come
                retention_bias=retention_bias,
                initial_state=state,
                output_final_state=True,
            )
            for size in [o.abs().max().item(), *(x.norm().item() for x in tensors_of(state))]:
                largest = max(largest, size if size == size else float("inf"))
            if largest == float("inf"):
                break
    return largest


KINDS = ["random", "eight repeated tokens", "one constant token", "v = -k"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_stays_bounded(kind):
    assert largest_state(kind, 4096, MemoryRule(), chunk_size=64) < 40
    assert largest_state(kind, 512, MemoryRule(), chunk_size=1, read="running") < 40


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "two layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_rates_up_to_two_stay_bounded(kind, linear):
    """Where 1 + α, which limits them, is near 2, and where it is not."""
    for retention_bias in (1.0, 9.0):
        options = {"linear": linear, "rate_max": 2.0, "retention_bias": retention_bias}
        assert largest_state(kind, 2048, MemoryRule(), chunk_size=64, **options) < 60
        assert largest_state(kind, 512, MemoryRule(), chunk_size=1, read="running", **options) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_momentum_stays_bounded(kind):
    """In the first of these streams the sum of the writes reaches 25."""
    assert largest_state(kind, 2048, MemoryRule(), chunk_size=64, decay=0.7) < 12
    assert largest_state(kind, 128, MemoryRule(), chunk_size=1, read="running", decay=0.7) < 12


def test_the_largest_decays_are_bounded_too_and_the_sum_is_far_above():
    options = {"kind": "one constant token", "length": 2048, "chunk_size": 64, "decay": 0.99}
    assert largest_state(rule=MemoryRule(), **options) < 200  # by default
    assert largest_state(rule=MemoryRule(momentum="average"), **options) < 200
    assert largest_state(rule=MemoryRule(momentum="sum"), **options) > 1000


def test_bounding_is_what_does_it():
    # The same rule without the bound on the errors, on the worst input: this is what the bound is for.
    free = MemoryRule(error_bound=None)
    assert largest_state("eight repeated tokens", 2048, free) > 1e3


def test_the_literal_rule_blows_up():
    sizes = [largest_state(kind, 1024, MemoryRule.literal(), piece=256) for kind in KINDS]
    assert max(sizes) > 1e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_the_default_stays_bounded_for_a_million_tokens(kind, chunk_size):
    assert largest_state(kind, 2**20, MemoryRule(), chunk_size=chunk_size, piece=2**14) < 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "two layers"])
def test_rates_up_to_two_stay_bounded_for_a_million_tokens(kind, linear):
    options = {"linear": linear, "chunk_size": 16, "read": "running", "piece": 2**14}
    assert largest_state(kind, 2**20, MemoryRule(), rate_max=2.0, **options) < 80


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_averaged_momentum_stays_bounded_for_a_million_tokens(kind, chunk_size):
    assert largest_state(kind, 2**20, MemoryRule(), chunk_size=chunk_size, piece=2**14, decay=0.7) < 60
