"""The loop over chunks of a deep memory with its derivative written out.

Rows are N = sequences × heads. Layers are pairs, inner and outer, of which a linear memory has the first
alone. An adjoint is called ``at_…`` or ``grad_…``. Only what the next chunk needs is computed chunk by chunk;
what depends on tokens alone, and the adjoints that end there, are computed for a whole segment at once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.chunk_recompute import Segment, State, chunk_of
from nl_kernels.delta_adjoint import (
    Erase,
    MomentumWrite,
    Read,
    ReadAdjoint,
    VelocityAdjoint,
    Write,
    WriteAdjoint,
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
    Activated,
    Signal,
    activated,
    bound_adjoint,
    error_signal,
    hidden_adjoint,
    length_factor,
    signal_adjoint,
)
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.snapshot import snapshot_adjoint, take_snapshot


def supports(rule: MemoryRule, read: str, momentum: bool) -> bool:
    """Whether derivatives are written out for these options; autograd does the others."""
    return not momentum or (read == "snapshot" and rule.momentum == "sum")


class _Tokens(NamedTuple):
    """What a chunk, or a segment of n, is given: q, k, v [N, c, ·], the others [N, c, 1] or ``None``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rate: torch.Tensor
    log_decay: torch.Tensor
    momentum: torch.Tensor | None
    applied: torch.Tensor | None


class _Prepared(NamedTuple):
    """What depends on no state: decays, the rate, and what the first layer erases with."""

    coefficients: ChunkCoefficients
    given_rate: torch.Tensor
    rate: torch.Tensor  # of the first layer
    gram: torch.Tensor | None
    erase: Erase | None


class _Served(NamedTuple):
    """What a chunk computes at its snapshot."""

    hidden: Activated | None
    error: torch.Tensor
    factor: torch.Tensor | None
    signal: Signal | None


class _Layer(NamedTuple):
    """What a layer takes in over a chunk: its input, δ, and what it erases with; then what it wrote."""

    x: torch.Tensor
    delta: torch.Tensor
    rate: torch.Tensor
    gram: torch.Tensor | None
    erase: Erase | None
    write: Write | MomentumWrite | None = None


class _Made(NamedTuple):
    """What the adjoint of a chunk needs."""

    running: list[torch.Tensor]
    snapshot: list[torch.Tensor]  # empty where it was the running weights
    velocity: list[torch.Tensor]
    served: _Served
    layers: list[_Layer]
    probe: Activated | None  # the hidden layer of running reads
    reads: list[Read]


class _Collected(NamedTuple):
    """Adjoints that end at a segment's tokens, by chunk; summed over layers but for the first one's own."""

    rate: torch.Tensor  # of the rate as given, from later layers
    first_rate: torch.Tensor  # of the first layer's
    gram: torch.Tensor | None
    decays: dict[str, torch.Tensor]
    velocity: VelocityAdjoint | None


