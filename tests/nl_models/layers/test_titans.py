"""The memory layers: what they have in common, and what makes them remember."""

import copy

import pytest
import torch

from nl_kernels import MemoryRule
from nl_kernels.memory_rule import l2_normalize
from nl_models.layers.self_modifying_titans import SelfModifyingTitans
from nl_models.layers.state import state_tensors
from nl_models.layers.titans import Titans


def test_self_modifying_titans_start_as_titans():
    """While its generators rest at zero output, the self-modifying layer is Titans with constant gates and
    values of unit length."""
    torch.manual_seed(0)
    options = {"memory_hidden_size": 5, "chunk_size": 12, "read": "running", "rate_bias": 0.3}
    plain = Titans(12, 2, **options).double()
    layer = SelfModifyingTitans(12, 2, **options).double()
    with torch.no_grad():
        plain.rate_proj.weight.zero_()
        plain.retention_proj.weight.zero_()
        plain.memory.outer.zero_()
        for memory in layer.memories.values():
            memory.outer.zero_()
        layer.memories["memory"].inner.copy_(plain.memory.inner)
    own = layer.state_dict()
    layer.load_state_dict({**own, **{n: w for n, w in plain.state_dict().items() if n in own}})
    plain.v_proj.register_forward_hook(lambda _, __, v: l2_normalize(v.unflatten(-1, (2, 6))).flatten(-2))
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    expected = plain(x)[0]
    assert expected[:, 1:].abs().min() > 0
    # Its keys are normalised twice, each time with a small number added to the squared norm.
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Titans, SelfModifyingTitans])
def test_linear_memories_and_all_rules_run(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 11, 12)
    for rule in (MemoryRule(), MemoryRule.literal(), MemoryRule(erase="none")):
        for hidden in (None, 7):
            layer = kind(
                12, 2, memory_hidden_size=hidden, chunk_size=4, rule=rule, momentum=True, rate_max=0.1
            )
            y, state = layer(x, output_state=True)
            assert y.isfinite().all()
            assert any(part is None for part in state.snapshot) == (hidden is None)
            y.sum().backward()
            assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", [Titans, SelfModifyingTitans])
def test_what_was_written_is_recalled(kind):
    """The read of a key turns to the value that was written under it, more with every repeat.

    Delta gradient descent erases what it has just learned at the rate at which it learns it, so that the read
    of a repeated pair goes to half the value: the direction is what the norm after the memory sees.
    """
    torch.manual_seed(0)
    layer = kind(16, 1, memory_hidden_size=32, chunk_size=1, read="snapshot").double()
    with torch.no_grad():
        layer.q_proj.weight.copy_(layer.k_proj.weight)
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    x = x / x.norm()
    target = layer.v_proj(x)[0, 0]
    outputs = []
    layer.output = torch.nn.Identity()
    layer.output.forward = lambda o, x: outputs.append(o[0, :, 0]) or o.flatten(2)
    layer(x.expand(1, 8, 16))
    alignment = torch.cosine_similarity(outputs[0], target, dim=-1)
    assert alignment[0] < 0.5
    assert alignment[1] > 0.9
    assert alignment[7] > 0.95


@pytest.mark.parametrize("kind", [Titans, SelfModifyingTitans])
def test_the_largest_rates_do_not_make_one_repeated_token_grow(kind):
    """A factor of α - 2 would be 9 after 100 tokens, and infinite in the end."""
    torch.manual_seed(0)
    layer = kind(16, 1, rate_max=2.0, rate_bias=30.0, retention_bias=3.8, chunk_size=128)
    with torch.no_grad():
        x = torch.randn(1, 1, 16).expand(1, 100, 16)
        size = [
            max(t.norm() for t in state_tensors(layer(x[:, :n], output_state=True)[1].running))
            for n in (1, 100)
        ]
    assert size[1] < 2 * size[0]


def test_the_outer_gradient_does_not_explode_along_the_sequence():
    """Large projections, as training makes them: what memories take in keeps unit length."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 1)
    with torch.no_grad():
        for projection in (layer.k_proj, layer.v_proj):
            projection.weight.mul_(10)
    x = torch.randn(4, 512, 32, requires_grad=True)
    layer(x)[0][:, -16:].square().sum().backward()
    by_chunk = x.grad.norm(dim=(0, 2)).view(-1, 16).amax(1)
    assert by_chunk[:16].max() < by_chunk[-1]  # 300,000 times as large without the norms


def test_momentum_changes_the_writes():
    torch.manual_seed(0)
    layer = Titans(12, 2, memory_hidden_size=5, chunk_size=2, momentum=True, read="snapshot").double()
    without = copy.deepcopy(layer)
    without.momentum_proj = None
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0][:, :2], without(x)[0][:, :2], rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x)[0][:, 4:], without(x)[0][:, 4:], atol=1e-6)


@pytest.mark.parametrize(("hidden", "most"), [(None, 1e-7), (16, 1e-5)], ids=["linear", "two-layer"])
def test_averaged_momentum_is_not_chaotic(hidden, most):
    """A change of the input by 1e-9, which the printed sum of the writes lets grow along the sequence."""

    def apart(**options):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(64, 2, memory_hidden_size=hidden, momentum=True, **options).double()
        with torch.no_grad():
            layer.momentum_proj.weight.mul_(10)  # decays all over their range, as training may make them
            x = torch.randn(1, 512, 64, dtype=torch.float64)
            y, moved = layer(x)[0], layer(x + 1e-9 * torch.randn_like(x))[0]
        return (y - moved)[:, -64:].norm() / y[:, -64:].norm()

    assert apart() < most  # by default
    assert apart(rule=MemoryRule(momentum="sum")) > 30 * apart(rule=MemoryRule(momentum="average"))


@pytest.mark.parametrize("kind", [Titans, SelfModifyingTitans])
def test_heads_divide_the_width(kind):
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size=12, got 5"):
        kind(12, 5)


@pytest.mark.parametrize("momentum", [False, True], ids=["", "momentum"])
@pytest.mark.parametrize("kind", [Titans, SelfModifyingTitans])
def test_decoding_takes_the_step_and_equals_the_forward_pass(kind, momentum, monkeypatch):
    torch.manual_seed(0)
    layer = kind(12, 2, memory_hidden_size=5, chunk_size=4, momentum=momentum).double()
    x = torch.randn(2, 14, 12, dtype=torch.float64)
    mask = torch.rand(2, 14) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        expected, end = layer(x, mask=mask, output_state=True)
        y, state = layer(x[:, :2], mask=mask[:, :2], output_state=True)
        op = "deep_memory" if kind is Titans else "self_modifying_memory"
        monkeypatch.setattr(f"{kind.__module__}.{op}", None)
        outputs = [y]
        for t in range(2, 14):
            y, state = layer(x[:, t : t + 1], state, mask[:, t : t + 1], output_state=True)
            outputs.append(y)
        assert layer(x[:, :1], state)[1] is None
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-12)
    for a, b in zip(state_tensors(state), state_tensors(end)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
