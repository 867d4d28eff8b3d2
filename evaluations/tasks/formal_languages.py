"""Formal languages: may the next letter be this one, at every position of a word?

Bhattamishra et al., *On the Ability and Limitations of Transformers to Recognize Formal Languages* (EMNLP
2020; `satwik77/Transformer-Formal-Languages`), as in table 5 of Nested Learning (arXiv 2512.24695). A model
reads a word and answers at every letter; a word counts when all of its answers are right.

The source: words of 2-50 letters, 10,000 of them, 25 epochs in batches of 32 (7,800 steps), width 32, one
layer, rate 0.005; bin 0 has the trained lengths, bin 1 the 50 after them; training ends where both are right.
Here: words drawn anew for every batch, lengths uniform; cross-entropy where the source has squared errors;
bits of parity uniform (the source makes all words even); Shuffle-2 by interleaving two words of Dyck-1 (the
source's are nested); aⁿbⁿ and aⁿbⁿcⁿ by the length of the word (the source's lengths are n).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from evaluations.task import TEST_SEED, VALIDATION_SEED, Batch, Task

PAD = 0
BINS = {"2-50": (2, 50), "51-100": (51, 100)}
TEST_WORDS = 500  # a bin; the source has 2,000


@dataclasses.dataclass(frozen=True)
class Language:
    """A language over ``letters``.

    Attributes:
        letters: of its words.
        period: word lengths are its multiples.
        word: draws one of a length.
        answers: what is asked at each letter of a word, ones and zeros [T, outputs].
        single: whether there is one word of each length.
    """

    letters: str
    period: int
    word: Callable[[int, torch.Generator], str]
    answers: Callable[[str], list[list[int]]]
    single: bool = False


def _bits(length: int, rng: torch.Generator) -> str:
    return "".join(map(str, torch.randint(2, (length,), generator=rng).tolist()))


def _dyck(pairs: int, opening: str, closing: str, rng: torch.Generator) -> str:
    """A balanced word, uniform among those of its length (the cycle lemma)."""
    steps = torch.tensor([1] * pairs + [-1] * (pairs + 1))[torch.randperm(2 * pairs + 1, generator=rng)]
    start = int(steps.cumsum(0).argmin()) + 1  # after the first minimum: the one rotation that is balanced
    rotated = torch.cat([steps[start:], steps[:start]])[:-1].tolist()
    return "".join(opening if step == 1 else closing for step in rotated)


def _shuffle(length: int, rng: torch.Generator) -> str:
    first = int(torch.randint(length // 2 + 1, (1,), generator=rng))
    words = [list(_dyck(first, "(", ")", rng)), list(_dyck(length // 2 - first, "[", "]", rng))]
    turns = torch.randperm(length, generator=rng).tolist()
    return "".join(words[turn >= 2 * first].pop(0) for turn in turns)


def _in_or_out(accepts: Callable[[str], bool]) -> Callable[[str], list[list[int]]]:
    def answers(word: str) -> list[list[int]]:
        return [[1, 0] if accepts(word[: i + 1]) else [0, 1] for i in range(len(word))]

    return answers


def _counted(letters: str) -> tuple[Callable, Callable]:
    """a^n b^n …: the next letters that may come, and the end T."""

    def word(length: int, _: torch.Generator) -> str:
        return "".join(letter * (length // len(letters)) for letter in letters)

    def answers(word: str) -> list[list[int]]:
        n = len(word) // len(letters)
        following = ["ab"] * n + [*word[n + 1 :], "T"]
        return [[int(letter in may) for letter in (*letters, "T")] for may in following]

    return word, answers


def _open(word: str) -> list[list[int]]:
    depths, rows = {"(": 0, "[": 0}, []
    for letter in word:
        opening = {")": "(", "]": "["}.get(letter, letter)
        depths[opening] += 1 if letter == opening else -1
        rows.append([1, int(depths["("] > 0), 1, int(depths["["] > 0)])
    return rows


LANGUAGES = {
    "parity": Language("01", 1, _bits, _in_or_out(lambda w: w.count("1") % 2 == 0)),
    "(aa)*": Language("a", 2, lambda n, _: "a" * n, _in_or_out(lambda w: len(w) % 2 == 0), single=True),
    "(abab)*": Language(
        "ab", 4, lambda n, _: "ab" * (n // 2), _in_or_out(re.compile("(abab)*").fullmatch), single=True
    ),
    "a^n b^n": Language("ab", 2, *_counted("ab"), single=True),
    "a^n b^n c^n": Language("abc", 3, *_counted("abc"), single=True),
    "shuffle-2": Language("()[]", 2, _shuffle, _open),
}

# Table 5 of Nested Learning: bin 0, bin 1.
PUBLISHED = {
    "LSTM": dict.fromkeys(LANGUAGES, (100.0, 100.0)),
    "Transformer": {
        "parity": (46.4, 0.0),
        **dict.fromkeys(["(aa)*", "(abab)*"], (0.0, 0.0)),
        **dict.fromkeys(["a^n b^n", "a^n b^n c^n", "shuffle-2"], (100.0, 100.0)),
    },
    "DeltaNet": {
        "parity": (98.2, 10.1),
        **dict.fromkeys(["(aa)*", "(abab)*"], (0.0, 0.0)),
        **dict.fromkeys(["a^n b^n", "a^n b^n c^n", "shuffle-2"], (100.0, 100.0)),
    },
    "Hope": dict.fromkeys(LANGUAGES, (100.0, 100.0)),
}


class FormalLanguage(Task):
    """One of :data:`LANGUAGES`."""

    scores = tuple(BINS)
    goal = 1.0

    def __init__(self, name: str) -> None:
        if name not in LANGUAGES:
            raise ValueError(f"name: expected one of {', '.join(LANGUAGES)}, got {name!r}")
        self.name = name
        self.language = LANGUAGES[name]
        self.vocabulary = len(self.language.letters) + 1
        self.outputs = len(self.language.answers(self.language.word(12, torch.Generator()))[0])

    def lengths(self, low: int, high: int) -> range:
        period = self.language.period
        return range(-(-low // period) * period, high + 1, period)

    def batch(self, size: int, seed: int) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        lengths = self.lengths(*BINS["2-50"])
        drawn = [lengths[i] for i in torch.randint(len(lengths), (size,), generator=rng).tolist()]
        return self.encode([self.language.word(length, rng) for length in drawn])

    def held_out(self, low: int, high: int, seed: int) -> list[str]:
        """Words of lengths ``low`` to ``high``, as many of each; all of them where there is one of each."""
        lengths = self.lengths(low, high)
        if self.language.single:
            return [self.language.word(length, torch.Generator()) for length in lengths]
        rng = torch.Generator().manual_seed(seed)
        return [self.language.word(lengths[i % len(lengths)], rng) for i in range(TEST_WORDS)]

    def encode(self, words: Sequence[str]) -> Batch:
        """Ids [B, T], and answers [B, T, outputs] with -1 behind a word's end."""
        longest = max(map(len, words))
        ids = torch.full((len(words), longest), PAD)
        answers = torch.full((len(words), longest, self.outputs), -1.0)
        for row, word in enumerate(words):
            ids[row, : len(word)] = torch.tensor([self.language.letters.index(x) + 1 for x in word])
            answers[row, : len(word)] = torch.tensor(self.language.answers(word), dtype=torch.float32)
        return ids, answers

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked = targets >= 0
        return F.binary_cross_entropy_with_logits(logits[asked], targets[asked])

    def right(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of which words [B] every answer is right."""
        return (((logits > 0) == (targets > 0.5)) | (targets < 0)).flatten(1).all(1)

    def evaluate(self, model: Callable[[torch.Tensor], torch.Tensor], final: bool) -> dict[str, float]:
        seed = TEST_SEED if final else VALIDATION_SEED
        scores = {}
        for name, bounds in BINS.items():
            words = self.held_out(*bounds, seed)
            right = [self.right(model(ids), answers) for ids, answers in map(self.encode, _parts(words, 250))]
            scores[name] = torch.cat(right).float().mean().item()
        return scores


def _parts(words: list[str], size: int) -> list[list[str]]:
    return [words[i : i + size] for i in range(0, len(words), size)]


TASKS = dict.fromkeys(LANGUAGES, FormalLanguage)
