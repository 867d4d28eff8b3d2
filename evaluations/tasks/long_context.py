"""Long context in a small vocabulary: needles, variable tracking, and facts that change, in noise.

RULER's needles and variable tracking (Hsieh et al., arXiv 2404.06654) and BABILong's facts in noise (Kuratov
et al., arXiv 2406.10149), as in table 1 and figure 9 of Nested Learning (arXiv 2512.24695), which has models
of 760M parameters and English text: its scores are not on one scale with ours.

A statement is a pair of tokens, ``key value``, among random noise tokens; a question is ``ASK key``. In
training four or six statements are in the first half of a sequence, and questions to each key in the second,
answers never shown: 250 steps with 64 tokens, one question to a key, in which recall is learned, then as
many tokens a step in sequences of 512, eight questions to a key, in which it has to last. Tested on streams
of up to 256 times that length, statements at evenly spaced depths from the first token to just before the
end, read in pieces with the state carried; questions are put to copies of the state at the end of a stream,
so that none changes it. Lengths beyond one at which less than a tenth is right are not read.

- needle: four keys with a value each, one is asked for; "single": one key in the whole stream.
- multi-value: two keys with three values each, all of which are asked for. A value is right if it is among
  the three that the model holds most likely.
- tracking: two chains of three variables, ``X value``, ``Y X``, ``Z Y``: which value has each?
- changing facts: three keys with two values, one after the other: the last one counts.

Softmax attention keeps every token of a stream and is tested up to 8K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from evaluations.models import LanguageModel
from evaluations.task import IGNORED, TEST_SEED, VALIDATION_SEED, Batch, Task
from nl_models.hope import HopeCache

NOISE, KEYS, VALUES = range(16), range(16, 48), range(48, 80)
ASK = VALUES.stop
VOCABULARY = ASK + 1
SHORT, TRAINED = 64, 512
SHORT_STEPS = 250
LENGTHS = {"512": TRAINED, "2K": 2**11, "8K": 2**13, "32K": 2**15, "128K": 2**17}
LOST = 0.1
ATTENDED = 2**13  # tokens, at most, of models that keep them all
STREAMS = 16
VALIDATION_SEQUENCES = 250
PIECE = 1024


class Facts(NamedTuple):
    """What sequences say, in order, and what is asked of each.

    Attributes:
        statements: ``[B, S, 2]`` tokens.
        keys: ``[B, Q]``, asked for.
        answers: ``[B, Q, A]``, the values of each.
        told: ``[B, Q, A]``, the statements that told them.
    """

    statements: torch.Tensor
    keys: torch.Tensor
    answers: torch.Tensor
    told: torch.Tensor


def _distinct(count: int, size: int, of: range, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(count, len(of), generator=rng).argsort(1)[:, :size] + of.start


def _owned(count: int, owners: int, each: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Owners [count, owners · each] of statements in random order, and the statements of each in order."""
    owner = torch.rand(count, owners * each, generator=rng).argsort(1) // each
    return owner, owner.argsort(dim=1, stable=True).view(count, owners, each)


def needle(count: int, rng: torch.Generator, needles: int = 4) -> Facts:
    keys, values = _distinct(count, needles, KEYS, rng), _distinct(count, needles, VALUES, rng)
    told = torch.arange(needles).expand(count, -1)
    return Facts(torch.stack([keys, values], 2), keys, values[..., None], told[..., None])


def single(count: int, rng: torch.Generator) -> Facts:
    return needle(count, rng, needles=1)


def multi_value(count: int, rng: torch.Generator) -> Facts:
    owner, told = _owned(count, 2, 3, rng)
    keys, values = _distinct(count, 2, KEYS, rng), _distinct(count, 6, VALUES, rng)
    answers = values.gather(1, told.flatten(1)).view(told.shape)
    return Facts(torch.stack([keys.gather(1, owner), values], 2), keys, answers, told)


