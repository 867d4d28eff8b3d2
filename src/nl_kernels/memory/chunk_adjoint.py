"""The adjoint of a chunk: of ``learn`` and ``prepare`` in :mod:`nl_kernels.memory.chunk`.

An adjoint is called ``d_…``; shapes as there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from nl_kernels.memory.bank import Layers, Layout
from nl_kernels.memory.chunk import BankRule, Errors, Learned, Prepared, Tokens, Weights, back, read_layers
from nl_kernels.memory.decays import CoefficientAdjoints, coefficient_adjoint
from nl_kernels.memory.hidden import bound_adjoint, hidden_adjoint, row_dot, signal_adjoint
from nl_kernels.memory.layer import (
    ReadAdjoint,
    WriteAdjoint,
    gram_adjoint,
    proximal_adjoint,
    read_adjoint,
    write_adjoint,
)
from nl_kernels.memory_rule import MemoryRule


class TokenAdjoints(NamedTuple):
    """Adjoints that end at a chunk's tokens, summed over memories and layers.

    ``first_rate``, ``gram`` and ``mixed_gram`` are of the layers that take in the keys; ``rate`` of the
    others.
    """

    query: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    rate: torch.Tensor | None
    first_rate: torch.Tensor
    momentum: torch.Tensor | None
    gram: torch.Tensor | None
    mixed_gram: torch.Tensor | None
    coefficients: CoefficientAdjoints
    scale: torch.Tensor | None


def prepare_adjoint(rule: MemoryRule, tokens: Tokens, prepared: Prepared, found: TokenAdjoints) -> Tokens:
    """The adjoints of the tokens, from what :func:`learn_adjoint` found in each chunk."""
    k, momentum, applied = tokens.k, tokens.momentum, tokens.applied
    d_k, d_rate = found.k, found.first_rate
    if prepared.erase is not None:
        d_gram = found.gram * prepared.coefficients.decay.strict
        if found.mixed_gram is not None:
            d_gram.addcmul_(found.mixed_gram, prepared.coefficients.mixed.strict)
        d_k = d_k + gram_adjoint(d_gram, k)
        if rule.proximal:
            d_rate, extra = proximal_adjoint(d_rate, prepared.rate, k, prepared.first_rate)
            d_k += extra
    if found.rate is not None:
        d_rate = d_rate + found.rate
    if applied is not None and momentum is not None:
        momentum = momentum.where(applied != 0, 1)
    d_decay, d_momentum = coefficient_adjoint(
        prepared.coefficients,
        None if momentum is None else momentum[..., 0],
        None if applied is None else applied[..., 0],
        found.coefficients,
    )
    d_decay = d_decay[..., None]
    if momentum is not None:
        d_momentum = d_momentum[..., None]
        if found.momentum is not None:
            d_momentum = d_momentum + found.momentum
    gates = [d_rate, d_decay, d_momentum]
    if applied is not None:
        gates = [None if x is None else x.masked_fill(applied == 0, 0) for x in gates]
    return Tokens(found.query, d_k, found.v, *gates, None, found.scale)


class ChunkAdjoint(NamedTuple):
    """What :func:`learn_adjoint` gives.

    ``read_anchor``: by layer, of the anchor of the memory that is read, from running reads;
    ``error_anchor``: of linear memories' anchor, from errors there. The rest of it is that of ``base``.
    """

    tokens: TokenAdjoints
    running: Layers
    velocity: Layers
    base: Layers
    read_anchor: list[torch.Tensor]
    error_anchor: torch.Tensor | None


def learn_adjoint(
    bank: BankRule,
    tokens: Tokens,
    prepared: Prepared,
    weights: Weights,
    learned: Learned,
    d_o: torch.Tensor | None,
    d_after: Layers,
    d_velocity: Layers,
) -> ChunkAdjoint:
    """Adjoints of a chunk's arguments from those of its reads and of weights and velocities after it."""
    rule, layout, count = bank.rule, bank.layout, len(learned.layers)
    base, running, velocity, anchor = weights
    reads: list[ReadAdjoint] = []
    if d_o is not None and bank.read == "running":
        d_y, parts = d_o, read_layers(bank, weights, learned.layers, learned.writes)
        for i in reversed(range(len(parts))):
            reads.insert(0, read_adjoint(d_y, parts[i], prepared.coefficients, learned.reads[i]))
            d_y = hidden_adjoint(reads[0].queries, learned.probe) if i == 1 else None
    none = [None] * count
    by_reads = [*((part.decaying, part.written) for part in reads), *none][:count]
    parts = (d_after, d_velocity or none, by_reads, running, velocity or none, learned.layers, learned.writes)
    writes = [write_adjoint(*x, layout.read_outputs) for x in zip(*parts)]
    for part, found in zip(reads, writes):
        layout.read_inputs(found.x).add_(part.x)
        layout.read_weights(found.state).add_(part.state)
        if part.velocity is not None:
            layout.read_weights(found.velocity).add_(part.velocity)

    d_rate, d_keys = (
        (None, None) if layout.linear else _hidden_inputs_adjoint(bank, prepared, learned, writes)
    )
    d_scale = None
    if tokens.scale is not None:
        errors, d_errors = (layout.read_outputs(x) for x in (learned.made.errors[0], writes[0].signal))
        d_scale = row_dot(d_errors, learned.made.unscaled)
        d_errors *= tokens.scale
        errors.copy_(learned.made.unscaled)
    d_k, d_v, d_query, d_base, d_anchor = _errors_adjoint(
        bank, base, anchor, learned.made, writes, d_keys, d_o
    )
    if reads:
        d_query = reads[0].queries
    elif d_o is not None and not bank.reads_inputs:
        d_query = _snapshot_read_adjoint(bank, tokens.query, base, learned, d_o, d_base)
    if rule.residual and d_o is not None:
        d_query = d_query + d_o
    first = writes[0]
    adjoints = TokenAdjoints(
        d_query,
        d_k,
        d_v,
        d_rate,
        layout.total(first.rate),
        _sum([layout.total(part.momentum) for part in writes]),
        layout.total(first.gram),
        layout.total(first.mixed_gram),
        _sum_coefficients(layout, [part.coefficients for part in (*writes, *reads)]),
        d_scale,
    )
    return ChunkAdjoint(
        adjoints,
        tuple(part.state for part in writes),
        tuple(part.velocity for part in writes) if velocity else (),
        d_base,
        [part.anchor for part in reads if part.anchor is not None],
        d_anchor,
    )


