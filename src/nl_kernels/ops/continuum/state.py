"""What goes into and out of a continuum memory: the definition of a level, and its state between calls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

RULES = ("sgd", "dgd")


@dataclass(frozen=True, eq=False, kw_only=True)
class ContinuumLevel:
    """One level: a pre-norm residual MLP block ``x + down σ(up n(x))`` and how its weights learn in context.

    Matrices have the layout of ``nn.Linear.weight``. ``up``, ``gate`` and ``down`` are the *initial* fast
    weights; ``norm``, ``key`` and ``value`` do not change in context. All may need gradients.

    Attributes:
        norm: [D], the weight of the RMS norm ``n`` before the block.
        up: [H, D].
        down: [D, H].
        gate: [H, D] for a gated block ``down (SiLU(gate n(x)) ∘ up n(x))`` as in Llama; None: GELU.
        chunk_size: the level's weights step after every ``chunk_size`` tokens; None: never.
            Part of the model: weights trained at one chunk size run at that one.
        rate: η, the rate of every token: a number, or a tensor [] or [B, T]; finite and not negative.
            The number 0 makes the level exactly the plain block. May need a gradient.
        key: [D, D], makes the keys ``n(key n(x))`` (this ``n`` without a weight: unit root mean square).
            Needed unless the level never steps, as is ``value``.
        value: [D, D], makes the targets ``value n(x)``.
        rule: ``"sgd"`` or ``"dgd"`` (delta gradient descent, in its exact mini-batch form).
        error_bound: the largest root mean square that each linear layer's error signal may have; longer ones
            are scaled down, which for the last layer is a Huber loss. None: no bound, the plain square.
    """

    norm: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None = None
    chunk_size: int | None = None
    rate: torch.Tensor | float = 0.0
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    rule: str = "sgd"
    error_bound: float | None = 1.0

    @property
    def steps(self) -> bool:
        """Whether the weights ever change."""
        return self.chunk_size is not None and (isinstance(self.rate, torch.Tensor) or self.rate > 0)


class ContinuumLevelState(NamedTuple):
    """A level's fast weights and the tokens that it has seen since its last step, for each of B sequences.

    Floating tensors are fp32 (fp64 when the op runs in fp64). P is the largest ``position`` in the batch.
    """

    up: torch.Tensor  # [B, H, D]
    down: torch.Tensor  # [B, D, H]
    gate: torch.Tensor | None  # [B, H, D]; None for a level without a gate
    pending_inputs: torch.Tensor  # [B, P, D]: n(x) of the tokens not yet learned from, then padding
    pending_rates: torch.Tensor  # [B, P]: their rates
    position: torch.Tensor  # [B], int64: tokens since the last step, < chunk_size


#: One entry for each level; None for a level that never steps.
ContinuumState: TypeAlias = tuple[ContinuumLevelState | None, ...]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of fast weights and of everything that changes them: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_chunk_sizes(sizes: Sequence[int | None]) -> None:
    """Check that levels run from fast to slow: each chunk size a multiple of the one before, None last.

    Raises:
        ValueError: the first level that does not.
    """
    for index, (fast, slow) in enumerate(itertools.pairwise(sizes)):
        if slow is not None and (fast is None or slow % fast):
            raise ValueError(f"levels[{index + 1}].chunk_size: expected a multiple of {fast}, got {slow}")
