"""One layer of a memory over one chunk of tokens: the delta recurrence without a loop over tokens.

For tokens t = 1 … c of a chunk, with rank-1 writes w_t x_tᵀ (without momentum, U_t is the write alone)::

    U_t = μ_t U_{t-1} + w_t x_tᵀ
    S_t = α_t S_{t-1} − β_t (S_{t-1} x_t) x_tᵀ + U_t

Every coefficient is an entry of a lower-triangular matrix over the instants 0 (before the chunk) … c (after
its last token): ``decay[i, j] = α_{j+1} ⋯ α_i``, ``momentum`` likewise with μ, and ``mixed[i, j]``, the
weight in S_i of the write of token j without erasing (of the incoming U for j = 0). Erasing then adds
pseudo-values that solve one unit lower-triangular system. Tensors are [P, c, width] for P layers at once;
states are [P, out, in].
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

    def map(self, function) -> Spread:
        return Spread(*(function(part) for part in self))


class ChunkCoefficients(NamedTuple):
    """Spreads of decay, and with momentum also of momentum and of their mixture."""

    decay: Spread
    momentum: Spread | None
    mixed: Spread | None

    def map(self, function) -> ChunkCoefficients:
        return ChunkCoefficients(*(part and part.map(function) for part in self))


class LayerChunk(NamedTuple):
    """What a layer takes in over a chunk, for P layers at once.

    Attributes:
        x: [P, c, in] inputs.
        write: [P, c, out] writes w.
        erase: β [P, c, 1], or ``None`` when the layer does not erase; then so are the next two.
        gram: x xᵀ [P, c, c].
        inverse: [P, c, c], of :func:`erase_inverse`.
        coefficients: of :func:`chunk_coefficients`.
    """

    x: torch.Tensor
    write: torch.Tensor
    erase: torch.Tensor | None
    gram: torch.Tensor | None
    inverse: torch.Tensor | None
    coefficients: ChunkCoefficients


class LayerWrites(NamedTuple):
    """What a chunk adds to a layer: ``erased`` [P, c, out] only decays, ``written`` also has momentum.

    Without momentum ``erased`` holds both and ``written`` is ``None``; ``erased`` is ``None`` when nothing
    is erased and there is momentum.
    """

    erased: torch.Tensor | None
    written: torch.Tensor | None


def chunk_coefficients(
    log_decay: torch.Tensor, momentum: torch.Tensor | None, applied: torch.Tensor | None
) -> ChunkCoefficients:
    """Coefficients from log decays, momenta and whether a token counts, all [.., c].

    A log decay of −inf and a momentum of 0 are exact. ``applied`` is 0 for empty slots, where U must not
    be added again; it matters only with momentum.
    """
    decay = _segment_products(log_decay)
    if momentum is None:
        return ChunkCoefficients(spread(decay), None, None)
    carried = _segment_products((momentum + TINY).log())
    entering = carried[..., 1:, :] if applied is None else carried[..., 1:, :] * applied[..., None]
    return ChunkCoefficients(spread(decay), spread(carried), spread(decay[..., 1:] @ entering))


def _segment_products(log: torch.Tensor) -> torch.Tensor:
    """[.., c + 1, c + 1], products over tokens j + 1 … i, from sums and not from differences of sums."""
    size = log.shape[-1] + 1
    below = log.new_full((size, size), LOG2_E).tril_(-1)
    rows = torch.nn.functional.pad(log.clamp_min(LOWEST_LOG), (1, 0))[..., None]
    return (rows * below).cumsum(-2).exp2().tril()


def spread(matrix: torch.Tensor) -> Spread:
    """The parts of a matrix over instants [.., c + 1, c + 1]."""
    return Spread(
        matrix[..., :-1, :1],
        matrix[..., 1:, :1],
        matrix[..., :-1, 1:],
        matrix[..., 1:, 1:],
        matrix[..., -1, 1:, None],
        matrix[..., -1:, :1],
    )


def whole_matrix(parts: Spread) -> torch.Tensor:
    """The matrix [.., c + 1, c + 1] of which :func:`spread` gave the parts."""
    lower = torch.cat([parts.after, parts.full], -1)
    upper = torch.cat([parts.before[..., :1, :], parts.strict[..., :1, :]], -1)
    return torch.cat([upper, lower], -2)


def split_coefficients(coefficients: ChunkCoefficients, sizes: list[int]) -> list[ChunkCoefficients]:
    """Coefficients of consecutive groups of layers, ``sizes`` layers each."""
    spreads = [
        [None] * len(sizes) if s is None else [Spread(*p) for p in zip(*(x.split(sizes) for x in s))]
        for s in coefficients
    ]
    return [ChunkCoefficients(*parts) for parts in zip(*spreads)]


def erase_inverse(gram: torch.Tensor, erase: torch.Tensor, decay: Spread) -> torch.Tensor:
    """``(I + A)^{-1}`` [.., c, c] with A_ij = β_i · decay(j → before i) · gram_ij; erase β [.., c, 1]."""
    return _UnitLowerInverse.apply(erase * decay.strict * gram)


class _UnitLowerInverse(torch.autograd.Function):
    """``(I + A)^{-1}`` for strictly lower-triangular A, by substitution: sums of powers of A cancel badly."""

    @staticmethod
    def forward(ctx, below: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(below.shape[-1], dtype=below.dtype, device=below.device)
        inverse = torch.linalg.solve_triangular(
            below, identity.expand_as(below), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


def write_layer(
    state: torch.Tensor, velocity: torch.Tensor | None, layer: LayerChunk
) -> tuple[torch.Tensor, torch.Tensor | None, LayerWrites]:
    """Carry S and U [P, out, in] (or ``None``) over a chunk: both after it, and what was added."""
    x, write, erase, gram, inverse, (decay, momentum, mixed) = layer
    if momentum is None:
        if erase is not None:
            recalled = torch.bmm(x, state.transpose(1, 2))
            write = torch.bmm(inverse, torch.addcmul(write, erase * decay.before, recalled, value=-1))
        state = torch.baddbmm(decay.final * state, write.transpose(1, 2), decay.to_end * x)
        return state, None, LayerWrites(write, None)

    erased = None
    after = torch.baddbmm(
        decay.final * state + mixed.final * velocity, write.transpose(1, 2), mixed.to_end * x
    )
    if erase is not None:
        recalled = (
            decay.before * torch.bmm(x, state.transpose(1, 2))
            + mixed.before * torch.bmm(x, velocity.transpose(1, 2))
            + torch.bmm(mixed.strict * gram, write)
        )
        erased = -torch.bmm(inverse, erase * recalled)
        after = torch.baddbmm(after, erased.transpose(1, 2), decay.to_end * x)
    velocity = torch.baddbmm(momentum.final * velocity, write.transpose(1, 2), momentum.to_end * x)
    return after, velocity, LayerWrites(erased, write)


def read_layer(
    queries: torch.Tensor,
    state: torch.Tensor,
    velocity: torch.Tensor | None,
    x: torch.Tensor,
    writes: LayerWrites,
    coefficients: ChunkCoefficients,
) -> torch.Tensor:
    """``S_t queries_t`` for each token, [P, c, out], from S and U before the chunk and what the chunk added.

    With more inputs than queries per chunk, the coefficients' ``after`` and ``full`` have the queries'
    rows alone.
    """
    decay, momentum, mixed = coefficients
    scores = torch.bmm(queries, x.transpose(1, 2))
    y = decay.after * torch.bmm(queries, state.transpose(1, 2))
    if writes.erased is not None:
        y = torch.baddbmm(y, decay.full * scores, writes.erased)
    if momentum is not None:
        y = y + mixed.after * torch.bmm(queries, velocity.transpose(1, 2))
        y = torch.baddbmm(y, mixed.full * scores, writes.written)
    return y