def _snapshot_read_adjoint(bank: BankRule, query, base: Layers, learned: Learned, d_y, d_base: Layers):
    """The adjoint of the queries; adds to ``d_base``."""
    for i in reversed(range(bank.layout.read_layers)):
        weights, into = (bank.layout.read_weights(each[i]) for each in (base, d_base))
        into += torch.bmm(d_y.mT, query if i == 0 else learned.probe.value)
        d_y = torch.bmm(d_y, weights)
        if i == 1:
            d_y = hidden_adjoint(d_y, learned.probe)
    return d_y


def _hidden_inputs_adjoint(bank: BankRule, prepared: Prepared, learned: Learned, writes: list[WriteAdjoint]):
    """Adjoints of what the last layers take in: the rate as given [N, c, 1], and hidden layers of keys."""
    rule, layout = bank.rule, bank.layout
    d_keys, d_rates = [], []
    for layer, part in zip(learned.layers[1:], writes[1:]):
        d_x, d_rate = part.x, part.rate
        if part.gram is not None:
            d_gram = part.gram * _for_layers(layout, prepared.coefficients.decay.strict, part.gram)
            if part.mixed_gram is not None:
                mixed = prepared.coefficients.mixed.strict
                d_gram.addcmul_(part.mixed_gram, _for_layers(layout, mixed, part.gram))
            d_x += gram_adjoint(d_gram, layer.x)
            if rule.proximal:
                given = prepared.rate.repeat(len(d_rate) // layout.banks, 1, 1)
                d_rate, extra = proximal_adjoint(d_rate, given, layer.x, layer.rate)
                d_x += extra
        d_keys.append(d_x)
        d_rates.append(layout.total(d_rate))
    return _sum(d_rates), d_keys[0] if len(d_keys) == 1 else torch.cat(d_keys)


def _for_layers(layout: Layout, strict: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, c, c] for the layers of ``like``."""
    return strict if len(like) == layout.banks else torch.cat([strict] * (len(like) // layout.banks))


def _errors_adjoint(
    bank: BankRule, base: Layers, anchor: Layers, made: Errors, writes: list[WriteAdjoint], d_keys, d_o
):
    """Adjoints of k, v, of queries that went with the keys, of the snapshot, and of the anchor from errors.

    ``d_keys``: of the keys' hidden layers from the writes.
    """
    rule, layout, hidden = bank.rule, bank.layout, made.hidden
    size = writes[0].x.shape[1]
    d_errors = [part.signal for part in (writes if layout.linear else writes[1:])]
    lasts, d_lasts, radial, d_slope = layout.lasts(base), [], None, None
    if hidden is not None:
        d_back, d_value, d_slope, radial = signal_adjoint(writes[0].signal, made.signal, made.keys, rule)
        if d_value is not None:
            d_keys += d_value
        for part, d_error, error, w in zip(layout.split(d_back), d_errors, made.errors, lasts):
            d_error.baddbmm_(part, w.mT)
            d_lasts.append(torch.bmm(error.mT, part))
    _unbound_errors(bank, d_errors, made)
    features, d_outputs, d_anchor = layout.split(made.features), d_errors, None
    d_reads = torch.zeros_like(d_errors[0]) if d_o is None and bank.reads_inputs else d_o
    if bank.errs_at_anchor:
        (d_error,), (x,) = d_errors, features
        d_anchor = torch.bmm(d_error.mT, x[:, :size])
        d_others = d_reads if bank.reads_inputs else d_error.neg() if layout.self_made else d_error[:, :0]
        features, d_outputs = (x[:, size:],), [d_others]
        d_features = torch.cat([torch.bmm(d_error, anchor[0]), torch.bmm(d_others, base[0])], 1)
    else:
        if bank.reads_inputs:
            d_outputs = [torch.cat([d_errors[0], d_reads], 1)]
        d_features = back(d_outputs, lasts)
    if hidden is None:
        d_lasts = [torch.bmm(d.mT, x) for d, x in zip(d_outputs, features)]
    else:
        d_lasts = [total.baddbmm_(d.mT, x) for total, d, x in zip(d_lasts, d_outputs, features)]

    d_first = ()
    if hidden is None:
        d_x, d_more = d_features, d_features.neg() if bank.subtracts_first else d_features[:, size:]
    else:
        d_hidden = torch.cat([d_features, d_features.neg()], 1) if layout.self_made else d_features
        d_hidden[:, :size] += d_keys
        d_z = hidden_adjoint(d_hidden, hidden, radial)
        d_z[:, :size] += d_slope
        d_first = (torch.bmm(d_z.mT, made.x),)
        d_x = torch.bmm(d_z, base[0])
        d_more = layout.total(d_x[:, size:])
    d_k = layout.total(writes[0].x.add_(d_x[:, :size]))
    d_v, d_query = (d_more, None) if layout.self_made else (None, d_more)

    by_projection = layout.by_projection(d_errors)
    if bank.residuals:
        d_k += by_projection[: bank.residuals].sum(0)
    total = by_projection[0] if layout.projections == 1 else by_projection.sum(0)
    d_v = total.neg() if d_v is None else d_v.sub_(total)
    return d_k, d_v, d_query if bank.reads_inputs else None, (*d_first, *d_lasts), d_anchor


def _unbound_errors(bank: BankRule, d_errors: list[torch.Tensor], made: Errors) -> None:
    """Adjoints of the errors before their bound, in place."""
    if made.factor is None:
        return
    bound = bank.rule.error_bound
    d_projection, projection = map(bank.layout.by_projection, (d_errors, made.errors))
    d_projection.copy_(bound_adjoint(d_projection, projection, made.factor, bound))
    gates = bank.layout.gates(made.errors)
    if gates is not None:
        d_gates = bank.layout.gates(d_errors)
        d_gates.copy_(torch.ops.aten.hardtanh_backward(d_gates, gates, -bound, bound))


def _sum(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return functools.reduce(torch.add, present) if present else None


def _sum_coefficients(layout: Layout, layers: list[CoefficientAdjoints]) -> CoefficientAdjoints:
    """Sums over layers and memories, by name."""
    found = CoefficientAdjoints({}, {}, {})
    for layer in layers:
        for total, parts in zip(found, layer):
            for name, part in parts.items():
                part = layout.total(part)
                total[name] = total[name] + part if name in total else part
    return found
