"""Titans (arXiv 2501.00663): a deep memory whose keys, values and rates come from slow projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nl_kernels import DeepMemoryState, MemoryRule, deep_memory, deep_memory_step
from nl_kernels.memory_rule import l2_normalize
from nl_kernels.renamed import renamed_arguments
from nl_models.layers.gated_output import GatedOutput
from nl_models.layers.initial_memory import InitialMemory
from nl_models.layers.memory_layer import MemoryLayer, is_decoding


class Titans(MemoryLayer):
    """One deep memory per head, on the ``deep_memory`` op: what is left without self-modification.

    Args:
        hidden_size: width ``d``.
        num_heads: heads; divides ``d``.
        memory_hidden_size: hidden width of a memory; ``None`` (default) for linear memories.
        chunk_size: tokens between the states at which gradients are taken. Part of the model.
        read: ``"snapshot"`` or ``"running"``.
        rule: how a memory is applied and written.
        rate_max: largest rate, in [0, 2], and at most 1 + α; 0 switches writing off.
        rate_bias, retention_bias: initial biases of the gates' logits.
        momentum: whether writes have momentum, in the form that ``rule.momentum`` says: by default their
            running average.
        initializer_range: standard deviation of the memory's initial last layer.
        eps: of the output norm.
        impl: of the op, "triton", "eager" or "reference"; ``None`` picks by device.
    """

    rate_proj: nn.Linear
    retention_proj: nn.Linear

    @renamed_arguments(implementation="impl")
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        memory_hidden_size: int | None = None,
        chunk_size: int = 16,
        read: str = "running",
        rule: MemoryRule | None = None,
        rate_max: float = 1.0,
        rate_bias: float = 0.0,
        retention_bias: float = 4.0,
        momentum: bool = False,
        initializer_range: float = 0.02,
        eps: float = 1e-6,
        impl: str | None = None,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            {"rate_proj": num_heads, "retention_proj": num_heads},
            chunk_size=chunk_size,
            read=read,
            rule=rule,
            rate_max=rate_max,
            rate_bias=rate_bias,
            retention_bias=retention_bias,
            momentum=momentum,
            impl=impl,
        )
        self.memory = InitialMemory(
            num_heads, self.head_dim, self.head_dim, memory_hidden_size, initializer_range
        )
        self.output = GatedOutput(hidden_size, self.head_dim, eps=eps)
        self.reset_parameters()

    def forward(
        self,
        x: torch.Tensor,
        state: DeepMemoryState | None = None,
        mask: torch.Tensor | None = None,
        output_state: bool = False,
    ) -> tuple[torch.Tensor, DeepMemoryState | None]:
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
        q, k, v = (self.split_heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        # Norms and rates in fp32 (or better): a retention near 1 has too few digits in bf16.
        exact = torch.promote_types(x.dtype, torch.float32)
        log_decay = F.logsigmoid(self.retention_proj(x).to(exact) + self.retention_bias)
        # The factor of an erase, α - η, stays in (-1, 1).
        limit = (1 + log_decay.exp()).clamp(max=self.rate_max)
        rate = limit * torch.sigmoid(self.rate_proj(x).to(exact) + self.rate_bias)
        tokens = (l2_normalize(q.to(exact)), l2_normalize(k.to(exact)), v, rate, log_decay)
        options: dict[str, Any] = {
            "chunk_size": self.chunk_size,
            "momentum": self.momentum(x),
            "rule": self.rule,
            "read": self.read,
            "mask": mask,
            "impl": self.impl,
        }
        if decoding and state is not None:
            o, state = deep_memory_step(*tokens, self.memory(), state=state, **options)
            return self.output(o, x).unsqueeze(1), state if output_state else None
        o, state = deep_memory(
            *tokens, self.memory(), initial_state=state, output_final_state=output_state, **options
        )
        return self.output(o, x), state
