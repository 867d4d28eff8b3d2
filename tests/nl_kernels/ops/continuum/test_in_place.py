"""Steps in place, with products in fp64 in the kernels' place, against the token-by-token reference."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nl_kernels import continuum_flush, continuum_memory
from nl_kernels.ops.continuum import api, chunk_walk, eager, first_order, schedule
from nl_kernels.ops.continuum.state import VARIANTS
from tests.nl_kernels.continuum_levels import (
    PADDINGS,
    WIDTH,
    ExactProducts,
    assert_same,
    close,
    flat,
    flush_in_place,
    forget_all_but_the_last,
    in_place,
    make_level,
    random_tensor,
    require_grad,
    run_with_gradients,
)
from tests.nl_kernels.ops.continuum.test_variants import TOLERANCE, changed, levels_of, options_of


def same(x, levels, **options):
    tolerance = TOLERANCE.get(levels[0].rule, 1e-10)
    return assert_same(x, levels, memory=in_place, detach_updates=True, tolerance=tolerance, **options)


@pytest.mark.parametrize(("gated", "key"), [(False, True), (True, False)])
@pytest.mark.parametrize("rule", api.KERNEL_RULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [9, 16])
def test_equals_the_reference(length, variant, rule, gated, key):
    levels = levels_of(rule, batch=2, length=length, gated=gated, restore_norms=gated, key=key)
    same(random_tensor(2, length, WIDTH, seed=0), levels, **options_of(variant))


@pytest.mark.parametrize("padding", ["anywhere", "short", None])
@pytest.mark.parametrize(("variant", "rule"), list(itertools.product(VARIANTS, api.KERNEL_RULES)))
def test_going_on_from_ragged_positions_equals_the_reference(variant, rule, padding):
    before = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    options = options_of(variant)
    levels = levels_of(rule, batch=3, length=5)
    x = random_tensor(3, 5, WIDTH, seed=5)
    _, state = continuum_memory(x, levels, mask=before, output_final_state=True, **options)
    assert [s.position.tolist() for s in state[:3]] == [[1, 1, 1], [1, 1, 3], [5, 1, 3]]
    mask = None if padding is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
    levels = levels_of(rule, batch=3, length=9, restore_norms=True)
    same(random_tensor(3, 9, WIDTH, seed=6), levels, mask=mask, state=state, **options)


@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_anywhere_changes_nothing(variant, key):
    x = random_tensor(2, 13, WIDTH, seed=0)
    levels = [dataclasses.replace(level, rate=0.04) for level in levels_of("momentum", key=key)]
    options = options_of(variant)
    results, positions, gradients = run_with_gradients(x, levels, "reference", detach_updates=True, **options)
    for cut in range(1, 13, 2):
        start = x.clone().requires_grad_()
        moved, leaves = require_grad(levels)
        first, state = in_place(start[:, :cut], moved, output_final_state=True, impl="eager", **options)
        second, final = in_place(
            start[:, cut:], moved, initial_state=state, output_final_state=True, impl="eager", **options
        )
        found = [torch.cat((first, second), dim=1), *flat(final)]
        close(found, results)
        assert all(torch.equal(s.position, p) for s, p in zip(final, positions))
        functional = sum((r * random_tensor(*r.shape, seed=i)).sum() for i, r in enumerate(found))
        found = torch.autograd.grad(functional, [start, *leaves], allow_unused=True, materialize_grads=True)
        close(found, gradients[: len(found)])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_token_by_token_is_the_forward(variant, ragged):
    x = random_tensor(2, 14, WIDTH, seed=0)
    mask = torch.ones(2, 14, dtype=torch.bool)
    if ragged:
        mask[0, :3] = False
    levels = [dataclasses.replace(level, rate=0.04) for level in levels_of("momentum", restore_norms=True)]
    options = options_of(variant)
    whole, final = continuum_memory(
        x, levels, mask=mask, output_final_state=True, impl="reference", **options
    )
    pieces, state = [], None
    for t in range(14):
        given = None if state is None else [tensor.clone() for tensor in flat(state)]
        before, token = state, x[:, t : t + 1]
        y, state = in_place(
            token, levels, mask=mask[:, t : t + 1], initial_state=before, output_final_state=True,
            impl="eager", **options,
        )  # fmt: skip
        pieces.append(y)
        if before is not None:
            assert all(torch.equal(a, b) for a, b in zip(flat(before), given))
    close([torch.cat(pieces, dim=1), *flat(final)], [whole, *flat(state)])
    assert all(torch.equal(s.position, f.position) for s, f in zip(state, final) if s is not None)


@pytest.mark.parametrize("every", [1, 2, 100, None])
@pytest.mark.parametrize("variant", ["nested", "independent"])
def test_checkpointing_changes_no_value(variant, every, monkeypatch):
    mask = torch.tensor(PADDINGS["left"], dtype=torch.bool)
    x = random_tensor(3, 9, WIDTH, seed=0)
    levels = levels_of("momentum", batch=3, length=9)
    options = {**options_of(variant), "detach_updates": True}
    plain = run_with_gradients(x, levels, "reference", mask=mask, **options)
    if every is None:
        forget_all_but_the_last(monkeypatch)
    kept = run_with_gradients(
        x, levels, "eager", mask=mask, checkpoint_every=every, memory=in_place, **options
    )
    close(kept[0], plain[0])
    close(kept[2], plain[2])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", api.KERNEL_RULES)
def test_a_flush_equals_the_reference(rule, variant):
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2], dtype=torch.bool)
    levels, leaves = require_grad(levels_of(rule, batch=3, length=7, restore_norms=True))
    x = random_tensor(3, 7, WIDTH, seed=0)
    found = []
    for impl in ("eager", "reference"):
        _, state = continuum_memory(
            x, levels, variant=variant, mask=mask, output_final_state=True, detach_updates=True
        )
        if impl == "eager":
            state = flush_in_place(state, levels, variant=variant)
        else:
            state = continuum_flush(state, levels, variant=variant, detach_updates=True, impl=impl)
        assert all(not s.position.any() and not s.pending_inputs.shape[1] for s in state[:3])
        functional = sum((r * random_tensor(*r.shape, seed=i)).sum() for i, r in enumerate(flat(state)))
        gradients = torch.autograd.grad(functional, leaves, allow_unused=True, materialize_grads=True)
        found.append(([*flat(state)], gradients))
    for part in (0, 1):
        close(found[0][part], found[1][part], TOLERANCE.get(rule, 1e-10))


@pytest.mark.parametrize("memory", [in_place, continuum_memory])
def test_what_the_backward_needs_is_saved_where_checkpointing_finds_it(memory):
    (level,), _ = require_grad([make_level(1, chunk_size=2)])
    x, kept = random_tensor(2, 9, WIDTH, seed=0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y, _ = memory(x, [level], detach_updates=True, impl="eager")
    served = [shape for shape in kept if shape == (2, *level.up.shape)]
    assert len(served) == 4
    plain = torch.autograd.grad(y.sum(), [level.up, level.norm])
    again, _ = checkpoint(
        lambda x: memory(x, [level], detach_updates=True, impl="eager"), x, use_reentrant=False
    )
    close(torch.autograd.grad(again.sum(), [level.up, level.norm]), plain)


def test_reduced_precision_keeps_a_copy_and_steps_in_fp32():
    levels = [
        dataclasses.replace(
            level, **{n: getattr(level, n).to(torch.bfloat16) for n in ("norm", "up", "down", "key", "value")}
        )
        for level in (make_level(1, chunk_size=2, rate=0.05), make_level(2, chunk_size=4, rate=0.05))
    ]
    x = random_tensor(2, 9, WIDTH, seed=0).to(torch.bfloat16)
    own, leaves = require_grad(levels)
    y, state = in_place(x, own, output_final_state=True, impl="eager")
    exact, exact_state = continuum_memory(x, levels, output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in flat(state))
    torch.testing.assert_close(y, exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(state[0].up, exact_state[0].up, rtol=1e-2, atol=1e-2)
    y.float().square().sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, True, True, False, False] * 2


def test_autocast():
    made = [
        dataclasses.replace(level, **{n: getattr(level, n).float() for n in ("norm", "up", "down", "value")})
        for level in (make_level(1, chunk_size=2, rate=0.05), make_level(2, chunk_size=4, rate=0.05))
    ]
    levels, _ = require_grad([dataclasses.replace(level, key=None) for level in made])
    x = random_tensor(2, 9, WIDTH, seed=0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = in_place(x, levels, impl="eager", output_final_state=True)
    exact, _ = continuum_memory(x, levels)
    assert all(t.dtype == torch.float32 for t in flat(state))
    torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert all(level.up.grad.isfinite().all() and level.up.grad.any() for level in levels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_waits_for_the_device_twice_a_call(variant, monkeypatch):
    """For the positions and for the mask, however many levels, tokens and steps there are."""
    levels = levels_of("momentum", batch=2, length=25)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[0, 3:5] = False
    x = random_tensor(2, 25, WIDTH, seed=0)
    _, state = continuum_memory(
        x[:, :3], levels_of("momentum", length=3), mask=mask[:, 2:5], output_final_state=True
    )
    if variant == "nested":
        state = None
    waits = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, name=name, original=original):
            waits.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with torch.no_grad():
        in_place(
            x, levels, variant=variant, mask=mask, initial_state=state, output_final_state=True, impl="eager"
        )
    assert waits == ["tolist"] * (1 if state is None else 2)


def test_the_default_is_triton_on_cuda_for_what_it_serves():
    def chosen(levels, *, flows=False, dtype=torch.bfloat16):
        x = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
        return api._choose("continuum_memory", None, x, levels, flows)

    levels = [make_level(1, chunk_size=2), make_level(2, chunk_size=4, rule="muon"), make_level(3)]
    assert chosen(levels) == "triton"
    assert chosen(levels, flows=True) == "compiled"
    assert chosen(levels, dtype=torch.float64) == "eager"
    assert chosen([make_level(1, chunk_size=2, rule="dgd")]) == "eager"
    assert chosen([make_level(1, rule="dgd")]) == "triton"


def without(step, **parts):
    return step._replace(update=step.update._replace(**parts))


def learned_from_the_first():
    original, first = ExactProducts.chunk_sums, []

    def chunk_sums(level, keys, inputs, *rest):
        first.append(inputs)
        return original(level, keys, first[0] if inputs.shape == first[0].shape else inputs, *rest)

    return staticmethod(chunk_sums)


MUTATIONS = {
    "reset one chunk late": changed(
        schedule.Resets, "after", lambda _, r, n: (r.first + n) % r.period == 0
    ),
    "momentum forgotten": changed(
        chunk_walk.InPlaceWalk, "_learn", lambda made, *_: (*made[:2], without(made[2], momenta=None))
    ),
    "muon's direction is the momentum": (chunk_walk, "evened_out", lambda momentum, impl: momentum),
    "norms not restored": changed(eager, "row_norms", lambda *_: None),
    "stepped where the chunk is not full": changed(
        chunk_walk.InPlaceWalk, "_learn", lambda made, *_: (*made[:2], without(made[2], where=None))
    ),
    "steps not taken": (chunk_walk, "take", lambda steps, products: None),
    "gradients of a reset weight given to the first": changed(
        first_order, "_owners", lambda _, owner, totals: [(None, totals[:3])]
    ),
    "slope of the step in the read": changed(eager, "read_backward", lambda grad, *_: 2 * grad),
    "learned from the wrong chunk": (ExactProducts, "chunk_sums", learned_from_the_first()),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices_a_broken_implementation(mutation, monkeypatch):
    x = random_tensor(3, 9, WIDTH, seed=0)
    levels = levels_of("momentum", batch=3, length=9, restore_norms=True)
    if mutation.startswith("muon"):
        levels = [dataclasses.replace(level, rule="muon") for level in levels]
    options = {"variant": "nested", "mask": torch.tensor(PADDINGS["right"], dtype=torch.bool)}
    _, options["state"] = continuum_memory(
        x[:, :1], levels_of(levels[0].rule, batch=3, length=1), variant="nested", output_final_state=True
    )
    same(x, levels, **options)
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        same(x, levels, **options)
