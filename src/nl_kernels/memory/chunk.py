"""A bank of memories learns one chunk of tokens and is read.

``prepare`` has what depends on tokens alone and takes several chunks at once; ``learn`` is one chunk. Shapes
as in :mod:`nl_kernels.memory.bank`; N = sequences × heads, c tokens in a chunk.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from nl_kernels.memory.bank import Layers, Layout
from nl_kernels.memory.decays import Coefficients, Spread, chunk_coefficients
from nl_kernels.memory.hidden import Activated, Signal, activated, error_signal, length_factor
from nl_kernels.memory.layer import (
    Erase,
    LayerInput,
    Read,
    Write,
    erase_matrices,
    proximal_rate,
    read,
    write,
)
from nl_kernels.memory.state import map_tensors
from nl_kernels.memory_rule import MemoryRule


class Tokens(NamedTuple):
    """What the tokens of a chunk say: [N, c, ·], or [N, n, c, ·] of n chunks; ``None`` where there is none.

    Attributes:
        query, k: [.., c, D]. v: [.., c, Dv], the targets, or what self-made ones are made of.
        rate, log_decay, momentum: [.., c, 1].
        applied: [.., c, 1], 0 in places that hold no token.
        scale: [.., c, 1], of the errors of the memory that is read; linear memories that make their targets.
    """

    query: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rate: torch.Tensor
    log_decay: torch.Tensor
    momentum: torch.Tensor | None
    applied: torch.Tensor | None
    scale: torch.Tensor | None = None


class Prepared(NamedTuple):
    """What depends on no state: [N, c, ·], or [N, n, c, ·] of n chunks.

    ``rate`` is η as given, ``first_rate`` that of layers which take in the keys; ``gram`` and ``erase`` are
    theirs. ``share``: what momentum leaves of a write.
    """

    coefficients: Coefficients
    rate: torch.Tensor
    first_rate: torch.Tensor
    gram: torch.Tensor | None
    erase: Erase | None
    share: torch.Tensor | None


def prepare(rule: MemoryRule, tokens: Tokens) -> Prepared:
    """What depends on tokens alone, of one chunk or of several."""
    k, (rate, log_decay, momentum, applied) = tokens.k, tokens[3:7]
    if applied is not None:  # places that hold no token retain all
        rate, log_decay = rate * applied, log_decay.masked_fill(applied == 0, 0)
        momentum = None if momentum is None else momentum.where(applied != 0, 1)
    flat = (None if x is None else x[..., 0] for x in (log_decay, momentum, applied))
    coefficients = chunk_coefficients(*flat)
    first_rate, gram, erase = rate, None, None
    if rule.erases(True):
        first_rate = proximal_rate(rate, k) if rule.proximal else rate
        gram = k @ k.mT
        erased = gram if momentum is None else gram.clone()
        erase = erase_matrices(erased, first_rate, coefficients.decay.strict)
    gram = None if momentum is None else gram
    return Prepared(coefficients, rate, first_rate, gram, erase, rule.share(momentum))


class Errors(NamedTuple):
    """What :func:`errors_of` made, and its adjoint needs.

    Attributes:
        x: what the first layers are applied to (:meth:`BankRule.inputs`); of linear ones that make their
            targets at the same weights the difference of keys and values.
        hidden, keys: the hidden layers there, and at the keys alone.
        features: what the last layers made the errors, and reads at the snapshot, of [.., c or 2c, in].
        errors: by last layer; ``factor`` scaled them to their bound, then the tokens' scale multiplied those
            of the memory that is read, which were ``unscaled``.
        signal: of the hidden layers.
    """

    x: torch.Tensor
    hidden: Activated | None
    keys: Activated | None
    features: torch.Tensor
    errors: list[torch.Tensor]
    unscaled: torch.Tensor | None
    factor: torch.Tensor | None
    signal: Signal | None


class Learned(NamedTuple):
    """What :func:`learn` computed and its adjoint needs.

    Attributes:
        layers, writes: by layer, what it took in and wrote.
        probe: the hidden layer of the read.
        reads: by layer, of running reads.
    """

    made: Errors
    layers: list[LayerInput]
    writes: tuple[Write, ...]
    probe: Activated | None
    reads: list[Read]


@dataclasses.dataclass(frozen=True)
class BankRule:
    """How the memories of a bank are applied, written and read."""

    rule: MemoryRule
    read: str
    layout: Layout

    @property
    def residuals(self) -> int:
        """The number of the projections that add their input; they come first."""
        return self.layout.projections - (not self.rule.residual)

    @property
    def reads_inputs(self) -> bool:
        """Whether reads are at the snapshot and go through the same products as the keys."""
        return self.read == "snapshot" and not self.layout.self_made

    def inputs(self, tokens: Tokens) -> torch.Tensor:
        """What the first layers are applied to at the snapshot: keys, then values or queries, if any."""
        if self.layout.self_made:
            return self.layout.each(torch.cat([tokens.k, tokens.v], 1))
        return torch.cat([tokens.k, tokens.query], 1) if self.reads_inputs else tokens.k

    @property
    def subtracts_first(self) -> bool:
        """Whether errors are made of the difference of keys and values: f(k) − f(v) at the same weights."""
        return self.layout.self_made and not self.errs_at_anchor

    @property
    def errs_at_anchor(self) -> bool:
        """Whether errors at keys are taken at the anchor."""
        return self.rule.errs_at_anchor(self.layout.linear)


class Weights(NamedTuple):
    """What a chunk meets.

    Attributes:
        base: the snapshot's weights, with the anchor.
        running, velocity: before the chunk; ``velocity`` is absent without momentum.
        anchor: absent for a rule that is not anchored.
    """

    base: Layers
    running: Layers
    velocity: Layers
    anchor: Layers


def learn(
    bank: BankRule, tokens: Tokens, prepared: Prepared, weights: Weights, keep: bool
) -> tuple[torch.Tensor, Layers, Layers, Learned | None]:
    """Reads [N, c, Dv], weights and velocities after a chunk, and with ``keep`` what the adjoint needs."""
    rule, layout = bank.rule, bank.layout
    base, running, velocity, anchor = weights
    made, others = errors_of(bank, tokens, base, anchor, keep)
    layers = _layer_inputs(bank, tokens, prepared, made)
    velocities = velocity or (None,) * len(layers)
    after, velocity_after, writes = zip(*map(write, running, velocities, layers))
    if bank.reads_inputs:
        o, probe, reads = others[0], None, []
    elif bank.read == "running":
        parts = read_layers(bank, weights, layers, writes)
        o, probe, reads = _running_read(bank, tokens.query, parts, prepared.coefficients, keep)
    else:
        o, probe, reads = tokens.query, None, []
        for i, layer in enumerate(base[: layout.read_layers]):
            if i == 1:
                probe = activated(o, rule, sloped=keep, curved=False)
                o = probe.value
            o = torch.bmm(o, layout.read_weights(layer).mT)
    if rule.residual:
        o = o + tokens.query
    learned = Learned(made, layers, writes, probe, reads) if keep else None
    return o, after, velocity_after if velocity else (), learned


def errors_of(
    bank: BankRule, tokens: Tokens, base: Layers, anchor: Layers, keep: bool
) -> tuple[Errors, list[torch.Tensor]]:
    """Errors at the snapshot and what of them reaches the hidden layers; outputs at values or queries."""
    rule, layout = bank.rule, bank.layout
    k, v, size = tokens.k, tokens.v, tokens.k.shape[1]
    hidden = signal = None
    if layout.linear and bank.subtracts_first:
        x = features = k - v
    else:
        x = features = bank.inputs(tokens)
    if not layout.linear:
        curved = keep and (layout.self_made or slice(size))  # where the adjoint needs the curvature
        hidden = activated(torch.bmm(x, base[0].mT), rule, curved=curved)
        features = hidden.value
        if bank.subtracts_first:
            features = features[:, :size] - features[:, size:]
    lasts = layout.lasts(base)
    if bank.errs_at_anchor:
        errors = [torch.bmm(k, anchor[0].mT)]
        others = [torch.bmm(features[:, size:], base[0].mT)]
        if layout.self_made:
            errors[0] -= others[0]
    else:
        errors, others = [torch.bmm(part, w.mT) for part, w in zip(layout.split(features), lasts)], []
        if features.shape[1] > size:
            errors, others = ([y[:, rows] for y in errors] for rows in (slice(size), slice(size, None)))
    factor, unscaled = _finish_errors(bank, errors, k, v), None
    if tokens.scale is not None:
        scaled = layout.read_outputs(errors[0])
        unscaled = scaled.clone() if keep else None
        scaled *= tokens.scale
    keys = None if hidden is None else hidden.rows(slice(size))
    if hidden is not None:
        signal = error_signal(back(errors, lasts), keys, rule)
    return Errors(x, hidden, keys, features, errors, unscaled, factor, signal), others


def _finish_errors(bank: BankRule, errors: list[torch.Tensor], k, v) -> torch.Tensor | None:
    """Targets, residuals and bound, in place; what scaled the errors of projections."""
    by_projection, gates = bank.layout.by_projection(errors), bank.layout.gates(errors)
    by_projection -= v  # given targets, or of self-made ones v in v + f(v)
    if bank.residuals:
        by_projection[: bank.residuals].add_(k)
    bound = bank.rule.error_bound
    factor = length_factor(by_projection, bound)
    if factor is not None:
        by_projection *= factor
        if gates is not None:
            gates.clamp_(-bound, bound)  # the length of one number is its absolute value
    return factor


def back(errors: list[torch.Tensor], lasts: Layers) -> torch.Tensor:
    """Errors [.., c, out] through the last layers, for all memories [M · N, c, h]."""
    parts = [e * w if w.shape[1] == 1 else torch.bmm(e, w) for e, w in zip(errors, lasts)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _layer_inputs(bank: BankRule, tokens: Tokens, prepared: Prepared, made: Errors) -> list[LayerInput]:
    """What each layer of the bank takes in, for :func:`~nl_kernels.memory.layer.write`."""
    rule, layout = bank.rule, bank.layout
    if layout.linear:
        coefficients, rate, share = prepared.coefficients, prepared.first_rate, prepared.share
        erase = prepared.erase
        return [LayerInput(tokens.k, made.errors[0], rate, coefficients, erase, prepared.gram, share)]
    each, keys = layout.each, made.keys.value
    coefficients = prepared.coefficients
    if layout.memories > 1:
        coefficients = _each_coefficients(layout, coefficients)
    share = None if prepared.share is None else each(prepared.share)
    gram = None if prepared.gram is None else each(prepared.gram)
    erase = None if prepared.erase is None else Erase(*map(each, prepared.erase))
    rate = each(prepared.rate)
    first_rate = rate if prepared.first_rate is prepared.rate else each(prepared.first_rate)
    x = made.x[:, : keys.shape[1]]
    first = LayerInput(x, made.signal.value, first_rate, coefficients, erase, gram, share)

    gram = erase = None
    if rule.erases(False):
        rate = proximal_rate(rate, keys) if rule.proximal else rate
        gram = torch.bmm(keys, keys.mT)
        erased = gram if tokens.momentum is None else gram.clone()
        erase = erase_matrices(erased, rate, each(prepared.coefficients.decay.strict))
        gram = None if tokens.momentum is None else gram
    whole = LayerInput(keys, None, rate, coefficients, erase, gram, share)
    return [first, *(part._replace(signal=e) for part, e in zip(_by_last_layer(whole, layout), made.errors))]


def _each_coefficients(layout: Layout, coefficients: Coefficients) -> Coefficients:
    """For every memory; without momentum only the parts with one value a token, which alone are used."""
    if coefficients.mixed is not None:
        return map_tensors(layout.each, coefficients)
    decay = coefficients.decay
    once = {"before": decay.before, "to_end": decay.to_end, "final": decay.final}
    return Coefficients(
        Spread(*(layout.each(once[name]) if name in once else None for name in Spread._fields)), None, None
    )


def _by_last_layer(value, layout: Layout) -> list:
    """Nested tuples of tensors, of all memories along the batch, by last layer."""
    if value is None or isinstance(value, torch.Tensor):
        return [None] * (1 + layout.self_made) if value is None else layout.split(value)
    return [type(value)(*parts) for parts in zip(*(_by_last_layer(part, layout) for part in value))]


def read_layers(bank: BankRule, weights: Weights, layers, writes) -> list[tuple]:
    """By layer of the memory that is read, what :func:`~nl_kernels.memory.layer.read` takes of it."""
    layout = bank.layout
    found = []
    for i in range(layout.read_layers):
        read = (layout.read_weights(each[i]) if each else None for each in weights[1:])
        found.append((*read, layout.read_inputs(layers[i].x), *map(layout.read_outputs, writes[i][:2])))
    return found


def _running_read(bank: BankRule, query, parts: list[tuple], coefficients: Coefficients, keep: bool):
    """Reads after each token, layer by layer."""
    y, probe, reads = query, None, []
    for i, layer in enumerate(parts):
        if i == 1:
            probe = activated(y, bank.rule, sloped=keep, curved=False)
            y = probe.value
        y, done = read(y, layer, coefficients)
        reads.append(done)
    return y, probe, reads
