"""The chunk of :mod:`nl_kernels.delta_chunk` with its derivatives written out.

For P layers at once, over c tokens, without momentum: decay α, erase and write rate η, error signal δ (the
write is −η δ), and
``K = strict_lower(decay · x xᵀ)``::

    ω = (I + K diag(η))⁻¹ (δ + before · (x Sᵀ))        u = −η ω        S' = final S + uᵀ (to_end x)

Its adjoint needs no second triangular solve: with ``ρ = (I + K diag(η))⁻ᵀ (−η ū)``, that of δ is ρ and
that of K is −ρ uᵀ. Adjoints of decays are kept as their products with the decays, summed where they meet, so
that exact zeros stay harmless. What depends on keys that several layers share is computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.delta_chunk import LOG2_E, TINY, ChunkCoefficients, Spread, spread, whole_matrix
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
    to_end: torch.Tensor | None
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


class MomentumWrite(NamedTuple):
    """As :class:`Write` with momentum: the write w = −η δ, what was erased, and the recalls of S and U."""

    write: torch.Tensor
    surprise: torch.Tensor | None
    erased: torch.Tensor | None
    recalled: torch.Tensor | None
    recalled_velocity: torch.Tensor | None
    mixed_gram: torch.Tensor | None


def momentum_forward(
    velocity, state, x, signal, rate, coefficients: ChunkCoefficients, gram, erase: Erase | None
) -> tuple[torch.Tensor, torch.Tensor, MomentumWrite]:
    """S and U after the chunk, as :func:`write_forward`; ``gram`` is x xᵀ.

    With w = −η δ, ``ω = (I + K diag(η))⁻¹ (before (x Sᵀ) + mixed.before (x Uᵀ) + (mixed.strict ∘ x xᵀ) w)``
    and what is erased is −η ω; the writes themselves decay as ``mixed``.
    """
    decay, momentum, mixed = coefficients
    write = signal * -rate
    velocity_after = (velocity * momentum.final).baddbmm_((write * momentum.to_end).transpose(1, 2), x)
    kept = MomentumWrite(write, None, None, None, None, None)
    if erase is not None:
        recalled = torch.bmm(x, state.transpose(1, 2))
        recalled_velocity = torch.bmm(x, velocity.transpose(1, 2))
        mixed_gram = mixed.strict * gram
        surprise = (recalled * decay.before).addcmul_(recalled_velocity, mixed.before)
        surprise = torch.bmm(erase.inverse, surprise.baddbmm_(mixed_gram, write))
        kept = MomentumWrite(write, surprise, surprise * -rate, recalled, recalled_velocity, mixed_gram)
    after = torch.addcmul(state * decay.final, velocity, mixed.final)
    return after.baddbmm_(_at_end(kept, coefficients).transpose(1, 2), x), velocity_after, kept


def _at_end(kept: MomentumWrite, coefficients: ChunkCoefficients) -> torch.Tensor:
    """What of a chunk's writes and of what it erased has reached S at its end, by token [P, c, out]."""
    arrived = kept.write * coefficients.mixed.to_end
    return arrived if kept.erased is None else arrived.addcmul_(kept.erased, coefficients.decay.to_end)


class VelocityAdjoint(NamedTuple):
    """Adjoints of U, and of the parts of the coefficients that only momentum has (plain ones).

    Attributes:
        state: [P, out, in].
        gram, strict: of ``mixed.strict ∘ x xᵀ`` and of ``mixed.strict`` [P, c, c]; ``None`` without erasing.
        before, to_end, final: of those parts of ``mixed``.
        carried_to_end, carried_final: of those parts of ``momentum``.
    """

    state: torch.Tensor
    gram: torch.Tensor | None
    strict: torch.Tensor | None
    before: torch.Tensor | None
    to_end: torch.Tensor
    final: torch.Tensor
    carried_to_end: torch.Tensor
    carried_final: torch.Tensor


class MomentumAdjoint(NamedTuple):
    """Adjoints of a layer with momentum; ``layer`` is as without it."""

    layer: WriteAdjoint
    velocity: VelocityAdjoint