def changing_facts(count: int, rng: torch.Generator) -> Facts:
    owner, told = _owned(count, 3, 2, rng)
    keys, values = _distinct(count, 3, KEYS, rng), _distinct(count, 6, VALUES, rng)
    told = told[..., 1:]
    answers = values.gather(1, told.flatten(1)).view(told.shape)
    return Facts(torch.stack([keys.gather(1, owner), values], 2), keys, answers, told)


def tracking(count: int, rng: torch.Generator) -> Facts:
    chains, links = 2, 3
    _, told = _owned(count, chains, links, rng)
    names = _distinct(count, chains * links, KEYS, rng).view(told.shape)
    values = _distinct(count, chains, VALUES, rng)[..., None]
    says = torch.stack([names, torch.cat([values, names[..., :-1]], 2)], 3)
    statements = torch.empty(count, chains * links, 2, dtype=torch.int64)
    statements.scatter_(1, told.reshape(count, -1, 1).expand(-1, -1, 2), says.flatten(1, 2))
    answers = values.expand(told.shape).reshape(count, -1, 1)
    return Facts(statements, names.flatten(1), answers, told.reshape(count, -1, 1))


GENERATORS = {
    "needle": needle,
    "multi-value": multi_value,
    "tracking": tracking,
    "changing facts": changing_facts,
}
# Right answers at 4K / 16K, table 1 of Nested Learning: multi-key and multi-value needles.
PUBLISHED = {
    "Transformer": {"needle": (79.4, 61.4), "multi-value": (37.5, 21.5)},
    "Titans": {"needle": (26.4, 8.2), "multi-value": (24.6, 8.2)},
    "Hope": {"needle": (29.4, 14.8), "multi-value": (31.4, 11.4)},
    "Hope-Attention": {"needle": (80.2, 60.8), "multi-value": (35.2, 24.8)},
}


