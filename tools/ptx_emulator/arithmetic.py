"""What translated instructions call: arithmetic that numpy has no single function for.

Arguments are arrays of one element a thread, or numpy scalars of the same dtype.
"""

from __future__ import annotations

import numpy as np


def to_bf16(x):
    """fp32 to the bits of bf16, to the nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(x):
    """fp32 to the bits of tf32, to the nearest, ties away from zero."""
    bits = x.view(np.uint32)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))


def fused(a, b, c):
    """a · b + c of fp32: the product is exact in fp64, the sum rounded there and again to fp32."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def towards_zero(x):
    """fp64 to fp32."""
    y = x.astype(np.float32)
    over = np.abs(y.astype(np.float64)) > np.abs(x)
    return np.where(over & np.isfinite(y), np.nextafter(y, np.float32(0)), y)


def join(parts):
    """Registers side by side, the first one lowest, as one of their total width."""
    size = parts[0].dtype.itemsize
    total = np.dtype(f"u{size * len(parts)}").type
    whole = total(0)
    for i, part in enumerate(parts):
        whole = whole | (part.astype(total) << total(8 * size * i))
    return whole


def part(whole, index, size):
    """The ``index``-th part of ``size`` bytes."""
    return (whole >> whole.dtype.type(8 * size * index)).astype(f"u{size}")


def shift_left(a, by):
    bits = a.dtype.itemsize * 8
    by = np.asarray(by).astype(np.uint64)
    return np.where(by < bits, a << (by & np.uint64(bits - 1)).astype(a.dtype), a.dtype.type(0))


def shift_right(a, by):
    bits = a.dtype.itemsize * 8
    by = np.asarray(by).astype(np.uint64)
    if a.dtype.kind == "i":
        return a >> np.minimum(by, np.uint64(bits - 1)).astype(a.dtype)
    return np.where(by < bits, a >> (by & np.uint64(bits - 1)).astype(a.dtype), a.dtype.type(0))


def divide(a, b):
    """Integers, towards zero."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def remainder(a, b):
    return (a - divide(a, b) * b).astype(a.dtype)


def high_product(a, b):
    """The upper half of a · b."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * np.asarray(b).astype(wide)) >> wide(32)).astype(a.dtype)
    product = a.astype(object) * np.asarray(b).astype(object)
    upper = np.frompyfunc(lambda x: (int(x) >> 64) & (2**64 - 1), 1, 1)(product)
    return upper.astype(np.uint64).view(a.dtype)


def extract(a, position, length):
    """``length`` bits from ``position`` on, extended by their sign where ``a`` is signed."""
    bits = a.dtype.itemsize * 8
    position, length = (np.asarray(x).astype(np.int64) & 255 for x in (position, length))
    unsigned = a.view(f"u{a.dtype.itemsize}")
    ones = (np.uint64(1) << np.where(length >= bits, 0, length).astype(np.uint64)) - np.uint64(1)
    mask = np.where(length >= bits, np.uint64(2**64 - 1), ones).astype(unsigned.dtype)
    found = shift_right(unsigned, position) & mask
    if a.dtype.kind == "i":
        top = shift_right(unsigned, np.minimum(position + length - 1, bits - 1)) & unsigned.dtype.type(1)
        found = np.where(top.astype(bool) & (length > 0), found | ~mask, found)
    return found.view(a.dtype)


def permute(a, b, selectors):
    """Bytes of the eight of ``a`` and ``b`` by four selectors; by a selector's top bit, the byte's sign."""
    eight = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    chosen = np.uint64(0)
    for i in range(4):
        selector = np.asarray(selectors).astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = eight >> np.uint64(8) * (selector & np.uint64(7)) & np.uint64(255)
        if np.any(selector & np.uint64(8)):
            byte = np.where(selector & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        chosen = chosen | byte << np.uint64(8 * i)
    return chosen.astype(np.uint32)


def to_integer(x, dtype, mode):
    """A float rounded as ``mode`` says, kept within the dtype's range; NaN is 0."""
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]
    x, range_ = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0)), np.iinfo(dtype)
    top = float(range_.max)
    within = np.clip(x, float(range_.min), np.nextafter(top, 0) if top > 2**53 else top)
    return np.where(x >= top, range_.max, within.astype(dtype)).astype(dtype)
