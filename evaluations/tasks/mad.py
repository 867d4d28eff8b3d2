"""Five tasks of MAD: compression, in-context recall, fuzzy recall, selective copying, memorisation.

Poli et al., *Mechanistic Design and Scaling of Hybrid Architectures* (arXiv 2403.17844; `athms/mad-lab`), as
in table 4 of Nested Learning (arXiv 2512.24695).

The source: sizes as below; 12,800 sequences (memorisation 256), 200 epochs of batches of 128, width 128, two
blocks, rates 1e-4, 5e-4 and 1e-3 with weight decay 0 and 0.1; the mean over harder variants of each task is
what is published. Here: the first variant alone, sequences drawn anew for every batch, and the share of right
answers (the source averages over classes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from evaluations.task import IGNORED, TEST_SEED, VALIDATION_SEED, Batch, Task, accuracy

VOCABULARY = 16
MEMORISED = 256  # its vocabulary
TEST_SEQUENCES = 500


def compression(count: int, rng: torch.Generator, training: bool) -> Batch:
    """Random tokens and a last one, from whose output all are to be read."""
    ids = torch.randint(VOCABULARY - 1, (count, 32), generator=rng)
    ids[:, -1] = VOCABULARY - 1
    return ids, ids.clone()


def in_context_recall(count: int, rng: torch.Generator, training: bool) -> Batch:
    """Pairs of keys and values, each key with one value; the value of a key that was there before is asked.

    In training every next token is.
    """
    keys = torch.randint(VOCABULARY // 2, (count, 64), generator=rng)
    # The last key is one that was there.
    keys[:, -1:] = keys.gather(1, torch.randint(63, (count, 1), generator=rng))
    value_of = torch.randint(VOCABULARY // 2, VOCABULARY, (count, VOCABULARY // 2), generator=rng)
    ids = torch.stack([keys, value_of.gather(1, keys)], 2).flatten(1)
    seen = F.one_hot(keys, VOCABULARY // 2).cumsum(1).gather(2, keys[..., None])[..., 0] > 1
    asked = torch.stack([torch.zeros_like(seen), seen], 2).flatten(1)
    return _next_tokens(ids, asked, training)


def fuzzy_recall(count: int, rng: torch.Generator, training: bool) -> Batch:
    """Keys and values of one to three tokens (keys of three in tests)."""
    rows = [_fuzzy(rng, training) for _ in range(count)]
    ids, asked = (torch.stack(parts) for parts in zip(*rows))
    return _next_tokens(ids, asked, training)


def _fuzzy(rng: torch.Generator, training: bool, length: int = 128, longest: int = 3) -> Batch:
    pad = VOCABULARY - 1
    half = pad // 2

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    def motif(first: int, stop: int, size: int) -> tuple[int, ...]:
        return tuple((torch.randperm(stop - first, generator=rng)[:size] + first).tolist())

    def key() -> tuple[int, ...]:
        return motif(0, half, draw(1, longest + 1) if training else longest)

    def value() -> tuple[int, ...]:
        return motif(half, pad, draw(1, longest + 1))

    probe = key()
    values = {probe: value()}
    size = len(probe) + len(values[probe])
    stop = length - size - 2 * longest
    probe_from, ids, asked, seen = draw(0, stop - 2 * longest), [], [], set()
    while len(ids) < stop:
        now = probe if len(ids) >= probe_from and probe not in seen else key()
        ids += [*now, *values.setdefault(now, value())]
        asked += [False] * len(now) + [now in seen] * len(values[now])
        seen.add(now)
    ids += [*probe, *values[probe]]
    asked += [False] * len(probe) + [True] * len(values[probe])
    padding = length + 1 - len(ids)
    return torch.tensor([pad] * padding + ids), torch.tensor([False] * padding + asked)


def selective_copying(count: int, rng: torch.Generator, training: bool) -> Batch:
    """16 tokens among blanks, to be said again in their order after the copy token."""
    copies, length = 16, 256
    copy, blank = VOCABULARY - 1, VOCABULARY - 2
    tokens = torch.randint(blank, (count, copies), generator=rng)
    before = length - copies - 1
    places = torch.rand(count, before, generator=rng).argsort(1)[:, :copies].sort(1).values
    ids = torch.full((count, length), blank)
    ids.scatter_(1, places, tokens)[:, before] = copy
    targets = torch.full((count, length), IGNORED)
    targets[:, -copies:] = tokens
    return ids, targets


def memorisation(count: int, rng: torch.Generator, training: bool) -> Batch:
    """Keys, each followed by a token in whose place its value is asked: the same one in all sequences."""
    insert = MEMORISED - 1
    keys = insert // 2
    value_of = torch.randperm(insert - keys, generator=torch.Generator().manual_seed(12345)) + keys
    drawn = torch.randint(keys, (count, 16), generator=rng)
    ids = torch.stack([drawn, torch.full_like(drawn, insert)], 2).flatten(1)
    targets = torch.stack([torch.full_like(drawn, IGNORED), value_of[drawn]], 2).flatten(1)
    return ids, targets


def _next_tokens(ids: torch.Tensor, asked: torch.Tensor, training: bool) -> Batch:
    targets = ids[:, 1:]
    return ids[:, :-1], targets if training else targets.masked_fill(~asked[:, 1:], IGNORED)


GENERATORS = {
    "compression": compression,
    "in-context recall": in_context_recall,
    "fuzzy recall": fuzzy_recall,
    "selective copying": selective_copying,
    "memorisation": memorisation,
}
# Table 4 of Nested Learning, means over harder variants.
PUBLISHED = {
    model: dict(zip(GENERATORS, scores))
    for model, scores in {
        "Transformer": (49.4, 100.0, 47.9, 96.2, 83.7),
        "Titans": (49.8, 100.0, 50.0, 99.4, 83.4),
        "Hope": (51.2, 100.0, 52.1, 99.7, 85.2),
    }.items()
}


class Mad(Task):
    """One of :data:`GENERATORS`."""

    goal = 0.999
    scores = ("accuracy",)

    def __init__(self, name: str) -> None:
        if name not in GENERATORS:
            raise ValueError(f"name: expected one of {', '.join(GENERATORS)}, got {name!r}")
        self.name = name
        self.vocabulary = self.outputs = MEMORISED if name == "memorisation" else VOCABULARY
        self.head = "pooled" if name == "compression" else "linear"

    def draw(self, count: int, seed: int, training: bool) -> Batch:
        return GENERATORS[self.name](count, torch.Generator().manual_seed(seed), training)

    def batch(self, size: int, seed: int) -> Batch:
        return self.draw(size, seed, training=True)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def evaluate(self, model: Callable[[torch.Tensor], torch.Tensor], final: bool) -> dict[str, float]:
        seed = TEST_SEED if final else VALIDATION_SEED
        return {"accuracy": accuracy(model, *self.draw(TEST_SEQUENCES, seed, training=False))}


TASKS = dict.fromkeys(GENERATORS, Mad)
