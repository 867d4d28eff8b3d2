"""Continuum memory as a module: the slow parameters of every level, and the bounds that keep it stable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nl_kernels import ContinuumLevel, ContinuumState, continuum_flush, continuum_memory
from nl_kernels.checks import check_choice, check_positive_int
from nl_kernels.ops.continuum.state import (
    RULES,
    RULES_WITH_MOMENTUM,
    VARIANTS,
    check_chunk_sizes,
    state_dtype,
)


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of a :class:`ContinuumMemory`.

    Attributes:
        hidden_size: width H of the MLP's hidden layer.
        chunk_size: tokens between two steps of the fast weights; None: they never change, a plain MLP.
        gated: SwiGLU with a gate matrix, as in Llama, instead of GELU.
        rule: ``"sgd"``, ``"dgd"``, ``"momentum"`` or ``"muon"``; see :func:`nl_kernels.continuum_update`.
        max_rate: the largest *relative* rate r. The level learns one r in (0, max_rate), and every token's
            rate is ``η = r / (D · chunk_size)``. Keys have unit root mean square, so r is the gain of the
            first layer's step on a chunk of one repeated token, whatever the chunk size: up to 2 the steps on
            such a chunk bring its error down. With momentum
            ``η = r (1 − momentum_decay) / (D · chunk_size)``, so that it is that of all steps that follow.
            0: the level never changes. In the nested variant its chunk size still says when the next faster
            level starts anew.
        initial_rate: r at initialisation, less than ``max_rate``.
        initial_retention: α at initialisation, in (0, max_retention), or 1. The level learns one α in
            (0, max_retention), the part of its weights' distance from the initial ones that a step retains:
            they remember about 1 / (1 − α) chunks. 1: α is 1 and is not learned, so that nothing is
            forgotten; beyond the length of the training windows such a level gets worse with every chunk
            (docs/defaults.md). ``max_rate`` should then be 1.
        max_retention: the largest α, at most 1. Training windows should hold several chunks, three at least:
            a level that saw fewer has not been trained for what it goes on to remember. With chunks of
            fewer than four tokens 0.9, and an ``error_bound`` of 1, keep the weights near the initial ones.
        error_bound, momentum_decay, restore_norms: see :class:`nl_kernels.ContinuumLevel`.
        key_projection: keys are learned projections of what the block reads; False: they are what it reads,
            which costs the least.
        predict_next: the level learns to say, of each token, what comes next; False: a map of the token
            itself. See :class:`nl_kernels.ContinuumLevel`.
    """

    hidden_size: int
    chunk_size: int | None = None
    gated: bool = False
    rule: str = "sgd"
    max_rate: float = 2.0
    initial_rate: float = 1.0
    initial_retention: float = 0.9
    max_retention: float = 0.99
    error_bound: float | None = 3.0
    momentum_decay: float = 0.9
    restore_norms: bool = False
    key_projection: bool = True
    predict_next: bool = True

    def __post_init__(self) -> None:
        check_positive_int("hidden_size", self.hidden_size)
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        check_choice("rule", self.rule, RULES)
        if not 0 <= self.max_rate < math.inf:
            raise ValueError(f"max_rate: expected a finite number, at least 0, got {self.max_rate}")
        if self.steps and not 0 < self.initial_rate < self.max_rate:
            raise ValueError(f"initial_rate: expected between 0 and {self.max_rate}, got {self.initial_rate}")
        if not 0 < self.max_retention <= 1:
            raise ValueError(f"max_retention: expected more than 0 and at most 1, got {self.max_retention}")
        if self.initial_retention != 1 and not 0 < self.initial_retention < self.max_retention:
            raise ValueError(
                f"initial_retention: expected between 0 and max_retention={self.max_retention}, or 1, got "
                f"{self.initial_retention}"
            )
        if self.error_bound is not None and not self.error_bound > 0:
            raise ValueError(f"error_bound: expected more than 0 or None, got {self.error_bound}")
        if self.predict_next and self.chunk_size == 1:
            raise ValueError("chunk_size: expected at least 2, or predict_next=False, got 1")
        if not 0 <= self.momentum_decay < 1:
            raise ValueError(f"momentum_decay: expected a number in [0, 1), got {self.momentum_decay}")

    @property
    def steps(self) -> bool:
        """Whether the fast weights ever change."""
        return self.chunk_size is not None and self.max_rate > 0


