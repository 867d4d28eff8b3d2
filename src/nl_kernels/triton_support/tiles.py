"""Sizes of tiles: powers of two, and at least what a tensor-core product takes."""

MIN_TILE = 16
"""The smallest extent of a tensor-core product."""


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """The tile of a product that holds a whole width."""
    return max(MIN_TILE, power_of_two(size))
