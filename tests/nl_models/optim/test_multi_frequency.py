"""A group of period k takes one step on k gradients: against a loop that says so, however one trains."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nl_models.optim import M3, DeepMomentum, DeltaMomentum, MultiFrequency, Muon
from tests.nl_models.optim.problems import set_gradients

SHAPES = [(3, 4), (4, 3), (5, 5)]


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


INNER = {
    "sgd": sgd,
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05, fused=True),
    "muon": lambda groups: Muon(groups, lr=0.05),
    "m3": lambda groups: M3(groups, lr=0.05, frequency=2),
    "delta": lambda groups: DeltaMomentum(groups, lr=0.05),
    "deep": lambda groups: DeepMomentum(groups, lr=0.05),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def weights(dtype=torch.float64, shapes=SHAPES):
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)) for s in shapes]


def made(inner, periods, dtype=torch.float64, **options):
    params = weights(dtype, SHAPES[: len(periods)])
    return MultiFrequency(inner([{"params": [p]} for p in params]), periods, **options), params


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_inner
def test_every_group_steps_on_its_window(inner, reduction):
    periods = [1, 2, 5]
    optimizer, params = made(inner, periods, reduction=reduction)
    alone = weights()
    single = [inner([p]) for p in alone]
    window = [[] for _ in periods]
    for call in range(20):
        before = [p.detach().clone() for p in params]
        set_gradients(params, torch.Generator().manual_seed(call))
        given = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, given))
        for i, (p, period) in enumerate(zip(alone, periods)):
            window[i].append(given[i].clone())
            if len(window[i]) == period:
                p.grad = sum(window[i]) / (period if reduction == "mean" else 1)
                single[i].step()
                window[i].clear()
            else:
                assert torch.equal(params[i], before[i])
        for a, b in zip(params, alone):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    periods=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    calls=st.lists(st.sampled_from(["step", "missing", "save"]), min_size=1, max_size=25),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_any_run_equals_the_definition(periods, calls, reduction):
    """Missing gradients count as zero, a period without any is skipped; saving anywhere changes nothing."""
    optimizer, params = made(sgd, periods, reduction=reduction)
    alone = weights(shapes=SHAPES[: len(periods)])
    single = [sgd([p]) for p in alone]
    totals, steps = [None] * len(periods), 0
    for number, call in enumerate(calls):
        if call == "save":
            other, twins = made(sgd, [9] * len(periods), reduction=reduction)
            for p, twin in zip(params, twins):
                twin.data.copy_(p.data)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other.load_state_dict(torch.load(file))
            optimizer, params = other, twins
            continue
        steps += 1
        set_gradients(params, torch.Generator().manual_seed(number))
        if call == "missing":
            params[0].grad = None
        optimizer.step()
        for i, (p, period) in enumerate(zip(alone, periods)):
            if params[i].grad is not None:
                totals[i] = params[i].grad + (0 if totals[i] is None else totals[i])
            if steps % period == 0:
                p.grad = None if totals[i] is None else totals[i] / (period if reduction == "mean" else 1)
                single[i].step()
                totals[i] = None
    for a, b in zip(params, alone):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_inner
def test_a_state_saved_within_a_period_continues_bit_for_bit(inner, dtype):
    optimizer, params = made(inner, [1, 3, 4], dtype)

    def run(chosen, group, seeds):
        for seed in seeds:
            set_gradients(group, torch.Generator().manual_seed(seed))
            chosen.step()

    run(optimizer, params, range(5))  # 2 of 3 and 1 of 4 gradients are waiting
    other, twins = made(inner, [1, 3, 4], dtype)
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    # PyTorch's own optimisers share what they load; the sums are copied.
    given = copy.deepcopy(saved)
    for number, values in given["state"].items():
        if "multi_frequency_sum" in values:
            values["multi_frequency_sum"] = saved["state"][number]["multi_frequency_sum"]
    other.load_state_dict(given)
    assert {total.dtype for total in other._sums.values()} == {torch.float32}
    run(other, twins, range(5, 12))
    for number in (1, 2):
        sums = (state["state"][number]["multi_frequency_sum"] for state in (kept, saved))
        assert torch.equal(*sums)
    run(optimizer, params, range(5, 12))
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins))


def test_sums_of_16_bit_gradients_are_fp32():
    """In bf16, 1 + 1/512 is 1: a sum of small gradients would stand still."""
    w = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = MultiFrequency(torch.optim.SGD([w], lr=1.0), [257], reduction="sum")
    for call in range(257):
        w.grad = torch.full_like(w, 1.0 if call == 0 else 2**-9)
        optimizer.step()
    assert torch.equal(w.detach(), torch.full_like(w, -1.5))


@every_inner
def test_clipped_gradients_are_what_is_added(inner):
    """Each call's gradient is clipped by itself, as it comes."""
    optimizer, params = made(inner, [4], reduction="sum")
    (alone,) = weights(shapes=SHAPES[:1])
    single, total = inner([alone]), 0
    for seed in range(8):
        set_gradients(params, torch.Generator().manual_seed(seed))
        assert nn.utils.clip_grad_norm_(params, 0.3) > 0.3
        total = total + params[0].grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        if seed % 4 == 3:
            alone.grad, total = total, 0
            single.step()
    torch.testing.assert_close(params[0], alone, rtol=1e-12, atol=1e-12)


