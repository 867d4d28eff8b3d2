"""Multi-query associative recall: bind keys to values, then ask for the value of each key.

The synthetic task of Arora et al., *Zoology* (arXiv 2312.04927), where a model without a working memory stays
at chance. One sequence, with fillers f wherever they fall::

    k1 v1  k2 v2  f  k3 v3 … kn vn   q1 q2 f … qm  end

The target of the position that holds ``q`` is the value bound to ``q``; no answer ever appears after a query,
so no question can be answered by elimination.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True)
class AssociativeRecall:
    """The task's sizes. Ids are laid out as keys, values, fillers, end.

    Attributes:
        pairs: n, key-value pairs to remember. Keys and values are distinct within a sequence.
        keys: how many key ids exist.
        values: how many value ids exist.
        queries: m, distinct keys asked for at the end; ``None``: all n, in random order.
        fillers: meaningless tokens scattered between the pairs and among the queries.
        filler_ids: how many filler ids exist.
    """

    pairs: int
    keys: int = 64
    values: int = 64
    queries: int | None = None
    fillers: int = 0
    filler_ids: int = 16

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs: expected at least 1, got {self.pairs}")
        for name in ("keys", "values"):
            if getattr(self, name) < self.pairs:
                raise ValueError(
                    f"{name}: expected at least pairs = {self.pairs}, distinct in a sequence, "
                    f"got {getattr(self, name)}"
                )
        if self.queries is not None and not 1 <= self.queries <= self.pairs:
            raise ValueError(f"queries: expected 1 to pairs = {self.pairs} or None, got {self.queries}")
        if self.fillers < 0:
            raise ValueError(f"fillers: expected at least 0, got {self.fillers}")
        if self.filler_ids < 1:
            raise ValueError(f"filler_ids: expected at least 1, got {self.filler_ids}")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.filler_ids + 1

    @property
    def asked(self) -> int:
        """Queries in a sequence."""
        return self.pairs if self.queries is None else self.queries

    @property
    def sequence_length(self) -> int:
        return 2 * self.pairs + self.asked + self.fillers + 1

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values seen: 1 / pairs.

        A model without any memory of bindings reaches this once it has learned to answer with one of the
        sequence's values; a guess over all values scores ``1 / values``.
        """
        return 1.0 / self.pairs

    def batch(self, batch_size: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw sequences; the same arguments give the same batch.

        Returns:
            ``input_ids`` and ``labels``, both ``[B, T]`` int64 on the CPU. Labels follow the convention of
            causal language models in transformers, which compare ``logits[:, t]`` to ``labels[:, t + 1]``:
            the value asked for by the query at t stands at ``labels[:, t + 1]``, everything else is -100
            (ignored).
        """
        generator = torch.Generator().manual_seed(seed)

        def distinct(ids: int, count: int) -> torch.Tensor:
            return torch.rand(batch_size, ids, generator=generator).argsort(dim=1)[:, :count]

        keys = distinct(self.keys, self.pairs)
        values = distinct(self.values, self.pairs) + self.keys
        asked = distinct(self.pairs, self.asked)
        fillers = torch.randint(self.filler_ids, (batch_size, self.fillers), generator=generator)

        units = self.pairs + self.asked
        tokens = torch.cat(
            [
                torch.stack([keys, values], dim=2).flatten(1),
                keys.gather(1, asked),
                fillers + self.keys + self.values,
            ],
            dim=1,
        )
        targets = torch.full_like(tokens, IGNORED)
        targets[:, 2 * self.pairs : 2 * self.pairs + self.asked] = values.gather(1, asked)
        # A pair or query is one unit at an integer time; fillers fall at the half-times before them.
        times = torch.arange(units, dtype=torch.float32)
        repeats = torch.tensor([2] * self.pairs + [1] * self.asked)
        unit_times = times.repeat_interleave(repeats).expand(batch_size, -1)
        filler_times = torch.randint(units, (batch_size, self.fillers), generator=generator) - 0.5
        order = torch.cat([unit_times, filler_times], dim=1).argsort(dim=1, stable=True)

        end = torch.full((batch_size, 1), self.vocab_size - 1)
        ignored = torch.full((batch_size, 1), IGNORED)
        input_ids = torch.cat([tokens.gather(1, order), end], dim=1)
        labels = torch.cat([ignored, targets.gather(1, order)], dim=1)
        return input_ids, labels


def recall_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of queries answered exactly: ``logits [B, T, vocab]``, ``labels [B, T]`` of ``batch``."""
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    return (logits[:, :-1].argmax(dim=-1) == targets)[wanted].float().mean().item()
