"""The whole memory on the kernels, interpreted: values, gradients, launches, and what is held."""

import collections
import dataclasses
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nl_kernels import continuum_detach, continuum_flush, continuum_memory
from nl_kernels.ops.continuum.state import VARIANTS
from nl_kernels.triton_support.kernel_call import KernelCall
from tests.nl_kernels.budgets import RoundedProducts, assert_within_budget
from tests.nl_kernels.continuum_levels import (
    PADDINGS,
    TENSORS,
    WIDTH,
    flat,
    make_level,
    random_tensor,
    require_grad,
    run_with_gradients,
)
from tests.nl_kernels.ops.continuum.test_variants import levels_of

pytestmark = pytest.mark.interpreter


def cast(levels, dtype):
    return [
        dataclasses.replace(
            level,
            **{
                name: getattr(level, name).to(torch.float32 if name == "rate" else dtype)
                for name in TENSORS
                if isinstance(getattr(level, name), torch.Tensor)
            },
        )
        for level in levels
    ]


def detached(state):
    return None if state is None else tuple(
        None if s is None else s._make(t.float() if t is not None and t.is_floating_point() else t for t in s)
        for s in state
    )  # fmt: skip


def assert_budget(x, levels, *, state=None, level_weights=None, dtype=torch.float32, factor=3.0, **options):
    """Outputs, states and all gradients against fp64, beside the eager implementation of the same dtype."""
    if level_weights is not None:
        options["level_weights"] = level_weights
    exact = run_with_gradients(x, levels, "reference", state=state, detach_updates=True, **options)
    if level_weights is not None:
        options["level_weights"] = level_weights.to(dtype)
    made = x.to(dtype), cast(levels, dtype)
    options |= {"state": detached(state), "detach_updates": True}
    found = run_with_gradients(*made, "triton", **options)
    with RoundedProducts(dtype):
        eager = run_with_gradients(*made, "eager", **options)
    assert all(torch.equal(f, e) for f, e in zip(found[1], exact[1]))
    for kind in (0, 2):
        for i, parts in enumerate(zip(found[kind], eager[kind], exact[kind], strict=True)):
            if parts[2].numel():
                assert_within_budget(*parts, factor=factor, name=f"{kind} {i}")


CASES = [
    ("sequential", "sgd", False, True, torch.float32),
    ("nested", "momentum", True, True, torch.float32),
    ("independent", "sgd", False, False, torch.float32),
    ("independent", "momentum", True, True, torch.float16),
    ("sequential", "muon", False, False, torch.float32),
]


def assert_case_within_budget(variant, rule, gated, key, dtype, **budget):
    length = 5 if rule == "muon" else 9
    levels = levels_of(rule, batch=2, length=length, gated=gated, restore_norms=gated, key=key)[:2]
    x = random_tensor(2, length, WIDTH, seed=0).to(dtype).double()
    levels = [dataclasses.replace(level, **_rounded(level, dtype)) for level in levels]
    options = {"variant": variant}
    if variant == "independent":
        options["level_weights"] = torch.tensor([0.5, -1.5], dtype=torch.float64)
    assert_budget(x, levels, dtype=dtype, **budget, **options)


@pytest.mark.parametrize(("variant", "rule", "gated", "key", "dtype"), CASES)
def test_error_budget(variant, rule, gated, key, dtype):
    assert_case_within_budget(variant, rule, gated, key, dtype)


def _rounded(level, dtype):
    return {
        name: getattr(level, name).to(dtype).double()
        for name in TENSORS[:-2]
        if getattr(level, name) is not None
    }


@pytest.mark.parametrize(
    ("variant", "rule", "padding"), [("nested", "momentum", "anywhere"), ("independent", "sgd", None)]
)
def test_error_budget_going_on_from_ragged_positions(variant, rule, padding):
    before = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    options = {"variant": variant}
    levels = levels_of(rule, batch=3, length=5)[:2]
    x = random_tensor(3, 5, WIDTH, seed=5)
    _, state = continuum_memory(x, levels, mask=before, output_final_state=True, **options)
    mask = None if padding is None else torch.tensor(PADDINGS[padding], dtype=torch.bool)
    levels = levels_of(rule, batch=3, length=9, restore_norms=True)[:2]
    assert_budget(random_tensor(3, 9, WIDTH, seed=6), levels, mask=mask, state=state, **options)


