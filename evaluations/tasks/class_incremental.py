"""Class-incremental learning: digits in five parts of two classes, intents in seven of three.

Nested Learning (arXiv 2512.24695, figure 6) has CLINC, Banking and DBpedia for transformers of 3 and 8
billion parameters; the scores that were read off it stand below. Here a transformer of 0.1 million
parameters learns

- digits (scikit-learn, 1,797 images), pooled to 4 × 4 pixels of 17 levels: 16 tokens and the class;
- intents (``chatterbot-corpus``, English): lines of 21 topics, at most 60 a topic, and the topic.

The base knows the domain and what classes are, but none of these: it is trained on other texts of the same
source (600 images, the other lines) in whose context groups found by k-means have class tokens that are
drawn anew for every context. Then documents are read once, part by part; every class may be answered at any
time. Each score is the mean over classes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from evaluations.learners import Learner
from evaluations.streams import Course, require_package

SIZES = {"digits": (10, 2), "intents": (21, 3)}  # classes, and those of a part
BASE_BATCH = 8
GROUPS = 24  # of k-means
IN_A_CONTEXT = 4  # of these
LONGEST = 20  # tokens of a line
LINES = 60
# CLINC, Banking and DBpedia with a transformer of 3 billion parameters, figure 6 of Nested Learning (±0.3).
PUBLISHED_FIGURE = {
    "In context": (58.2, 51.1, 35.5),
    "EWC": (60.8, 53.9, 39.2),
    "Hope": (69.1, 63.7, 42.4),
}


class Data(NamedTuple):
    """Documents without classes, and by class what is read, validation and test documents."""

    symbols: int
    groups: list[list[torch.Tensor]]
    read: list[list[torch.Tensor]]
    validation: list[list[torch.Tensor]]
    test: list[list[torch.Tensor]]


@functools.cache
def load(name: str) -> Data:
    return {"digits": _digits, "intents": _intents}[name]()


def _digits() -> Data:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    ids = torch.nn.functional.avg_pool2d(images, 2).flatten(1).round().long()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    ids, classes = ids[order], torch.tensor(classes)[order]
    by_class = [[*ids[600:][classes[600:] == c]] for c in range(10)]
    return Data(17, _groups(ids[:600].float(), list(ids[:600])), *_split(by_class, 80))


def _intents() -> Data:
    import yaml
    from sklearn.feature_extraction.text import TfidfVectorizer

    from nl_models.data import train_bpe

    folder = require_package("chatterbot_corpus", "chatterbot-corpus") / "data/english"
    rng = torch.Generator().manual_seed(0)
    topics, others = [], []
    for path in sorted(folder.glob("*.yml")):
        conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        lines = sorted({str(line) for conversation in conversations for line in conversation})
        lines = [lines[index] for index in torch.randperm(len(lines), generator=rng).tolist()]
        count = min(LINES, 2 * len(lines) // 3)
        topics.append(lines[:count])
        others += lines[count:]
    tokenizer = train_bpe([line for lines in (*topics, others) for line in lines], vocab_size=512)

    def encode(lines: list[str]) -> list[torch.Tensor]:
        return [torch.tensor(ids[:LONGEST]) for ids in tokenizer.encode_batch(lines)]

    found = TfidfVectorizer(max_features=500).fit_transform(others).toarray()
    groups = _groups(torch.tensor(found, dtype=torch.float32), encode(others))
    return Data(tokenizer.vocab_size, groups, *_split([encode(lines) for lines in topics], None))


def _groups(features: torch.Tensor, documents: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    from sklearn.cluster import KMeans

    labels = KMeans(GROUPS, n_init=1, random_state=0).fit_predict(features.numpy())
    groups = [[documents[i] for i in (labels == group).nonzero()[0]] for group in range(GROUPS)]
    return [group for group in groups if len(group) > 1]


def _split(by_class: list[list[torch.Tensor]], read: int | None) -> tuple[list[list[torch.Tensor]], ...]:
    """``read`` of each class, or two thirds, and halves of the rest, at least one document each."""
    parts: tuple[list[list[torch.Tensor]], ...] = ([], [], [])
    for documents in by_class:
        first = read or min(2 * len(documents) // 3, len(documents) - 2)
        middle = (first + len(documents)) // 2
        for part, piece in zip(parts, (documents[:first], documents[first:middle], documents[middle:])):
            part.append(piece)
    return parts


class ClassIncremental(Course):
    """One of :data:`SIZES`."""

    classes = True

    def __init__(self, name: str) -> None:
        if name not in SIZES:
            raise ValueError(f"name: expected one of {', '.join(SIZES)}, got {name!r}")
        self.name = name
        self.count, self.each = SIZES[name]
        starts = range(0, self.count, self.each)
        self.parts = tuple(f"{first}–{first + self.each - 1}" for first in starts)

    @property
    def data(self) -> Data:
        return load(self.name)

    @property
    def vocabulary(self) -> int:
        return self.data.symbols + self.count

    def _document(self, text: torch.Tensor, label: int) -> torch.Tensor:
        return torch.cat([text, torch.tensor([self.data.symbols + label])])

    def base_batch(self, rng: torch.Generator) -> torch.Tensor:
        rows = []
        for _ in range(BASE_BATCH):
            groups = torch.randperm(len(self.data.groups), generator=rng)[:IN_A_CONTEXT].tolist()
            labels = torch.randperm(self.count, generator=rng)[:IN_A_CONTEXT].tolist()
            row: list[torch.Tensor] = []
            while sum(map(len, row)) < self.context:
                drawn = int(torch.randint(IN_A_CONTEXT, (1,), generator=rng))
                group = self.data.groups[groups[drawn]]
                text = group[int(torch.randint(len(group), (1,), generator=rng))]
                row.append(self._document(text, labels[drawn]))
            rows.append(torch.cat(row)[: self.context])
        return torch.stack(rows)

    def documents(self, part: int, seed: int) -> list[torch.Tensor]:
        order = torch.Generator().manual_seed(1000 * seed + part)
        found = [
            self._document(text, label) for label in self._classes(part) for text in self.data.read[label]
        ]
        return [found[index] for index in torch.randperm(len(found), generator=order).tolist()]

    def score(self, learner: Learner, part: int, final: bool) -> float:
        texts, shares = self.data.test if final else self.data.validation, []
        for label in self._classes(part):
            ids = torch.nn.utils.rnn.pad_sequence(texts[label], batch_first=True)
            ends = torch.tensor([len(text) - 1 for text in texts[label]])
            logits = learner.logits(ids)[torch.arange(len(ids)), ends, self.data.symbols :]
            shares.append((logits.argmax(-1) == label).float().mean().item())
        return sum(shares) / len(shares)

    def _classes(self, part: int) -> range:
        return range(part * self.each, (part + 1) * self.each)


TASKS = dict.fromkeys(SIZES, ClassIncremental)
