"""What came of reading a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class LearningReport:
    """Losses before learning, and the levels' steps, over one call of :meth:`ContinuumLearner.learn`.

    Attributes:
        chunk_sizes: of the levels.
        losses: nats per token ``[pieces, B]`` of every piece, predicted before it was learned.
        tokens: of every piece.
        steps: how often each level stepped.
        update_sizes: of each level, ‖ΔW‖ / ‖W‖ of every step, mean over the batch.
    """

    chunk_sizes: tuple[int, ...]
    losses: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(init=False)
    update_sizes: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = [0] * len(self.chunk_sizes)
        self.update_sizes = [[] for _ in self.chunk_sizes]

    def add(self, loss: torch.Tensor, tokens: int, sizes: dict[int, float]) -> None:
        """Take in one piece: its summed losses ``[B]`` and the sizes of the steps that followed."""
        self.losses.append((loss / tokens).cpu())
        self.tokens.append(tokens)
        for level, size in sizes.items():
            self.steps[level] += 1
            self.update_sizes[level].append(size)

    @property
    def loss(self) -> torch.Tensor:
        """Nats per token ``[B]`` over all that was read; NaN where nothing was."""
        if not self.losses:
            return torch.tensor([torch.nan])
        weights = torch.tensor(self.tokens, dtype=self.losses[0].dtype)
        return (torch.stack(self.losses) * weights[:, None]).sum(0) / weights.sum()