def test_widths_of_several_tiles():
    """More hidden units, columns and tokens than a tile has."""
    width, hidden, chunk = 66, 130, 66
    level = dataclasses.replace(
        make_level(1, chunk_size=chunk, rate=0.002, error_bound=0.5),
        norm=torch.ones(width).double(),
        up=random_tensor(hidden, width, scale=width**-0.5, seed=1),
        down=random_tensor(width, hidden, scale=hidden**-0.5, seed=2),
        gate=random_tensor(hidden, width, scale=width**-0.5, seed=4),
        key=None,
        value=random_tensor(width, width, scale=width**-0.5, seed=3),
    )
    assert_budget(random_tensor(1, chunk + 1, width, seed=0), [level])


def test_strides_of_weights_and_states_do_not_matter():
    def turned(tensor):
        return tensor.mT.contiguous().mT.detach() if tensor.ndim > 1 else tensor

    def results(change):
        levels = cast(levels_of("momentum", gated=True)[:1], torch.float32)
        levels = [
            dataclasses.replace(
                level,
                rate=0.05,
                **{n: change(getattr(level, n)) for n in ("up", "down", "gate", "key", "value")},
            )
            for level in levels
        ]
        levels, _ = require_grad(levels)
        x = random_tensor(2, 6, WIDTH, seed=0).float()
        _, state = continuum_memory(
            change(x[:, :3]), levels, detach_updates=True, output_final_state=True, impl="triton"
        )
        state = tuple(
            s._make(change(t) if t is not None and t.ndim == 3 else t for t in continuum_detach((s,))[0])
            for s in state
        )
        assert state[0].up.is_contiguous() is (change is not turned)
        y, final = continuum_memory(
            change(x[:, 3:]), levels, detach_updates=True, initial_state=state, output_final_state=True,
            impl="triton",
        )  # fmt: skip
        decoded, _ = continuum_memory(
            change(x[:, :1]), levels, initial_state=final, impl="triton", detach_updates=True
        )
        z, _ = continuum_memory(change(x), levels, detach_updates=True, impl="triton")
        return [y, decoded, *flat(final), *torch.autograd.grad(z.square().sum(), [lv.up for lv in levels])]

    for found, expected in zip(results(turned), results(lambda tensor: tensor)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_decoding_and_a_flush():
    levels = cast(
        [dataclasses.replace(level, rate=0.04) for level in levels_of("momentum")[:2]], torch.float32
    )
    x = random_tensor(2, 9, WIDTH, seed=0).float()
    whole, final = continuum_memory(x, levels, output_final_state=True)
    y, state = continuum_memory(x[:, :5], levels, output_final_state=True, impl="triton")
    pieces = [y]
    for t in range(5, 9):
        y, state = continuum_memory(
            x[:, t : t + 1], levels, initial_state=state, output_final_state=True, impl="triton"
        )
        pieces.append(y)
    for found, expected in zip([torch.cat(pieces, dim=1), *flat(state)], [whole, *flat(final)]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(
        flat(continuum_flush(state, levels, impl="triton")), flat(continuum_flush(final, levels))
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Launches(collections.Counter):
    """Kernels by name, counted while it is entered."""

    def __init__(self, monkeypatch):
        super().__init__()
        run = KernelCall.run

        def counted(call):
            self[call.kernel.fn.__name__.removesuffix("_kernel")] += 1
            run(call)

        monkeypatch.setattr(KernelCall, "run", counted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_launches(variant, monkeypatch):
    """Two reads and five more kernels a chunk that is learned from; one update for all that are due."""
    levels = cast(
        [make_level(1, chunk_size=2, rate=0.05), make_level(2, chunk_size=4, rate=0.05)], torch.float32
    )
    levels = [dataclasses.replace(level, key=None) for level in levels]
    for length in (4, 8):
        x = random_tensor(2, length, WIDTH, seed=0).float()
        fast, slow = length // 2, length // 4
        # where the slower level steps a nested one begins again: nothing is learned from that chunk
        learned = fast + slow - (slow if variant == "nested" else 0)
        # the levels share the last update, side by side all updates
        updates = {"sequential": fast + slow - 1, "nested": fast, "independent": fast}[variant]
        found = Launches(monkeypatch)
        continuum_memory(x, levels, variant=variant, output_final_state=True, impl="triton")
        assert found == {
            "hidden": fast + slow,
            "error": learned,
            "back": learned,
            "token_sum": 2 * learned,
            "update": updates,
        } | ({"rows": slow} if variant == "nested" else {})
        monkeypatch.undo()


class LargeStorages(TorchDispatchMode):
    """The most bytes that live at once in storages of at least ``least`` bytes, of those that appear in it.

    Garbage that the interpreter leaves is collected after each kernel.
    """

    def __init__(self, least, monkeypatch):
        super().__init__()
        self.least, self.live, self.peak, self.known = least, 0, 0, set()
        run = KernelCall.run
        monkeypatch.setattr(KernelCall, "run", lambda call: (run(call), gc.collect()))

    def __enter__(self):
        gc.collect()
        gc.freeze()  # what is there is not looked through again and again
        return super().__enter__()

    def __exit__(self, *error):
        gc.unfreeze()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage):
        size, key = storage.nbytes(), storage._cdata
        if size < self.least or key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self.known.discard(key)
        self.live -= size


HIDDEN = 64  # so wide that nothing else is as large as a weight


def wide_level(dtype, **options):
    level = make_level(1, chunk_size=2, rate=0.05, hidden=HIDDEN, **options)
    return cast([dataclasses.replace(level, key=None)], dtype)


@pytest.mark.parametrize(
    ("dtype", "rule", "size"),
    [(torch.float16, "sgd", 4 + 2), (torch.float16, "momentum", 4 + 2 + 4), (torch.float32, "sgd", 4)],
)
def test_fast_state_is_one_copy_of_fp32_and_one_of_16_bits(dtype, rule, size, monkeypatch):
    batch, levels = 2, wide_level(dtype, rule=rule)
    numbers = batch * HIDDEN * WIDTH  # of each of the two matrices
    for length in (5, 11):
        x = random_tensor(batch, length, WIDTH, seed=0).to(dtype)
        with torch.no_grad(), LargeStorages(dtype.itemsize * numbers, monkeypatch) as found:
            continuum_memory(x, levels, impl="triton")
        assert found.peak == (size + 4) * 2 * numbers  # 4: the sums of the chunk's step


def test_what_the_backward_keeps_is_a_copy_for_each_step(monkeypatch):
    batch, levels = 2, require_grad(wide_level(torch.float16))[0]
    numbers = batch * HIDDEN * WIDTH
    for length, copies in ((5, 2), (11, 5)):
        x = random_tensor(batch, length, WIDTH, seed=0).half()
        with LargeStorages(2 * numbers, monkeypatch) as found:
            y, _ = continuum_memory(x, levels, detach_updates=True, impl="triton")
            assert y.requires_grad
            assert found.live == 2 * copies * 2 * numbers


def with_rule(rule):
    return lambda call: call.update(
        levels=cast([make_level(1, chunk_size=2, rule=rule, rate=0.05)], torch.float32)
    )


REFUSED = {
    r"levels\[0\].rule: .* got 'dgd'": with_rule("dgd"),
    "got float64": lambda call: call.update(x=call["x"].double(), levels=[make_level(1, chunk_size=2)]),
    "detach_updates: .* got False": lambda call: call.update(x=call["x"].requires_grad_()),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernels_do_not_serve_is_refused(message):
    call = {"x": torch.ones(1, 3, WIDTH), "levels": cast([make_level(1, chunk_size=2)], torch.float32)}
    continuum_memory(**call, impl="triton")
    REFUSED[message](call)
    with pytest.raises(NotImplementedError, match=message):
        continuum_memory(**call, impl="triton")
    continuum_memory(**call)
