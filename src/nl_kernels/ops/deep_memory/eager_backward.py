"""One chunk of a two-layer deep memory with its derivatives written out: one node of the autograd graph.

Rows are N = sequences × heads. An adjoint is called ``at_…`` or ``grad_…``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.delta_adjoint import (
    Erase,
    decay_adjoint,
    erase_matrices,
    gram_adjoint,
    momentum_adjoint,
    momentum_coefficient_adjoint,
    momentum_forward,
    proximal_adjoint,
    proximal_rate,
    read_adjoint,
    read_forward,
    write_adjoint,
    write_forward,
)
from nl_kernels.delta_chunk import ChunkCoefficients, chunk_coefficients
from nl_kernels.hidden_layer import (
    activated,
    bound_adjoint,
    error_signal,
    hidden_adjoint,
    length_factor,
    signal_adjoint,
)
from nl_kernels.memory_rule import MemoryRule


class Prepared(NamedTuple):
    """What of a chunk depends on no state: decays, and what the first layer erases with."""

    coefficients: ChunkCoefficients
    applied: torch.Tensor | None
    rate: torch.Tensor
    gram: torch.Tensor | None
    erase: Erase | None


@torch.no_grad()
def prepare(k, rate, log_decay, momentum, applied, rule: MemoryRule) -> list[Prepared]:
    """:class:`Prepared` for every chunk of k [N, n, c, D], rates and the rest [N, n, c, 1], in one go."""
    chunks = k.shape[1]
    flat = [None if x is None else x[..., 0] for x in (log_decay, momentum, applied)]
    coefficients = chunk_coefficients(*flat)
    gram = erase = None
    if rule.erases(True):
        if rule.proximal:
            rate = proximal_rate(rate, k)
        gram = k @ k.transpose(-1, -2)
        erase = erase_matrices(gram.clone(), rate, coefficients.decay.strict)
    whole = Prepared(coefficients, flat[2], rate, gram, erase)
    return _by_chunk(whole, chunks)


def _by_chunk(value, chunks: int) -> list:
    """Nested tuples of tensors [N, n, ..] chunk by chunk."""
    if value is None:
        return [None] * chunks
    if isinstance(value, torch.Tensor):
        return value.unbind(1)
    return [type(value)(*parts) for parts in zip(*(_by_chunk(part, chunks) for part in value))]


def supports(rule: MemoryRule, read: str, momentum: bool, linear: bool) -> bool:
    """Whether derivatives are written out for these options; autograd does the others."""
    return not linear and not (momentum and read == "running")


def fused_chunk(rule, read, prepared: Prepared, tokens, running, velocity, snapshot, anchor):
    """What a chunk reads and writes: reads [N, c, Dv] without residual, layers after it, velocities after it.

    Args:
        rule, read: as in :func:`~nl_kernels.ops.deep_memory.api.deep_memory`.
        prepared: of :func:`prepare`, from the same tokens.
        tokens: q, k, v [N, c, ·]; rate, log decay, momentum [N, c, 1], the last one or ``None``.
        running, velocity, snapshot, anchor: pairs of layers, or of ``None``: no momentum; the snapshot
            is ``running``; no anchor.
    """
    arguments = (rule, read, prepared, *tokens, *running, *velocity, *snapshot, *anchor)
    if not torch.is_grad_enabled():
        found = _forward(*arguments, keep=False)[0]
        return found[0], list(found[1:3]), list(found[3:5])
    found = _FusedChunk.apply(*arguments)
    return found[0], list(found[1:3]), list(found[3:5])


class _FusedChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        found, ctx.made = _forward(*arguments, keep=True)
        ctx.rule, ctx.read, ctx.prepared = arguments[:3]
        ctx.save_for_backward(*arguments[3:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return (
            None,
            None,
            None,
            *_backward(ctx.rule, ctx.read, ctx.prepared, ctx.made, ctx.saved_tensors, grads),
        )


def _forward(
    rule,
    read,
    prepared,
    q,
    k,
    v,
    rate,
    log_decay,
    momentum,
    first,
    last,
    first_velocity,
    last_velocity,
    first_snapshot,
    last_snapshot,
    first_anchor,
    last_anchor,
    *,
    keep: bool,
):
    size, snapshot_read = k.shape[1], read == "snapshot"
    coefficients = prepared.coefficients
    decay = coefficients.decay
    inner, outer = (first, last) if first_snapshot is None else (first_snapshot, last_snapshot)
    if first_anchor is not None:
        inner, outer = inner + first_anchor, outer + last_anchor

    tokens = torch.cat([k, q], 1) if snapshot_read else k
    hidden = activated(torch.bmm(tokens, inner.transpose(1, 2)), rule)
    made = torch.bmm(hidden.value, outer.transpose(1, 2))
    keys = hidden.rows(slice(None, size))
    error = made[:, :size] - v
    if rule.residual:
        error += k
    factor = length_factor(error, rule.error_bound)
    if factor is not None:
        error.mul_(factor)
    signal = error_signal(torch.bmm(error, outer), keys, rule)

    erase = gram = None
    hidden_rate = rate
    if rule.erases(False):
        if rule.proximal:
            hidden_rate = proximal_rate(rate, keys.value)
        gram = torch.bmm(keys.value, keys.value.transpose(1, 2))
        erase = erase_matrices(gram.clone() if momentum is not None else gram, hidden_rate, decay.strict)
    first_arguments = (first, k, signal.value, prepared.rate)
    last_arguments = (last, keys.value, error, hidden_rate)
    first_velocity_after = last_velocity_after = None
    if momentum is None:
        first_after, first_write = write_forward(*first_arguments, decay, prepared.erase)
        last_after, last_write = write_forward(*last_arguments, decay, erase)
    else:
        first_after, first_velocity_after, first_write = momentum_forward(
            first_velocity, *first_arguments, coefficients, prepared.gram, prepared.erase
        )
        last_after, last_velocity_after, last_write = momentum_forward(
            last_velocity, *last_arguments, coefficients, gram, erase
        )
    probe = reads = None
    if snapshot_read:
        o = made[:, size:].contiguous()
    else:
        z, first_read = read_forward(q, first, first_anchor, k, first_write.written, decay)
        probe = activated(z, rule, sloped=keep, curved=False)
        o, last_read = read_forward(probe.value, last, last_anchor, keys.value, last_write.written, decay)
        reads = first_read, last_read
    found = (o, first_after, last_after, first_velocity_after, last_velocity_after)
    if not keep:
        return found, None
    state = (inner, outer, tokens, hidden, error, factor, signal)
    return found, (*state, hidden_rate, gram, erase, first_write, last_write, probe, reads)


def _backward(rule, read, prepared, made, saved, grads):
    q, k, _, rate, _, momentum, first, last, first_velocity, last_velocity = saved[:10]
    first_snapshot, _, first_anchor, last_anchor = saved[10:]
    (inner, outer, tokens, hidden, error, factor, signal) = made[:7]
    hidden_rate, gram, erase, first_write, last_write, probe, reads = made[7:]
    size = k.shape[1]
    keys = hidden.rows(slice(None, size))
    coefficients = prepared.coefficients
    decay = coefficients.decay
    states = (first, last, first_velocity, last_velocity)
    grad_o, *after = (
        g if g is not None or x is None else torch.zeros_like(x) for g, x in zip(grads, (None, *states))
    )

    at_first_written = at_last_written = probed = None
    decay_parts: dict[str, torch.Tensor] = {}
    if read == "running" and grad_o is not None:
        read_last = read_adjoint(
            grad_o, probe.value, last, last_anchor, keys.value, last_write.written, decay, reads[1]
        )
        at_probe = hidden_adjoint(read_last.queries, probe)
        read_first = read_adjoint(at_probe, q, first, first_anchor, k, first_write.written, decay, reads[0])
        at_first_written, at_last_written = read_first.written, read_last.written
        decay_parts = {
            "after": read_first.after + read_last.after,
            "full": read_first.full + read_last.full,
        }
        probed = read_first, read_last

    layers = (
        (after[0], after[2], at_first_written, first, first_velocity, k, signal.value, first_write, prepared),
        (after[1], after[3], at_last_written, last, last_velocity, keys.value, error, last_write, None),
    )
    found = []
    for grad, grad_velocity, outer_grad, state, velocity, x, delta, write, shared in layers:
        matrices = (prepared.gram, prepared.erase) if shared else (gram, erase)
        used = prepared.rate if shared else hidden_rate
        if momentum is None:
            found.append(write_adjoint(grad, outer_grad, state, x, write, used, decay, matrices[1]))
        else:
            found.append(
                momentum_adjoint(
                    grad, grad_velocity, state, velocity, x, delta, write, used, coefficients, *matrices
                )
            )
    at_first, at_last = (part if momentum is None else part.layer for part in found)
    for name in ("strict", "before", "to_end", "final"):
        parts = [x for x in (getattr(at_first, name), getattr(at_last, name)) if x is not None]
        if parts:
            decay_parts[name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]

    at_k, at_keys = at_first.x, at_last.x
    if probed is not None:
        at_k += probed[0].x
        at_keys += probed[1].x
    if at_first.gram is not None:
        at_k = at_k.add_(gram_adjoint(_weighted(found[0], decay, coefficients), k))
    if at_last.gram is not None:
        at_keys = at_keys.add_(gram_adjoint(_weighted(found[1], decay, coefficients), keys.value))
    grad_rate = at_first.rate
    if prepared.erase is not None and rule.proximal:
        grad_rate, extra = proximal_adjoint(grad_rate, rate, k, prepared.rate)
        at_k += extra
    grad_hidden_rate = at_last.rate
    if erase is not None and rule.proximal:
        grad_hidden_rate, extra = proximal_adjoint(grad_hidden_rate, rate, keys.value, hidden_rate)
        at_keys += extra
    grad_rate = grad_rate + grad_hidden_rate
    if momentum is None:
        grad_decay, grad_momentum = decay_adjoint(size, k, **decay_parts), None
    else:
        grad_decay, grad_momentum = momentum_coefficient_adjoint(
            [part.velocity for part in found], coefficients, momentum[..., 0], prepared.applied, decay_parts
        )
        grad_momentum = grad_momentum[..., None]

    at_back, at_value, at_slope, radial = signal_adjoint(at_first.signal, signal, keys, rule)
    if at_value is not None:
        at_keys += at_value
    at_error = at_last.signal.baddbmm_(at_back, outer.transpose(1, 2))
    at_error = bound_adjoint(at_error, error, factor, rule.error_bound)
    grad_outer = torch.bmm(error.transpose(1, 2), at_back)
    at_made = at_error
    if read == "snapshot":
        at_made = torch.cat([at_error, torch.zeros_like(at_error) if grad_o is None else grad_o], 1)
    grad_outer.baddbmm_(at_made.transpose(1, 2), hidden.value)
    at_hidden = torch.bmm(at_made, outer)
    at_hidden[:, :size] += at_keys
    at_z = hidden_adjoint(at_hidden, hidden, radial)
    at_z[:, :size] += at_slope
    grad_inner = torch.bmm(at_z.transpose(1, 2), tokens)
    at_tokens = torch.bmm(at_z, inner)
    at_k += at_tokens[:, :size]
    if rule.residual:
        at_k += at_error
    grad_q = at_tokens[:, size:] if read == "snapshot" else None

    grad_anchor = (None, None) if first_anchor is None else (grad_inner, grad_outer)
    grad_state = [at_first.state, at_last.state]
    grad_snapshot = (None, None)
    if first_snapshot is None:
        grad_state = [at_first.state + grad_inner, at_last.state + grad_outer]
    else:
        grad_snapshot = (grad_inner, grad_outer)
    if probed is not None:
        read_first, read_last = probed
        grad_q = read_first.queries
        grad_state = [grad_state[0] + read_first.state, grad_state[1] + read_last.state]
        if first_anchor is not None:
            grad_anchor = (grad_inner + read_first.anchor, grad_outer + read_last.anchor)
    grad_velocity = (None, None) if momentum is None else [part.velocity.state for part in found]
    return (
        grad_q,
        at_k,
        -at_error,
        grad_rate,
        grad_decay[..., None],
        grad_momentum,
        *grad_state,
        *grad_velocity,
        *grad_snapshot,
        *grad_anchor,
    )


def _weighted(part, decay, coefficients):
    """The adjoint of a layer's x xᵀ."""
    layer = part.layer if hasattr(part, "layer") else part
    weighted = layer.gram * decay.strict
    if layer is not part:
        weighted.addcmul_(part.velocity.gram, coefficients.mixed.strict)
    return weighted
