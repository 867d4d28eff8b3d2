"""One token of ``self_modifying_memory`` for decoding on the CPU: no chunk, no gradient, few operations.

Inside, N = sequences × heads rows come first, then the memories: first layers [N, 5, h, D], last layers
[N, 3, D, h] (key, value, memory) and [N, 2, h] (rate, retention), as in the state.
"""

from __future__ import annotations

import torch

from nl_kernels.memory.hidden import Activated, activated, error_signal, length_factor
from nl_kernels.memory.state import map_tensors
from nl_kernels.memory.step import Gates, advance, refreshed, write_token
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule, l2_normalize
from nl_kernels.ops.self_modifying.state import (
    MemoryStack,
    SelfModifyingState,
    SelfModifyingWeights,
    stack_memories,
)

Number = torch.Tensor | float


def self_modifying_memory_step(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    write_scale: torch.Tensor | None,
    momentum: torch.Tensor | None,
    weights: SelfModifyingWeights,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: Number,
    rate_bias: Number,
    retention_bias: Number,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    mask: torch.Tensor | None,
    inplace: bool,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """One token of :func:`self_modifying_memory_reference` in the dtype of ``state``.

    Args:
        query, key_input, value_input, gate_input: [B, H, D]. write_scale, momentum: [B, H]. mask: [B].
        weights: the anchor, shared or by sequence; unused by a rule that is not anchored.
        rate_max, rate_bias, retention_bias: numbers or [H].
        inplace: write into the tensors of ``state``, which are contiguous and share no memory; otherwise they
            stay as they are, and the new state may share those that did not change.

    Returns:
        o [B, H, D] and the state after the token.
    """
    snapshot, running, position, velocity = state
    batch, heads, width = query.shape
    rows, dtype = batch * heads, running.last.dtype
    inputs = [x.to(dtype) for x in (key_input, value_input, query, gate_input)]
    if mask is not None:
        inputs = [x.masked_fill(~mask[:, None, None], 0) for x in inputs]
        write_scale = None if write_scale is None else write_scale.masked_fill(~mask[:, None], 0)
    inputs[2] = l2_normalize(inputs[2])
    base = _base(snapshot, weights, rule)
    key, value, o, gate = _serve(inputs, base, rows, rule)
    k = l2_normalize(key)
    gates = _gates(gate, momentum, mask, (batch, heads, dtype), rate_max, rate_bias, retention_bias)

    pairs = _pairs(k, value, base, _rows(snapshot), rule)
    if write_scale is not None:
        pairs.last[1].view(rows, 3, width)[:, 2].mul_(write_scale.to(dtype).reshape(rows, 1))
    running, velocity = _write(pairs, running, velocity, gates, rule, inplace)
    if read == "running":
        o = _read(inputs[2].reshape(rows, 1, width), running, weights, rule)
    if rule.residual:
        o = o + inputs[2].reshape(rows, 1, width)

    clocks = (chunk_size, generator_chunk_size)
    after, (own, others) = advance(position, mask, max(clocks), clocks)
    snapshot = _refresh(own, others, running, snapshot, inplace)
    position = position.copy_(after) if inplace else after
    return o.view(batch, heads, width), SelfModifyingState(snapshot, running, position, velocity)


def _base(snapshot: MemoryStack, weights: SelfModifyingWeights, rule: MemoryRule) -> MemoryStack:
    """The weights at the snapshot: first [N, 5h, D], last [N, 3·out, in], gate [N, 2, in]."""
    if rule.anchored:
        if any(memory.inner.ndim != weights.key.inner.ndim for memory in weights):
            # Some are by sequence, some shared: all by sequence.
            lead = snapshot.last.shape[:2]
            weights = SelfModifyingWeights(
                *(
                    DeepMemoryWeights(*(w if w is None else w.expand(*lead, *w.shape[-2:]) for w in m))
                    for m in weights
                )
            )
        snapshot = map_tensors(_add, stack_memories(weights), snapshot)
    return _rows(snapshot)


def _add(anchor: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Their sum, in the memory of the freshly stacked ``anchor`` if it fits: new pages cost more."""
    whole = anchor if anchor.ndim == change.ndim else anchor.unsqueeze(0)
    fits = whole.shape == change.shape and whole.dtype == change.dtype
    return whole.add_(change) if fits else whole + change


def _rows(stack: MemoryStack) -> MemoryStack:
    """A state's [B, H, m, out, in] as [B · H, m · out, in], and its gates [B · H, 2, in]."""
    first, last, gate = stack
    if first is not None:
        first = first.flatten(0, 1).flatten(1, 2)
    return MemoryStack(first, last.flatten(0, 1).flatten(1, 2), gate.flatten(0, 1))


def _serve(inputs: list[torch.Tensor], base: MemoryStack, rows: int, rule: MemoryRule):
    """M_key, M_value and the read, without its residual, [N, 1, D], and the logits of the gates [N, 2]."""
    key, value, query, gate = inputs
    width = query.shape[-1]
    if base.first is None:
        wide = torch.stack([key, value, query], 2).view(rows * 3, 1, width)
        narrow = gate.reshape(rows, 1, width)
    else:
        x = torch.stack([key, value, query, gate, gate], 2).view(rows * 5, 1, width)
        z = torch.bmm(x, base.first.view(rows * 5, -1, width).mT)
        hidden = activated(z, rule, sloped=False, curved=False).value.view(rows, 5, -1)
        wide, narrow = hidden[:, :3].reshape(rows * 3, 1, -1), hidden[:, 3:]
    key_value_read = torch.bmm(wide, base.last.view(rows * 3, width, -1).mT).view(rows, 3, 1, width).unbind(1)
    key_out, value_out, o = key_value_read
    key_out = key_out + key.reshape(rows, 1, width)
    value_out = value_out + value.reshape(rows, 1, width)
    return key_out, value_out, o, (base.gate * narrow).sum(-1)


def _gates(
    logits: torch.Tensor,
    momentum: torch.Tensor | None,
    mask: torch.Tensor | None,
    shape: tuple[int, int, torch.dtype],
    rate_max: Number,
    rate_bias: Number,
    retention_bias: Number,
) -> Gates:
    batch, heads, dtype = shape
    rate_max, rate_bias, retention_bias = (
        x.to(dtype) if isinstance(x, torch.Tensor) else x for x in (rate_max, rate_bias, retention_bias)
    )
    rate, retention = logits.view(batch, heads, 2).unbind(-1)
    decay = (retention + retention_bias).sigmoid_()
    rate = (rate + rate_bias).sigmoid_() * (decay + 1).clamp_(max=rate_max)
    return Gates.of(rate, decay, None if momentum is None else momentum.to(dtype), mask)


def _pairs(
    k: torch.Tensor, v: torch.Tensor, base: MemoryStack, change: MemoryStack, rule: MemoryRule
) -> MemoryStack:
    """What each layer takes in and its error signal, pairs (x, δ).

    ``base`` is the anchor with its ``change``.
    Inputs are [N, 1, in] where a stack shares them, with signals [N, 1, m · out], else [N, m, 1, in] with
    [N, m, 1, out].
    """
    rows, _, width = k.shape
    linear = base.first is None
    if linear:
        # f(k) − f(v) of linear memories is f(k − v).
        apart = narrow = k - v
        wide = torch.bmm(apart, base.last.mT).view(rows, 3, width)
    else:
        x = torch.cat([k, v], 1)
        hidden = activated(torch.bmm(x, base.first.mT).view(rows, 2, 5, -1), rule, curved=False)
        apart = hidden.value[:, 0] - hidden.value[:, 1]
        narrow = apart[:, 3:]
        wide = torch.bmm(apart[:, :3].reshape(rows * 3, 1, -1), base.last.view(rows * 3, width, -1).mT)
        wide = wide.view(rows, 3, width)
    gate = (base.gate * narrow).sum(-1)
    if rule.errs_at_anchor(linear):
        wide -= torch.bmm(k, change.last.mT).view(rows, 3, width)
        gate -= (change.gate * k).sum(-1)
    wide -= v
    wide[:, :2] += k
    if rule.residual:
        wide[:, 2:] += k
    factor = length_factor(wide, rule.error_bound)
    wide = wide if factor is None else wide.mul_(factor)
    if rule.error_bound is not None:
        gate = gate.clamp_(-rule.error_bound, rule.error_bound)  # its length is its absolute value
    if not linear:
        back = torch.bmm(wide.view(rows * 3, 1, width), base.last.view(rows * 3, width, -1)).view(rows, 3, -1)
        back = torch.cat([back, gate[:, :, None] * base.gate], 1)

    if linear:
        return MemoryStack(None, (k, wide.view(rows, 1, -1)), (k, gate.view(rows, 1, 2)))
    at_keys = Activated(*(None if part is None else part[:, 0] for part in hidden))
    signal = error_signal(back, at_keys, rule).value
    a = at_keys.value.unsqueeze(2)
    last, gates = (a[:, :3], wide.unsqueeze(2)), (a[:, 3:], gate.view(rows, 2, 1, 1))
    return MemoryStack((k, signal.view(rows, 1, -1)), last, gates)


def _write(
    pairs: MemoryStack,
    running: MemoryStack,
    velocity: MemoryStack | None,
    gates: Gates,
    rule: MemoryRule,
    inplace: bool,
) -> tuple[MemoryStack, MemoryStack | None]:
    """Running weights and velocities after the token, in the state's shapes."""
    linear = running.first is None
    written = []
    for layer, (state, momentum) in enumerate(zip(running, velocity or (None, None, None))):
        if state is None:
            written.append((None, None))
            continue
        # Layers that share their input are one; the last layers of two-layer memories do not.
        shared = linear or layer == 0
        after = write_token(
            _one_layer(state, shared=shared),
            None if momentum is None else _one_layer(momentum, shared=shared),
            *pairs[layer],
            gates if shared else gates.broadcast(),
            rule,
            first_layer=shared,
            inplace=inplace,
        )
        written.append(tuple(None if part is None else part.view(state.shape) for part in after))
    running, momentum = (MemoryStack(*parts) for parts in zip(*written))
    return running, momentum if velocity is not None else None


def _one_layer(part: torch.Tensor, *, shared: bool) -> torch.Tensor:
    """[B, H, m, ..] of a state as [N, m · out, in], or as [N, m, out, in] where inputs are not shared."""
    part = part.flatten(0, 1)
    if part.ndim == 3:  # gates: their rows are matrices of one row
        return part if shared else part.unsqueeze(2)
    return part.flatten(1, 2) if shared else part


def _read(
    q: torch.Tensor, running: MemoryStack, weights: SelfModifyingWeights, rule: MemoryRule
) -> torch.Tensor:
    """M_memory(q) [N, 1, D] after the token, without its residual."""
    memory = [None if x is None else x[:, :, 2] for x in (running.first, running.last)]
    anchor = weights.memory
    if rule.anchored:
        anchors = [None, anchor.inner] if anchor.outer is None else anchor
        memory = [None if x is None else a + x for x, a in zip(memory, anchors)]
    first, last = (None if x is None else x.flatten(0, 1) for x in memory)
    if first is not None:
        q = activated(torch.bmm(q, first.mT), rule, sloped=False, curved=False).value
    return torch.bmm(q, last.mT)


def _refresh(own, others, running: MemoryStack, snapshot: MemoryStack, inplace: bool) -> MemoryStack:
    """The snapshot after the token, with the boundaries met by M_memory's clock and by the others'."""
    if own is others and isinstance(own, bool):
        return refreshed(own, running, snapshot, inplace)
    own, others = (
        m
        if isinstance(m, torch.Tensor)
        else torch.full(snapshot.last.shape[:1], m, device=snapshot.last.device)
        for m in (own, others)
    )
    met = torch.stack([others, others, own, others, others], 1)[:, None].expand(
        -1, snapshot.last.shape[1], -1
    )
    return refreshed((met, met[:, :, :3], met[:, :, 3:]), running, snapshot, inplace)
