"""Products of decays within a chunk, and their adjoints.

Every coefficient of a chunk of c tokens is an entry of a lower-triangular matrix over the instants 0 (before
the chunk) … c (after its last token): ``decay[i, j] = α_{j+1} ⋯ α_i``, ``momentum`` likewise with μ, and
``mixed[i, j]``, the weight in S_i of the write of token j without erasing (of the incoming U for j = 0).
Entries are sums of logs and not differences of such sums, so that a decay of 0 is exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LOG2_E = math.log2(math.e)  # exp2 takes a fourth of the time of exp on the CPU
LOWEST_LOG = -1000.0  # its exponential is 0 in fp32 and in fp64, so −inf still forgets everything
TINY = 1e-30  # added to momenta before their log: keeps the derivative at 0 finite and right


class Spread(NamedTuple):
    """The parts of one matrix over instants that the chunk needs; leading dimensions are shared.

    Attributes:
        before, after: [.., c, 1], from the chunk's start to just before, and just after, each token.
        strict, full: [.., c, c], from token j to just before, and just after, token i; zero where there is
            none.
        to_end: [.., c, 1], from each token to the chunk's end.
        final: [.., 1, 1], over the whole chunk.
    """

    before: torch.Tensor
    after: torch.Tensor
    strict: torch.Tensor
    full: torch.Tensor
    to_end: torch.Tensor
    final: torch.Tensor


class Coefficients(NamedTuple):
    """Spreads of decay, and with momentum also of momentum and of their mixture; ``None`` without."""

    decay: Spread
    momentum: Spread | None
    mixed: Spread | None


Parts = dict[str, torch.Tensor]
"""Adjoints of a spread's parts by name."""


class CoefficientAdjoints(NamedTuple):
    """Adjoints of the parts of each spread, of the decay's times the parts themselves, so that exact zeros
    stay harmless; those of the others are plain."""

    decay: Parts
    momentum: Parts
    mixed: Parts


def chunk_coefficients(
    log_decay: torch.Tensor, momentum: torch.Tensor | None, applied: torch.Tensor | None
) -> Coefficients:
    """Coefficients from log decays, momenta and whether a token counts, all [.., c].

    A log decay of −inf and a momentum of 0 are exact. ``applied`` is 0 for empty places, where U must not be
    added again; it matters only with momentum.
    """
    decay = _products(log_decay)
    if momentum is None:
        return Coefficients(_spread(decay), None, None)
    carried = _products((momentum + TINY).log())
    entering = _entering(carried, applied)
    return Coefficients(_spread(decay), _spread(carried), _spread(decay[..., 1:] @ entering))


def coefficient_adjoint(
    coefficients: Coefficients,
    momentum: torch.Tensor | None,
    applied: torch.Tensor | None,
    found: CoefficientAdjoints,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adjoints of log decays and momenta [.., c] from those of the parts of each spread."""
    d_products = _whole(found.decay, coefficients.decay)
    if momentum is None:
        return _along_logs(d_products), None
    products, momenta = (_matrix(coefficients.decay), _matrix(coefficients.momentum))
    d_mixed, d_carried = (_whole(parts, coefficients.decay) for parts in (found.mixed, found.momentum))
    by_decay = torch.zeros_like(products)
    by_decay[..., 1:] = d_mixed @ _entering(momenta, applied).mT
    d_entering = products[..., 1:].mT @ d_mixed
    d_carried[..., 1:, :] += d_entering if applied is None else d_entering * applied[..., None]
    d_decay = _along_logs(d_products.addcmul_(by_decay, products))
    # Sums of entries of the span alone: a momentum of 0 divides by almost nothing, so nothing else may enter.
    later = d_carried.mul_(momenta).flip(-2).cumsum(-2).flip(-2)
    return d_decay, later.tril_(-1).sum(-1)[..., 1:] / (momentum + TINY)


def _products(log: torch.Tensor) -> torch.Tensor:
    """[.., c + 1, c + 1], products over tokens j + 1 … i, from the logs [.., c]."""
    rows = torch.cat([log.new_zeros(*log.shape[:-1], 1), log.clamp_min(LOWEST_LOG)], -1)[..., None]
    below = log.new_full((rows.shape[-2],) * 2, LOG2_E).tril_(-1)
    return torch.cumsum(rows * below, -2).exp2_().tril()


def _spread(matrix: torch.Tensor) -> Spread:
    size = matrix.shape[-1] - 1
    from_start, from_tokens = matrix.split_with_sizes((1, size), -1)  # half the time of slices
    before, final = from_start.split_with_sizes((size, 1), -2)
    strict, to_end = from_tokens.split_with_sizes((size, 1), -2)
    _, after = from_start.split_with_sizes((1, size), -2)
    _, full = from_tokens.split_with_sizes((1, size), -2)
    return Spread(before, after, strict, full, to_end.mT, final)


def _matrix(parts: Spread) -> torch.Tensor:
    """The matrix [.., c + 1, c + 1] of which :func:`_spread` gave the parts."""
    lower = torch.cat([parts.after, parts.full], -1)
    upper = torch.cat([parts.before[..., :1, :], parts.strict[..., :1, :]], -1)
    return torch.cat([upper, lower], -2)


def _entering(carried: torch.Tensor, applied: torch.Tensor | None) -> torch.Tensor:
    """What of each instant's momentum enters S at each token [.., c, c + 1]."""
    return carried[..., 1:, :] if applied is None else carried[..., 1:, :] * applied[..., None]


def _whole(parts: Parts, like: Spread) -> torch.Tensor:
    """The sum of adjoints of parts, each in its place of the matrix [.., c + 1, c + 1]."""
    size = like.full.shape[-1] + 1
    matrix = like.full.new_zeros(*like.full.shape[:-2], size, size)
    places = _spread(matrix)
    for name, part in parts.items():
        place = getattr(places, name)
        place += part
    return matrix


def _along_logs(matrix: torch.Tensor) -> torch.Tensor:
    """Each log's adjoint: the sum of the entries [.., c + 1, c + 1] whose span holds it.

    An entry from instant j to i holds the logs of tokens j + 1 … i, so each of them gets it.
    """
    return (matrix.sum(-2) - matrix.sum(-1)).cumsum(-1)[..., :-1]
