"""Multi-query associative recall, and the same where keys get new values: only the last one counts.

Zoology (Arora et al., arXiv 2312.04927; `HazyResearch/zoology`, `multiquery_ar.py` and `forgetting_mqar.py`).
The first 2n tokens are key-value pairs; "forgetting" appends new values of some of the keys. Then keys come
again in places drawn by a power law, random tokens between them, and the answer to a key is its last value.

The source: vocabulary 8,192, lengths and pairs (64, 4), (128, 8), (256, 16 to 64) in training and to 1,024
with 256 in tests; forgetting: 8 pairs, 4 updates; two layers, width 64 to 256, batches of 256, 32 epochs of
180,000 sequences, four rates. Published as curves alone. Here: vocabulary 128, width 64, fresh batches of 32,
trained at one length each; tested there and at twice the pairs and length, which the source does as well.
None of the random tokens is a key of its sequence, as hardly one is in the source's vocabulary. Of 128 many
were, and then one with a value behind it spoils what was written: what answers best writes nothing behind the
place of training's last pair, which at twice the pairs is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from evaluations.task import IGNORED, TEST_SEED, VALIDATION_SEED, Batch, Task, accuracy

VOCABULARY = 128
POWER = 0.01
TEST_SEQUENCES = 500
SIZES = {"mqar": (64, 8, 0), "forgetting mqar": (64, 8, 4)}  # length, pairs, updates


def draw(count: int, length: int, pairs: int, updates: int, seed: int, vocabulary: int = VOCABULARY) -> Batch:
    """``count`` sequences: ids [count, length] and targets, of which the ones asked for are not ignored.

    Keys are ids from 1 below half of the vocabulary, distinct in a sequence; values are the other half.
    Random tokens are values and other sequences' keys.
    """
    context = 2 * (pairs + updates)
    if context + 2 * pairs > length:
        raise ValueError(f"length: expected at least {context + 2 * pairs}, got {length}")
    rng = torch.Generator().manual_seed(seed)
    half = vocabulary // 2
    others = torch.rand(count, half - 1, generator=rng).argsort(1) + 1
    keys, others = others[:, :pairs], others[:, pairs:]
    values = torch.rand(count, half, generator=rng).argsort(1)[:, :pairs] + half
    updated = torch.rand(count, pairs, generator=rng).argsort(1)[:, :updates]
    # Another value than the one before: any step round the values but a whole turn.
    steps = torch.randint(1, half, (count, updates), generator=rng)
    new = (values.gather(1, updated) - half + steps) % half + half
    final = values.scatter(1, updated, new)

    places = torch.arange(1, (length - context) // 2 + 1)
    weights = (POWER * places ** (POWER - 1)).expand(count, -1)
    gaps = 2 * torch.multinomial(weights, pairs, generator=rng) + context
    filling = torch.cat([others, torch.arange(half, 2 * half).expand(count, -1)], 1)
    ids = filling.gather(1, torch.randint(filling.shape[1], (count, length), generator=rng))
    ids[:, 0:context:2] = torch.cat([keys, keys.gather(1, updated)], 1)
    ids[:, 1:context:2] = torch.cat([values, new], 1)
    ids.scatter_(1, gaps, keys)
    targets = torch.full((count, length), IGNORED).scatter_(1, gaps, final)
    return ids, targets


class Recall(Task):
    """One of :data:`SIZES`."""

    goal = 0.999
    scores = ("same", "twice")

    def __init__(self, name: str) -> None:
        if name not in SIZES:
            raise ValueError(f"name: expected one of {', '.join(SIZES)}, got {name!r}")
        self.name = name
        self.vocabulary = self.outputs = VOCABULARY

    def batch(self, size: int, seed: int) -> Batch:
        return draw(size, *SIZES[self.name], seed)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def evaluate(self, model: Callable[[torch.Tensor], torch.Tensor], final: bool) -> dict[str, float]:
        """Share of right answers, at the trained length and pairs, and at twice both."""
        seed, found = TEST_SEED if final else VALIDATION_SEED, {}
        for name, times in (("same", 1), ("twice", 2)):
            ids, targets = draw(TEST_SEQUENCES, *(times * size for size in SIZES[self.name]), seed)
            found[name] = accuracy(model, ids, targets)
        return found


TASKS = dict.fromkeys(SIZES, Recall)
PUBLISHED: dict[str, dict[str, float]] = {}  # curves alone
