"""One layer of a memory over one chunk of tokens, without a loop over tokens, and its adjoint.

For tokens t = 1 … c with error signals δ_t, rates η_t, decays α_t and, with momentum, μ_t and the share s_t
that momentum leaves of a write (1 without momentum)::

    U_t = μ_t U_{t-1} − s_t η_t δ_t x_tᵀ
    S_t = α_t S_{t-1} − η_t (S_{t-1} x_t) x_tᵀ + U_t

With ``K = strict_lower(decay · x xᵀ)``, without momentum::

    ω = (I + K diag(η))⁻¹ (δ + before · (x Sᵀ))        u = −η ω        S' = final S + uᵀ (to_end x)

Its adjoint needs no second triangular solve: with ``ρ = (I + K diag(η))⁻ᵀ (−η ū)``, that of δ is ρ and that
of K is −ρ uᵀ. With momentum the write w = −s η δ and what is erased, −η ω, decay differently, and ``ω = (I +
K diag(η))⁻¹ (before (x Sᵀ) + mixed.before (x Uᵀ) + (mixed.strict ∘ x xᵀ) w)``.

Tensors are [P, c, width] for P layers at once; states are [P, out, in]. Adjoints of decays are kept as their
products with the decays, summed where they meet (:class:`~nl_kernels.memory.decays.CoefficientAdjoints`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from nl_kernels.memory.decays import CoefficientAdjoints, Coefficients, Parts
from nl_kernels.memory.hidden import row_dot


class Erase(NamedTuple):
    """How a layer erases: ``gram`` is K [P, c, c], ``inverse`` is (I + K diag(η))⁻¹."""

    gram: torch.Tensor
    inverse: torch.Tensor


class LayerInput(NamedTuple):
    """What a layer takes in over a chunk.

    Attributes:
        x: [P, c, in]. signal: δ [P, c, out]. rate: η [P, c, 1].
        coefficients: of decays and momenta, for P layers.
        erase: how it erases; ``None`` if it does not.
        gram: x xᵀ [P, c, c] for a layer that erases with momentum, else ``None``.
        share: s [P, c, 1]; ``None`` for 1.
    """

    x: torch.Tensor
    signal: torch.Tensor
    rate: torch.Tensor
    coefficients: Coefficients
    erase: Erase | None
    gram: torch.Tensor | None
    share: torch.Tensor | None


class Write(NamedTuple):
    """What a chunk writes [P, c, out].

    Attributes:
        decaying: what only decays: u, or with momentum −η ω (``None`` without an erase).
        written: w with momentum, else ``None``.
        surprise: ω; without momentum δ where nothing is erased.
        recalled, recalled_velocity: x Sᵀ and x Uᵀ, or ``None``.
        mixed_gram: ``mixed.strict ∘ x xᵀ`` [P, c, c], or ``None``.
    """

    decaying: torch.Tensor | None
    written: torch.Tensor | None
    surprise: torch.Tensor | None
    recalled: torch.Tensor | None
    recalled_velocity: torch.Tensor | None
    mixed_gram: torch.Tensor | None


def erase_matrices(gram: torch.Tensor, rate: torch.Tensor, strict: torch.Tensor) -> Erase:
    """:class:`Erase` from x xᵀ [.., c, c] (overwritten), η [.., c, 1] and the decay before each token."""
    gram = gram.mul_(strict)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return Erase(
        gram, torch.linalg.solve_triangular(gram * rate.mT, identity, upper=False, unitriangular=True)
    )


def write(
    state: torch.Tensor, velocity: torch.Tensor | None, layer: LayerInput
) -> tuple[torch.Tensor, torch.Tensor | None, Write]:
    """S and U [P, out, in] after the chunk (U ``None`` without momentum), and what was written."""
    x, signal, rate, (decay, momentum, mixed), erase, gram, share = layer
    decaying = written = recalled = recalled_velocity = mixed_gram = velocity_after = None
    surprise = signal if velocity is None else None
    after = state * decay.final
    if velocity is not None:
        written = signal * (-rate if share is None else -rate * share)
        velocity_after = (velocity * momentum.final).baddbmm_((written * momentum.to_end).mT, x)
        after.addcmul_(velocity, mixed.final)
    if erase is not None:
        recalled = torch.bmm(x, state.mT)
        if velocity is None:
            surprise = torch.addcmul(signal, recalled, decay.before)
        else:
            recalled_velocity, mixed_gram = torch.bmm(x, velocity.mT), mixed.strict * gram
            surprise = (recalled * decay.before).addcmul_(recalled_velocity, mixed.before)
            surprise.baddbmm_(mixed_gram, written)
        surprise = torch.bmm(erase.inverse, surprise)
    if surprise is not None:
        decaying = surprise * -rate
    done = Write(decaying, written, surprise, recalled, recalled_velocity, mixed_gram)
    return after.baddbmm_(_at_end(done, layer.coefficients).mT, x), velocity_after, done


def _at_end(done: Write, coefficients: Coefficients) -> torch.Tensor:
    """What of a chunk's writes, and of what it erased, is in S at its end, by token."""
    if done.written is None:
        return done.decaying * coefficients.decay.to_end
    arrived = done.written * coefficients.mixed.to_end
    return arrived if done.decaying is None else arrived.addcmul_(done.decaying, coefficients.decay.to_end)


