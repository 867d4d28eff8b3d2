"""Every variant, rule and way of differentiating, against the token-by-token reference, in fp64."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from nl_kernels import (
    ContinuumClock,
    continuum_clone,
    continuum_detach,
    continuum_flush,
    continuum_memory,
    continuum_reset,
    continuum_update,
)
from nl_kernels.ops.continuum import eager, first_order, orthogonal, schedule
from nl_kernels.ops.continuum.state import NO_MOMENTA, RULES, VARIANTS
from tests.nl_kernels.continuum_levels import (
    PADDINGS,
    WIDTH,
    assert_same,
    close,
    flat,
    flush_in_place,
    forget_all_but_the_last,
    in_place,
    make_level,
    random_tensor,
    rates,
    require_grad,
    run_with_gradients,
)

# muon's pass through five quintics loses some digits
TOLERANCE = {"muon": 1e-8}


def levels_of(rule, *, batch=2, length=13, gated=False, key=True, **options):
    """Periods 2, 4, 8 and a level that never steps; what a step retains is a tensor, a number, and all.

    The second one predicts what comes next.
    """
    retention, rate = torch.tensor([0.7, 0.03]).double()
    made = [
        make_level(
            1,
            rule=rule,
            gated=gated,
            chunk_size=2,
            rate=rates(batch, length),
            error_bound=0.3,
            retention=retention,
        ),
        make_level(
            2,
            rule=rule,
            gated=not gated,
            chunk_size=4,
            rate=0.04,
            hidden=3,
            retention=0.6,
            predict_next=True,
        ),
        make_level(4, rule=rule, gated=gated, chunk_size=8, rate=rate, hidden=8),
        make_level(3),
    ]
    made = [dataclasses.replace(level, **options) for level in made]
    return made if key else [dataclasses.replace(level, key=None) for level in made]


def options_of(variant):
    weights = torch.tensor([0.7, -0.4, 1.2, 0.9], dtype=torch.float64)
    return {"variant": variant} | ({"level_weights": weights} if variant == "independent" else {})


@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(variant, rule, gated, detach_updates):
    levels = levels_of(rule, batch=1, length=9, gated=gated, restore_norms=gated, key=rule != "dgd")
    x = random_tensor(1, 9, WIDTH, seed=0)
    options = {**options_of(variant), "detach_updates": detach_updates}
    assert_same(x, levels, tolerance=TOLERANCE.get(rule, 1e-10), **options)


@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_that_are_what_is_read(variant, key, detach_updates):
    levels = levels_of("sgd", batch=2, length=9, key=key, restore_norms=True)
    x = random_tensor(2, 9, WIDTH, seed=0)
    assert_same(x, levels, **options_of(variant), detach_updates=detach_updates)


@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize("padding", ["anywhere", None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_from_ragged_positions_equals_the_reference(variant, padding, detach_updates):
    before = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    options = {**options_of(variant), "detach_updates": detach_updates}
    levels = levels_of("momentum", batch=3, length=5)
    x = random_tensor(3, 5, WIDTH, seed=5)
    _, state = continuum_memory(x, levels, mask=before, output_final_state=True, **options)
    assert [s.position.tolist() for s in state[:3]] == [[1, 1, 1], [1, 1, 3], [5, 1, 3]]
    mask = None if padding is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
    levels = levels_of("momentum", batch=3, length=9)
    assert_same(random_tensor(3, 9, WIDTH, seed=6), levels, mask=mask, state=state, **options)


@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize(("variant", "rule"), [*itertools.product(VARIANTS, ["momentum"]), ("nested", "dgd")])
def test_a_cut_anywhere_changes_nothing(variant, rule, detach_updates):
    x = random_tensor(2, 13, WIDTH, seed=0)
    levels = [dataclasses.replace(level, rate=0.04) for level in levels_of(rule)]
    options = {**options_of(variant), "detach_updates": detach_updates}
    results, positions, gradients = run_with_gradients(x, levels, "eager", **options)
    for cut in range(1, 13, 2):
        start = x.clone().requires_grad_()
        moved, leaves = require_grad(levels)
        first, state = continuum_memory(start[:, :cut], moved, output_final_state=True, **options)
        second, final = continuum_memory(
            start[:, cut:], moved, initial_state=state, output_final_state=True, **options
        )
        found = [torch.cat((first, second), dim=1), *flat(final)]
        close(found, results)
        assert all(torch.equal(s.position, p) for s, p in zip(final, positions))
        functional = sum((r * random_tensor(*r.shape, seed=i)).sum() for i, r in enumerate(found))
        found = torch.autograd.grad(functional, [start, *leaves], allow_unused=True, materialize_grads=True)
        close(found, gradients[: len(found)])


@pytest.mark.parametrize(("every", "rule"), [(1, "momentum"), (2, "momentum"), *((None, r) for r in RULES)])
@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_value(variant, detach_updates, every, rule, monkeypatch):
    mask = torch.tensor(PADDINGS["left"], dtype=torch.bool)
    x = random_tensor(3, 9, WIDTH, seed=0)
    levels = levels_of(rule, batch=3, length=9)
    options = {**options_of(variant), "detach_updates": detach_updates, "mask": mask}
    plain = run_with_gradients(x, levels, "eager", **options)
    if every is None:
        forget_all_but_the_last(monkeypatch)
    kept = run_with_gradients(x, levels, "eager", checkpoint_every=every, **options)
    close(kept[0], plain[0], 1e-14)
    close(kept[2], plain[2], 1e-12)


def test_a_nested_level_is_reset_exactly_when_the_slower_one_steps():
    fast, slow = make_level(1, chunk_size=2), make_level(2, chunk_size=6)
    x, state, reset, same = random_tensor(1, 20, WIDTH, seed=0), None, [], []
    chain_state = None
    for t in range(20):
        token = x[:, t : t + 1]
        _, state = continuum_memory(
            token, [fast, slow], variant="nested", initial_state=state, output_final_state=True
        )
        _, chain_state = continuum_memory(
            token, [fast, slow], initial_state=chain_state, output_final_state=True
        )
        if torch.equal(state[0].up[0], fast.up) and torch.equal(state[0].down[0], fast.down):
            reset.append(t + 1)
        if torch.equal(state[1].up, chain_state[1].up):
            same.append(t + 1)
    assert reset == [1, 6, 7, 12, 13, 18, 19]  # until the first step of all it is where it started
    assert same == list(range(1, 12))  # from the first reset on the slower level has other tokens to learn


def test_the_slowest_level_that_steps_is_never_reset():
    levels = [make_level(1, chunk_size=2), make_level(2)]
    x = random_tensor(2, 9, WIDTH, seed=0)
    assert torch.equal(continuum_memory(x, levels, variant="nested")[0], continuum_memory(x, levels)[0])


def test_one_independent_level_is_a_chain_of_one():
    level, x = make_level(1, chunk_size=2), random_tensor(2, 9, WIDTH, seed=0)
    assert torch.equal(
        continuum_memory(x, [level], variant="independent")[0], continuum_memory(x, [level])[0]
    )


def test_independent_levels_that_never_step_are_one_wide_mlp():
    levels = [dataclasses.replace(make_level(s), norm=make_level(1).norm) for s in (1, 2, 3)]
    x = random_tensor(2, 9, WIDTH, seed=0)
    up = torch.cat([level.up for level in levels])
    down = torch.cat([level.down for level in levels], dim=1)
    inner = F.rms_norm(x, (WIDTH,), levels[0].norm, 1e-6)
    wide = x + F.gelu(inner @ up.mT) @ down.mT
    close([continuum_memory(x, levels, variant="independent")[0]], [wide], 1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_update_of_its_rule(rule):
    """The op's step and ``continuum_update``, given the same gradient, for two steps."""
    level = make_level(1, rule=rule, chunk_size=3, rate=0.05, error_bound=None, restore_norms=True)
    level = dataclasses.replace(level, key=None)
    x = random_tensor(1, 6, WIDTH, seed=0)
    _, (state,) = continuum_memory(x, [level], output_final_state=True)
    inner = F.rms_norm(x[0], (WIDTH,), level.norm, 1e-6)
    up, down, momenta = level.up, level.down, (None, None)
    for keys in inner.split(3):
        hidden = F.gelu(keys @ up.mT)
        error = hidden @ down.mT - keys @ level.value.mT
        signal = torch.ops.aten.gelu_backward(error @ down, keys @ up.mT)
        new = []
        for weight, start, delta, inputs, momentum in (
            (up, level.up, signal, keys, momenta[0]),
            (down, level.down, error, hidden, momenta[1]),
        ):
            extra = {"momentum": momentum} if rule in ("momentum", "muon") else {}
            if rule == "dgd":
                extra = {"gram": 0.05 * inputs.mT @ inputs}
            gradient = 0.05 * delta.mT @ inputs
            new.append(continuum_update(weight, gradient, rule=rule, norms=start.norm(dim=1), **extra))
        (up, m_up), (down, m_down) = new
        momenta = m_up, m_down
    found = [state.up[0], state.down[0]]
    expected = [up, down]
    if rule in ("momentum", "muon"):
        found += [state.up_momentum[0], state.down_momentum[0]]
        expected += momenta
    close(found, expected, 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_updates_to_follow_what_makes_them_has_no_gradient(variant):
    levels, _ = require_grad(levels_of("sgd"))
    y, _ = continuum_memory(random_tensor(2, 13, WIDTH, seed=0), levels, variant=variant, detach_updates=True)
    y.square().sum().backward()
    for level in levels[:3]:
        assert level.key.grad is None
        assert level.value.grad is None
        assert all(weight.grad.any() for weight in (level.up, level.down, level.norm))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("detach_updates", [False, True])
def test_a_flush_equals_the_reference(rule, variant, detach_updates):
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2], dtype=torch.bool)
    levels = levels_of(rule, batch=3, length=7, restore_norms=True)
    x = random_tensor(3, 7, WIDTH, seed=0)
    found = []
    for impl in ("eager", "reference"):
        own, leaves = require_grad(levels)
        _, state = continuum_memory(
            x, own, variant=variant, mask=mask, output_final_state=True, impl=impl,
            detach_updates=detach_updates,
        )  # fmt: skip
        state = continuum_flush(state, own, variant=variant, detach_updates=detach_updates, impl=impl)
        assert all(not s.position.any() and not s.pending_inputs.shape[1] for s in state[:3])
        functional = sum((r * random_tensor(*r.shape, seed=i)).sum() for i, r in enumerate(flat(state)))
        gradients = torch.autograd.grad(functional, leaves, allow_unused=True, materialize_grads=True)
        found.append(([*flat(state)], gradients))
    for part in (0, 1):
        close(found[0][part], found[1][part], TOLERANCE.get(rule, 1e-10))


