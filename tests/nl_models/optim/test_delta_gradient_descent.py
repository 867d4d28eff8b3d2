"""Delta gradient descent: every step equals its plain form in fp64, however the gradients were made."""

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from nl_models.optim import DeltaGradientDescent, MultiFrequency, split_parameters
from tests.nl_models.optim.problems import PlainAdamW


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False)]
    return nn.Sequential(*layers).to(dtype)


def made(model, **options):
    return DeltaGradientDescent(split_parameters(model, linear_only=True), model=model, **options)


def rows(n, width=4, seed=0, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tapped(model, x):
    """The output, and what each linear layer was given and gave, by going through the modules by hand."""
    seen = []
    for module in model:
        given, x = x, module(x) if not isinstance(module, nn.ReLU) else torch.relu(x)
        if isinstance(module, nn.Linear):
            x.retain_grad()
            seen.append((module.weight, given, x))
    return x, seen


def plain_step(group, weight, x, g):
    """W⁺ = W − ηWXᵀSX − ηGᵀSX, S = (I + ηXXᵀ)⁻¹ (rows of G are output gradients), η in its two roles."""
    rate = group["lr"] * group["erase"] / (len(x) if group["reduction"] == "mean" else 1)
    weight = weight * (1 - group["lr"] * group["weight_decay"])
    s = torch.linalg.inv(torch.eye(len(x), dtype=x.dtype) + rate * x @ x.T)
    if group["reduction"] == "sum" and group["erase"] == 1:
        return weight - rate * weight @ x.T @ s @ x - rate * g.T @ s @ x
    stepped = weight - group["lr"] * g.T @ x
    return stepped - rate * stepped @ x.T @ s @ x


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"erase": 0.0},
    {"erase": 3.0, "weight_decay": 0.3},
    {"reduction": "sum", "erase": 0.2, "lr": 0.05},
    {"adamw_lr": 0.2, "adamw_betas": (0.5, 0.7), "adamw_eps": 0.1},
]


@pytest.mark.parametrize("count", [1, 3, 5, 6, 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_twenty_steps_equal_the_plain_form(options, count):
    model = network()
    twin = copy.deepcopy(model)
    optimizer = made(model, **{"lr": 0.1, **options})
    adamw = {p: PlainAdamW(optimizer.param_groups[1]) for p in twin.parameters() if p.ndim == 1}
    for step in range(20):
        x, y = rows(count, seed=step), rows(count, 3, seed=100 + step)
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square()).sum().backward()
        optimizer.step()
        twin.zero_grad()
        output, seen = tapped(twin, x)
        (0.5 * (output - y).square()).sum().backward()
        new = {w: plain_step(optimizer.param_groups[0], w.detach(), x, out.grad) for w, x, out in seen}
        new |= {p: rule.step(p.detach(), p.grad) for p, rule in adamw.items()}
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.detach(), new[q].detach(), rtol=1e-10, atol=1e-11)
            q.data.copy_(new[q].detach())


def test_it_is_the_minimum_of_the_proximal_objective():
    """Eq. 56, by its gradient, with u the negative output gradients of a summed loss."""
    layer = nn.Linear(5, 3, bias=False).double()
    before, x, target = layer.weight.detach().clone(), rows(4, 5), rows(4, 3, seed=1)
    optimizer = made(layer, lr=0.7, reduction="sum")
    y = layer(x)
    y.retain_grad()
    (y - target).pow(4).sum().backward()
    optimizer.step()
    v = layer.weight.detach().clone().requires_grad_()
    objective = 0.5 * (x @ v.T + y.grad).square().sum() + (v - before).square().sum() / (2 * 0.7)
    (slope,) = torch.autograd.grad(objective, v)
    assert slope.abs().max() < 1e-12


