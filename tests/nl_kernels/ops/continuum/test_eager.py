"""The eager implementation against the token-by-token reference, in fp64."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from nl_kernels import ContinuumLevel, continuum_memory
from nl_kernels.memory.segments import KEPT_MEGABYTES
from nl_kernels.ops.continuum import chunk_walk, eager, loop
from nl_kernels.ops.continuum.state import Weights
from tests.nl_kernels.continuum_levels import (
    PADDINGS,
    TENSORS,
    WIDTH,
    assert_same,
    chain,
    close,
    flat,
    forget_all_but_the_last,
    make_level,
    random_tensor,
    rates,
    require_grad,
    run_with_gradients,
)


@pytest.mark.parametrize("length", [1, 4, 7, 17])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_equals_the_reference(rule, gated, length):
    levels = [
        make_level(1, gated=gated, rule=rule, chunk_size=2, rate=rates(2, length), error_bound=0.3),
        make_level(2, gated=gated, rule=rule, chunk_size=8, rate=torch.tensor(0.02).double(), hidden=11),
        make_level(3, gated=gated),
    ]
    assert_same(random_tensor(2, length, WIDTH, seed=0), levels)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 16])
@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_equals_the_reference_at_every_chunk_size(rule, chunk_size):
    level = make_level(4, rule=rule, chunk_size=chunk_size, rate=0.03, error_bound=None)
    assert_same(random_tensor(1, 13, WIDTH, seed=2), [level])


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_equals_the_reference(padding):
    mask = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    x = random_tensor(3, 9, WIDTH, seed=0)
    results, _, gradients = assert_same(x, chain(9), mask=mask)
    assert not results[0][~mask].any()
    assert not gradients[0][~mask].any()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_going_on_from_ragged_positions_equals_the_reference(rule, padding):
    before = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    levels = chain(3, rule=rule)
    _, state = continuum_memory(
        random_tensor(3, 3, WIDTH, seed=5), levels, mask=before, output_final_state=True
    )
    assert [s.position.tolist() for s in state[:2]] == [[1, 1, 0], [3, 1, 2]]
    mask = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    x = random_tensor(3, 9, WIDTH, seed=6)
    assert_same(x, chain(9, rule=rule), mask=mask, state=state)
    assert_same(x, chain(9, rule=rule), state=state)


def test_padding_is_as_if_it_were_not_there():
    x = random_tensor(2, 12, WIDTH, seed=0)
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0], [1] * 12], dtype=torch.bool)
    levels = [make_level(1, chunk_size=2), make_level(2, chunk_size=4, gated=True)]
    poisoned = x.masked_fill(~mask[..., None], 1e30)
    y, state = continuum_memory(poisoned, levels, mask=mask, output_final_state=True)
    for b in range(2):
        alone, state_alone = continuum_memory(x[b, mask[b]][None], levels, output_final_state=True)
        close([y[b, mask[b]]], [alone[0]])
        for level, level_alone in zip(state, state_alone):
            position = int(level_alone.position)
            assert int(level.position[b]) == position
            close([level.up[b], level.down[b]], [level_alone.up[0], level_alone.down[0]])
            close([level.pending_inputs[b, :position]], [level_alone.pending_inputs[0]])


@pytest.mark.parametrize("padding", [None, "anywhere"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_level_that_never_steps_may_have_weights_of_each_sequence(gated, padding):
    own = [make_level(seed, gated=gated) for seed in (3, 4, 5)]
    stacked = {
        part: torch.stack([getattr(level, part) for level in own])
        for part in ("up", "down", *(("gate",) if gated else ()))
    }
    before, after = make_level(1, chunk_size=2), dataclasses.replace(own[0], **stacked)
    x = random_tensor(3, 9, WIDTH, seed=0)
    mask = None if padding is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
    results, _, _ = assert_same(x, [before, after], mask=mask)
    for b, level in enumerate(own):
        level = dataclasses.replace(level, norm=after.norm)
        row_mask = None if mask is None else mask[b : b + 1]
        alone, _ = continuum_memory(x[b : b + 1], [before, level], mask=row_mask)
        close([results[0][b : b + 1]], [alone])
    with pytest.raises(ValueError, match=r"levels\[0\].up: expected a tensor of shape \[H, 6\], got"):
        continuum_memory(x, [dataclasses.replace(after, chunk_size=2, rate=0.1)])
    with pytest.raises(ValueError, match=r"levels\[0\].up: expected shape \(2, 5, 6\)"):
        continuum_memory(x[:2], [after])
    with pytest.raises(ValueError, match=r"levels\[0\].down: expected shape \(3, 6, 5\)"):
        continuum_memory(x, [dataclasses.replace(after, down=own[0].down)])


def test_sequences_do_not_know_of_each_other():
    x = random_tensor(3, 11, WIDTH, seed=0)
    levels = [make_level(1, chunk_size=2), make_level(2, chunk_size=4)]
    together = continuum_memory(x, levels)[0]
    close([together], [torch.cat([continuum_memory(row[None], levels)[0] for row in x])])


@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_a_cut_anywhere_changes_nothing(rule):
    x = random_tensor(2, 13, WIDTH, seed=0)
    levels = [
        make_level(1, rule=rule, chunk_size=3),
        make_level(2, rule=rule, chunk_size=6, gated=True),
        make_level(3),
    ]
    results, positions, gradients = run_with_gradients(x, levels, "eager")
    for cut in range(1, 13):
        start = x.clone().requires_grad_()
        moved, leaves = require_grad(levels)
        first, state = continuum_memory(start[:, :cut], moved, output_final_state=True)
        second, final = continuum_memory(start[:, cut:], moved, initial_state=state, output_final_state=True)
        found = [torch.cat((first, second), dim=1), *flat(final)]
        close(found, results)
        assert all(torch.equal(s.position, p) for s, p in zip(final, positions))
        functional = sum((r * random_tensor(*r.shape, seed=i)).sum() for i, r in enumerate(found))
        found = torch.autograd.grad(functional, [start, *leaves], allow_unused=True, materialize_grads=True)
        close(found, gradients)


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_token_by_token_is_the_forward(ragged):
    x = random_tensor(2, 14, WIDTH, seed=0)
    mask = torch.ones(2, 14, dtype=torch.bool)
    if ragged:
        mask[0, :3] = False
    levels = [make_level(1, chunk_size=2), make_level(2, chunk_size=4, gated=True), make_level(3)]
    whole, final = continuum_memory(x, levels, mask=mask, output_final_state=True)
    for prompt in (1, 5, 8):
        y, state = continuum_memory(x[:, :prompt], levels, mask=mask[:, :prompt], output_final_state=True)
        pieces = [y]
        for t in range(prompt, 14):
            y, state = continuum_memory(
                x[:, t : t + 1], levels, mask=mask[:, t : t + 1], initial_state=state, output_final_state=True
            )
            pieces.append(y)
        close([torch.cat(pieces, dim=1), *flat(state)], [whole, *flat(final)])
        assert all(torch.equal(s.position, f.position) for s, f in zip(state, final) if s is not None)


def test_a_state_may_be_gone_on_from_twice():
    x = random_tensor(1, 9, WIDTH, seed=0)
    level = make_level(1, chunk_size=4)
    _, state = continuum_memory(x[:, :3], [level], output_final_state=True)
    kept = [t.clone() for t in flat(state)]
    first = continuum_memory(x[:, 3:], [level], initial_state=state)[0]
    assert all(torch.equal(t, k) for t, k in zip(flat(state), kept))
    assert torch.equal(continuum_memory(x[:, 3:], [level], initial_state=state)[0], first)


def test_a_state_shares_no_memory_with_the_weights():
    level = make_level(1, chunk_size=4)
    _, (state,) = continuum_memory(random_tensor(1, 3, WIDTH, seed=0), [level], output_final_state=True)
    before = state.up.clone()
    level.up.zero_()
    assert torch.equal(state.up, before)


@pytest.mark.parametrize("every", [1, 2, 100, None])
@pytest.mark.parametrize("padding", [None, "left"])
def test_checkpointing_changes_no_value(every, padding, monkeypatch):
    mask = None if padding is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
    x = random_tensor(3, 9, WIDTH, seed=0)
    plain = run_with_gradients(x, chain(9), "eager", mask=mask)
    if every is None:
        forget_all_but_the_last(monkeypatch)
    kept = run_with_gradients(x, chain(9), "eager", mask=mask, checkpoint_every=every)
    close(kept[0], plain[0], 1e-14)
    close(kept[2], plain[2], 1e-12)


def saved_bytes(x, levels, **options):
    """Distinct storage that the backward keeps, in bytes."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        continuum_memory(x, levels, **options)
    return sum(storage.nbytes() for storage in storages.values())