class ContinuumMemory(nn.Module):
    """Pre-norm residual MLP blocks, fast to slow, whose weights learn within each sequence.

    Takes the place of a transformer block's MLP together with its norm and its residual connection. With
    levels that never step it is exactly that: ``x + down(act(up(n(x))))``, bit for bit.

    The parameters are the slow part: norms, projections, rates, and the *initial* fast weights, trained
    through the steps. Fast weights are never parameters or buffers: they live in the state that
    ``forward`` takes and returns.

    Levels whose weights step in *training* time, every C tokens of accumulated gradient, are no part of this:
    they are a matter of the optimiser, :class:`nl_models.optim.MultiFrequency`.

    Args:
        hidden_size: width D of the stream.
        levels: fast to slow; every chunk size a multiple of the one before, levels that never step last.
        variant: how levels are put together, see :func:`nl_kernels.continuum_memory`. ``"independent"`` has
            learned weights of the levels, 1 at the start.
        detach_updates: no gradient through the steps. Rates, retentions and projections then stay as
            initialised, and do not require gradients; the initial fast weights learn.
        norm_eps: added to the mean square inside the norms.
        checkpoint_every: see :func:`nl_kernels.continuum_memory`.
        impl: see :func:`nl_kernels.continuum_memory`.
    """

    def __init__(
        self,
        hidden_size: int,
        levels: Sequence[LevelConfig],
        *,
        variant: str = "sequential",
        detach_updates: bool = False,
        norm_eps: float = 1e-6,
        checkpoint_every: int | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("hidden_size", hidden_size)
        if not levels:
            raise ValueError("levels: expected at least one, got none")
        check_chunk_sizes([config.chunk_size for config in levels])
        check_choice("variant", variant, VARIANTS)
        self.hidden_size = hidden_size
        self.variant = variant
        self.detach_updates = detach_updates
        self.norm_eps = norm_eps
        self.checkpoint_every = checkpoint_every
        self.impl = impl
        self.levels = nn.ModuleList(ContinuumBlock(hidden_size, config) for config in levels)
        self.level_weights = nn.Parameter(torch.empty(len(levels))) if variant == "independent" else None
        self.reset_parameters()
        if detach_updates:
            for level in self.levels:
                for parameter in (level.key, level.value, level.rate_logit, level.retention_logit):
                    if parameter is not None:
                        parameter.requires_grad_(False)

    def reset_parameters(self) -> None:
        """All levels count the same."""
        if self.level_weights is not None:
            nn.init.ones_(self.level_weights)

    def forward(
        self,
        x: torch.Tensor,
        state: ContinuumState | None = None,
        mask: torch.Tensor | None = None,
        output_state: bool = False,
    ) -> tuple[torch.Tensor, ContinuumState | None]:
        """Runs all levels on the tokens that follow those of ``state``.

        Args:
            x: [B, T, D].
            state: from the call on the preceding tokens of the same sequences; None at their start.
            mask: [B, T] bool, True for tokens; padding is not learned from, and its outputs are zero.
            output_state: also return the state after the last token.

        Returns:
            y [B, T, D], and the state or None.
        """
        return continuum_memory(
            x,
            [level() for level in self.levels],
            variant=self.variant,
            level_weights=self.level_weights,
            mask=mask,
            initial_state=state,
            output_final_state=output_state,
            detach_updates=self.detach_updates,
            norm_eps=self.norm_eps,
            checkpoint_every=self.checkpoint_every,
            impl=self.impl,
        )

    def flush(self, state: ContinuumState) -> ContinuumState:
        """The state after a step on the tokens that wait for one; see :func:`nl_kernels.continuum_flush`."""
        return continuum_flush(
            state,
            [level() for level in self.levels],
            variant=self.variant,
            detach_updates=self.detach_updates,
            norm_eps=self.norm_eps,
            impl=self.impl,
        )


class ContinuumBlock(nn.Module):
    """The slow parameters of one level."""

    def __init__(self, hidden_size: int, config: LevelConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = hidden_size, config.hidden_size
        self.norm = nn.Parameter(torch.empty(width))
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.gate = nn.Parameter(torch.empty(hidden, width)) if config.gated else None
        self.down = nn.Parameter(torch.empty(width, hidden))
        keyed = config.steps and config.key_projection
        self.key = nn.Parameter(torch.empty(width, width)) if keyed else None
        self.value = nn.Parameter(torch.empty(width, width)) if config.steps else None
        # Of one dimension: FSDP2 shards no scalars.
        self.rate_logit = nn.Parameter(torch.empty(1)) if config.steps else None
        retains = config.steps and config.initial_retention < 1
        self.retention_logit = nn.Parameter(torch.empty(1)) if retains else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The MLP as ``nn.Linear`` starts it; keys are what the block reads, targets a random map of it."""
        nn.init.ones_(self.norm)
        for weight in (self.up, self.gate, self.down):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.key is not None:
            nn.init.eye_(self.key)
        if self.value is not None and self.rate_logit is not None:  # of a level that steps
            nn.init.kaiming_uniform_(self.value, a=math.sqrt(5))
            nn.init.constant_(self.rate_logit, _logit(self.config.initial_rate / self.config.max_rate))
        if self.retention_logit is not None:
            share = self.config.initial_retention / self.config.max_retention
            nn.init.constant_(self.retention_logit, _logit(share))

    def rate(self) -> torch.Tensor | float:
        """η of every token: a scalar of at least fp32, or the number 0 for a level that never steps."""
        config = self.config
        if config.chunk_size is None or self.rate_logit is None:
            return 0.0
        scale = config.max_rate / (self.up.shape[1] * config.chunk_size)
        if config.rule in RULES_WITH_MOMENTUM:
            scale *= 1 - config.momentum_decay
        return scale * torch.sigmoid(self.rate_logit[0].to(state_dtype(self.rate_logit.dtype)))

    def retention(self) -> torch.Tensor | float:
        """α of every step: a scalar of at least fp32, or the number 1 where nothing is forgotten."""
        if self.retention_logit is None:
            return 1.0
        logit = self.retention_logit[0].to(state_dtype(self.retention_logit.dtype))
        return self.config.max_retention * torch.sigmoid(logit)

    def forward(self) -> ContinuumLevel:
        """This level as :func:`nl_kernels.continuum_memory` takes it.

        A call, for what brings a module's parameters when the module is called (offloading).
        """
        return ContinuumLevel(
            norm=self.norm,
            up=self.up,
            down=self.down,
            gate=self.gate,
            chunk_size=self.config.chunk_size,
            rate=self.rate(),
            key=self.key,
            value=self.value,
            rule=self.config.rule,
            momentum_decay=self.config.momentum_decay,
            retention=self.retention(),
            restore_norms=self.config.restore_norms,
            error_bound=self.config.error_bound,
            predict_next=self.config.predict_next,
        )


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