def momentum_adjoint(
    grad,
    grad_velocity,
    state,
    velocity,
    x,
    signal,
    kept: MomentumWrite,
    rate,
    coefficients: ChunkCoefficients,
    gram,
    erase: Erase | None,
) -> MomentumAdjoint:
    """Adjoints of the arguments of :func:`momentum_forward` from those of S and U after the chunk."""
    decay, momentum, mixed = coefficients
    at_end = torch.bmm(x, grad.transpose(1, 2))
    at_velocity_end = torch.bmm(x, grad_velocity.transpose(1, 2))
    grad_x = torch.bmm(_at_end(kept, coefficients), grad)
    grad_x.baddbmm_(kept.write * momentum.to_end, grad_velocity)
    mixed_to_end, carried_to_end = row_dot(at_end, kept.write), row_dot(at_velocity_end, kept.write)
    at_write = (at_end * mixed.to_end).addcmul_(at_velocity_end, momentum.to_end)
    grad_state = grad * decay.final
    final = (grad_state * state).sum((1, 2), keepdim=True)
    at_velocity = torch.addcmul(grad_velocity * momentum.final, grad, mixed.final)
    mixed_final = (grad * velocity).sum((1, 2), keepdim=True)
    carried_final = (grad_velocity * velocity).sum((1, 2), keepdim=True)
    to_end = strict = at_gram = before = mixed_strict = mixed_gram = mixed_before = None
    grad_rate = None
    if erase is not None:
        at_erased = at_end.mul_(decay.to_end)
        to_end = row_dot(at_erased, kept.erased)
        grad_rate = row_dot(at_erased, kept.surprise).neg_()
        at_sum = torch.bmm(erase.inverse.transpose(1, 2), at_erased.mul_(-rate))
        at_recalled, at_recalled_velocity = at_sum * decay.before, at_sum * mixed.before
        before = row_dot(at_recalled, kept.recalled)
        mixed_before = row_dot(at_sum, kept.recalled_velocity)
        grad_x.baddbmm_(at_recalled, state).baddbmm_(at_recalled_velocity, velocity)
        grad_state.baddbmm_(at_recalled.transpose(1, 2), x)
        at_velocity.baddbmm_(at_recalled_velocity.transpose(1, 2), x)
        at_write.baddbmm_(kept.mixed_gram.transpose(1, 2), at_sum)
        mixed_gram = torch.bmm(at_sum, kept.write.transpose(1, 2))
        mixed_strict = mixed_gram * gram
        at_gram = torch.bmm(at_sum, kept.surprise.transpose(1, 2))
        strict = at_gram * erase.gram
        grad_rate.sub_(strict.sum(1, keepdim=True).transpose(1, 2))
        columns = -rate.transpose(1, 2)
        strict.mul_(columns)
        at_gram.mul_(columns)
    by_write = row_dot(at_write, signal)
    grad_rate = by_write.neg_() if grad_rate is None else grad_rate.sub_(by_write)
    layer = WriteAdjoint(
        grad_state, grad_x, at_write.mul_(-rate), grad_rate, strict, at_gram, before, to_end, final
    )
    return MomentumAdjoint(
        layer,
        VelocityAdjoint(
            at_velocity,
            mixed_gram,
            mixed_strict,
            mixed_before,
            mixed_to_end,
            mixed_final,
            carried_to_end,
            carried_final,
        ),
    )


def momentum_coefficient_adjoint(
    velocities, coefficients: ChunkCoefficients, momentum, applied, decay_parts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoints of log decays and momenta [P, c], from all layers that have these coefficients.

    :func:`~nl_kernels.delta_chunk.chunk_coefficients` has ``mixed = decay[:, 1:] (carried[1:] ∘ applied)``.
    """
    decay, carried, _ = (part and whole_matrix(part) for part in coefficients)
    grad_mixed, grad_carried = torch.zeros_like(decay), torch.zeros_like(decay)
    for part in velocities:
        if part.strict is not None:
            grad_mixed[..., :-1, 1:] += part.strict
            grad_mixed[..., :-1, :1] += part.before
        grad_mixed[..., -1:, 1:] += part.to_end.transpose(-1, -2)
        grad_mixed[..., -1:, :1] += part.final
        grad_carried[..., -1:, 1:] += part.carried_to_end.transpose(-1, -2)
        grad_carried[..., -1:, :1] += part.carried_final
    entering = carried[..., 1:, :]
    if applied is not None:
        entering = entering * applied[..., None]
    by_decay = torch.zeros_like(decay)
    by_decay[..., 1:] = grad_mixed @ entering.transpose(-1, -2)
    at_entering = decay[..., 1:].transpose(-1, -2) @ grad_mixed
    grad_carried[..., 1:, :] += at_entering if applied is None else at_entering * applied[..., None]
    size = momentum.shape[-1]
    grad_decay = decay_adjoint(size, decay, **decay_parts) + _along_logs(by_decay.mul_(decay))
    # Sums of entries of the span alone: a momentum of 0 divides by almost nothing, so nothing else may enter.
    later = grad_carried.mul_(carried).flip(-2).cumsum(-2).flip(-2)
    return grad_decay, later.tril_(-1).sum(-1)[..., 1:] / (momentum + TINY)


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
    return _along_logs(matrix)


def _along_logs(matrix: torch.Tensor) -> torch.Tensor:
    """Each log's adjoint: the sum of the entries [.., c + 1, c + 1] whose span holds it."""
    return (matrix.sum(-2) - matrix.sum(-1)).cumsum(-1)[..., :-1]


def decay_products(log: torch.Tensor) -> Spread:
    """The spread of finite log decays [.., c]: from sums and not from differences of sums."""
    size = log.shape[-1]
    lower = log.new_full((size, size + 1), LOG2_E).tril_()
    matrix = log.new_empty(*log.shape[:-1], size + 1, size + 1)
    matrix[..., 0, :] = 0
    matrix[..., 0, 0] = 1
    # not out=: torch.compile takes no view there
    matrix[..., 1:, :] = torch.cumsum(log[..., None] * lower, -2).exp2_().tril_(1)
    return spread(matrix)


def proximal_rate(rate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``η/(1 + η‖x‖²)``."""
    return rate / (1 + rate * row_dot(x, x))


def proximal_adjoint(grad, rate, x, effective) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoints of η and x from that of :func:`proximal_rate`."""
    share = 1 / (1 + rate * row_dot(x, x))
    return grad * share.square(), x * (-2 * grad * effective.square())
