"""What learns from a stream of documents, one part after the other, starting from the same transformer."""

from __future__ import annotations

import abc
import copy
import functools
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from evaluations.models import make, parameters
from evaluations.task import IGNORED
from nl_models import HopeForCausalLM
from nl_models.continual import ContinuumLearner, StepRule
from nl_models.evaluation.token_losses import token_losses
from nl_models.hope import HopeCache
from nl_models.surgery import convert_mlp_to_continuum

FAST, SLOW, SLOWEST = 128, 1024, 4096  # tokens between steps

# Shares of the MLPs and tokens between steps, fast to slow; rules as in docs/continual_learning.md.
LEVELS = {
    1: ((1.0, FAST, "sgd"),),
    2: ((1 / 4, FAST, "sgd"), (3 / 4, SLOW, "muon")),
    3: ((1 / 4, FAST, "sgd"), (3 / 8, SLOW, "muon"), (3 / 8, SLOWEST, "muon")),
}


def make_base(vocabulary: int, width: int, context: int) -> LlamaForCausalLM:
    """A transformer of two layers, drawn at random."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            initializer_range=(0.4 / width) ** 0.5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def make_hope_base(vocabulary: int, width: int, context: int) -> HopeForCausalLM:
    """A Hope of two layers with as many parameters, its continuum as by default."""
    sizes = ("hope_continuum", vocabulary, vocabulary)
    made = functools.partial(make, *sizes, width=width, layers=2, heads=2, head="tied")
    with torch.device("meta"):
        wanted = parameters(make_base(vocabulary, width, context))
        least, more = (parameters(made(inner=inner)) for inner in (8, 16))
    return made(inner=8 + 8 * round((wanted - least) / (more - least))).hope


class Learner(abc.ABC):
    """One way to learn. ``seconds`` and ``tokens`` count what was read for learning."""

    elsewhere = False

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    def read(self, documents: Sequence[torch.Tensor]) -> float:
        """Learn a part of the stream, documents ``[T]``; nats per token, each before a step on it."""
        began = time.perf_counter()
        loss = self._read(documents)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(map(len, documents))
        return loss

    @abc.abstractmethod
    def _read(self, documents: Sequence[torch.Tensor]) -> float: ...

    @abc.abstractmethod
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """``[N, T, V]`` for new texts ``[N, T]``; nothing is learned."""

    @abc.abstractmethod
    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        """``[N, T']``, prompts included."""

    def loss(self, documents: Sequence[torch.Tensor]) -> float:
        """Nats per token of new documents; nothing is learned."""
        with torch.no_grad():
            losses = [
                F.cross_entropy(self.logits(d[None])[0, :-1], d[1:], reduction="sum") for d in documents
            ]
        return torch.stack(losses).sum().item() / sum(len(d) - 1 for d in documents)


class Transformer(Learner):
    """Learns nothing: the base as it is."""

    def __init__(self, base: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = copy.deepcopy(base).eval()

    def _read(self, documents: Sequence[torch.Tensor]) -> float:
        return self.loss(documents)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits

    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        return self.model.generate(ids, **options)


class InContext(Transformer):
    """What was read last stands in front of every text, as many documents as its context takes.

    Of documents that end in a class (``classes``), the newest of every class in turn.
    """

    def __init__(self, base: LlamaForCausalLM, classes: bool) -> None:
        super().__init__(base)
        self.classes, self.documents = classes, []

    def _read(self, documents: Sequence[torch.Tensor]) -> float:
        losses = 0.0
        for document in documents:
            losses += self.loss([document]) * (len(document) - 1)
            self.documents.insert(0, document)
        return losses / sum(len(document) - 1 for document in documents)

    def prefix(self, room: int) -> torch.Tensor:
        """At most ``room`` tokens, the newest document last."""
        documents = self.documents
        if self.classes:
            by_class: dict[int, list[torch.Tensor]] = {}
            for document in documents:
                by_class.setdefault(int(document[-1]), []).append(document)
            turns = itertools.zip_longest(*by_class.values())
            documents = [document for turn in turns for document in turn if document is not None]
        taken: list[torch.Tensor] = []
        for document in documents:
            if sum(map(len, taken)) + len(document) > room:
                break
            taken.append(document)
        return torch.cat([torch.empty(0, dtype=torch.int64), *taken[::-1]])

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        prefix = self.prefix(self.model.config.max_position_embeddings - ids.shape[1])
        return super().logits(torch.cat([prefix.expand(len(ids), -1), ids], 1))[:, len(prefix) :]

    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        longest = ids.shape[1] + options["max_new_tokens"]
        prefix = self.prefix(self.model.config.max_position_embeddings - longest)
        if "attention_mask" in options:
            ones = torch.ones(len(ids), len(prefix), dtype=torch.int64)
            options["attention_mask"] = torch.cat([ones, options["attention_mask"]], 1)
        return super().generate(torch.cat([prefix.expand(len(ids), -1), ids], 1), **options)[:, len(prefix) :]


class FineTuning(Transformer):
    """AdamW on all parameters.

    Args:
        batch_size: documents of a step, on their mean loss.
        penalty: of elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796): λ/2 Σ F (θ − θ*)²,
            F summed over the parts, from 64 documents of each; 0: none.
        replayed: documents kept of all that was read, each as likely (reservoir sampling), of which every
            step takes as many as of new ones; 0: none.
    """

    fisher_documents = 64

    def __init__(
        self,
        base: LlamaForCausalLM,
        rate: float,
        batch_size: int = 8,
        penalty: float = 0.0,
        replayed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        self.batch_size, self.penalty, self.replayed = batch_size, penalty, replayed
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        self.rng = torch.Generator().manual_seed(seed)
        self.memory: list[torch.Tensor] = []
        self.seen = 0
        self.fisher: list[torch.Tensor] = []
        self.anchor: list[torch.Tensor] = []

    def _read(self, documents: Sequence[torch.Tensor]) -> float:
        losses = 0.0
        for start in range(0, len(documents), self.batch_size):
            new = list(documents[start : start + self.batch_size])
            old = self._draw(len(new)) if self.memory else []
            ids, targets = padded([*new, *old])
            # As many new tokens as old ones in the mean, whatever their lengths.
            loss = F.cross_entropy(self.model(ids).logits[:, :-1].mT, targets[:, 1:], reduction="none")
            losses += loss[: len(new)].detach().sum().item()
            loss = loss.sum() / (targets[:, 1:] != IGNORED).sum()
            if self.fisher:
                moved = zip(self.fisher, self.model.parameters(), self.anchor)
                loss = loss + self.penalty / 2 * sum((f * (p - a).square()).sum() for f, p, a in moved)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            for document in new:
                self._keep(document)
        if self.penalty:
            self._consolidate(documents)
        return losses / sum(len(d) - 1 for d in documents)

    def _draw(self, count: int) -> list[torch.Tensor]:
        return [
            self.memory[i] for i in torch.randint(len(self.memory), (count,), generator=self.rng).tolist()
        ]

    def _keep(self, document: torch.Tensor) -> None:
        place = int(torch.randint(self.seen + 1, (1,), generator=self.rng))
        self.seen += 1
        if len(self.memory) < self.replayed:
            self.memory.append(document)
        elif place < self.replayed:
            self.memory[place] = document

    def _consolidate(self, documents: Sequence[torch.Tensor]) -> None:
        parameters = list(self.model.parameters())
        chosen = torch.randperm(len(documents), generator=self.rng)[: self.fisher_documents].tolist()
        fisher = [torch.zeros_like(p) for p in parameters]
        for index in chosen:
            document = documents[index][None]
            loss = F.cross_entropy(self.model(document).logits[:, :-1].mT, document[:, 1:], reduction="sum")
            for total, gradient in zip(fisher, torch.autograd.grad(loss, parameters)):
                total += gradient.square() / len(chosen)
        self.fisher = [a + b for a, b in zip(self.fisher, fisher)] if self.fisher else fisher
        self.anchor = [p.detach().clone() for p in parameters]


def padded(documents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N, T] with zeros behind the ends, and targets [N, T] with nothing asked there."""
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(documents, batch_first=True), pad(documents, batch_first=True, padding_value=IGNORED)


class Reading(Learner):
    """A Hope that reads on, its state carried from document to document; no weight of it is trained.

    Args:
        starts_over: every part begins with a fresh state (a control).
    """

    def __init__(self, base: HopeForCausalLM, starts_over: bool = False) -> None:
        super().__init__()
        self.model, self.starts_over, self.cache = base, starts_over, HopeCache(base.config)

    @torch.no_grad()
    def _read(self, documents: Sequence[torch.Tensor]) -> float:
        if self.starts_over:
            self.cache = HopeCache(self.model.config)
        losses = 0.0
        for document in documents:
            losses += token_losses(self.model, document[None], self.cache).sum().item()
            self.model(input_ids=document[None, -1:], cache=self.cache)
        return losses / sum(len(document) - 1 for document in documents)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, cache=self._copies(len(ids))).logits

    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        return self.model.generate(ids, cache=self._copies(len(ids)), **options)

    def _copies(self, count: int) -> HopeCache:
        if not self.cache.get_seq_length():
            return HopeCache(self.model.config)
        return self.cache.select([0] * count)


class Levels(Learner):
    """A continuum of the transformer's own MLPs (:data:`LEVELS`) that learns as it reads.

    Args:
        levels: how many.
        rates: of each, per token.
        starts_over: every part begins with the base's weights (a control: what is left is not a memory).
        elsewhere: it reads another stream than the one it is tested on (a control, of personalisation).
        file: options of :meth:`ContinuumLearner.save`; between parts the memory is a file of that size alone.
        chunks: tokens between steps of each level, if not those of :data:`LEVELS`.
    """

    def __init__(
        self,
        base: LlamaForCausalLM,
        levels: int,
        rates: Sequence[float],
        starts_over: bool = False,
        elsewhere: bool = False,
        file: dict[str, object] | None = None,
        chunks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        parts = LEVELS[levels]
        chunks = chunks or [chunk for _, chunk, _ in parts]
        sizes = [{"fraction": share, "chunk_size": chunk} for (share, _, _), chunk in zip(parts, chunks)]
        rules = [
            StepRule(rule=rule, rate=rate, momentum_decay=0.0)
            for (_, _, rule), rate in zip(parts, rates, strict=True)
        ]
        model = convert_mlp_to_continuum(copy.deepcopy(base).eval(), sizes)
        self.learner = ContinuumLearner(model, rules, nested=levels > 1)
        self.starts_over, self.elsewhere, self.file, self.file_bytes = starts_over, elsewhere, file, 0

    def _read(self, documents: Sequence[torch.Tensor]) -> float:
        if self.starts_over:
            self.learner.reset()
        report = self.learner.learn(list(documents))
        if self.file is not None:
            options = {**self.file, "dtype": getattr(torch, self.file["dtype"])}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "memory.safetensors"
                self.learner.save(path, **options)
                self.file_bytes = path.stat().st_size
                self.learner.load(path)
        return report.loss.item()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.learner.predict(ids)

    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        return self.learner.generate(ids, **options)


def make_learner(
    method: str,
    base: LlamaForCausalLM | HopeForCausalLM,
    setting: dict[str, object],
    seed: int,
    classes: bool,
) -> Learner:
    """The learner of a method of :data:`METHODS`; ``classes`` as for :class:`InContext`."""
    kind = METHODS[method]
    if kind is InContext:
        return InContext(base, classes)
    if kind is FineTuning:
        return FineTuning(base, seed=seed, **setting)
    return kind(base, **setting)


METHODS: dict[str, type[Learner]] = {
    "frozen": Transformer,
    "in_context": InContext,
    "fine_tuning": FineTuning,
    "ewc": FineTuning,
    "replay": FineTuning,
    "joint": FineTuning,
    "hope_1_level": Levels,
    "hope_2_levels": Levels,
    "hope_3_levels": Levels,
    "hope_small_file": Levels,
    "starts_over": Levels,
    "other_project": Levels,
    "hope_reads": Reading,
    "hope_reads_anew": Reading,
}