def test_a_flush_of_a_whole_chunk_is_its_step():
    level = make_level(1, chunk_size=8, rule="momentum")
    x = random_tensor(2, 4, WIDTH, seed=0)
    _, state = continuum_memory(x, [level], output_final_state=True)
    (flushed,) = continuum_flush(state, [level])
    short = dataclasses.replace(level, chunk_size=4)
    _, (stepped,) = continuum_memory(x, [short], output_final_state=True)
    close(flat([flushed]), flat([stepped]))


def test_reset_takes_sequences_back_to_their_start():
    levels = levels_of("momentum", batch=3)
    x = random_tensor(3, 13, WIDTH, seed=0)
    _, state = continuum_memory(x, levels, output_final_state=True)
    levels = [dataclasses.replace(level, rate=0.05) for level in levels]
    rows = torch.tensor([True, False, True])
    kept = continuum_clone(state)
    again = continuum_reset(state, levels, sequences=rows)
    y, final = continuum_memory(x, levels, initial_state=again, output_final_state=True)
    fresh, fresh_final = continuum_memory(x, levels, output_final_state=True)
    gone_on, _ = continuum_memory(x, levels, initial_state=state)
    close([y[rows], y[1]], [fresh[rows], gone_on[1]])
    close([final[0].up[rows]], [fresh_final[0].up[rows]])
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(kept)))
    everything = continuum_reset(state, levels)
    close([continuum_memory(x, levels, initial_state=everything)[0]], [fresh])
    with pytest.raises(TypeError, match="sequences"):
        continuum_reset(state, levels, sequences=torch.ones(3))
    with pytest.raises(ValueError, match="sequences"):
        continuum_reset(state, levels, sequences=rows[:2])