def _noise(count: int, length: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(len(NOISE), (count, length), generator=rng)


def draw(facts: Facts, rng: torch.Generator, length: int) -> Batch:
    """Sequences as in training: ids [B, length], and answers [B, length, A] where a question ends."""
    count, half, times = len(facts.keys), length // 2, length // SHORT
    keys, told = facts.keys.repeat(1, times), facts.answers.repeat(1, times, 1)

    def pairs(pairs: torch.Tensor, first: int, ordered: bool) -> torch.Tensor:
        places = torch.rand(count, half // 2, generator=rng).argsort(1)[:, : pairs.shape[1]]
        places = first + 2 * (places.sort(1).values if ordered else places)
        ids.scatter_(1, places, pairs[..., 0]).scatter_(1, places + 1, pairs[..., 1])
        return places + 1

    ids = _noise(count, length, rng)
    pairs(facts.statements, 0, ordered=True)
    asked = pairs(torch.stack([torch.full_like(keys, ASK), keys], 2), half, ordered=False)
    targets = torch.full((count, length, told.shape[2]), IGNORED)
    targets.scatter_(1, asked[..., None].expand(told.shape), told)
    return ids, targets


def streams(facts: Facts, length: int, rng: torch.Generator) -> torch.Tensor:
    """Ids [B, length] without questions; statements from the first token to just before the end."""
    ids = _noise(len(facts.keys), length, rng)
    count = facts.statements.shape[1]
    for index, start in enumerate(depth_places(count, length)):
        ids[:, start : start + 2] = facts.statements[:, index]
    return ids


def depth_places(count: int, length: int) -> list[int]:
    """Where each of the statements begins; a single one in the middle."""
    if count == 1:
        return [length // 2]
    return [index * (length - 4) // (count - 1) for index in range(count)]


def right(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Whether each of ``answers [..., A]`` is among the A likeliest of ``logits [..., V]``."""
    return (logits.topk(answers.shape[-1]).indices[..., None] == answers[..., None, :]).any(-2)


def ask(model: LanguageModel, ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits [B, Q, V] of questions to the state after ``ids [B, T]``, each put to a copy of it."""
    hope, (count, questions) = model.hope, keys.shape
    cache = HopeCache(hope.config)
    for piece in ids.split(PIECE, 1):
        hope.model(input_ids=piece, cache=cache, use_cache=True)
    cache = cache.select(torch.arange(count).repeat_interleave(questions))
    question = torch.stack([torch.full_like(keys, ASK), keys], 2).flatten(0, 1)
    hidden = hope.model(input_ids=question, cache=cache, use_cache=True).last_hidden_state
    return hope.lm_head(hidden[:, -1]).view(count, questions, -1)


def by_statement(found: torch.Tensor, facts: Facts) -> list[float | None]:
    """Share of right answers by the statement that told them; ``None`` where none counts."""
    shares = []
    for index in range(facts.statements.shape[1]):
        here = facts.told == index
        shares.append(found[here].float().mean().item() if here.any() else None)
    return shares


class LongContext(Task):
    """One of :data:`GENERATORS`."""

    goal = None
    head = "tied"
    vocabulary = outputs = VOCABULARY
    scores = tuple(LENGTHS)

    def __init__(self, name: str, lengths: tuple[str, ...] = tuple(LENGTHS)) -> None:
        if name not in GENERATORS:
            raise ValueError(f"name: expected one of {', '.join(GENERATORS)}, got {name!r}")
        self.name, self.lengths = name, lengths

    def batch(self, size: int, seed: int) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        step = seed % 1_000_003  # as evaluations.training counts them
        length = SHORT if step < SHORT_STEPS else TRAINED
        return draw(GENERATORS[self.name](max(1, size * SHORT // length), rng), rng, length)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with the answers of each question, all of them as likely."""
        asked = targets[..., 0] != IGNORED
        answers = targets[asked]
        logits = logits[asked][:, None].expand(-1, answers.shape[1], -1)
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten())

    def evaluate(self, model: Callable[[torch.Tensor], torch.Tensor], final: bool) -> dict[str, float]:
        """Share of right answers: of validation sequences of 64 and streams of 512; of test
        streams by length, and by length and depth.

        Names of the latter are "length@depth", those with one needle "single length". "fresh" has the answers
        at the last of these lengths when only the last 512 tokens are read.
        """
        if not final:
            rng = torch.Generator().manual_seed(VALIDATION_SEED)
            ids, targets = draw(GENERATORS[self.name](VALIDATION_SEQUENCES, rng), rng, SHORT)
            asked = targets[..., 0] != IGNORED
            near = right(model(ids)[asked], targets[asked]).float().mean().item()
            ids, facts = self._stream(GENERATORS[self.name], TRAINED, VALIDATION_SEED)
            far = right(ask(model, ids, facts.keys), facts.answers).float().mean().item()
            return {"64": near, "512": far}
        attends = "full_attention" in model.hope.config.layer_types
        scores, cells, best = {}, {}, 1.0
        for name in self.lengths:
            if best < LOST or (attends and LENGTHS[name] > ATTENDED):
                break
            ids, facts = self._stream(GENERATORS[self.name], LENGTHS[name])
            found = right(ask(model, ids, facts.keys), facts.answers)
            best = scores[name] = found.float().mean().item()
            statements = facts.statements.shape[1]
            for index, share in enumerate(by_statement(found, facts)):
                if share is not None:
                    cells[f"{name}@{index / (statements - 1):.2f}"] = share
            if self.name == "needle":
                one, alone = self._stream(single, LENGTHS[name])
                alone_found = right(ask(model, one, alone.keys), alone.answers).float().mean().item()
                cells[f"single {name}"] = alone_found
                best = max(best, alone_found)
        fresh = right(ask(model, ids[:, -TRAINED:], facts.keys), facts.answers)
        return {**scores, "fresh": fresh.float().mean().item(), **cells}

    @staticmethod
    def _stream(
        generator: Callable[..., Facts], length: int, seed: int = TEST_SEED
    ) -> tuple[torch.Tensor, Facts]:
        rng = torch.Generator().manual_seed(seed + length)
        facts = generator(STREAMS, rng)
        return streams(facts, length, rng), facts


TASKS = dict.fromkeys(GENERATORS, LongContext)
