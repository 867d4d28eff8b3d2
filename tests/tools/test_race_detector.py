"""Every kind of race is named, with its line; what is in order runs and computes what it did."""

import pytest
import torch
import triton
import triton.language as tl

from tools.race_detector import DataRace, detect_races

pytestmark = pytest.mark.interpreter


@triton.jit
def add_in_place(x, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """Programs have ``SHIFT`` numbers of their own, and touch ``SIZE``."""
    place = x + tl.program_id(0) * SHIFT + tl.arange(0, SIZE)
    tl.store(place, tl.load(place) + 1)


@triton.jit
def store_to_itself(x, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE) * STRIDE, tl.zeros([SIZE], tl.float32))


@triton.jit
def move_up(x, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + 1 + at, value)


@triton.jit
def store_then_load(x, y, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + at, tl.load(x + at))


@triton.jit
def store_twice(x, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + SIZE - 1 - at, at.to(tl.float32))


@triton.jit
def add_below(x, SIZE: tl.constexpr, LAST: tl.constexpr):
    """The load wraps round where nothing is stored."""
    at = tl.arange(0, SIZE)
    value = tl.load(x + at % (LAST + 1), mask=at <= LAST, other=0.0)
    tl.store(x + at, value + 1, mask=at <= LAST)


@triton.jit
def load_beyond(x, y, SIZE: tl.constexpr, LAST: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at <= LAST, other=0.0))


def test_tiles_of_their_own_are_in_order():
    x = torch.zeros(512)
    add_in_place[(2,)](x, 256, 256, num_warps=4)
    assert (x == 1).all()


def test_a_program_that_touches_another_ones_tile_is_refused():
    with pytest.raises(DataRace, match=r"load at .*: program 1 touches what program 0 has stored"):
        add_in_place[(2,)](torch.zeros(512), 256, 128, num_warps=4)


def test_a_small_tile_is_loaded_by_several_threads_and_stored_by_one():
    add_in_place[(1,)](torch.zeros(128), 128, 128, num_warps=4)
    with pytest.raises(DataRace, match="no barrier since it was loaded"):
        add_in_place[(1,)](torch.zeros(64), 64, 64, num_warps=4)


def test_what_counts_is_what_is_touched():
    x = torch.zeros(256)
    add_below[(1,)](x, 256, 199, num_warps=4)
    assert x.sum() == 200


def test_a_store_that_writes_an_address_twice_is_refused():
    store_to_itself[(1,)](torch.ones(16), 16, 1)
    with pytest.raises(DataRace, match="more than once"):
        store_to_itself[(1,)](torch.ones(16), 16, 0)


@pytest.mark.parametrize(("kernel", "tensors"), [(move_up, 1), (store_then_load, 2), (store_twice, 1)])
def test_other_threads_need_a_barrier(kernel, tensors):
    arguments = [torch.zeros(257) for _ in range(tensors)]
    kernel[(1,)](*arguments, 256, True)
    with pytest.raises(DataRace, match=f"{kernel.__name__}.* no barrier since it was"):
        kernel[(1,)](*arguments, 256, False)


def test_a_barrier_of_one_program_does_not_order_another():
    with pytest.raises(DataRace, match="program 1 touches"):
        move_up[(2,)](torch.zeros(257), 256, True)


def test_an_address_outside_the_tensors_is_refused():
    x, y = torch.zeros(10), torch.zeros(16)
    load_beyond[(1,)](x, y, 16, 9)
    with pytest.raises(DataRace, match=r"load at test_race_detector.py:.*: addresses outside the tensors"):
        load_beyond[(1,)](x, y, 16, 10)


def test_outside_of_it_nothing_is_watched():
    before = triton.runtime.interpreter.InterpretedFunction.run
    with detect_races():
        assert triton.runtime.interpreter.InterpretedFunction.run is not before
    assert triton.runtime.interpreter.InterpretedFunction.run is before


@triton.jit
def load_from_either(x, y, o, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    """Each place of the tile has its own tensor."""
    at = tl.arange(0, SIZE)
    tl.store(x + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(o + at, tl.load(tl.where(at % 2 == 0, x + at, y + at)))


def test_one_load_may_touch_several_tensors():
    x, y, o = torch.zeros(64), -torch.ones(64), torch.zeros(64)
    with detect_races():
        load_from_either[(1,)](x, y, o, SIZE=64, BARRIER=True, num_warps=1)
        assert o[::2].tolist() == list(range(0, 64, 2))
        assert (o[1::2] == -1).all()
        with pytest.raises(DataRace, match="no barrier since it was stored"):
            load_from_either[(1,)](x, y, o, SIZE=64, BARRIER=False, num_warps=1)
        with pytest.raises(DataRace, match="outside the tensors"):
            load_from_either[(1,)](x, y[:32].clone(), o, SIZE=64, BARRIER=True, num_warps=1)
