"""One token of a chunked memory for decoding on the CPU: no chunk, no gradient, few operations.

At one token the arithmetic is small, so what a chunk prepares for many tokens is left out. Tokens are rows
[.., 1, width]: a product of a row with ``W.mT`` is several times as fast as that of ``W`` with a column.
Weights are blocks [N, m, out, in] of a state (:meth:`nl_kernels.memory.bank.Layout.blocks_of`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

from nl_kernels.memory.bank import Layers, Layout, Met, Request, Sequences
from nl_kernels.memory.chunk import BankRule, Errors, apply, counted, errors_of
from nl_kernels.memory.generate import source_of
from nl_kernels.memory.hidden import row_dot
from nl_kernels.memory.state import map_tensors
from nl_kernels.memory_checks import per_sequence, zero_padding
from nl_kernels.memory_rule import MemoryRule

Weights = TypeVar("Weights", bound=tuple)


def step_token(request: Request, inplace: bool) -> tuple[torch.Tensor, tuple]:
    """Reads [B, H, Dv] of one token in the dtype of the state, and the state after it.

    Args:
        request: tensors [B, H, ..], mask [B]; weights are unused by a rule that is not anchored.
        inplace: write into the state's tensors, which are contiguous and share no memory; otherwise they
            stay as they are, and the new state may share those that did not change.
    """
    rule, read, mask, clocks, weights = (
        request.rule,
        request.read,
        request.mask,
        request.clocks,
        request.weights,
    )
    tokens = request.op.sequences(request.tensors)
    snapshot, running, position, velocity = state = request.state
    batch, heads, _ = tokens.query.shape
    count, dtype = batch * heads, next(x for x in running if x is not None).dtype
    if mask is not None:
        tokens = map_tensors(lambda x: zero_padding(x, mask), tokens)
    tokens = Sequences(*(None if x is None else x.to(dtype).reshape(count, 1, -1) for x in tokens))
    applied = None if mask is None else mask.repeat_interleave(heads).to(dtype)[:, None, None]
    layout = Layout.of(count, tokens, running)
    bank = BankRule(rule, read, layout)

    base = _base(layout, weights if rule.anchored else None, snapshot)
    reads = read == "snapshot" and layout.batched
    source, sequences = source_of(rule, layout, tokens, applied, 1, reads)
    gates = request.gates.values()
    gates = [x.to(dtype).repeat(batch).view(-1, 1, 1) if isinstance(x, torch.Tensor) else x for x in gates]
    token, generated = source.tokens(base, gates, sequences, False)
    recalled = None
    if rule.errs_at_anchor(layout.linear):
        recalled = [torch.bmm(token.k, x.flatten(0, 1).flatten(1, -2).mT) for x in snapshot if x is not None]
        recalled = torch.cat(recalled, -1) if layout.self_made else recalled[0]
    made, others = errors_of(bank, token, base, (), False, recalled)

    rate, log_decay, momentum = counted(token)
    scales = (rate, log_decay.exp(), momentum, applied)
    pairs = iter(_pairs(layout, token.k, made))
    after = []
    for part, moving in zip(running, velocity or (None,) * len(running)):
        if part is not None:
            first, options = not after or layout.linear, {"rule": rule, "inplace": inplace}
            part, moving = write_token(part, moving, *next(pairs), scales, first_layer=first, **options)
        after.append((part, moving))
    running, moving = (type(running)(*x) for x in zip(*after))
    velocity = None if velocity is None else moving

    if reads or bank.reads_inputs:
        o = generated.read if reads else others[0]
    elif read == "snapshot":
        o, _ = apply(rule, token.query, map(layout.read_weights, base[: layout.read_layers]))
    else:
        memory = weights.memory if layout.self_made else weights
        layers = [x for x in running if x is not None][: layout.read_layers]
        layers = [x[:, :, 2] for x in layers] if layout.self_made else layers
        if rule.anchored:
            layers = [x + w for x, w in zip(layers, memory)]
        o, _ = apply(rule, token.query, [x.flatten(0, 1) for x in layers])
    if rule.residual:
        o = o + token.query

    place, met = advance(position, mask, max(clocks), clocks)
    snapshot = _refreshed(*met, running, snapshot, layout, inplace)
    position = position.copy_(place) if inplace else place
    return o.view(batch, heads, -1), type(state)(snapshot, running, position, velocity)


def _base(layout: Layout, anchor: tuple | None, snapshot: tuple) -> Layers:
    """The weights at the snapshot as the engine has them; new pages of memory cost most."""
    if anchor is None:
        return layout.layers_of(layout.blocks_of(snapshot))
    if not layout.self_made:
        return tuple((w + x).flatten(0, 1) for w, x in zip(anchor, snapshot) if x is not None)
    batch, dtype = snapshot.last.shape[0], snapshot.last.dtype
    if len({memory.inner.ndim for memory in anchor}) > 1:  # some are by sequence, some shared
        anchor = map_tensors(lambda w: per_sequence(w, batch, dtype), anchor)
    firsts, lasts = zip(*anchor)
    if layout.linear:
        rows = torch.cat(firsts, -2).to(dtype).expand(batch, -1, -1, -1).contiguous()
        last, gate = rows.split_with_sizes((3 * layout.width, 2), -2)
        last.add_(snapshot.last.flatten(2, 3))
        gate.add_(snapshot.gate)
        return (rows.flatten(0, 1),)
    base, changes = [], (snapshot.first, snapshot.last, snapshot.gate.unsqueeze(3))
    for weights, change in zip((firsts, lasts[:3], lasts[3:]), changes):
        fresh, change = torch.stack(weights).to(dtype), change.transpose(1, 2).transpose(0, 1)
        fresh = fresh if fresh.ndim == 5 else fresh.unsqueeze(1)
        if fresh.shape[1] < batch:
            fresh, change = change.clone(memory_format=torch.contiguous_format), fresh
        base.append(fresh.add_(change).flatten(0, 2))
    return tuple(base)


def _pairs(layout: Layout, k: torch.Tensor, made: Errors) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer takes in, and its error signal: tokens [N, 1, ·], or [N, m, 1, ·] of memories apart."""
    if layout.linear:
        sizes = (3 * layout.width, 2) if layout.self_made else (layout.width,)
        return [(k, signal) for signal in made.errors[0].split_with_sizes(sizes, -1)]
    inputs, signals = (made.keys.value,), (made.signal.value, *made.errors)
    if layout.self_made:
        inputs = layout.as_blocks(layout.split(*inputs))
        first, *lasts = layout.as_blocks(signals)
        signals = (first.reshape(len(k), 1, -1), *lasts)
    return zip((k, *inputs), signals)


