"""The continuum memory module: plain where it never steps, without state of its own, trainable throughout."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nl_models.layers.continuum import ContinuumMemory, LevelConfig

WIDTH = 16


def build(*, seed=0, **options):
    torch.manual_seed(seed)
    return ContinuumMemory(
        WIDTH,
        [
            LevelConfig(hidden_size=24, chunk_size=4, **options),
            LevelConfig(hidden_size=24, chunk_size=8, **options),
        ],
    )


def tokens(*shape, seed=1):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_without_steps_it_is_the_mlp_of_llama_bit_for_bit():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=24, num_attention_heads=2, rms_norm_eps=1e-6
    )
    torch.manual_seed(0)
    mlp, norm = modeling.LlamaMLP(config), modeling.LlamaRMSNorm(WIDTH, eps=1e-6)
    nn.init.normal_(norm.weight, mean=1.0, std=0.1)
    x = tokens(2, 37)
    for still in ({"chunk_size": None}, {"chunk_size": 4, "max_rate": 0.0}):
        memory = ContinuumMemory(WIDTH, [LevelConfig(hidden_size=24, gated=True, **still)])
        names = {
            "norm": norm.weight,
            "up": mlp.up_proj.weight,
            "gate": mlp.gate_proj.weight,
            "down": mlp.down_proj.weight,
        }
        memory.load_state_dict({f"levels.0.{name}": weight for name, weight in names.items()})
        assert torch.equal(memory(x)[0], x + mlp(norm(x)))


def test_without_steps_it_is_an_mlp_of_linear_layers_bit_for_bit():
    memory = ContinuumMemory(WIDTH, [LevelConfig(hidden_size=24)])
    mlp = nn.Sequential(nn.Linear(WIDTH, 24, bias=False), nn.GELU(), nn.Linear(24, WIDTH, bias=False))
    mlp.load_state_dict({"0.weight": memory.levels[0].up, "2.weight": memory.levels[0].down})
    x = tokens(2, 37)
    assert torch.equal(memory(x)[0], x + mlp(nn.RMSNorm(WIDTH, eps=1e-6)(x)))


def test_a_level_that_never_steps_has_only_the_parameters_of_an_mlp():
    memory = ContinuumMemory(WIDTH, [LevelConfig(hidden_size=24)])
    assert {name for name, _ in memory.named_parameters()} == {
        f"levels.0.{n}" for n in ("norm", "up", "down")
    }


def test_a_nested_level_starts_anew_with_the_chunks_of_one_of_rate_zero():
    torch.manual_seed(0)
    levels = [
        LevelConfig(hidden_size=24, chunk_size=2),
        LevelConfig(hidden_size=24, chunk_size=6, max_rate=0.0),
    ]
    memory, x = ContinuumMemory(WIDTH, levels, variant="nested"), tokens(2, 18)
    apart = torch.cat([memory(part)[0] for part in x.split(6, 1)], 1)
    torch.testing.assert_close(memory(x)[0], apart)
    state, parts = None, []
    for part in x.split(4, 1):
        y, state = memory(part, state, output_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), apart)


def test_forward_changes_neither_parameters_nor_buffers():
    memory = build()
    before = copy.deepcopy(memory.state_dict())
    _, state = memory(tokens(2, 9), output_state=True)
    memory(tokens(2, 9), state)
    assert not list(memory.buffers())
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


@pytest.mark.parametrize("rule", ["sgd", "dgd", "momentum", "muon"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_parameter_learns_through_the_steps(rule, gated):
    memory = build(rule=rule, gated=gated).double()
    x, target = tokens(2, 17).double(), tokens(2, 17, seed=2).double()

    def loss():
        return (memory(x)[0] - target).square().sum()

    loss().backward()
    for name, parameter in memory.named_parameters():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).double()
        expected = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = loss()
            parameter -= 2e-5 * direction
            below = loss()
            parameter += 1e-5 * direction
        assert expected.abs() > 1e-6, name
        torch.testing.assert_close((above - below) / 2e-5, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_level_weights_learn():
    levels = [LevelConfig(hidden_size=24, chunk_size=4), LevelConfig(hidden_size=24)]
    memory = ContinuumMemory(WIDTH, levels, variant="independent")
    assert torch.equal(memory.level_weights, torch.ones(2))
    memory(tokens(2, 9))[0].square().sum().backward()
    assert memory.level_weights.grad.abs().min() > 0


def test_a_flush_steps_on_what_is_pending():
    memory = build(rule="momentum")
    _, state = memory(tokens(2, 6), output_state=True)
    flushed = memory.flush(state)
    assert [int(level.position.max()) for level in flushed] == [0, 0]
    assert all((f.up - s.up).abs().max() > 0 for f, s in zip(flushed, state))


def test_state_and_mask_reach_the_memory():
    memory = build()
    x = tokens(2, 13)
    whole, _ = memory(x)
    first, state = memory(x[:, :6], output_state=True)
    second, none = memory(x[:, 6:], state)
    assert none is None
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :5] = False
    masked, _ = memory(x, mask=mask)
    torch.testing.assert_close(masked[0, 5:], memory(x[:1, 5:])[0][0], rtol=1e-5, atol=1e-5)
    assert not masked[0, :5].any()


def test_autocast_keeps_the_state_in_fp32():
    memory = build()
    x = tokens(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = memory(x, output_state=True)
    exact, expected = memory(x, output_state=True)
    assert all(
        t.dtype == torch.float32 for level in state for t in level if t is not None and t.is_floating_point()
    )
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
    # steps run in full precision; only the inputs of the second level saw rounded reads
    torch.testing.assert_close(state[0].up, expected[0].up, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "dgd", "momentum", "muon"])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_bf16_layers_have_fp32_states_and_finite_gradients(variant, rule, detach_updates):
    torch.manual_seed(0)
    first = LevelConfig(
        hidden_size=24, chunk_size=4, rule=rule, gated=True, restore_norms=True, key_projection=False
    )
    levels = [first, LevelConfig(hidden_size=20, chunk_size=12, rule=rule)]
    memory = ContinuumMemory(WIDTH, levels, variant=variant, detach_updates=detach_updates).bfloat16()
    y, state = memory(tokens(2, 37).bfloat16(), output_state=True)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    floating = [t for level in state for t in level if t is not None and t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in memory.parameters() if p.requires_grad)
    assert memory(tokens(2, 5).bfloat16(), memory.flush(state))[0].isfinite().all()


def test_retention_starts_where_it_should_and_can_be_left_out():
    first, second = build(initial_retention=0.8, max_retention=0.9).levels
    torch.testing.assert_close(first.retention(), torch.tensor(0.8))
    assert not first().retains_all
    assert second.retention_logit.shape == (1,)
    for level in build(initial_retention=1.0).levels:
        assert level.retention_logit is None
        assert level().retains_all
    with torch.no_grad():
        first.retention_logit.fill_(100.0)
    torch.testing.assert_close(first.retention(), torch.tensor(0.9))
    for value in (0.0, 0.9, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"expected between 0 and max_retention=0\.9"):
            LevelConfig(hidden_size=8, initial_retention=value, max_retention=0.9)
    with pytest.raises(ValueError, match="max_retention: expected more than 0 and at most 1"):
        LevelConfig(hidden_size=8, max_retention=1.5)


def test_rates_are_bounded_and_start_where_they_should():
    memory = build(max_rate=1.5, initial_rate=0.7)
    for level, chunk_size in zip(memory.levels, (4, 8)):
        torch.testing.assert_close(level.rate() * WIDTH * chunk_size, torch.tensor(0.7))
        with torch.no_grad():
            level.rate_logit.fill_(100.0)
        torch.testing.assert_close(level.rate() * WIDTH * chunk_size, torch.tensor(1.5))
    slow = build(initial_rate=0.5, rule="momentum", momentum_decay=0.8).levels[0]
    torch.testing.assert_close(slow.rate() * WIDTH * 4, torch.tensor(0.1))  # five steps' worth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 4, "chunk_size": 0}, "chunk_size"),
        ({"hidden_size": 4, "chunk_size": 1}, "chunk_size: expected at least 2, or predict_next=False"),
        ({"hidden_size": 4, "rule": "adam"}, "rule"),
        ({"hidden_size": 4, "max_rate": -1.0}, "max_rate"),
        ({"hidden_size": 4, "chunk_size": 2, "initial_rate": 7.0}, "initial_rate"),
        ({"hidden_size": 4, "error_bound": 0.0}, "error_bound"),
        ({"hidden_size": 4, "momentum_decay": 1.0}, "momentum_decay"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LevelConfig(**options)


def test_levels_out_of_order_are_refused_at_construction():
    with pytest.raises(ValueError, match="multiple"):
        ContinuumMemory(WIDTH, [LevelConfig(hidden_size=4, chunk_size=c) for c in (4, 6)])
    with pytest.raises(ValueError, match="at least one"):
        ContinuumMemory(WIDTH, [])


def test_it_learns_to_recall_within_the_context():
    """Each sequence repeats one random pattern: with steps its second half is predicted better."""

    def trained_loss(max_rate):
        torch.manual_seed(0)
        memory = ContinuumMemory(WIDTH, [LevelConfig(hidden_size=32, chunk_size=8, max_rate=max_rate)])
        optimizer = torch.optim.Adam(memory.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(120):
            symbols = torch.randn(8, 8, WIDTH, generator=generator)
            answers = torch.randn(8, 8, WIDTH, generator=generator)
            # a symbol with its answer, and later the symbol alone
            x = torch.cat((symbols, symbols), dim=1)
            x[:, :8, WIDTH // 2 :] = answers[..., WIDTH // 2 :]
            x[:, 8:, WIDTH // 2 :] = 0
            y, _ = memory(x)
            loss = F.mse_loss(y[:, 8:, WIDTH // 2 :], answers[..., WIDTH // 2 :])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    without = trained_loss(0.0)
    assert trained_loss(LevelConfig(hidden_size=1).max_rate) < 0.8 * without