def test_checkpointing_keeps_weights_only_at_its_boundaries():
    level, length = make_level(1, chunk_size=4, hidden=64), 256
    (level,), _ = require_grad([level])
    x = random_tensor(1, length, WIDTH, seed=0)
    weights = 2 * 64 * WIDTH * 8
    rows = 20 * length * WIDTH * 8  # what is kept of the whole sequence at the stream's width
    assert saved_bytes(x, [level]) > (length // 4) * weights + rows
    assert saved_bytes(x, [level], checkpoint_every=1) < (length // 4 + 1) * weights + rows
    assert saved_bytes(x, [level], checkpoint_every=8) < (length // 32 + 1) * weights + rows


@pytest.mark.parametrize("rule", ["sgd", "muon"])
@pytest.mark.parametrize("detach_updates", [False, True])
def test_what_is_kept_is_bounded(detach_updates, rule, monkeypatch):
    (level,), _ = require_grad([make_level(1, chunk_size=1, hidden=64, rule=rule)])

    def kept(length):
        x = random_tensor(1, length, WIDTH, seed=0)
        return saved_bytes(x, [level], detach_updates=detach_updates)

    assert kept(128) - kept(64) > 0.9 * 64 * 2 * 64 * WIDTH * 8  # there is room for all
    monkeypatch.setitem(KEPT_MEGABYTES, "continuum", 0)
    states = [kept(length) - 20 * length * WIDTH * 8 for length in (64, 256)]
    assert states[1] < 2.3 * states[0]  # twice the root of four times the chunks


def plain_block(level, x):
    inner = F.rms_norm(x, (x.shape[-1],), level.norm, 1e-6)
    up = F.linear(inner, level.up)
    hidden = F.gelu(up) if level.gate is None else F.silu(F.linear(inner, level.gate)) * up
    return x + F.linear(hidden, level.down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("still", [{"chunk_size": None, "rate": 0.1}, {"chunk_size": 2, "rate": 0.0}])
def test_a_level_that_never_steps_is_the_plain_block_bit_for_bit(still, gated, dtype):
    def cast(seed):
        level = make_level(seed, gated=gated, hidden=33)
        return dataclasses.replace(
            level,
            **{n: getattr(level, n).to(dtype) for n in TENSORS[:-2] if getattr(level, n) is not None},
            **still,
        )

    levels, leaves = require_grad([cast(1), cast(2)])
    x = random_tensor(2, 37, WIDTH, seed=0).to(dtype).requires_grad_()
    y, state = continuum_memory(x, levels, output_final_state=True)
    plain = plain_block(levels[1], plain_block(levels[0], x))
    assert torch.equal(y, plain)
    assert state == (None, None)
    used = [leaf for leaf in leaves if leaf.shape != (WIDTH, WIDTH)]
    for found, expected in zip(*(torch.autograd.grad(out.sum(), [x, *used]) for out in (y, plain))):
        assert torch.equal(found, expected)


def test_before_its_first_step_a_level_is_the_plain_block_bit_for_bit():
    level = make_level(1, chunk_size=16)
    x = random_tensor(2, 16, WIDTH, seed=0)
    assert torch.equal(continuum_memory(x, [level])[0], plain_block(level, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["sgd", "dgd"])
def test_rounding_stays_within_its_budget(rule, dtype):
    """Error against fp64 at most twice that of a plain block plus one rounding; steps run in fp32."""
    width, length = 32, 96
    tensors = {
        "norm": torch.ones(width),
        "up": random_tensor(48, width, scale=width**-0.5, seed=1),
        "down": random_tensor(width, 48, scale=48**-0.5, seed=2),
        "key": torch.eye(width),
        "value": random_tensor(width, width, scale=width**-0.5, seed=3),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    x = random_tensor(2, length, width, seed=0).to(dtype)

    def level(dtype, **options):
        return ContinuumLevel(**{name: t.to(dtype) for name, t in tensors.items()}, rule=rule, **options)

    def error(**options):
        y = continuum_memory(x, [level(dtype, **options)], output_final_state=True)
        exact = continuum_memory(x.double(), [level(torch.float64, **options)])[0]
        return (y[0].double() - exact).norm(dim=-1) / exact.norm(dim=-1), y

    rate = 0.3 / width if rule == "dgd" else 0.3 / width / 16
    found, (y, (state,)) = error(chunk_size=16, rate=rate)
    plain, _ = error()
    assert y.dtype == dtype
    assert state.up.dtype == state.pending_inputs.dtype == torch.float32
    assert found.norm() <= 2 * plain.norm() + torch.finfo(dtype).eps
    assert found.max() <= 2 * plain.max() + torch.finfo(dtype).eps


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["random", "few", "one"])
@pytest.mark.parametrize("chunk_size", [1, 16])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("sgd", {}),
        ("dgd", {}),
        ("momentum", {}),
        ("muon", {}),
        ("sgd", {"retention": 0.9}),
        ("sgd", {"retention": 0.99, "error_bound": 3.0, "predict_next": True}),
    ],
)
def test_weights_stay_bounded_on_a_long_stream(rule, options, chunk_size, kind, gated):
    """At large rates: a gain of 1 for a whole chunk (of momentum in all steps), of dgd for every token.

    With retention, a gain of 2, the largest of :class:`nl_models.layers.LevelConfig`, whose other limits by
    default are those of the last.
    """
    width, hidden, length = 16, 32, {1: 200 if rule == "muon" else 768, 16: 4096}[chunk_size]
    if "predict_next" in options:
        chunk_size = max(chunk_size, 4)
    generator = torch.Generator().manual_seed(0)
    distinct = {"random": length, "few": 8, "one": 1}[kind]
    table = torch.randn(distinct, width, generator=generator)
    x = table[torch.randint(distinct, (1, length), generator=generator)]

    def normal(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    level = ContinuumLevel(
        norm=torch.ones(width),
        up=normal(hidden, width),
        down=normal(width, hidden),
        gate=normal(hidden, width) if gated else None,
        key=torch.eye(width),
        value=normal(width, width),
        chunk_size=chunk_size,
        rate=(2 if "retention" in options else 1)
        * {"sgd": 1.0 / chunk_size, "dgd": 1.0}.get(rule, 0.1 / chunk_size)
        / width,
        rule=rule,
        **options,
    )
    y, (state,) = continuum_memory(x, [level], output_final_state=True)
    assert y.isfinite().all()
    for initial, fast in ((level.up, state.up), (level.down, state.down)):
        assert fast.norm() < 10 * initial.norm()


def changed(owner, name, change):
    """A mutation: the function ``name`` of ``owner`` with its result changed."""
    original = getattr(owner, name)
    return owner, name, lambda *args: change(original(*args), *args)


def turned_round(made, level, reads, keys, targets, weights, *_):
    new = (None if w is None else 2 * old - w for w, old in zip(made[2], weights))
    return *made[:2], Weights(*new), made[3]


MUTATIONS = {
    "writes turned round": changed(eager, "learn", turned_round),
    "bound forgotten": (eager, "_bounding", lambda signal, bound: None),
    "rates ignored": (
        loop, "Chunk", lambda keys, targets, rates, *rest: chunk_walk.Chunk(
            keys, targets, None if rates is None else torch.full_like(rates, 0.05), *rest
        )
    ),
    "hidden layer not learned": changed(
        eager, "learn", lambda made, level, reads, keys, targets, weights, *_: (
            *made[:2], made[2]._replace(up=weights.up), made[3]
        )
    ),
    "learned from the wrong chunk": (loop, "_targets", lambda level, inputs: inputs.flip(1) @ level.value.mT),
    "pending rates lost": changed(
        loop, "pending_tokens", lambda pending, *_: (pending[0], torch.zeros_like(pending[1]), pending[2])
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices_a_broken_implementation(mutation, monkeypatch):
    x = 3 * random_tensor(1, 7, WIDTH, seed=0)
    levels = [make_level(1, rule="dgd", chunk_size=2, rate=rates(1, 7), error_bound=0.3)]
    assert_same(x, levels)
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        assert_same(x, levels)


def good_call():
    return {
        "x": random_tensor(2, 5, WIDTH, seed=0),
        "levels": [make_level(1, chunk_size=2), make_level(2, chunk_size=4)],
    }


def with_level(index=0, **changes):
    def change(call):
        call["levels"][index] = dataclasses.replace(call["levels"][index], **changes)

    return change


def with_state(**changes):
    def change(call):
        _, state = continuum_memory(**call, output_final_state=True)
        call["initial_state"] = (state[0]._replace(**changes), state[1])

    return change


BAD_CALLS = {
    "x: expected a tensor": (TypeError, lambda c: c.update(x=[1.0])),
    r"x: expected \[B, T, D\]": (ValueError, lambda c: c.update(x=c["x"][0])),
    "x: expected one of": (TypeError, lambda c: c.update(x=c["x"].long())),
    r"x: expected \[B, T, D\] .* got shape \(2, 0, 6\)": (ValueError, lambda c: c.update(x=c["x"][:, :0])),
    "levels: expected a sequence": (TypeError, lambda c: c.update(levels=c["levels"][0])),
    "levels: expected at least one": (ValueError, lambda c: c.update(levels=[])),
    r"levels\[0\].up": (ValueError, with_level(up=torch.ones(3))),
    r"levels\[1\].down": (ValueError, with_level(1, down=torch.ones(WIDTH, 4))),
    r"levels\[0\].gate": (ValueError, with_level(gate=torch.ones(4, WIDTH))),
    r"levels\[0\].norm": (ValueError, with_level(norm=torch.ones(1))),
    r"levels\[0\].value: .* got None": (ValueError, with_level(value=None)),
    r"levels\[0\].value: expected shape": (ValueError, with_level(value=torch.ones(2, 2))),
    r"levels\[0\].key": (ValueError, with_level(key=torch.ones(2, 2))),
    r"levels\[0\].momentum_decay: expected less": (ValueError, with_level(momentum_decay=1.0)),
    r"levels\[0\].retention: expected a number in": (ValueError, with_level(retention=-0.1)),
    r"levels\[0\].retention: expected values": (ValueError, with_level(retention=torch.tensor(2.0))),
    r"levels\[0\].retention: expected shape": (ValueError, with_level(retention=torch.ones(2))),
    r"levels\[0\].restore_norms": (TypeError, with_level(restore_norms=1)),
    r"levels\[0\].predict_next": (TypeError, with_level(predict_next=1)),
    r"levels\[0\].chunk_size: expected at least 2 with predict": (
        ValueError,
        with_level(chunk_size=1, predict_next=True),
    ),
    "variant": (ValueError, lambda c: c.update(variant="parallel")),
    "level_weights: of variant": (ValueError, lambda c: c.update(level_weights=torch.ones(2))),
    "level_weights: expected shape": (
        ValueError,
        lambda c: c.update(level_weights=torch.ones(3), variant="independent"),
    ),
    "detach_updates": (TypeError, lambda c: c.update(detach_updates="yes")),
    r"levels\[0\].chunk_size: expected at least 1": (ValueError, with_level(chunk_size=0)),
    r"levels\[0\].chunk_size: expected an int": (TypeError, with_level(chunk_size=2.0)),
    r"levels\[1\].chunk_size: expected a multiple of 2": (ValueError, with_level(1, chunk_size=3)),
    r"levels\[0\].chunk_size: levels that never step .* reorder": (
        ValueError,
        with_level(0, chunk_size=None),
    ),
    r"levels\[0\].rate: expected a finite": (ValueError, with_level(rate=-0.1)),
    r"levels\[0\].rate: expected a number": (TypeError, with_level(rate="fast")),
    r"levels\[0\].rate: expected values": (ValueError, with_level(rate=torch.tensor(float("nan")))),
    r"levels\[0\].rate: expected shape \(2, 5\)": (ValueError, with_level(rate=torch.ones(5))),
    r"levels\[0\].rule": (ValueError, with_level(rule="adam")),
    r"levels\[0\].error_bound": (ValueError, with_level(error_bound=0)),
    "mask: expected a bool tensor": (TypeError, lambda c: c.update(mask=torch.ones(2, 5))),
    "mask: expected shape": (ValueError, lambda c: c.update(mask=torch.ones(2, 4, dtype=torch.bool))),
    "initial_state: expected a tuple of 2": (ValueError, lambda c: c.update(initial_state=(None,))),
    r"initial_state\[0\]: expected ContinuumLevelState": (
        TypeError,
        lambda c: c.update(initial_state=(None, None)),
    ),
    r"initial_state\[0\].up: expected shape": (ValueError, with_state(up=torch.ones(1, 5, WIDTH))),
    r"initial_state\[0\].gate: expected None": (ValueError, with_state(gate=torch.ones(2, 5, WIDTH))),
    r"initial_state\[0\].down: expected torch.float64": (TypeError, with_state(down=torch.ones(2, WIDTH, 5))),
    r"initial_state\[0\].up_momentum: expected a tensor exactly": (
        ValueError,
        with_state(up_momentum=torch.ones(2, 5, WIDTH)),
    ),
    r"initial_state\[0\].position: expected an int64 tensor": (TypeError, with_state(position=torch.ones(2))),
    r"initial_state\[0\].position: expected shape": (ValueError, with_state(position=torch.ones(1).long())),
    r"initial_state\[0\].position: expected values": (ValueError, with_state(position=torch.tensor([0, 2]))),
    r"initial_state\[0\].pending_inputs": (ValueError, with_state(pending_inputs=torch.ones(2, 0, WIDTH))),
    r"initial_state\[0\].pending_rates: expected fewer": (
        ValueError,
        with_state(pending_inputs=torch.ones(2, 2, WIDTH).double(), pending_rates=torch.ones(2, 2).double()),
    ),
    "checkpoint_every": (ValueError, lambda c: c.update(checkpoint_every=0)),
    "norm_eps": (ValueError, lambda c: c.update(norm_eps=-1.0)),
    "impl": (ValueError, lambda c: c.update(impl="cuda")),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    error, change = BAD_CALLS[message]
    call = good_call()
    continuum_memory(**call)
    change(call)
    with pytest.raises(error, match=message):
        continuum_memory(**call)
