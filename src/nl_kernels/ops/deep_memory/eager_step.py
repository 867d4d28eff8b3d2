"""One token of ``deep_memory`` for decoding on the CPU: no chunk, no gradient, few operations."""

from __future__ import annotations

import torch

from nl_kernels.memory.hidden import activated, error_signal, length_factor
from nl_kernels.memory.step import Gates, advance, refreshed, write_token
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory.state import DeepMemoryState


def deep_memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum: torch.Tensor | None,
    weights: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    inplace: bool,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """One token of :func:`deep_memory_reference` in the dtype of ``state``: reads [B, H, Dv] and the state.

    Args:
        q, k, v: [B, H, ·]. rate, log_decay, momentum: [B, H]. mask: [B].
        weights: the anchor, shared or by sequence; unused by a rule that is not anchored.
        inplace: write into the tensors of ``state``, which are contiguous and share no memory; otherwise they
            stay as they are, and the new state may share those that did not change.
    """
    snapshot, running, position, velocity = state
    batch, heads, _ = q.shape
    rows, dtype = batch * heads, running.inner.dtype
    if mask is not None:
        q, k, v = (x.masked_fill(~mask[:, None, None], 0) for x in (q, k, v))
    q, k, v = (x.to(dtype).reshape(rows, 1, -1) for x in (q, k, v))
    momentum = None if momentum is None else momentum.to(dtype)
    gates = Gates.of(rate.to(dtype), log_decay.to(dtype).exp(), momentum, mask)

    inner, outer = (_at_rows(w, a, rule) for w, a in zip(snapshot, weights))
    x = k if read == "running" else torch.cat([k, q], 1)
    y = torch.bmm(x, inner.mT)
    hidden = None
    if outer is not None:
        both = activated(y, rule, curved=False)
        y, hidden = torch.bmm(both.value, outer.mT), both.rows(slice(1))
    error = y[:, :1] - v
    if rule.errs_at_anchor(outer is None):
        error -= torch.bmm(k, snapshot.inner.flatten(0, 1).mT)
    if rule.residual:
        error += k
    factor = length_factor(error, rule.error_bound)
    error = error if factor is None else error.mul_(factor)
    layers = [(k, error)]
    if hidden is not None:
        delta = error_signal(torch.bmm(error, outer), hidden, rule).value
        layers = [(k, delta), (hidden.value, error)]

    written = [
        write_token(
            running[layer].flatten(0, 1),
            None if velocity is None else velocity[layer].flatten(0, 1),
            *pair,
            gates,
            rule,
            first_layer=layer == 0,
            inplace=inplace,
        )
        for layer, pair in enumerate(layers)
    ]
    running = _weights(running, [w for w, _ in written])
    if velocity is not None:
        velocity = _weights(velocity, [u for _, u in written])

    if read == "running":
        inner, outer = (_at_rows(w, a, rule) for w, a in zip(running, weights))
        o = torch.bmm(q, inner.mT)
        if outer is not None:
            o = torch.bmm(activated(o, rule, sloped=False, curved=False).value, outer.mT)
    else:
        o = y[:, 1:]
    if rule.residual:
        o = o + q

    after, (met,) = advance(position, mask, chunk_size, (chunk_size,))
    snapshot = refreshed(met, running, snapshot, inplace)
    position = position.copy_(after) if inplace else after
    return o.view(batch, heads, -1), DeepMemoryState(snapshot, running, position, velocity)


def _at_rows(change: torch.Tensor | None, anchor: torch.Tensor | None, rule: MemoryRule):
    """The weights that a state's [B, H, out, in] stand for, as [B · H, out, in]."""
    if change is None:
        return None
    return (anchor + change if rule.anchored else change).flatten(0, 1)


def _weights(like: DeepMemoryWeights, layers: list[torch.Tensor]) -> DeepMemoryWeights:
    return DeepMemoryWeights(
        *(None if old is None else new.view(old.shape) for old, new in zip(like, [*layers, None]))
    )
