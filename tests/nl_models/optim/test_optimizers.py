"""What training loops ask of an optimiser: state, closures, schedulers, scaling, odd gradients, refusals."""

import copy
import io

import pytest
import torch
from torch import nn

from nl_models.optim import M3, DeltaMomentum, Muon, split_parameters
from tests.nl_models.optim.problems import KINDS, groups_of, parameters, set_gradients

every_kind = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
# What does not step by lr alone: a momentum goes on without it, and printed deep momentum has none.
steps_by_rate = pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind, options in KINDS.values() if options != {"literal": True}],
    ids=[name for name, (_, options) in KINDS.items() if options != {"literal": True}],
)


def made(kind, options, dtype=torch.float32):
    matrices, others = parameters(dtype)
    return kind(groups_of(matrices, others), lr=0.02, **options), [*matrices, *others]


def take_steps(optimizer, params, seeds):
    for seed in seeds:
        set_gradients(params, torch.Generator().manual_seed(seed))
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_a_saved_state_continues_bit_for_bit(kind, options, dtype):
    optimizer, params = made(kind, options, dtype)
    take_steps(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, twins = made(kind, options, dtype)
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    other.load_state_dict(torch.load(file))
    for p, twin in zip(params, twins):
        assert optimizer.state[p].keys() == other.state[twin].keys()
        for name, value in optimizer.state[p].items():
            assert value.dtype == other.state[twin][name].dtype
            assert torch.equal(value, other.state[twin][name])
    take_steps(optimizer, params, range(5, 10))
    take_steps(other, twins, range(5, 10))
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins))


@every_kind
def test_loading_copies(kind, options):
    optimizer, params = made(kind, options)
    take_steps(optimizer, params, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other, twins = made(kind, options)
    other.load_state_dict(saved)
    take_steps(other, twins, range(4))
    for number, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(value, saved["state"][number][name])


@every_kind
def test_a_closure_is_evaluated_with_gradients(kind, options):
    w = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([w], lr=0.02, **options)
    before = w.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(w.detach(), before)


@every_kind
def test_parameters_without_a_gradient_are_left_out(kind, options):
    optimizer, params = made(kind, options)
    alone, same = made(kind, options)
    skipped = {1, 5}
    before = [p.detach().clone() for p in params]
    for seed in range(4):
        for chosen, group in ((optimizer, params), (alone, same)):
            set_gradients(group, torch.Generator().manual_seed(seed))
            if chosen is optimizer:
                for i in skipped:
                    params[i].grad = None
            chosen.step()
    for i, (p, old, twin) in enumerate(zip(params, before, same)):
        assert torch.equal(p, old) == (i in skipped)
        assert i in skipped or torch.allclose(p, twin, rtol=1e-5, atol=1e-6)
        assert bool(optimizer.state.get(p)) == (i not in skipped)
    for p in params:
        p.grad = None
    optimizer.step()


@every_kind
def test_a_matrix_that_comes_later_has_windows_of_its_own(kind, options):
    """Its state starts with its first gradient, as if it had been alone."""
    optimizer, params = made(kind, options)
    single = nn.Parameter(params[0].detach().clone())
    alone = kind([single], lr=0.02, **options)
    set_gradients(params, torch.Generator().manual_seed(99))
    params[0].grad = None
    optimizer.step()
    for seed in range(7):
        set_gradients(params, torch.Generator().manual_seed(seed))
        single.grad = params[0].grad.clone()
        optimizer.step()
        alone.step()
    torch.testing.assert_close(params[0], single, rtol=1e-5, atol=1e-6)


@every_kind
def test_sparse_gradients_are_refused_before_anything_changes(kind, options):
    optimizer, params = made(kind, options)
    set_gradients(params, torch.Generator().manual_seed(0))
    params[2].grad = params[2].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="gradient of parameter 2 is sparse"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert not any(optimizer.state.values())


@every_kind
def test_a_zero_gradient_does_nothing_but_decay(kind, options):
    w = nn.Parameter(torch.ones(3, 4))
    optimizer = kind([w], lr=0.1, weight_decay=0.5, **options)
    for _ in range(7):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((3, 4), 0.95**7))


