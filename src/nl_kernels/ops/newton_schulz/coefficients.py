"""Schedules of coefficients: one triple (a, b, c) of the odd quintic p(s) = as + bs³ + cs⁵ for each step."""

from __future__ import annotations

import math

from nl_kernels.renamed import renamed_arguments

Triple = tuple[float, float, float]

MUON_COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)
"""Muon's triple, the same in every step: steepest at zero, so singular values end near 1, not at it."""

# Without it the polynomial best for tiny values would press large ones down to about a·lower, from where the
# rounding of 16-bit products is raised again with them.
_CUSHION = 0.024
# Rounding may lift a singular value above the interval's end.
_MARGIN = 0.01
_CONVERGED = 1e-12
_EXCHANGES = 100


@renamed_arguments(lower="lower_singular_value")
def optimal_coefficients(steps: int, lower_singular_value: float = 1e-3) -> tuple[Triple, ...]:
    """The schedule that takes singular values in [lower_singular_value, 1] closest to 1 in so many steps.

    Each step is the minimax quintic on the interval that the steps before lead to, which is the best choice
    for the composition too (Polar Express, arXiv 2505.16932). Two departures serve low precision: no interval
    is wider than about 1 : 42 (below it a polynomial is only made to rise), and each reaches 1 % further up.

    Args:
        steps: number of triples, at least 1.
        lower_singular_value: smallest one of interest, relative to the matrix's Frobenius norm, in (0, 1).

    Raises:
        ValueError: ``steps`` or ``lower_singular_value`` out of range.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 < lower_singular_value < 1:
        raise ValueError(
            f"lower_singular_value: expected a number between 0 and 1, got {lower_singular_value}"
        )
    low, high = lower_singular_value, 1.0
    schedule = []
    for _ in range(steps):
        high *= 1 + _MARGIN
        triple = _minimax_quintic(max(low, _CUSHION * high), high)
        ends = evaluate(triple, low), evaluate(triple, high)
        # With a cushion the lowest value is further below 1 than the highest is above: centre them again.
        triple = tuple(2 / sum(ends) * x for x in triple)
        schedule.append(triple)
        low = evaluate(triple, low)
        high = 2 - low
    return tuple(schedule)


def evaluate(triple: Triple, s: float) -> float:
    """``as + bs³ + cs⁵``."""
    a, b, c = triple
    square = s * s
    return s * (a + square * (b + square * c))


def _minimax_quintic(low: float, high: float) -> Triple:
    """The odd quintic with the smallest largest |1 − p(s)| on [low, high], by the Remez exchange.

    Its error alternates between four points: both ends and its two extrema between them.
    """
    if high - low < 1e-3 * high:
        # The optimum tends to the Taylor polynomial at the middle, and the exchange loses its digits.
        middle = (low + high) / 2
        return 15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5
    inner = [low + (high - low) / 4, low + (high - low) * 3 / 4]
    triple, previous = (0.0, 0.0, 0.0), math.inf
    for _ in range(_EXCHANGES):
        rows = [[s, s**3, s**5, sign, 1.0] for s, sign in zip((low, *inner, high), (1.0, -1.0, 1.0, -1.0))]
        a, b, c, error = _solve(rows)
        triple = (a, b, c)
        if abs(error - previous) <= _CONVERGED * max(abs(error), 1e-3):
            break
        previous = error
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return triple


def _solve(rows: list[list[float]]) -> list[float]:
    """The solution of a small linear system, rows with the right-hand side last: elimination with pivots."""
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, size):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i])]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
