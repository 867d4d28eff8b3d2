"""The chunk of :mod:`nl_kernels.delta_chunk` without momentum, with its derivatives written out.

For P layers at once, over c tokens: decay α, erase and write rate η, error signal δ (the write is −η δ), and
``K = strict_lower(decay · x xᵀ)``::

    ω = (I + K diag(η))⁻¹ (δ + before · (x Sᵀ))        u = −η ω        S' = final S + uᵀ (to_end x)

Its adjoint needs no second triangular solve: with ``ρ = (I + K diag(η))⁻ᵀ (−η ū)``, that of δ is ρ and
that of K is −ρ uᵀ. Adjoints of decays are kept as their products with the decays, summed where they meet, so
that exact zeros stay harmless. What depends on keys that several layers share is computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.delta_chunk import Spread, spread
from nl_kernels.hidden_layer import row_dot


class Erase(NamedTuple):
    """How a layer erases: ``gram`` is K [P, c, c], ``inverse`` is (I + K diag(η))⁻¹."""

    gram: torch.Tensor
    inverse: torch.Tensor


class Write(NamedTuple):
    """A chunk's writes: ω and u [P, c, out], and the recall x Sᵀ (``None`` without erasing)."""

    surprise: torch.Tensor
    written: torch.Tensor
    recalled: torch.Tensor | None


def erase_matrices(gram: torch.Tensor, rate: torch.Tensor, strict: torch.Tensor) -> Erase:
    """:class:`Erase` from x xᵀ [.., c, c] (overwritten), η [.., c, 1] and the decay before each token."""
    gram = gram.mul_(strict)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(
        gram * rate.transpose(-1, -2), identity.expand_as(gram), upper=False, unitriangular=True
    )
    return Erase(gram, inverse)


def write_forward(
    state: torch.Tensor,
    x: torch.Tensor,
    signal: torch.Tensor,
    rate: torch.Tensor,
    decay: Spread,
    erase: Erase | None,
) -> tuple[torch.Tensor, Write]:
    """The state [P, out, in] after the chunk, and its writes; x [P, c, in], η [P, c, 1], δ [P, c, out]."""
    recalled = None
    if erase is not None:
        recalled = torch.bmm(x, state.transpose(1, 2))
        signal = torch.bmm(erase.inverse, torch.addcmul(signal, recalled, decay.before))
    written = signal * -rate
    after = (state * decay.final).baddbmm_(written.transpose(1, 2), x * decay.to_end)
    return after, Write(signal, written, recalled)


class WriteAdjoint(NamedTuple):
    """Adjoints of the arguments of :func:`write_forward`.

    Attributes:
        state, x, signal, rate: of the arguments (x without its part in the gram matrix).
        strict: K̄ K [P, c, c], the adjoint of ``decay.strict`` times itself, or ``None`` without erasing.
        gram: K̄ [P, c, c]; times the decays it is the adjoint of x xᵀ.
        before, to_end: [P, c, 1], and ``final`` [P, 1, 1], times themselves.
    """

    state: torch.Tensor
    x: torch.Tensor
    signal: torch.Tensor
    rate: torch.Tensor
    strict: torch.Tensor | None
    gram: torch.Tensor | None
    before: torch.Tensor | None
    to_end: torch.Tensor
    final: torch.Tensor


def write_adjoint(
    grad: torch.Tensor,
    grad_written: torch.Tensor | None,
    state: torch.Tensor,
    x: torch.Tensor,
    write: Write,
    rate: torch.Tensor,
    decay: Spread,
    erase: Erase | None,
) -> WriteAdjoint:
    """Adjoints from those of the state after the chunk and, for running reads, of u."""
    surprise, written, recalled = write
    grad_x = torch.bmm(written, grad).mul_(decay.to_end)
    to_end = row_dot(grad_x, x)
    at_written = x * decay.to_end
    if grad_written is None:
        at_written = torch.bmm(at_written, grad.transpose(1, 2))
    else:
        at_written = torch.baddbmm(grad_written, at_written, grad.transpose(1, 2))
    grad_rate = row_dot(at_written, surprise).neg_()
    at_surprise = at_written.mul_(-rate)
    grad_state = grad * decay.final
    final = (grad_state * state).sum((1, 2), keepdim=True)
    if erase is None:
        return WriteAdjoint(grad_state, grad_x, at_surprise, grad_rate, None, None, None, to_end, final)
    signal = torch.bmm(erase.inverse.transpose(1, 2), at_surprise)
    at_recalled = signal * decay.before
    before = row_dot(at_recalled, recalled)
    grad_x = grad_x.baddbmm_(at_recalled, state)
    grad_state = grad_state.baddbmm_(at_recalled.transpose(1, 2), x)
    gram = torch.bmm(signal, surprise.transpose(1, 2))
    strict = gram * erase.gram
    grad_rate = grad_rate.sub_(strict.sum(1, keepdim=True).transpose(1, 2))
    columns = -rate.transpose(1, 2)
    return WriteAdjoint(
        grad_state, grad_x, signal, grad_rate, strict.mul_(columns), gram.mul_(columns), before, to_end, final
    )