class WriteAdjoint(NamedTuple):
    """Adjoints of the arguments of :func:`write`.

    Attributes:
        state, velocity: [P, out, in].
        x, signal: without x's part in the gram matrices.
        rate: [P, c, 1], and ``momentum``, that of μ through the share (or ``None``).
        gram, mixed_gram: [P, c, c], of K and of ``mixed.strict ∘ x xᵀ``; times their spreads they are that of
            x xᵀ. ``None`` without an erase, or without momentum.
    """

    state: torch.Tensor
    velocity: torch.Tensor | None
    x: torch.Tensor
    signal: torch.Tensor
    rate: torch.Tensor
    momentum: torch.Tensor | None
    gram: torch.Tensor | None
    mixed_gram: torch.Tensor | None
    coefficients: CoefficientAdjoints


def write_adjoint(
    d_after: torch.Tensor,
    d_velocity: torch.Tensor | None,
    by_reads: tuple[torch.Tensor | None, torch.Tensor | None] | None,
    state: torch.Tensor,
    velocity: torch.Tensor | None,
    layer: LayerInput,
    done: Write,
    part_read: Callable,
) -> WriteAdjoint:
    """Adjoints from those of S and U after the chunk.

    ``by_reads``: what running reads add to the adjoints of ``done.decaying`` and ``written``, of the part of
    them that is ``part_read``.
    """
    x, signal, rate, (decay, momentum, mixed), erase, gram, share = layer
    d_end = torch.bmm(x, d_after.mT)
    d_x = torch.bmm(_at_end(done, layer.coefficients), d_after)
    d_state = d_after * decay.final
    parts, mixed_parts, carried_parts = {"final": _inner(d_state, state)}, {}, {}
    d_momentum_state = d_momentum = d_written = d_decaying = d_gram = d_mixed_gram = None
    if velocity is not None:
        d_velocity_end = torch.bmm(x, d_velocity.mT)
        d_x.baddbmm_(done.written * momentum.to_end, d_velocity)
        for found, d, d_final in ((mixed_parts, d_end, d_after), (carried_parts, d_velocity_end, d_velocity)):
            found |= {"to_end": row_dot(d, done.written), "final": _inner(d_final, velocity)}
        d_written = (d_end * mixed.to_end).addcmul_(d_velocity_end, momentum.to_end)
        d_momentum_state = torch.addcmul(d_velocity * momentum.final, d_after, mixed.final)
    if done.decaying is not None:
        d_decaying = d_end.mul_(decay.to_end)
        parts["to_end"] = row_dot(d_decaying, done.decaying)
    for whole, d in zip((d_decaying, d_written), by_reads or ()):
        if d is not None:
            part_read(whole).add_(d)
    d_rate = torch.zeros_like(rate)
    if done.decaying is not None:
        d_rate = row_dot(d_decaying, done.surprise).neg_()
        d_signal = d_decaying.mul_(-rate)
    if erase is not None:
        d_signal = torch.bmm(erase.inverse.mT, d_signal)
        d_recalled = d_signal * decay.before
        parts["before"] = row_dot(d_recalled, done.recalled)
        d_x.baddbmm_(d_recalled, state)
        d_state.baddbmm_(d_recalled.mT, x)
        if velocity is not None:
            d_recalled = d_signal * mixed.before
            mixed_parts["before"] = row_dot(d_signal, done.recalled_velocity)
            d_x.baddbmm_(d_recalled, velocity)
            d_momentum_state.baddbmm_(d_recalled.mT, x)
            d_written.baddbmm_(done.mixed_gram.mT, d_signal)
            d_mixed_gram = torch.bmm(d_signal, done.written.mT)
            mixed_parts["strict"] = d_mixed_gram * gram
        d_gram = _erase_adjoint(d_signal, done.surprise, rate, erase, d_rate, parts)
    if velocity is not None:
        d_scale = row_dot(d_written, signal)  # of −w/δ
        d_rate -= d_scale if share is None else d_scale * share
        d_momentum = None if share is None else d_scale * rate  # s = 1 − μ
        d_signal = d_written.mul_(-rate if share is None else -rate * share)
    grams, coefficients = (d_gram, d_mixed_gram), CoefficientAdjoints(parts, carried_parts, mixed_parts)
    return WriteAdjoint(d_state, d_momentum_state, d_x, d_signal, d_rate, d_momentum, *grams, coefficients)


def _erase_adjoint(d_sum, surprise, rate, erase: Erase, d_rate, parts: Parts) -> torch.Tensor:
    """The adjoint of K from that of what the inverse is applied to; adds to the rate's and to ``parts``."""
    gram = torch.bmm(d_sum, surprise.mT)
    strict = gram * erase.gram
    d_rate.sub_(strict.sum(1, keepdim=True).mT)
    columns = -rate.mT
    parts["strict"] = strict.mul_(columns)
    return gram.mul_(columns)