def write_token(
    state: torch.Tensor,
    velocity: torch.Tensor | None,
    x: torch.Tensor,
    signal: torch.Tensor,
    scales: tuple[torch.Tensor | None, ...],
    *,
    rule: MemoryRule,
    first_layer: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``U ← μU − sη δxᵀ``, ``S ← αS − η (Sx)xᵀ + U``: both after the token.

    The share s of a write is 1 − μ where the rule averages writes, else 1.

    Args:
        state, velocity: S and U [B, H, .., out, in]; U ``None`` without momentum.
        x, signal: of :func:`_pairs`.
        scales: η, α, μ and whether there is a token, 1 or 0, each [N, 1, 1] or ``None``.
        first_layer: whether the layer is its memory's first, for ``rule.erase``.
        inplace: write into ``state`` and ``velocity``; otherwise they stay and the results are new.
    """
    shape, block = state.shape, (*x.shape[:-2], -1, x.shape[-1])
    state, velocity = (w if w is None else w.reshape(block) for w in (state, velocity))
    if x.ndim > 3:
        scales = (w if w is None else w.unsqueeze(1) for w in scales)
    rate, decay, momentum, applied = scales
    erases = rule.erases(first_layer)
    if erases and rule.proximal:
        rate = rate / (1 + rate * row_dot(x, x))
    recalled = torch.bmm(x.flatten(0, -3), state.flatten(0, -3).mT).view_as(signal) if erases else None
    after = state.mul_(decay) if inplace else state * decay
    if velocity is None:
        # Without momentum what is erased and what is written are one product.
        target, erased = after, None
        signal = signal if recalled is None else recalled.add_(signal)
    else:
        velocity = velocity.mul_(momentum) if inplace else velocity * momentum
        target, erased = velocity, recalled
    share = rule.share(momentum)
    write_rate = rate if share is None else rate * share
    target.addcmul_((signal * write_rate).mT, x, value=-1)
    if erased is not None:
        after.addcmul_(erased.mul_(rate).mT, x, value=-1)
    if velocity is not None and applied is None:
        after.add_(velocity)
    elif velocity is not None:
        after.addcmul_(velocity, applied)  # an empty place must not add U again
    return after.view(shape), None if velocity is None else velocity.view(shape)


def advance(
    position: torch.Tensor, mask: torch.Tensor | None, period: int, clocks: tuple[int, ...]
) -> tuple[torch.Tensor, list[Met]]:
    """The positions [B] after one token, and which sequences meet a boundary of each clock.

    Positions are read on the CPU alone: elsewhere that would wait for the device.
    """
    after = position + 1 if mask is None else position + mask
    if mask is None and position.device.type == "cpu" and not torch.compiler.is_compiling():
        seen = after.tolist()
        met = {clock: [place % clock == 0 for place in seen] for clock in clocks}
        met = {clock: True if all(m) else torch.tensor(m) if any(m) else False for clock, m in met.items()}
        return (after if max(seen) < period else after % period), [met[clock] for clock in clocks]
    met = [after % clock == 0 for clock in clocks]
    return after % period, met if mask is None else [m & mask for m in met]


def _refreshed(
    read: Met, others: Met, running: Weights, snapshot: Weights, layout: Layout, inplace: bool
) -> Weights:
    """The snapshot after a token, with the boundaries met by both clocks; written into it if ``inplace``."""
    if isinstance(read, bool) and read is others:
        if not (read and inplace):
            return running if read else snapshot
        return map_tensors(torch.Tensor.copy_, snapshot, running)
    like = next(x for x in snapshot if x is not None)
    read, others = (torch.as_tensor(x, device=like.device).expand(len(like)) for x in (read, others))
    # By memory, for what a layer has of: all, projections, gates.
    met = torch.stack([others, others, read, others, others] if layout.self_made else [read], 1)[:, None]
    parts = (met, met[..., :3], met[..., 3:]) if layout.self_made else (met, met)

    def layer(met: torch.Tensor, new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
        if new is None:
            return None
        new = torch.where(met.view(met.shape + (1,) * (new.ndim - 3)), new, old)
        return old.copy_(new) if inplace else new

    return type(snapshot)(*map(layer, parts, running, snapshot))
