"""Where a bank's tokens come from: a call, or its memories (Eqs. 83-87), and the adjoint."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from nl_kernels.memory.bank import Layers, Layout
from nl_kernels.memory.chunk import Tokens
from nl_kernels.memory.hidden import Activated, activated, hidden_adjoint, row_dot
from nl_kernels.memory.segments import State
from nl_kernels.memory_rule import MemoryRule, inverse_norm


class _Made(NamedTuple):
    """What the adjoint needs; ``inputs`` and ``hidden`` are those of two-layer memories."""

    inputs: tuple[torch.Tensor, ...] | None
    hidden: Activated | None
    key_scale: torch.Tensor
    k: torch.Tensor
    rate: torch.Tensor  # its sigmoid
    retention: torch.Tensor  # before its sigmoid
    limit: torch.Tensor  # of the rate: the largest, and at most 1 + α


@dataclasses.dataclass(frozen=True)
class GivenTokens:
    """For :class:`~nl_kernels.memory.loop.Loop`: sequences are the tokens.

    Attributes:
        block: chunks whose tokens are known at the start of the first one.
    """

    block: int

    def tokens(self, base: Layers, constants: State, sequences: State, keep: bool) -> tuple[Tokens, Any]:
        """The tokens of a block from its sequences [N, T, ..], and what the adjoint needs."""
        return Tokens(*sequences), None

    def tokens_adjoint(
        self, base, constants, sequences, made, d_tokens: Tokens, d_base: Layers
    ) -> tuple[State, State]:
        """The adjoints of the sequences, and of the constants by token [N, T, ..]; adds to ``d_base``."""
        return d_tokens[:-1], ()


@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
    """As :class:`GivenTokens`, of tokens that the memories make.

    Sequences are inputs of key, value, query and gates [N, T, D], momentum, scale of writes and ``applied``
    [N, T, 1] or ``None``; constants are largest rate and biases, [N, 1, 1].

    Attributes:
        block: chunks between boundaries of the memories that make tokens, or between those and gradient cuts.
    """

    rule: MemoryRule
    layout: Layout
    block: int

    def tokens(self, base: Layers, constants: State, sequences: State, keep: bool) -> tuple[Tokens, _Made]:
        key_in, value_in, query, gate_in, momentum, scale, applied = sequences
        rate_max, rate_bias, retention_bias = constants
        inputs, hidden = None, None
        if self.layout.linear:
            key, value, gate = self._linear(base)
            k, v = torch.baddbmm(key_in, key_in, key.mT), torch.baddbmm(value_in, value_in, value.mT)
            rate, retention = torch.bmm(gate_in, gate.mT).split_with_sizes((1, 1), -1)
        else:
            rows, inputs = 2 * len(query), (torch.cat([key_in, value_in]), torch.cat([gate_in, gate_in]))
            z = [torch.bmm(x, w.mT) for x, w in zip(inputs, self._firsts(base))]
            hidden = activated(torch.cat(z), self.rule, sloped=keep, curved=False)
            made = torch.bmm(hidden.value[:rows], base[1][:rows].mT)
            k, v = made.add_(inputs[0]).chunk(2)
            rate, retention = torch.bmm(hidden.value[rows:], base[2].mT).chunk(2)
        key_scale = inverse_norm(k)
        k = k.mul_(key_scale)
        rate, retention = torch.sigmoid(rate + rate_bias), retention + retention_bias
        log_decay = torch.nn.functional.logsigmoid(retention)
        limit = log_decay.exp().add_(1).clamp_(max=rate_max)
        made = _Made(inputs, hidden, key_scale, k, rate, retention, limit)
        return Tokens(query, k, v, rate * limit, log_decay, momentum, applied, scale), made

    def tokens_adjoint(
        self, base: Layers, constants: State, sequences: State, made: _Made, d_tokens: Tokens, d_base: Layers
    ) -> tuple[State, State]:
        d_query, d_k, d_v, d_rate, d_decay, d_momentum, _, d_scale = d_tokens
        # The limit is the largest rate, or 1 + α, whose derivative by log α is α.
        d_limit = d_rate * made.rate
        by_decay = d_limit.masked_fill(made.limit == constants[0], 0)
        d_rate = torch.ops.aten.sigmoid_backward(d_rate * made.limit, made.rate)
        d_retention = torch.addcmul(d_decay, by_decay, made.limit - 1) * torch.sigmoid(-made.retention)
        d_gates = torch.cat([d_rate, d_retention], -1)
        d_k = torch.addcmul(d_k, made.k, row_dot(made.k, d_k), value=-1).mul_(made.key_scale)
        adjoint = self._linear_adjoint if self.layout.linear else self._two_layer_adjoint
        d_key, d_value, d_gate = adjoint(base, sequences, made, d_k, d_v, d_gates, d_base)
        d_constants = (d_limit - by_decay, d_rate, d_retention)
        return (d_key, d_value, d_query, d_gate, d_momentum, d_scale, None), d_constants

    def _linear(self, base: Layers) -> tuple[torch.Tensor, ...]:
        """The outputs that make keys, values and gates, of a layer of linear memories."""
        width = self.layout.width
        key, value, _, gate = base[0].split_with_sizes((width, width, width, 2), 1)
        return key, value, gate

    def _firsts(self, base: Layers) -> tuple[torch.Tensor, torch.Tensor]:
        """The first layers of those that make keys and values, and of those that make gates."""
        return base[0][: 2 * self.layout.banks], base[0][3 * self.layout.banks :]

    def _linear_adjoint(self, base, sequences, made, d_k, d_v, d_gates, d_base):
        """Of the inputs of keys, values and gates; adds to ``d_base``."""
        inputs = (sequences[0], sequences[1], sequences[3])
        for d, x, into in zip((d_k, d_v, d_gates), inputs, self._linear(d_base)):
            into.baddbmm_(d.mT, x)
        key, value, gate = self._linear(base)
        return torch.baddbmm(d_k, d_k, key), torch.baddbmm(d_v, d_v, value), torch.bmm(d_gates, gate)

    def _two_layer_adjoint(self, base, sequences, made, d_k, d_v, d_gates, d_base):
        rows, (_, last, gate), (_, d_last, d_gate) = 2 * len(d_k), base, d_base
        d_made, d_gates = torch.cat([d_k, d_v]), torch.cat(d_gates.split(1, -1))
        d_last[:rows].baddbmm_(d_made.mT, made.hidden.value[:rows])
        d_gate.baddbmm_(d_gates.mT, made.hidden.value[rows:])
        d_hidden = torch.cat([torch.bmm(d_made, last[:rows]), d_gates * gate])
        d_z = hidden_adjoint(d_hidden, made.hidden).chunk(2)
        for d, d_first, x in zip(d_z, self._firsts(d_base), made.inputs):
            d_first.baddbmm_(d.mT, x)
        d_inputs = (torch.bmm(d, first).chunk(2) for d, first in zip(d_z, self._firsts(base)))
        (d_key, d_value), (d_rate, d_retention) = d_inputs
        return d_key.add_(d_k), d_value.add_(d_v), d_rate.add_(d_retention)