def gram_adjoint(gram: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The adjoint of x from that of x xᵀ."""
    return torch.bmm(gram + gram.transpose(1, 2), x)


class Read(NamedTuple):
    """A running read: the recall q Sᵀ [P, c, out] and the scores (decay · q xᵀ) [P, c, c]."""

    recalled: torch.Tensor
    scores: torch.Tensor


def read_forward(queries, state, anchor, x, written, decay: Spread) -> tuple[torch.Tensor, Read]:
    """``(S_t + anchor) q_t`` after each token: [P, c, out]."""
    recalled = torch.bmm(queries, state.transpose(1, 2))
    scores = torch.bmm(queries, x.transpose(1, 2)).mul_(decay.full)
    y = (recalled * decay.after).baddbmm_(scores, written)
    if anchor is not None:
        y = y.baddbmm_(queries, anchor.transpose(1, 2))
    return y, Read(recalled, scores)


class ReadAdjoint(NamedTuple):
    """Adjoints of the arguments of :func:`read_forward`; ``after`` and ``full`` times themselves."""

    queries: torch.Tensor
    state: torch.Tensor
    anchor: torch.Tensor | None
    x: torch.Tensor
    written: torch.Tensor
    after: torch.Tensor
    full: torch.Tensor


def read_adjoint(grad, queries, state, anchor, x, written, decay: Spread, read: Read) -> ReadAdjoint:
    """Adjoints from that of the read."""
    at_recalled = grad * decay.after
    after = row_dot(at_recalled, read.recalled)
    grad_queries = torch.bmm(at_recalled, state)
    grad_anchor = None
    if anchor is not None:
        grad_queries.baddbmm_(grad, anchor)
        grad_anchor = torch.bmm(grad.transpose(1, 2), queries)
    grad_state = torch.bmm(at_recalled.transpose(1, 2), queries)
    grad_written = torch.bmm(read.scores.transpose(1, 2), grad)
    weighted = torch.bmm(grad, written.transpose(1, 2))
    full = weighted * read.scores
    weighted.mul_(decay.full)
    grad_queries.baddbmm_(weighted, x)
    grad_x = torch.bmm(weighted.transpose(1, 2), queries)
    return ReadAdjoint(grad_queries, grad_state, grad_anchor, grad_x, grad_written, after, full)


def decay_adjoint(
    size: int,
    like: torch.Tensor,
    *,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    strict: torch.Tensor | None = None,
    full: torch.Tensor | None = None,
    to_end: torch.Tensor | None = None,
    final: torch.Tensor | None = None,
) -> torch.Tensor:
    """The adjoint of the log decays [.., c] from those of a spread's parts, each times the part itself.

    An entry from instant j to i holds the log decays of tokens j + 1 … i, so each of them gets it.
    """
    lead = next(p for p in (before, after, strict, full, to_end, final) if p is not None).shape[:-2]
    matrix = like.new_zeros(*lead, size + 1, size + 1)
    parts = (
        (matrix[..., :-1, :1], before),
        (matrix[..., 1:, :1], after),
        (matrix[..., :-1, 1:], strict),
        (matrix[..., 1:, 1:], full),
        (matrix[..., -1:, 1:], None if to_end is None else to_end.transpose(-1, -2)),
        (matrix[..., -1:, :1], final),
    )
    for place, part in parts:
        if part is not None:
            place += part
    return (matrix.sum(-2) - matrix.sum(-1)).cumsum(-1)[..., :-1]


def decay_products(log: torch.Tensor) -> Spread:
    """The spread of finite log decays [.., c]: from sums and not from differences of sums."""
    size = log.shape[-1]
    lower = log.new_ones(size, size + 1).tril_()
    matrix = log.new_empty(*log.shape[:-1], size + 1, size + 1)
    matrix[..., 0, :] = 0
    matrix[..., 0, 0] = 1
    rows = torch.cumsum(log[..., None] * lower, -2, out=matrix[..., 1:, :])
    rows.exp_().tril_(1)
    return spread(matrix)


def proximal_rate(rate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``η/(1 + η‖x‖²)``."""
    return rate / (1 + rate * row_dot(x, x))


def proximal_adjoint(grad, rate, x, effective) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoints of η and x from that of :func:`proximal_rate`."""
    share = 1 / (1 + rate * row_dot(x, x))
    return grad * share.square(), x * (-2 * grad * effective.square())