@dataclasses.dataclass(frozen=True)
class WrittenChunks:
    """For :func:`~nl_kernels.chunk_recompute.run_with_adjoint`; tensors as in ``rows.py``."""

    rule: MemoryRule
    read: str
    chunk_size: int
    grid: ChunkGrid

    def forward(self, segment: Segment, state: State, constants: State, sequences: State, keep: bool):
        running, velocity, snapshot = (_present(state[i : i + 2]) for i in (0, 2, 4))
        anchor = _present(constants)
        prepared = self._prepare(segment, _Tokens(*sequences))
        outputs, made = [], []
        for i, shared in enumerate(_by_chunk(prepared, segment.chunks)):
            tokens = _Tokens(*chunk_of(sequences, segment, i))
            base = _base(snapshot or running, anchor)
            served, o = self._serve(tokens, base, keep)
            layers = self._layer_inputs(tokens, shared, served)
            layers, after, velocity_after = self._write(layers, running, velocity, shared.coefficients)
            probe, reads = None, []
            if self.read == "running":
                o, probe, reads = self._read(tokens.q, running, anchor, layers, shared.coefficients, keep)
            outputs.append(o + tokens.q if self.rule.residual else o)
            if keep:
                made.append(_Made(running, snapshot, velocity, served, layers, probe, reads))
            met = self._met(segment, i)
            old = snapshot or [None] * len(running)
            snapshot = _present([take_snapshot(met, *x) for x in zip(after, running, old)])
            running, velocity = after, velocity_after
        return (*_pair(running), *_pair(velocity), *_pair(snapshot)), outputs, (prepared, made)

    def backward(
        self,
        segment: Segment,
        made: tuple[_Prepared, list[_Made]],
        constants: State,
        sequences: State,
        grad_state: State,
        grad_output: torch.Tensor | None,
        grad_constants: State,
        grad_sequences: State,
    ) -> State:
        prepared, chunks = made
        shared = _by_chunk(prepared, segment.chunks)
        deep = len(chunks[0].running)
        anchor = _present(constants)
        running, velocity, snapshot = (list(grad_state[i : i + deep]) for i in (0, 2, 4))
        collected = []
        for i in reversed(range(segment.chunks)):
            chunk, tokens = chunks[i], _Tokens(*chunk_of(sequences, segment, i))
            chunks[i] = None
            (grad_o,) = chunk_of((grad_output,), segment, i)
            met = self._met(segment, i)
            running, old = map(list, zip(*(snapshot_adjoint(met, *x) for x in zip(running, snapshot))))
            running = [torch.zeros_like(x) if g is None else g for g, x in zip(running, chunk.running)]
            if chunk.velocity:
                velocity = [torch.zeros_like(x) if g is None else g for g, x in zip(velocity, chunk.velocity)]
            grad_q, grad_k, grad_v, running, velocity, base, at_anchor, found = self._chunk_adjoint(
                tokens, shared[i], chunk, anchor, grad_o, running, velocity
            )
            collected.append(found)
            for place, grad in zip(chunk_of(grad_sequences[:3], segment, i), (grad_q, grad_k, grad_v)):
                if place is not None:
                    place.zero_() if grad is None else place.copy_(grad)
            for total, grad in zip(grad_constants, at_anchor):
                if total is not None:
                    total += grad
            snapshot = [b if o is None else b + o for b, o in zip(base, old)]
            if not chunk.snapshot:
                running = [g.add_(s) for g, s in zip(running, snapshot)]
                snapshot = [None] * deep
        self._token_adjoints(segment, prepared, _joined(collected[::-1]), _Tokens(*sequences), grad_sequences)
        return (*_pair(running), *_pair(velocity), *_pair(snapshot))

    def _met(self, segment: Segment, i: int) -> bool | torch.Tensor:
        met = self.grid.meets_boundary(segment.slot + (i + 1) * segment.length, self.chunk_size)
        return met if isinstance(met, bool) else met[:, None, None]

    def _prepare(self, segment: Segment, tokens: _Tokens) -> _Prepared:
        """For every chunk of a segment in one go: tensors [N, n, c, ·]."""
        shape = (segment.chunks, segment.length)
        _, k, _, rate, log_decay, momentum, applied = (
            None if x is None else x.unflatten(1, shape) for x in tokens
        )
        if applied is not None:
            rate, log_decay = rate * applied, log_decay.masked_fill(applied == 0, 0)
            momentum = None if momentum is None else momentum.where(applied != 0, 1)
        flat = (None if x is None else x[..., 0] for x in (log_decay, momentum, applied))
        coefficients = chunk_coefficients(*flat)
        used, gram, erase = rate, None, None
        if self.rule.erases(True):
            used = proximal_rate(rate, k) if self.rule.proximal else rate
            gram = k @ k.mT
            erase = erase_matrices(gram.clone(), used, coefficients.decay.strict)
        return _Prepared(coefficients, rate, used, gram if momentum is not None else None, erase)

    def _serve(self, tokens: _Tokens, base, keep: bool) -> tuple[_Served, torch.Tensor]:
        """At the snapshot: errors of the keys and what of them reaches the first layer, and the reads."""
        k, v = tokens.k, tokens.v
        size = k.shape[1]
        made, hidden = torch.bmm(self._inputs(tokens), base[0].mT), None
        if len(base) == 2:
            hidden = activated(made, self.rule, curved=slice(None, size) if keep else False)
            made = torch.bmm(hidden.value, base[1].mT)
        error = made[:, :size] - v
        if self.rule.residual:
            error += k
        factor = length_factor(error, self.rule.error_bound)
        if factor is not None:
            error.mul_(factor)
        signal = None
        if hidden is not None:
            keys = hidden.rows(slice(None, size))
            signal = error_signal(torch.bmm(error, base[1]), keys, self.rule)
        return _Served(hidden, error, factor, signal), made[:, size:]

    def _inputs(self, tokens: _Tokens) -> torch.Tensor:
        """What the snapshot is applied to: keys, and then the queries of snapshot reads."""
        return tokens.k if self.read == "running" else torch.cat([tokens.k, tokens.q], 1)

    def _layer_inputs(self, tokens: _Tokens, shared: _Prepared, served: _Served) -> list[_Layer]:
        """The layers' inputs, the first one's prepared."""
        if served.hidden is None:
            return [_Layer(tokens.k, served.error, shared.rate, shared.gram, shared.erase)]
        first = _Layer(tokens.k, served.signal.value, shared.rate, shared.gram, shared.erase)
        x, rate, gram, erase = served.hidden.value[:, : tokens.k.shape[1]], shared.given_rate, None, None
        if self.rule.erases(False):
            rate = proximal_rate(rate, x) if self.rule.proximal else rate
            gram = torch.bmm(x, x.mT)
            kept = gram.clone() if tokens.momentum is not None else gram
            erase = erase_matrices(kept, rate, shared.coefficients.decay.strict)
        return [first, _Layer(x, served.error, rate, gram, erase)]

    def _write(self, layers: list[_Layer], running, velocity, coefficients: ChunkCoefficients):
        """The layers with what they wrote, and weights and velocities after the chunk."""
        found = []
        for i, (x, delta, rate, gram, erase, _) in enumerate(layers):
            if velocity:
                found.append(
                    momentum_forward(velocity[i], running[i], x, delta, rate, coefficients, gram, erase)
                )
            else:
                after, write = write_forward(running[i], x, delta, rate, coefficients.decay, erase)
                found.append((after, None, write))
        after, velocity_after, writes = zip(*found)
        layers = [layer._replace(write=write) for layer, write in zip(layers, writes)]
        return layers, list(after), _present(velocity_after)

    def _read(self, q, running, anchor, layers: list[_Layer], coefficients: ChunkCoefficients, keep: bool):
        """Reads after each token, in every layer."""
        y, probe, reads = q, None, []
        for i, layer in enumerate(layers):
            if i == 1:
                y = probe = activated(y, self.rule, sloped=keep, curved=False)
                y = probe.value
            fixed = anchor[i] if anchor else None
            y, read = read_forward(y, running[i], fixed, layer.x, layer.write.written, coefficients.decay)
            reads.append(read)
        return y, probe, reads

    def _read_adjoint(self, grad_o, q, made: _Made, anchor, decay) -> list[ReadAdjoint]:
        """By layer, from the gradient of the running reads."""
        found, grad = [], grad_o
        for i in reversed(range(len(made.layers))):
            queries = q if i == 0 else made.probe.value
            layer, fixed = made.layers[i], anchor[i] if anchor else None
            part = read_adjoint(
                grad, queries, made.running[i], fixed, layer.x, layer.write.written, decay, made.reads[i]
            )
            found.append(part)
            if i == 1:
                grad = hidden_adjoint(part.queries, made.probe)
        return found[::-1]

    def _chunk_adjoint(self, tokens, shared, made: _Made, anchor, grad_o, grad_after, grad_velocity):
        """Gradients of q, k, v, weights, velocities, snapshot and anchor, and the collected."""
        decay, momentum = shared.coefficients.decay, len(made.velocity) > 0
        reads = []
        if grad_o is not None and self.read == "running":
            reads = self._read_adjoint(grad_o, tokens.q, made, anchor, decay)
        parts, velocities = [], []
        for i, layer in enumerate(made.layers):
            if momentum:
                part, moving = momentum_adjoint(
                    grad_after[i],
                    grad_velocity[i],
                    made.running[i],
                    made.velocity[i],
                    layer.x,
                    layer.delta,
                    layer.write,
                    layer.rate,
                    shared.coefficients,
                    layer.gram,
                    layer.erase,
                )
                velocities.append(moving)
            else:
                part = write_adjoint(
                    grad_after[i],
                    reads[i].written if reads else None,
                    made.running[i],
                    layer.x,
                    layer.write,
                    layer.rate,
                    decay,
                    layer.erase,
                )
            parts.append(part)
        at_inputs = [part.x for part in parts]
        for at_x, read in zip(at_inputs, reads):
            at_x += read.x

        grad_rate = torch.zeros_like(shared.rate)
        if len(parts) == 2:
            grad_rate = self._hidden_adjoint(made.layers[1], parts[1], velocities[1:], shared, at_inputs[1])
        base = _base(made.snapshot or made.running, anchor)
        grad_q, at_k, at_error, base = self._serve_adjoint(
            tokens, made.served, base, parts, at_inputs, grad_o
        )
        if reads:
            grad_q = reads[0].queries
        if self.rule.residual:
            at_k += at_error
            grad_q = grad_q if grad_o is None else grad_q + grad_o
        state = [part.state for part in parts]
        for grad, read in zip(state, reads):
            grad += read.state
        at_anchor = base if anchor else []
        if anchor and reads:
            at_anchor = [grad + read.anchor for grad, read in zip(base, reads)]
        found = _Collected(
            grad_rate,
            parts[0].rate,
            _gram_part(parts[0], velocities[:1], shared.coefficients),
            _summed([_decays(part) for part in parts], [_read_decays(read) for read in reads]),
            _summed_velocity(velocities),
        )
        moving = [part.state for part in velocities]
        return grad_q, at_k, at_error.neg_(), state, moving, base, at_anchor, found

    def _hidden_adjoint(self, layer: _Layer, part: WriteAdjoint, velocities, shared: _Prepared, at_keys):
        """The gradient of the given rate from the outer layer; adds to that of its input, ``at_keys``."""
        gram = _gram_part(part, velocities, shared.coefficients)
        if gram is not None:
            at_keys += gram_adjoint(gram, layer.x)
        if layer.erase is None or not self.rule.proximal:
            return part.rate
        grad_rate, extra = proximal_adjoint(part.rate, shared.given_rate, layer.x, layer.rate)
        at_keys += extra
        return grad_rate

    def _serve_adjoint(self, tokens, served: _Served, base, parts, at_inputs, grad_o):
        """Gradients of q, of k but for what :meth:`_token_adjoints` adds, the error, and the snapshot."""
        rule, at_k, size = self.rule, at_inputs[0], at_inputs[0].shape[1]
        grad_base, radial, at_slope = [], None, None
        at_error = parts[-1].signal
        if served.hidden is not None:
            keys = served.hidden.rows(slice(None, size))
            at_back, at_value, at_slope, radial = signal_adjoint(parts[0].signal, served.signal, keys, rule)
            at_keys = at_inputs[1] if at_value is None else at_inputs[1].add_(at_value)
            at_error.baddbmm_(at_back, base[1].mT)
            grad_base.append(torch.bmm(served.error.mT, at_back))
        at_error = bound_adjoint(at_error, served.error, served.factor, rule.error_bound)
        at_made = at_error
        if self.read == "snapshot":
            at_made = torch.cat([at_error, torch.zeros_like(at_error) if grad_o is None else grad_o], 1)
        if served.hidden is not None:
            grad_base[0].baddbmm_(at_made.mT, served.hidden.value)
            at_hidden = torch.bmm(at_made, base[1])
            at_hidden[:, :size] += at_keys
            at_made = hidden_adjoint(at_hidden, served.hidden, radial)
            at_made[:, :size] += at_slope
        grad_base.insert(0, torch.bmm(at_made.mT, self._inputs(tokens)))
        at_tokens = torch.bmm(at_made, base[0])
        at_k += at_tokens[:, :size]
        return at_tokens[:, size:] if self.read == "snapshot" else None, at_k, at_error, grad_base

    def _token_adjoints(
        self, segment: Segment, prepared: _Prepared, found: _Collected, tokens: _Tokens, grads: State
    ) -> None:
        """Gradients that a whole segment's tokens get at once: of rates, decays, momenta, and keys."""
        shape = (segment.chunks, segment.length)
        k, momentum, applied = (
            None if x is None else x.unflatten(1, shape) for x in (tokens.k, tokens.momentum, tokens.applied)
        )
        grad_first = found.first_rate
        at_k = None if found.gram is None else (found.gram + found.gram.mT) @ k
        if self.rule.erases(True) and self.rule.proximal:
            grad_first, extra = proximal_adjoint(grad_first, prepared.given_rate, k, prepared.rate)
            at_k = at_k + extra
        grad_rate = found.rate + grad_first
        grad_momentum = None
        if momentum is None:
            grad_decay = decay_adjoint(segment.length, k, **found.decays)
        else:
            if applied is not None:
                momentum = momentum.where(applied != 0, 1)
            grad_decay, grad_momentum = momentum_coefficient_adjoint(
                [found.velocity],
                prepared.coefficients,
                momentum[..., 0],
                None if applied is None else applied[..., 0],
                found.decays,
            )
            grad_momentum = grad_momentum[..., None]
        found = [grad_rate, grad_decay[..., None], grad_momentum]
        if applied is not None:
            found = [None if x is None else x.masked_fill(applied == 0, 0) for x in found]
        for place, grad in zip(grads[3:6], found):
            if place is not None:
                place.copy_(grad.flatten(1, 2))
        if grads[1] is not None and at_k is not None:
            grads[1].add_(at_k.flatten(1, 2))


