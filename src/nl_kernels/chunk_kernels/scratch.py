"""Tiles that one step of a chunk hands to a later one by way of memory, which the caches hold.

Between the two there must be a barrier. Nothing is loaded and held before its step, so registers suffice.
"""

import triton
import triton.language as tl


@triton.jit
def hand_on(place, value):
    """Put the tile ``value`` into the memory at ``place``, if there is any."""
    if place is not None:
        column = tl.arange(0, value.shape[1])
        tl.store(place + tl.arange(0, value.shape[0])[:, None] * value.shape[1] + column[None, :], value)


@triton.jit
def take_back(place, value):
    """What :func:`hand_on` put there; with no ``place``, ``value`` itself, which stayed in registers."""
    if place is not None:
        column = tl.arange(0, value.shape[1])
        value = tl.load(place + tl.arange(0, value.shape[0])[:, None] * value.shape[1] + column[None, :])
    return value
