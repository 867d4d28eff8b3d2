"""Self-modifying Titans (arXiv 2512.24695, Eqs. 83-91): memories that make each other's inputs and rates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nl_kernels import (
    MemoryRule,
    SelfModifyingState,
    SelfModifyingWeights,
    self_modifying_memory,
    self_modifying_memory_step,
)
from nl_kernels.checks import check_choice
from nl_kernels.memory_rule import l2_normalize
from nl_kernels.renamed import renamed_arguments
from nl_models.layers.gated_output import GatedOutput
from nl_models.layers.initial_memory import InitialMemory
from nl_models.layers.memory_layer import MemoryLayer, is_decoding

GATE_INITIALIZER_RANGE = 0.25
"""Standard deviation of the gates' logits at the start, for inputs of unit length."""

MOMENTUM_MAX = 0.7
"""Largest decay of averaged momentum: above it the outer gradient grows faster on repeated tokens."""


VALUES = ("scaled", "unit")
VALUE_LENGTH = 8.0
"""The most that the length of a value counts."""


class SelfModifyingTitans(MemoryLayer):
    """Five memories per head, fed by slow projections, on the ``self_modifying_memory`` op.

    Keys are ``l2norm(M_key(n(W_k x)))``, values ``M_value(n(W_v x))``, and both gates' memories read
    ``n(W_r x)``, with ``n`` the l2 norm per head. Since these memories start close to the identity, the layer
    starts close to plain Titans, and learns to modify itself on top of it.

    Without ``n`` the memories feed on each other's changes with a gain that grows with the projections: from
    inputs of length 5 on, the outer gradient grows exponentially along the sequence (a chaotic system), and
    training stalls. What the memory that is read learns from has the lengths back, where values are
    "scaled": there ``‖W_v x‖`` says how much a token is worth, and is no part of the loop.

    Args:
        hidden_size: width ``d``.
        num_heads: heads; divides ``d``.
        memory_hidden_size: hidden width of a memory; ``None`` (default) for linear memories.
        chunk_size: tokens between the boundaries of the memory that is read. Part of the model.
        generator_chunk_size: the same for the four that make keys, values and gates; default ``chunk_size``.
            One of the two is a multiple of the other.
        read: ``"snapshot"`` or ``"running"``.
        rule: how a memory is applied and written.
        rate_max: largest rate, in [0, 2], and at most 1 + α; 0 switches writing off.
        rate_bias, retention_bias: initial biases of the gates' logits.
        values: "scaled": SiLU follows the projections of queries, keys and values, and the length of a value,
            at most :data:`VALUE_LENGTH`, scales what the memory that is read learns from; "unit": neither.
            ``None``: scaled for linear memories, unit for those of two layers, which have no scale.
        momentum: whether writes have momentum, in the form that ``rule.momentum`` says: by default their
            running average with decays up to :data:`MOMENTUM_MAX`. Their sum is chaotic here.
        truncate_every: the outer gradient does not cross every n-th chunk boundary; ``None`` for all.
        initializer_range: standard deviation of the initial last layers of the memories with a residual and
            of the one that is read.
        eps: of the output norm.
        impl: of the op, "triton", "eager" or "reference"; ``None`` picks by device.
    """

    r_proj: nn.Linear

    @renamed_arguments(implementation="impl")
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        memory_hidden_size: int | None = None,
        chunk_size: int = 16,
        generator_chunk_size: int | None = None,
        read: str = "running",
        rule: MemoryRule | None = None,
        rate_max: float = 1.0,
        rate_bias: float = 0.0,
        retention_bias: float = 4.0,
        values: str | None = None,
        momentum: bool = False,
        truncate_every: int | None = None,
        initializer_range: float = 0.02,
        eps: float = 1e-6,
        impl: str | None = None,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            {"r_proj": hidden_size},
            chunk_size=chunk_size,
            read=read,
            rule=rule,
            rate_max=rate_max,
            rate_bias=rate_bias,
            retention_bias=retention_bias,
            momentum=momentum,
            impl=impl,
        )
        self.values = choose_values("values", values, memory_hidden_size)
        if self.rule.momentum == "average":
            self.momentum_max = MOMENTUM_MAX
        self.generator_chunk_size = generator_chunk_size
        self.truncate_every = truncate_every
        wide = (self.head_dim, initializer_range)
        gate = (1, GATE_INITIALIZER_RANGE)
        kinds = dict(zip(SelfModifyingWeights._fields, (wide, wide, wide, gate, gate)))
        self.memories = nn.ModuleDict(
            {
                name: InitialMemory(num_heads, self.head_dim, out, memory_hidden_size, spread)
                for name, (out, spread) in kinds.items()
            }
        )
        self.output = GatedOutput(hidden_size, self.head_dim, eps=eps)
        self.reset_parameters()

    def forward(
        self,
        x: torch.Tensor,
        state: SelfModifyingState | None = None,
        mask: torch.Tensor | None = None,
        output_state: bool = False,
    ) -> tuple[torch.Tensor, SelfModifyingState | None]:
        """Read and write the memories along a piece of each sequence.

        Args:
            x: ``[B, T, d]``.
            state: of the tokens before; ``None`` is the learned initial state.
            mask: ``[B, T]`` bool, True at real tokens. Padding writes nothing; its output is zero.
            output_state: whether to return the state after this piece.

        Returns:
            ``y`` like ``x``, and the new state or ``None``.
        """
        decoding = is_decoding(x, state)
        if decoding:
            x, mask = x[:, 0], None if mask is None else mask[:, 0]
        exact = torch.promote_types(x.dtype, torch.float32)
        query, key, value, gate = (
            self.split_heads(projection, x)
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.r_proj)
        )
        scale = None
        if self.values == "scaled":
            query, key, value = F.silu(query), F.silu(key), F.silu(value)
            scale = torch.linalg.vector_norm(value, dim=-1, dtype=exact).clamp(max=VALUE_LENGTH)
        key, value, gate = l2_normalize(torch.stack([key, value, gate]).to(exact)).to(query.dtype).unbind()
        weights = SelfModifyingWeights(**{name: memory() for name, memory in self.memories.items()})
        options: dict[str, Any] = {
            "chunk_size": self.chunk_size,
            "generator_chunk_size": self.generator_chunk_size,
            "write_scale": scale,
            "momentum": self.momentum(x),
            "rule": self.rule,
            "rate_max": self.rate_max,
            "rate_bias": self.rate_bias,
            "retention_bias": self.retention_bias,
            "read": self.read,
            "mask": mask,
            "impl": self.impl,
        }
        if decoding and state is not None:
            o, state = self_modifying_memory_step(query, key, value, gate, weights, state=state, **options)
            return self.output(o, x).unsqueeze(1), state if output_state else None
        o, state = self_modifying_memory(
            query,
            key,
            value,
            gate,
            weights,
            truncate_every=self.truncate_every,
            initial_state=state,
            output_final_state=output_state,
            **options,
        )
        return self.output(o, x), state


def choose_values(name: str, values: str | None, memory_hidden_size: int | None) -> str:
    """Of :data:`VALUES`: what is asked for, or what suits the memories.

    Raises:
        ValueError: another name, or a scale of memories of two layers.
    """
    if values is None:
        return "scaled" if memory_hidden_size is None else "unit"
    check_choice(name, values, VALUES)
    if values == "scaled" and memory_hidden_size is not None:
        raise ValueError(f"{name}: memories of two layers have 'unit' values, got 'scaled'; leave it out")
    return values