@steps_by_rate
def test_schedulers_set_the_rate_of_both_rules(kind, options):
    optimizer, params = made(kind, {**options, "weight_decay": 0.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    changes = []
    for seed in range(3):
        before = [p.detach().clone() for p in params]
        take_steps(optimizer, params, [seed])
        scheduler.step() if seed < 2 else None
        changes.append([not torch.equal(p, old) for p, old in zip(params, before)])
    assert all(changes[0])
    assert all(changes[1])
    # A momentum goes on at a rate of zero, by what earlier rates have put into it.
    assert any(changes[2]) == (kind is DeltaMomentum)
    torch.optim.lr_scheduler.OneCycleLR(made(Muon, {})[0], max_lr=0.1, total_steps=5)


@steps_by_rate
def test_the_rate_scales_the_first_step(kind, options):
    steps = []
    for rate in (0.01, 0.03):
        optimizer, params = made(kind, {**options, "weight_decay": 0.0}, torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [p.detach().clone() for p in params]
        take_steps(optimizer, params, [0])
        steps.append([p.detach() - old for p, old in zip(params, before)])
    for small, large in zip(*steps):
        torch.testing.assert_close(3 * small, large)


@every_kind
def test_with_a_gradient_scaler(kind, options):
    """Scaled gradients give the same step; one that is not finite is skipped, state included."""
    plain, params = made(kind, options)
    scaled, twins = made(kind, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss_of(ps):
        return sum((p - 1).square().sum() for p in ps)

    for step in range(5):
        plain.zero_grad()
        loss_of(params).backward()
        plain.step()
        for attempt in ("overflow", "finite") if step == 2 else ("finite",):
            scaled.zero_grad()
            scaler.scale(loss_of(twins)).backward()
            if attempt == "overflow":
                twins[0].grad[0, 0] = torch.inf
            before = [p.detach().clone() for p in twins]
            scaler.step(scaled)
            scaler.update()
            unchanged = all(torch.equal(p, old) for p, old in zip(twins, before))
            assert unchanged == (attempt == "overflow")
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


@every_kind
def test_clipping_does_not_turn_the_first_direction(kind, options):
    """A matrix step does not depend on the gradient's length; those of plain forms do."""
    results = []
    for limit in (1e9, 0.5):
        optimizer, params = made(kind, options, torch.float64)
        set_gradients(params, torch.Generator().manual_seed(0))
        norm = nn.utils.clip_grad_norm_(params, limit)
        assert norm > 1
        optimizer.step()
        results.append([p.detach().clone() for p in params])
    same = [torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results)]
    depends = options.get("literal") or (kind, options) == (DeltaMomentum, {})
    assert all(same) != bool(depends)


@every_kind
def test_gradient_accumulation_equals_the_whole_batch(kind, options):
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        optimizer = kind(split_parameters(model), lr=0.02, **options)
        for _ in range(5):
            optimizer.zero_grad()
            for rows in data.chunk(parts):
                ((model(rows) - rows).square().mean() / parts).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@every_kind
def test_nothing_is_read_from_the_device_in_a_step(kind, options, monkeypatch):
    """Numbers of the host may be read: the step counter is one."""
    optimizer, params = made(kind, options)
    take_steps(optimizer, params, range(3))
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("item()"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("bool()"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda _: pytest.fail("float()"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("tolist()"))
    for _ in range(3):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [value for name, value in KINDS.items() if name != "deep-literal"],  # no descent
    ids=[name for name in KINDS if name != "deep-literal"],
)
def test_it_learns(kind, options):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = torch.tanh(x @ torch.randn(6, 3))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = kind(split_parameters(model), lr=0.02, **options)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Dividing by the root of V is slower here.
    assert losses[-1] < (0.6 if options.get("second_moment") else 0.3) * losses[0]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.hidden = nn.Linear(4, 6)
        self.stack = nn.Parameter(torch.zeros(2, 3, 4))
        self.gate = nn.Linear(4, 1)
        self.head = nn.Linear(6, 9, bias=False)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def get_output_embeddings(self):
        return self.head


def test_parameters_are_split_by_what_they_are():
    groups = split_parameters(Tiny(), weight_decay=0.3, exclude=lambda name, p: name == "gate.weight")
    names = {group["rule"]: [name for name, _ in group["params"]] for group in groups}
    assert names == {
        "matrix": ["stack", "hidden.weight"],
        "adamw": [
            "embed.weight", "convolution.weight", "convolution.bias", "hidden.bias", "gate.weight",
            "gate.bias", "head.weight",
        ],
    }  # fmt: skip
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert len(split_parameters(nn.Linear(2, 2, bias=False))) == 1


def test_describe_names_every_parameter_and_its_rule():
    optimizer = M3(split_parameters(Tiny(), weight_decay=0.3), lr=0.5)
    lines = optimizer.describe().splitlines()
    assert lines[0].split() == ["rule", "lr", "weight", "decay", "shape", "parameter"]
    assert len(lines) == 1 + 9
    assert lines[1].split() == ["M3", "0.5", "0.3", "(2,", "3,", "4)", "stack"]
    assert lines[-1].split() == ["AdamW", "0.5", "0", "(9,", "6)", "head.weight"]
    assert "parameter 0" in Muon([nn.Parameter(torch.zeros(2, 2))]).describe()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Muon, {"lr": -1.0}, "lr"),
        (Muon, {"lr": torch.tensor(0.1)}, "lr"),
        (Muon, {"momentum": 1.0}, "momentum"),
        (Muon, {"weight_decay": -0.1}, "weight_decay"),
        (Muon, {"rms": 0.0}, "rms"),
        (Muon, {"adamw_betas": (0.9,)}, "adamw_betas"),
        (Muon, {"adamw_eps": 0.0}, "adamw_eps"),
        (Muon, {"ns_steps": 0}, "steps"),
        (Muon, {"ns_coefficients": "moun"}, "coefficients"),
        (Muon, {"ns_eps": 0.0}, "ns_eps"),
        (M3, {"betas": (0.9, 0.9)}, "betas"),
        (M3, {"betas": (0.9, 0.9, 1.0)}, "betas"),
        (M3, {"alpha": -1.0}, "alpha"),
        (M3, {"frequency": 0}, "frequency"),
        (M3, {"frequency": 2.5}, "frequency"),
        (M3, {"eps": 0.0}, "eps"),
    ],
)
def test_bad_options_are_refused_by_name(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_vector_under_the_matrix_rule_is_refused_and_the_remedy_named():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"bias of shape \(2,\) is no matrix.*split_parameters"):
        Muon(model.named_parameters())
    optimizer = Muon([model.weight])
    with pytest.raises(ValueError, match="rule: expected one of"):
        optimizer.add_param_group({"params": [model.bias], "rule": "sgd"})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [model.bias], "rule": "adamw"})