def test_one_row_of_unit_length_is_the_printed_rule():
    """Eq. 57: W (I − η'xxᵀ) − η' ∇ with η' = η / (1 + η)."""
    layer = nn.Linear(5, 3, bias=False).double()
    w, x = layer.weight.detach().clone(), nn.functional.normalize(rows(1, 5))
    optimizer = made(layer, lr=0.5)
    layer(x).square().sum().backward()
    gradient, rate = layer.weight.grad.clone(), 0.5 / 1.5
    optimizer.step()
    expected = w @ (torch.eye(5) - rate * x.T @ x) - rate * gradient
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_without_erasing_it_is_sgd():
    model, twin = network(), network()
    ours = made(model, lr=0.1, erase=0.0, adamw_lr=0.0)
    theirs = torch.optim.SGD([p for p in twin.parameters() if p.ndim == 2], lr=0.1)
    for step in range(5):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(rows(7, seed=step)).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    """A layer used twice, the second time by the name of its argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Linear(4, 6).double(), nn.Linear(6, 6).double()

    def forward(self, x):
        return self.middle(input=torch.tanh(self.middle(self.first(x))))


def one_step(model, backward, **options):
    """The weights after ``backward(model, optimizer)`` and a step from the same start."""
    model = copy.deepcopy(model)
    optimizer = made(model, lr=0.3, **options)
    optimizer.zero_grad()
    backward(model, optimizer)
    optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_same(first, second, tolerance=1e-11):
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_layer_used_twice_has_the_rows_of_both_uses():
    model, x = Twice(), rows(5)
    first = model.first(x)
    second = model.middle(first)
    third = model.middle(torch.tanh(second))
    g = torch.autograd.grad(third.square().sum(), [second, third])
    both = torch.cat([first, torch.tanh(second)]).detach()
    group = {"lr": 0.3, "erase": 1.0, "reduction": "mean", "weight_decay": 0.0}
    expected = plain_step(group, model.middle.weight.detach(), both, torch.cat(g))
    after = one_step(model, lambda net, _: net(x).square().sum().backward())
    torch.testing.assert_close(after[2], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model", [network(), Twice()], ids=["sequential", "twice"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ways_to_make_the_same_gradient_give_the_same_step(model, reduction):
    x, options = rows(8), {"reduction": reduction}
    expected = one_step(model, lambda net, _: net(x).square().mean().backward(), **options)

    def accumulated(net, _):
        for part in x.split([1, 2, 5]):
            (net(part).square().mean() * len(part) / 8).backward()

    def shaped(net, _):
        net(x.reshape(2, 4, 4)).square().mean().backward()

    def with_evaluation_between(net, _):
        with torch.no_grad():
            net(100 * x)
        net.eval()
        net(50 * x)  # its graph is dropped
        output = net(x)
        with torch.inference_mode():
            net(100 * x)
        output.square().mean().backward()

    def after_gradients_of_the_input(net, _):
        given = (3 * x).requires_grad_()
        torch.autograd.grad(net(given).sum(), given)
        net(x).square().mean().backward()

    def after_zeroed_gradients(net, _):
        net(7 * x).sum().backward()
        net.zero_grad()
        net(x).square().mean().backward()

    def checkpointed(reentrant):
        def backward(net, _):
            given = x.clone().requires_grad_()
            checkpoint(net, given, use_reentrant=reentrant).square().mean().backward()

        return backward

    for backward in (
        accumulated,
        shaped,
        with_evaluation_between,
        after_gradients_of_the_input,
        after_zeroed_gradients,
        checkpointed(True),
        checkpointed(False),
    ):
        assert_same(one_step(model, backward, **options), expected)


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    reduction=st.sampled_from(["mean", "sum"]),
    rate=st.floats(1e-3, 10.0),
    erase=st.floats(0.0, 5.0),
)
def test_any_split_into_backward_passes_is_the_whole_batch(parts, reduction, rate, erase):
    """Rows of few, products of many: the step is one and the same."""
    results = []
    data = rows(sum(parts))
    for split in ([sum(parts)], parts):
        model = network()
        optimizer = made(model, lr=rate, erase=erase, reduction=reduction)
        for part in data.split(split):
            (model(part).square().sum() / len(data)).backward()
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert_same(*results, tolerance=1e-8)


def test_clipping_and_a_gradient_scaler():
    x = rows(5, dtype=torch.float32)
    results = {}
    for way in ("plain", "scaled", "clipped"):
        model = network(torch.float32)
        optimizer = made(model, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way == "scaled")
        for step in range(6):
            overflow = step == 3
            if overflow and way != "scaled":
                continue
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if overflow:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-9 if way == "clipped" else 1e9)
            scaler.step(optimizer)
            scaler.update()
        results[way] = [p.detach() for p in model.parameters()]
    assert_same(results["plain"], results["scaled"], tolerance=1e-5)
    # The gradient is gone, the erasing is not.
    start = network(torch.float32)[0].weight.norm()
    assert results["clipped"][0].norm() < 0.9 * start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_16_bit_weights(dtype):
    model, exact = network(dtype), network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer = made(model, lr=0.3)
        model(rows(5, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    reference = made(exact, lr=0.3)
    exact(rows(5)).square().mean().backward()
    reference.step()
    for p, q in zip(model.parameters(), exact.parameters()):
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0.05, atol=0.02)


def test_a_saved_state_continues_bit_for_bit_and_schedulers_work():
    model, twin = network(torch.float32), network(torch.float32)
    optimizers = [made(net, lr=0.1) for net in (model, twin)]

    def steps(net, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            net(rows(9, seed=seed, dtype=torch.float32)).square().mean().backward()
            optimizer.step()

    steps(model, optimizers[0], range(3))
    twin.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    steps(model, optimizers[0], range(3, 6))
    steps(twin, optimizers[1], range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    assert not any(optimizers[0].state[p] for p in optimizers[0].param_groups[0]["params"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizers[0], [9])
    schedule.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert [group["lr"] for group in optimizers[1].param_groups] == [0.1, 1e-3]


def test_equal_shapes_share_a_solve_and_nothing_is_read_from_the_device(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 2))
    optimizer = made(model, lr=0.1)
    calls, original = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: calls.append(tuple(x.shape)) or original(x))
    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read from the device"))
    for count, size in ((3, 3), (9, 6)):
        optimizer.zero_grad()
        model(rows(count, 6, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
        assert sorted(calls) == [(1, size, size), (4, size, size)]
        calls.clear()


def test_what_is_held_between_backward_and_zero_grad_is_no_larger_than_the_docstring_says():
    layer = nn.Linear(50, 3)
    optimizer = made(layer)
    for count, numbers in ((20, 20 * 50), (20, 40 * 50), (2000, 50 * 50), (7, 50 * 50)):
        layer(rows(count, 50, dtype=torch.float32)).sum().backward()
        inputs = optimizer._recorder.of(layer.weight)
        held = [x for x in (inputs.rows, inputs.gram, *(x for _, x in inputs.waiting)) if x is not None]
        assert sum(x.numel() for x in held) == numbers
    optimizer.zero_grad()
    assert optimizer._recorder._inputs[layer.weight].gram is None


def test_checkpointing_keeps_no_inputs_until_the_backward_pass():
    """What the hook keeps is dropped and recomputed with everything else."""

    def inputs_alive():
        gc.collect()
        # those of other tests too: a nested tensor has no shape
        tensors = (x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not x.is_nested)
        return sum(x.shape == (61, 6) for x in tensors)  # of the second and third layer

    model = network()
    optimizer = made(model)
    output = checkpoint(model, rows(61).requires_grad_(), use_reentrant=False)
    assert inputs_alive() == 0
    output.sum().backward()
    assert optimizer._recorder.of(model[4].weight).count == 61


def test_a_compiled_step_is_the_step_and_a_compiled_model_is_refused():
    model, twin = network(), network()
    optimizers = made(model), made(twin)
    steps = torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step
    for seed in range(3):
        for net, optimizer, step in zip((model, twin), optimizers, steps):
            optimizer.zero_grad()
            net(rows(5, seed=seed)).square().mean().backward()
            step()
    assert_same(model.parameters(), twin.parameters())
    with pytest.raises(Exception, match="cannot be collected in a compiled model"):
        torch.compile(model, backend="eager", fullgraph=True)(rows(5))


def test_closures_missing_and_sparse_gradients():
    model = network()
    optimizer = made(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(rows(5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert not torch.equal(model[0].weight, before[0])
    optimizer.zero_grad()
    optimizer.step()
    before = model[2].weight.detach().clone()
    model[0](rows(5)).sum().backward()  # the other layers have no gradient
    optimizer.step()
    assert torch.equal(model[2].weight, before)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_gradients_whose_inputs_are_not_known_are_refused_before_anything_changes():
    model = network()
    optimizer = made(model)

    def backward():
        model(rows(5)).square().mean().backward()

    def refused(message):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))

    backward()
    model[2].weight.grad = torch.ones(6, 6, dtype=torch.float64)
    refused("inputs behind the gradient of 2.weight are not known")
    optimizer.zero_grad()
    (model[0].weight.sum() + model(rows(5)).sum() * 0).backward()
    optimizer.step()  # a regulariser beside the layer is part of the gradient
    optimizer.zero_grad()
    model[0].weight.square().sum().backward()
    refused("inputs behind the gradient of 0.weight")
    optimizer.zero_grad()
    backward()
    model.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="changed between two backward passes"):
        backward()
    optimizer.zero_grad()
    backward()
    optimizer.remove_hooks()
    assert not any(module._forward_hooks for module in model)
    refused(r"before remove_hooks\(\)")
    assert not model[0].weight._post_accumulate_grad_hooks


def test_bad_arguments_are_refused_by_name():
    model = network()
    for options, message in (
        ({"erase": -1.0}, "erase"),
        ({"reduction": "max"}, "reduction"),
        ({"lr": -1.0}, "lr"),
        ({"adamw_eps": 0.0}, "adamw_eps"),
    ):
        with pytest.raises(ValueError, match=message):
            made(model, **options)
    assert not any(module._forward_hooks for module in model)
    with pytest.raises(TypeError, match="model: expected"):
        DeltaGradientDescent(model.parameters(), model=None)
    with pytest.raises(ValueError, match=r"not the weight of an nn.Linear of the model.*linear_only=True"):
        DeltaGradientDescent([nn.Parameter(torch.zeros(2, 2))], model=model)
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match="or of other modules too"):
        DeltaGradientDescent([tied["head"].weight], model=tied)
    assert split_parameters(tied, linear_only=True)[0]["rule"] == "adamw"
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(made(model))
    with pytest.raises(TypeError, match="DeltaGradientDescent cannot step on sums"):
        MultiFrequency(made(model), [1, 1])
    assert "AdamW" in made(model).describe()