class Read(NamedTuple):
    """A running read: its queries, the recalls q Sᵀ and q Uᵀ [P, c, out], and the scores [P, c, c].

    ``scores`` are ``decay.full ∘ q xᵀ`` (``None`` where nothing only decays), ``mixed_scores`` those of
    writes with momentum, and ``plain_scores`` q xᵀ with momentum.
    """

    queries: torch.Tensor
    recalled: torch.Tensor
    recalled_velocity: torch.Tensor | None
    scores: torch.Tensor | None
    mixed_scores: torch.Tensor | None
    plain_scores: torch.Tensor | None


def read(
    queries: torch.Tensor, layer: tuple[torch.Tensor | None, ...], coefficients: Coefficients
) -> tuple[torch.Tensor, Read]:
    """``(S_t + anchor) q_t`` after each token [P, c, out].

    ``layer``: S and U before the chunk, the anchor, x, and the chunk's writes: what only decays, all of a
    write without momentum, and what has momentum.
    """
    state, velocity, anchor, x, decaying, written = layer
    decay, _, mixed = coefficients
    recalled = torch.bmm(queries, state.mT)
    scores = torch.bmm(queries, x.mT)
    y = recalled * decay.after
    recalled_velocity = mixed_scores = plain = None
    if velocity is not None:
        plain, mixed_scores = scores, scores * mixed.full
        recalled_velocity = torch.bmm(queries, velocity.mT)
        y.addcmul_(recalled_velocity, mixed.after).baddbmm_(mixed_scores, written)
    if decaying is None:
        scores = None
    else:
        scores = scores * decay.full
        y.baddbmm_(scores, decaying)
    if anchor is not None:
        y = y.baddbmm_(queries, anchor.mT)
    return y, Read(queries, recalled, recalled_velocity, scores, mixed_scores, plain)


class ReadAdjoint(NamedTuple):
    """Adjoints of the arguments of :func:`read`."""

    queries: torch.Tensor
    state: torch.Tensor
    velocity: torch.Tensor | None
    anchor: torch.Tensor | None
    x: torch.Tensor
    decaying: torch.Tensor | None
    written: torch.Tensor | None
    coefficients: CoefficientAdjoints


def read_adjoint(
    d_y: torch.Tensor, layer: tuple[torch.Tensor | None, ...], coefficients: Coefficients, done: Read
) -> ReadAdjoint:
    """Adjoints from that of the read."""
    (state, velocity, anchor, x, decaying, written), (decay, _, mixed) = layer, coefficients
    queries = done.queries
    d_recalled = d_y * decay.after
    parts, mixed_parts = {"after": row_dot(d_recalled, done.recalled)}, {}
    d_queries = torch.bmm(d_recalled, state)
    d_anchor = d_velocity = d_decaying = d_written = None
    if anchor is not None:
        d_queries.baddbmm_(d_y, anchor)
        d_anchor = torch.bmm(d_y.mT, queries)
    d_state = torch.bmm(d_recalled.mT, queries)
    d_scores = None
    if decaying is not None:
        d_decaying = torch.bmm(done.scores.mT, d_y)
        d_scores = torch.bmm(d_y, decaying.mT)
        parts["full"] = d_scores * done.scores
        d_scores.mul_(decay.full)
    if velocity is not None:
        d_recalled_velocity = d_y * mixed.after
        mixed_parts["after"] = row_dot(d_y, done.recalled_velocity)
        d_queries.baddbmm_(d_recalled_velocity, velocity)
        d_velocity = torch.bmm(d_recalled_velocity.mT, queries)
        d_written = torch.bmm(done.mixed_scores.mT, d_y)
        d_mixed_scores = torch.bmm(d_y, written.mT)
        mixed_parts["full"] = d_mixed_scores * done.plain_scores
        d_mixed_scores.mul_(mixed.full)
        d_scores = d_mixed_scores if d_scores is None else d_scores.add_(d_mixed_scores)
    d_queries.baddbmm_(d_scores, x)
    d_x = torch.bmm(d_scores.mT, queries)
    found = CoefficientAdjoints(parts, {}, mixed_parts)
    return ReadAdjoint(d_queries, d_state, d_velocity, d_anchor, d_x, d_decaying, d_written, found)


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner products of [P, out, in], [P, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)  # an eighth of the time of a product of flattened ones


def gram_adjoint(d_gram: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The adjoint of x [.., c, in] from that of x xᵀ."""
    return (d_gram + d_gram.mT) @ x


def proximal_rate(rate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``η/(1 + η‖x‖²)``."""
    return rate / (1 + rate * row_dot(x, x))


def proximal_adjoint(d_effective, rate, x, effective) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoints of η and x from that of :func:`proximal_rate`."""
    part = 1 / (1 + rate * row_dot(x, x))
    return d_effective * part.square(), x * (-2 * d_effective * effective.square())
