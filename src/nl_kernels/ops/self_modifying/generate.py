"""The memories of a bank make keys, values, rates and retentions, and the adjoint: Eqs. 83-87 of the paper."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from nl_kernels.memory.bank import Bank, Layout
from nl_kernels.memory.chunk import Tokens
from nl_kernels.memory.hidden import Activated, activated, hidden_adjoint, row_dot
from nl_kernels.memory.loop import State
from nl_kernels.memory_rule import MemoryRule, inverse_norm


class _Made(NamedTuple):
    """What the adjoint needs; ``inputs`` and ``hidden`` of two-layer memories, of keys, values and twice the gates."""

    inputs: torch.Tensor | None
    hidden: Activated | None
    key_scale: torch.Tensor
    k: torch.Tensor
    gates: torch.Tensor  # before the sigmoids [N, T, 2]


@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
    """For :class:`~nl_kernels.memory.loop.Loop`.

    Sequences are inputs of key, value, query and gates [N, T, D], the momentum and ``applied`` [N, T, 1] or
    ``None``; constants are the largest rate and the biases of rate and retention, each [N, 1].

    Attributes:
        block: chunks between the boundaries of the memories that make tokens.
    """

    rule: MemoryRule
    layout: Layout
    block: int

    def tokens(self, base: Bank, constants: State, sequences: State, keep: bool) -> tuple[Tokens, _Made]:
        key_in, value_in, query, gate_in, momentum, applied = sequences
        rate_max, rate_bias, retention_bias = constants
        rows = len(query)
        inputs = hidden = None
        if self.layout.linear:
            weights = self._linear(base)
            k, v, gates = (torch.bmm(x, w.mT) for x, w in zip((key_in, value_in, gate_in), weights))
        else:
            inputs = torch.cat([key_in, value_in, gate_in, gate_in])
            hidden = activated(torch.bmm(inputs, base[0][rows:].mT), self.rule, sloped=keep, curved=False)
            made = torch.bmm(hidden.value[: 2 * rows], base[1][rows:].mT)
            gates = torch.bmm(hidden.value[2 * rows :], base[2].mT)
            k, v, gates = made[:rows], made[rows:], torch.cat(gates.split(rows), -1)
        if self.rule.projection_residual:
            k, v = k.add_(key_in), v.add_(value_in)
        key_scale = inverse_norm(k)
        k.mul_(key_scale)
        gates += torch.stack([rate_bias, retention_bias], -1)
        rate = torch.sigmoid(gates[..., :1]).mul_(rate_max[..., None])
        log_decay = torch.nn.functional.logsigmoid(gates[..., 1:])
        return Tokens(query, k, v, rate, log_decay, momentum, applied), _Made(
            inputs, hidden, key_scale, k, gates
        )

    def tokens_adjoint(
        self,
        base: Bank,
        constants: State,
        sequences: State,
        made: _Made,
        d_tokens: Tokens,
        d_base: Bank,
        d_constants: State,
        d_sequences: State,
    ) -> None:
        d_query, d_k, d_v, d_rate, d_decay, d_momentum, _ = d_tokens
        fraction = torch.sigmoid(made.gates[..., :1])
        d_rate_max = (d_rate * fraction).sum(1)
        d_gates = torch.cat(
            [
                d_rate * constants[0][..., None] * fraction * (1 - fraction),
                d_decay * torch.sigmoid(-made.gates[..., 1:]),
            ],
            -1,
        )
        for total, d in zip(d_constants, (d_rate_max, *d_gates.sum(1).split(1, 1))):
            if total is not None:
                total += d
        d_k = (d_k - made.k * row_dot(made.k, d_k)).mul_(made.key_scale)
        adjoint = self._linear_adjoint if self.layout.linear else self._two_layer_adjoint
        d_inputs = adjoint(base, sequences, made, d_k, d_v, d_gates, d_base)
        if self.rule.projection_residual:
            d_inputs[0].add_(d_k)
            d_inputs[1].add_(d_v)
        d_key, d_value, d_gate = d_inputs
        for place, d in zip(d_sequences, (d_key, d_value, d_query, d_gate, d_momentum)):
            if place is not None:
                place.zero_() if d is None else place.copy_(d)

    def _linear(self, base: Bank) -> tuple[torch.Tensor, ...]:
        """The outputs that make keys, values and gates, of a layer of linear memories."""
        width = self.layout.width
        return base[0].split([width, width, width, 2], 1)[1:]

    def _linear_adjoint(self, base, sequences, made, d_k, d_v, d_gates, d_base) -> list[torch.Tensor]:
        """Of the inputs of keys, values and gates; adds to ``d_base``."""
        inputs = (sequences[0], sequences[1], sequences[3])
        d_inputs = []
        for d, x, weights, into in zip(
            (d_k, d_v, d_gates), inputs, self._linear(base), self._linear(d_base)
        ):
            into.add_(torch.bmm(d.mT, x))
            d_inputs.append(torch.bmm(d, weights))
        return d_inputs

    def _two_layer_adjoint(self, base, sequences, made, d_k, d_v, d_gates, d_base) -> list[torch.Tensor]:
        rows = len(d_k)
        hidden = made.hidden
        d_made, d_gates = torch.cat([d_k, d_v]), torch.cat(d_gates.split(1, -1))
        first, last, gate = base
        d_first, d_last, d_gate = d_base
        d_last[rows:].baddbmm_(d_made.mT, hidden.value[: 2 * rows])
        d_gate.baddbmm_(d_gates.mT, hidden.value[2 * rows :])
        d_hidden = torch.cat([torch.bmm(d_made, last[rows:]), d_gates * gate])
        d_z = hidden_adjoint(d_hidden, hidden)
        d_first[rows:].baddbmm_(d_z.mT, made.inputs)
        d_inputs = torch.bmm(d_z, first[rows:])
        d_key, d_value, d_rate_in, d_retention_in = d_inputs.split(rows)
        return [d_key, d_value, d_rate_in + d_retention_in]