@every_inner
def test_with_a_gradient_scaler(inner):
    """Sums are of unscaled gradients though the scale changes; a call that overflows does not count."""
    plain, params = made(inner, [1, 3], torch.float32)
    scaled, twins = made(inner, [1, 3], torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(7):
        plain.zero_grad()
        sum((p - 1).square().sum() for p in params).backward()
        plain.step()
        for attempt in ("overflow", "finite") if step == 3 else ("finite",):
            scaled.zero_grad()
            scaler.scale(sum((p - 1).square().sum() for p in twins)).backward()
            if attempt == "overflow":
                twins[1].grad[0, 0] = torch.inf
            scaler.step(scaled)
            scaler.update()
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


def test_accumulation_within_a_call_equals_the_whole_batch():
    results = []
    data = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(4, 4).double()
        groups = [{"params": [model.weight]}, {"params": [model.bias]}]
        optimizer = MultiFrequency(torch.optim.SGD(groups, lr=0.1), [3, 1])
        for batch in data:
            optimizer.zero_grad()
            for rows in batch.chunk(parts):
                ((model(rows) - rows).square().mean() / parts).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_schedulers_work_on_it():
    optimizer, (fast, slow) = made(lambda groups: torch.optim.SGD(groups, lr=1.0), [1, 2], reduction="sum")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = [fast.detach().clone(), slow.detach().clone()]
    for _ in range(4):
        fast.grad, slow.grad = torch.ones_like(fast), torch.ones_like(slow)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(fast.detach(), start[0] - (1 + 0.5 + 0.25 + 0.125))
    torch.testing.assert_close(slow.detach(), start[1] - 2 * (0.5 + 0.125))
    assert scheduler.get_last_lr() == [0.0625, 0.0625]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)


def test_closures_sparse_gradients_and_compiled_steps():
    optimizer, (w,) = made(sgd, [2])
    before = w.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert torch.equal(w, before)
    optimizer.step(closure)
    assert not torch.equal(w, before)
    w.grad = w.detach().to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    compiled, (first, *_) = made(sgd, [2, 1])
    plain, (second, *_) = made(sgd, [2, 1])
    step = torch.compile(compiled.step, backend="eager")
    for seed in range(5):
        for p in (first, second):
            set_gradients([p], torch.Generator().manual_seed(seed))
        step()
        plain.step()
    assert torch.equal(first, second)


def test_groups_are_shared_and_can_be_added():
    params = weights()
    inner = sgd([{"params": params[:1]}])
    optimizer = MultiFrequency(inner, [3])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    optimizer.add_param_group({"params": params[1:2], "period": 2})
    optimizer.add_param_group({"params": params[2:]})
    assert [group["period"] for group in inner.param_groups] == [3, 2, 1]
    assert "every 3 calls" in optimizer.describe()
    assert "Muon" in MultiFrequency(Muon(weights()), [2]).describe()
    twin = copy.deepcopy(optimizer)
    assert [group["period"] for group in twin.param_groups] == [3, 2, 1]


def test_bad_arguments_are_refused_by_name():
    inner = sgd(weights())
    for periods in ([], [1, 2]):
        with pytest.raises(ValueError, match="periods: expected 1, one for each group"):
            MultiFrequency(inner, periods)
    for period in (0, 1.5, True):
        with pytest.raises(ValueError, match="periods: expected ints of at least 1"):
            MultiFrequency(inner, [period])
    with pytest.raises(ValueError, match="reduction"):
        MultiFrequency(inner, [1], reduction="max")
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        MultiFrequency(weights(), [1])
    with pytest.raises(TypeError, match="optimizer: LBFGS"):
        MultiFrequency(torch.optim.LBFGS(weights()), [1])
    assert "period" not in inner.param_groups[0]
    optimizer = MultiFrequency(inner, [2])
    with pytest.raises(ValueError, match="without MultiFrequency"):
        optimizer.load_state_dict(sgd(weights()).state_dict())
    stepped, params = made(sgd, [2])
    set_gradients(params, torch.Generator().manual_seed(0))
    stepped.step()
    with pytest.raises(ValueError, match="inside MultiFrequency, so sums are missing"):
        stepped.load_state_dict(stepped.optimizer.state_dict())
    with pytest.raises(ValueError, match="saved with reduction='mean'"):
        MultiFrequency(sgd(weights()), [2], reduction="sum").load_state_dict(optimizer.state_dict())


def test_only_slow_groups_hold_a_sum_and_only_within_a_period():
    optimizer, params = made(INNER["muon"], [1, 2, 3], torch.bfloat16)
    for held in ([1, 2], [2], [1], [2], [1, 2], []):
        set_gradients(params, torch.Generator().manual_seed(0))
        optimizer.step()
        sizes = [optimizer._sums[p].nbytes for p in params if p in optimizer._sums]
        assert sizes == [4 * params[i].numel() for i in held]