def test_detach_cuts_the_graph_and_clone_does_not():
    levels, _ = require_grad(levels_of("momentum"))
    _, state = continuum_memory(random_tensor(2, 13, WIDTH, seed=0), levels, output_final_state=True)
    assert not any(t.requires_grad for t in flat(continuum_detach(state)))
    clone = continuum_clone(state)
    assert all(level.up.requires_grad for level in clone[:3])
    assert all(c.data_ptr() != t.data_ptr() for c, t in zip(flat(clone), flat(state)))
    assert clone[3] is None
    assert continuum_detach(state)[3] is None


def test_states_that_do_not_nest_are_refused():
    levels = levels_of("sgd", batch=2, length=13)
    x = random_tensor(2, 13, WIDTH, seed=0)
    _, state = continuum_memory(x, levels, output_final_state=True, variant="nested")
    moved = (state[0], state[1]._replace(position=torch.tensor([1, 0])), *state[2:])
    with pytest.raises(ValueError, match=r"initial_state\[0\].position"):
        continuum_memory(x, levels, initial_state=moved, variant="nested")
    with pytest.raises(TypeError, match="state: expected a ContinuumState"):
        continuum_flush((None,), levels)
    with pytest.raises(ValueError, match=r"state: expected a tuple of 3"):
        continuum_flush(state, levels[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detached_gradients_in_reduced_precision(dtype):
    """Against fp64: as far as the plain block's are, within a factor."""
    levels = levels_of("sgd", key=False)
    x = random_tensor(2, 13, WIDTH, seed=0)

    def gradients(dtype, **changes):
        cast = [
            dataclasses.replace(
                level,
                **{n: getattr(level, n).to(dtype) for n in ("norm", "up", "down", "value")},
                gate=None if level.gate is None else level.gate.to(dtype),
                **changes,
            )
            for level in levels
        ]
        own, leaves = require_grad(cast)
        y, _ = continuum_memory(x.to(dtype), own, detach_updates=True)
        found = torch.autograd.grad(y.double().square().sum(), leaves, allow_unused=True)
        return torch.cat([g.double().flatten() for g in found if g is not None])

    def error(**changes):
        exact = gradients(torch.float64, **changes)
        return (gradients(dtype, **changes) - exact).norm() / exact.norm()

    assert error() <= 2 * error(rate=0.0) + torch.finfo(dtype).eps


def test_autocast_with_detached_updates():
    levels, _ = require_grad(
        [
            dataclasses.replace(
                level, **{n: getattr(level, n).float() for n in ("norm", "up", "down", "value")}
            )
            for level in (make_level(1, chunk_size=2, rate=0.05), make_level(2, chunk_size=4, rate=0.05))
        ]
    )
    levels = [dataclasses.replace(level, key=None) for level in levels]
    x = random_tensor(2, 9, WIDTH, seed=0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = continuum_memory(x, levels, detach_updates=True, output_final_state=True)
    exact, _ = continuum_memory(x, levels)
    assert all(t.dtype == torch.float32 for t in flat(state))
    torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert all(level.up.grad.isfinite().all() and level.up.grad.any() for level in levels)


def test_a_backward_pass_under_autocast_is_the_same():
    x = random_tensor(2, 9, WIDTH, seed=0)
    level = make_level(1, chunk_size=2, rate=0.05)
    fields = {n: getattr(level, n).float() for n in ("norm", "up", "down", "value")}
    (level,), _ = require_grad([dataclasses.replace(level, **fields, key=None)])
    leaves = [level.up, level.down]
    y, _ = continuum_memory(x.float(), [level], detach_updates=True)
    matrix = random_tensor(2, 5, 7, seed=1).float().requires_grad_()
    wide = orthogonal.orthogonalised(matrix)
    losses = ((y.square().sum(), leaves), (wide.mul(random_tensor(5, 7, seed=2)).sum(), [matrix]))
    for loss, of in losses:
        expected = torch.autograd.grad(loss, of, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(loss, of)
        assert all(map(torch.equal, found, expected))


def changed(owner, name, change):
    original = getattr(owner, name)
    return owner, name, lambda *args: change(original(*args), *args)


MUTATIONS = {
    "reset one chunk late": changed(schedule.Resets, "after", lambda _, r, n: (r.first + n) % r.period == 0),
    "never reset": (schedule.Resets, "after", lambda resets, number: False),
    "momentum forgotten": changed(eager, "learn", lambda made, *_: (*made[:3], NO_MOMENTA)),
    "norms not restored": (eager, "with_row_norms", lambda weight, norms: weight),
    "slope of the step in the read": changed(eager, "read_backward", lambda d_x, *_: 2 * d_x),
    "gradients of a reset weight given to the first": changed(
        first_order, "_owners", lambda _, owner, totals: [(None, totals[:3])]
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices_a_broken_implementation(mutation, monkeypatch):
    levels = levels_of("momentum", restore_norms=True)
    x = random_tensor(2, 13, WIDTH, seed=0)
    options = {"variant": "nested", "detach_updates": True}
    _, state = continuum_memory(random_tensor(2, 1, WIDTH, seed=0), [
        dataclasses.replace(level, rate=0.05) for level in levels
    ], output_final_state=True, **options)  # fmt: skip
    assert_same(x, levels, state=state, **options)
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        assert_same(x, levels, state=state, **options)


@pytest.mark.parametrize(
    ("memory", "flush"),
    [
        (partial(continuum_memory, impl="reference"), partial(continuum_flush, impl="reference")),
        (continuum_memory, continuum_flush),
        (in_place, flush_in_place),
    ],
    ids=["reference", "eager", "in place"],
)
def test_a_step_of_rate_zero_resets_the_faster_level_as_number_and_as_tensor(memory, flush):
    """Eq. 72, at every cut, from ragged positions, and in a flush."""
    fast, slow, slowest = make_level(1, chunk_size=2, rate=0.1), make_level(2, chunk_size=4), make_level(3)
    x = random_tensor(2, 15, WIDTH, seed=0)
    mask = torch.tensor([[1] * 15, [1, 0, 0, 1] + [1] * 11], dtype=torch.bool)

    def results(rate, cut):
        levels = [fast, dataclasses.replace(slow, rate=rate), slowest]
        parts, state = [], None
        for part, shown in zip(x.tensor_split([cut], 1), mask.tensor_split([cut], 1)):
            y, state = memory(
                part, levels, variant="nested", mask=shown, initial_state=state, output_final_state=True
            )
            parts.append(y)
        assert [s.position.tolist() for s in state[:2]] == [[1, 1], [3, 1]]
        flushed = flush(state, levels, variant="nested")
        assert not any(s.position.any() for s in flushed[:2])
        again = continuum_reset(state, levels, sequences=torch.tensor([True, False]))
        assert [s.position.tolist() for s in again[:2]] == [[0, 1], [0, 1]]
        assert torch.equal(flushed[0].up, fast.up.expand(2, -1, -1))
        return [torch.cat(parts, 1), state[0].up, state[0].pending_inputs, again[0].down], state[1]

    expected, _ = results(torch.zeros((), dtype=torch.float64), 7)
    for cut in (1, 6, 7, 14):
        found, clock = results(0.0, cut)
        close(found, expected, 1e-12)
        assert type(clock) is ContinuumClock


def test_only_a_slower_level_with_a_chunk_size_keeps_time():
    fast, x = make_level(1, chunk_size=2, rate=0.1), random_tensor(1, 9, WIDTH, seed=0)
    for levels, variant in (
        ([fast, make_level(2)], "nested"),  # never steps: no period
        ([fast, make_level(2, chunk_size=4, rate=0.0)], "sequential"),
        ([make_level(2, chunk_size=4, rate=0.0)], "nested"),
        ([make_level(1, chunk_size=2, rate=0.0), make_level(2, chunk_size=4, rate=0.0)], "nested"),
    ):
        _, state = continuum_memory(x, levels, variant=variant, output_final_state=True)
        assert state[-1] is None


def test_bad_clock():
    levels = [make_level(1, chunk_size=2, rate=0.1), make_level(2, chunk_size=4, rate=0.0)]
    x = random_tensor(2, 3, WIDTH, seed=0)
    _, state = continuum_memory(x, levels, variant="nested", output_final_state=True)
    for bad, message in (
        (None, r"initial_state\[1\]: expected ContinuumClock, got NoneType"),
        (ContinuumClock(torch.tensor([3, 4])), r"initial_state\[1\].position: expected .* got"),
        (ContinuumClock(torch.tensor([2, 2])), r"initial_state\[0\].position: expected the place"),
        (ContinuumClock(torch.tensor([3])), r"initial_state\[1\].position: expected shape \(2,\)"),
        (ContinuumClock(torch.tensor([3.0, 3.0])), r"initial_state\[1\].position: .* int64 tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            continuum_memory(x, levels, variant="nested", initial_state=(state[0], bad))
