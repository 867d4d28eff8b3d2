"""What came of reading a stream."""

from __future__ import annotations

import torch


class LearningReport:
    """Losses before learning, and the levels' steps, over one call of :meth:`ContinuumLearner.learn`.

    What it takes in stays on its device until somebody asks: reading a stream waits for nothing.

    Attributes:
        chunk_sizes: of the levels.
        tokens: of every piece.
        steps: how often each level stepped.
        empty_documents: how many had no token, and were passed over.
    """

    def __init__(self, chunk_sizes: tuple[int, ...]):
        self.chunk_sizes = chunk_sizes
        self.tokens: list[int] = []
        self.empty_documents = 0
        self.steps = [0] * len(chunk_sizes)
        self._losses: list[torch.Tensor] = []
        self._sizes: list[list[torch.Tensor]] = [[] for _ in chunk_sizes]

    def add(self, loss: torch.Tensor, tokens: int, sizes: dict[int, torch.Tensor]) -> None:
        """Take in one piece: its summed losses ``[B]`` and the sizes of the steps that followed."""
        self._losses.append(loss / tokens)
        self.tokens.append(tokens)
        for level, size in sizes.items():
            self.steps[level] += 1
            self._sizes[level].append(size)

    @property
    def losses(self) -> list[torch.Tensor]:
        """Nats per token ``[B]`` of every piece, predicted before it was learned; on the CPU."""
        return list(torch.stack(self._losses).cpu()) if self._losses else []

    @property
    def update_sizes(self) -> list[list[float]]:
        """Of each level, ‖ΔW‖ / ‖W‖ of every step, mean over the batch."""
        return [torch.stack(sizes).tolist() if sizes else [] for sizes in self._sizes]

    @property
    def loss(self) -> torch.Tensor:
        """Nats per token ``[B]`` over all that was read; NaN where nothing was."""
        if not self._losses:
            return torch.tensor([torch.nan])
        losses = torch.stack(self.losses)
        weights = torch.tensor(self.tokens, dtype=losses.dtype)
        return (losses * weights[:, None]).sum(0) / weights.sum()
