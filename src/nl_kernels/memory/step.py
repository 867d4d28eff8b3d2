"""One token of a chunked memory for decoding on the CPU: no chunk, no gradient, few operations.

At one token the time is that of calls, not of arithmetic. Layers have N = sequences × heads first, then the m
memories of a bank, as in a state: [N, out, in] or [N, m, out, in]. Tokens are rows [.., 1, width]: their
product with ``W.mT`` is several times as fast as that of ``W`` with a column.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from nl_kernels.memory.bank import Met, Request
from nl_kernels.memory.hidden import row_dot
from nl_kernels.memory.state import map_tensors
from nl_kernels.memory_checks import per_sequence, zero_padding
from nl_kernels.memory_rule import MemoryRule, inverse_norm, l2_normalize

Weights = TypeVar("Weights", bound=tuple)

ACTIVATIONS = {
    "silu": (torch.nn.functional.silu, torch.ops.aten.silu_backward.default),
    "gelu": (torch.nn.functional.gelu, torch.ops.aten.gelu_backward.default),
}


def step_token(request: Request, inplace: bool) -> tuple[torch.Tensor, tuple]:
    """Reads [B, H, Dv] of one token in the dtype of the state, and the state after it.

    Args:
        request: tensors [B, H, ..], mask [B]; weights are unused by a rule that is not anchored.
        inplace: write into the state's tensors, which are contiguous and share no memory; otherwise they
            stay as they are, and the new state may share those that did not change.
    """
    rule, mask, clocks, anchor = request.rule, request.mask, request.clocks, request.weights
    snapshot, running, position, velocity = state = request.state
    tokens, self_made = request.tensors, bool(request.gates)
    batch, heads, _ = tokens[0].shape
    changes = [x for x in snapshot if x is not None]
    linear, dtype = len(changes) < len(snapshot), changes[0].dtype
    if mask is not None:
        tokens = [None if x is None else zero_padding(x, mask) for x in tokens]
    *tokens, momentum = (x if x is None or x.dtype == dtype else x.to(dtype) for x in tokens)
    source = _self_made if self_made else _given
    pairs, query, o, rate, decay = source(request, tokens, changes, linear)

    momentum, applied = None if momentum is None else momentum.reshape(-1, 1, 1), None
    if mask is not None:
        applied = mask.repeat_interleave(heads).to(dtype)[:, None, None]
        rate, decay = rate * applied, decay.where(applied != 0, 1)
        momentum = None if momentum is None else momentum.where(applied != 0, 1)
    share = rule.share(momentum)
    scales = (rate, rate if share is None else rate * share, decay, momentum, applied)
    after = []
    for part, moving in zip(running, velocity or (None,) * len(running)):
        if part is not None:
            first, pair = linear or len(pairs) == len(changes), pairs.pop(0)
            part, moving = _written(part, moving, pair, scales, rule, rule.erases(first), inplace)
        after.append((part, moving))
    running, moving = (type(running)(*x) for x in zip(*after))
    velocity = None if velocity is None else moving

    if request.read == "running":
        layers = [x for x in running if x is not None][: 1 if linear else 2]
        layers = [x.select(2, 2) for x in layers] if self_made else layers
        if rule.anchored:
            layers = [x + w for x, w in zip(layers, anchor.memory if self_made else anchor)]
        o = torch.bmm(query, layers[0].flatten(0, 1).mT)
        if not linear:
            o = torch.bmm(_hidden(o, rule)[0], layers[1].flatten(0, 1).mT)
    if rule.residual:
        o = o + query
    place, met = advance(position, mask, max(clocks), clocks)
    snapshot = _refreshed(*met, running, snapshot, self_made, inplace)
    position = position.copy_(place) if inplace else place
    return o.view(batch, heads, -1), type(state)(snapshot, running, position, velocity)


def _given(request: Request, tokens: list, changes: list, linear: bool):
    """Of a memory with given targets: by layer, what it takes in and its error signal ([N, 1, ·], or
    [N, m, 1, ·] of memories apart); queries, what is read of them at the snapshot, η and α [N, 1, ·]."""
    rule, weights, (batch, heads, _) = request.rule, request.weights, tokens[0].shape
    query, k, v, rate, log_decay = (x.reshape(batch * heads, 1, -1) for x in tokens)
    reads, o, at_anchor = request.read == "snapshot", None, rule.errs_at_anchor(linear)
    if rule.anchored and (reads or not at_anchor):
        changes = [w + x for w, x in zip(weights, changes)]
    base = [x.flatten(0, 1) for x in changes]
    if linear:
        first = per_sequence(weights.inner, batch, k.dtype).flatten(0, 1) if at_anchor else base[0]
        error, o = torch.bmm(k, first.mT), torch.bmm(query, base[0].mT) if reads else None
    else:
        z = torch.bmm(torch.cat([k, query], 1) if reads else k, base[0].mT)
        hidden, scale = _hidden(z, rule)
        error = torch.bmm(hidden, base[1].mT)
        if reads:
            error, o = error.split(1, 1)
            z, hidden, scale = (None if x is None else x.narrow(1, 0, 1) for x in (z, hidden, scale))
    error.sub_(v)
    error = _bounded(error.add_(k) if rule.residual else error, rule.error_bound)
    pairs = [(k, error)]
    if not linear:
        pairs = [(k, _signal(rule, torch.bmm(error, base[1]), hidden, scale, z)), (hidden, error)]
    return pairs, query, o, rate, log_decay.exp()


def _self_made(request: Request, tokens: list, changes: list, linear: bool):
    """As :func:`_given`, of five memories that make their tokens and targets."""
    rule, (query, key, value, gate, scale) = request.rule, tokens
    batch, heads, width = query.shape
    count, query = batch * heads, l2_normalize(query)
    *first, last, own = _base(request, changes)
    lasts, (x, narrow) = last.flatten(0, 1), ([key, value, query], gate.reshape(count, 1, width))
    x = torch.stack(x if linear else [*x, gate, gate], 2).view(count, -1, width)
    wide = x
    if first:
        z = torch.bmm(x.view(5 * count, 1, width), first[0].flatten(0, 1).mT).view(count, 5, -1)
        wide, narrow = _hidden(z, rule)[0].split_with_sizes((3, 2), 1)
    made = torch.bmm(wide.reshape(3 * count, 1, -1), lasts.mT).view(count, 3, width)
    made.narrow(1, 0, 2).add_(x.narrow(1, 0, 2))
    k, v, o = made.split(1, 1)
    k, (rate, retention) = l2_normalize(k), row_dot(own, narrow).view(batch, heads, 2).unbind(2)
    gates = (x.to(k.dtype) if isinstance(x, torch.Tensor) else x for x in request.gates.values())
    rate_max, rate_bias, retention_bias = gates
    rate, decay = (rate + rate_bias).sigmoid_(), (retention + retention_bias).sigmoid_()
    rate.mul_((1 + decay).clamp_(max=rate_max))
    query, rate, decay = query.view(count, 1, -1), rate.view(count, 1, 1), decay.view(count, 1, 1)

    if linear:  # f(k) − f(v) is f(k − v)
        errors = [torch.bmm(k - v, w.mT) for w in (last.flatten(1, 2), own)]
        if rule.errs_at_anchor(True):  # there what the changes make of keys is no part of them
            for error, change in zip(errors, changes):
                error.baddbmm_(k, change.reshape(count, -1, width).mT, alpha=-1)
        error, gates = errors[0].view(count, 3, width), errors[1]
    else:
        z = torch.bmm(torch.cat([k, v], 1), first[0].flatten(1, 2).mT).view(count, 2, 5, -1)
        hidden, length = _hidden(z, rule)
        keys, values = hidden.unbind(1)
        error, gates = (keys - values).split_with_sizes((3, 2), 1)
        error = torch.bmm(error.reshape(3 * count, 1, -1), lasts.mT).view(count, 3, width)
        gates = row_dot(own, gates)
    error.sub_(v).narrow(1, 0, 2 + rule.residual).add_(k)
    error, bound = _bounded(error, rule.error_bound), rule.error_bound
    gates = gates if bound is None else gates.clamp_(-bound, bound)  # their length is their absolute value
    if scale is not None:
        error.narrow(1, 2, 1).mul_(scale.reshape(count, 1, 1))
    if linear:
        return [(k, error.view(count, 1, -1)), (k, gates)], query, o, rate, decay
    back = torch.bmm(error.view(3 * count, 1, width), lasts).view(count, 3, -1)
    back, length = torch.cat([back, gates * own], 1), None if length is None else length.select(1, 0)
    signal = _signal(rule, back, keys, length, z.select(1, 0)).view(count, 1, -1)
    wide, narrow = keys.unsqueeze(2).split_with_sizes((3, 2), 1)
    pairs = [(k, signal), (wide, error.unsqueeze(2)), (narrow, gates.unsqueeze(2))]
    return pairs, query, o, rate, decay


def _base(request: Request, changes: list) -> list[torch.Tensor]:
    """The weights at the snapshot of five memories."""
    weights, (batch, dtype) = request.weights, (len(changes[0]), changes[0].dtype)
    if not request.rule.anchored:
        return [x.flatten(0, 1) for x in changes]
    if len({memory.inner.ndim for memory in weights}) > 1:  # some are by sequence, some shared
        weights = map_tensors(lambda w: per_sequence(w, batch, dtype), weights)
    *firsts, lasts = (layers for layers in zip(*weights) if layers[0] is not None)
    anchors = [*(torch.stack(x, -3) for x in (*firsts, lasts[:3])), torch.cat(lasts[3:], -2)]
    anchors = [w if w.ndim == x.ndim else w.unsqueeze(0) for w, x in zip(anchors, changes)]
    if anchors[-1].shape == changes[-1].shape and anchors[-1].dtype == dtype:
        return [w.add_(x).flatten(0, 1) for w, x in zip(anchors, changes)]  # new memory costs most
    return [(w + x).flatten(0, 1) for w, x in zip(anchors, changes)]


def _hidden(z: torch.Tensor, rule: MemoryRule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """n(σ(z)) and 1/‖σ(z)‖, or ``None`` when it is not normalised."""
    value = ACTIVATIONS[rule.activation][0](z)
    scale = inverse_norm(value) if rule.normalize_hidden else None
    return value if scale is None else value.mul_(scale), scale


def _signal(rule, back, hidden, scale, z) -> torch.Tensor:
    """The error signal at z, bounded, from ``back``, the one at ``hidden``, n(σ(z))."""
    if scale is not None:
        back = torch.addcmul(back, hidden, row_dot(hidden, back), value=-1).mul_(scale)
    return _bounded(ACTIVATIONS[rule.activation][1](back, z), rule.error_bound)


def _bounded(x: torch.Tensor, bound: float | None) -> torch.Tensor:
    """``x``, overwritten, scaled down to length ``bound`` where it is longer."""
    if bound is None:
        return x
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=bound)
    return x.div_(length if bound == 1 else length.div_(bound))


def _written(state, velocity, pair, scales, rule, erases, inplace):
    """``U ← μU − sη δxᵀ``, ``S ← αS − η (Sx)xᵀ + U`` [B, H, .., out, in], both after the token.

    ``pair``: x and δ. ``scales``: η, sη (s = 1 − μ where the rule averages writes), α, μ and whether there is
    a token, 1 or 0, each [N, 1, 1] or ``None``. ``inplace``: into S and U; otherwise the results are new.
    """
    (x, signal), shape = pair, state.shape
    old, velocity = (w if w is None else w.reshape(*x.shape[:-2], -1, x.shape[-1]) for w in (state, velocity))
    if x.ndim > 3:
        scales = [w if w is None else w.unsqueeze(1) for w in scales]
    rate, write_rate, decay, momentum, applied = scales
    erased = None
    if erases:
        if rule.proximal:
            part = 1 / (1 + rate * row_dot(x, x))
            rate, write_rate = rate * part, write_rate * part
        rows, columns = x.flatten(0, -3), old.flatten(0, -3).mT
        if velocity is None:  # what is erased and what is written are one product
            signal = torch.baddbmm(signal.flatten(0, -3), rows, columns).view(signal.shape)
        else:
            erased = torch.bmm(rows, columns).view(signal.shape)
    target = after = old.mul_(decay) if inplace else old * decay
    if velocity is not None:
        target = velocity = velocity.mul_(momentum) if inplace else velocity * momentum
    target.addcmul_((signal * write_rate).mT, x, value=-1)
    if erased is not None:
        after.addcmul_(erased.mul_(rate).mT, x, value=-1)
    if velocity is not None:
        # An empty place must not add U again.
        after.add_(velocity) if applied is None else after.addcmul_(velocity, applied)
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
    read: Met, others: Met, running: Weights, snapshot: Weights, self_made: bool, inplace: bool
) -> Weights:
    """The snapshot after a token, with the boundaries met by both clocks; written into it if ``inplace``."""
    if isinstance(read, bool) and read is others:
        if not (read and inplace):
            return running if read else snapshot
        return map_tensors(torch.Tensor.copy_, snapshot, running)
    like = next(x for x in snapshot if x is not None)
    read, others = (torch.as_tensor(x, device=like.device).expand(len(like)) for x in (read, others))
    # By memory, for what a layer has of: all, projections, gates.
    met = torch.stack([others, others, read, others, others] if self_made else [read], 1)[:, None]
    parts = (met, met[..., :3], met[..., 3:]) if self_made else (met, met)

    def layer(met: torch.Tensor, new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
        if new is None:
            return None
        new = torch.where(met.view(met.shape + (1,) * (new.ndim - 3)), new, old)
        return old.copy_(new) if inplace else new

    return type(snapshot)(*map(layer, parts, running, snapshot))