def _base(weights: list[torch.Tensor], anchor: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x + a for x, a in zip(weights, anchor)] if anchor else weights


def _present(pair) -> list[torch.Tensor]:
    """The layers that there are."""
    return [x for x in pair if x is not None]


def _pair(layers) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (*layers, None, None)[:2]


def _by_chunk(value, chunks: int) -> list:
    """Nested tuples of tensors [N, n, ..] chunk by chunk."""
    if value is None:
        return [None] * chunks
    if isinstance(value, torch.Tensor):
        return value.unbind(1)
    return [type(value)(*parts) for parts in zip(*(_by_chunk(part, chunks) for part in value))]


def _joined(values: list):
    """The inverse of :func:`_by_chunk`; dictionaries too."""
    first = values[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.stack(values, 1)
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
    return type(first)(*map(_joined, zip(*values)))


def _decays(part: WriteAdjoint) -> dict[str, torch.Tensor | None]:
    return {name: getattr(part, name) for name in ("strict", "before", "to_end", "final")}


def _read_decays(part: ReadAdjoint) -> dict[str, torch.Tensor | None]:
    return {name: getattr(part, name) for name in ("after", "full")}


def _summed(*groups: list[dict[str, torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """Sums over the layers of each group, by name; without what is ``None`` in all."""
    found: dict[str, torch.Tensor] = {}
    for layer in (layer for group in groups for layer in group):
        for name, part in layer.items():
            if part is not None:
                found[name] = found[name].add_(part) if name in found else part
    return found


def _summed_velocity(velocities: list[VelocityAdjoint]) -> VelocityAdjoint | None:
    """Their sum, without what is no coefficient's."""
    if not velocities:
        return None
    names = ("strict", "before", "to_end", "final", "carried_to_end", "carried_final")
    found = _summed([{name: getattr(part, name) for name in names} for part in velocities])
    return VelocityAdjoint(None, None, *(found.get(name) for name in names))


def _gram_part(part: WriteAdjoint, velocities, coefficients: ChunkCoefficients) -> torch.Tensor | None:
    """The adjoint of a layer's x xᵀ."""
    if part.gram is None:
        return None
    gram = part.gram * coefficients.decay.strict
    for moving in velocities:
        gram.addcmul_(moving.gram, coefficients.mixed.strict)
    return gram
