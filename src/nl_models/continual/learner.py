"""A model that learns from a stream while it reads it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from nl_models.continual import memory_file
from nl_models.continual.converted import ConvertedParameters
from nl_models.continual.fast_parameters import FastParameters
from nl_models.continual.hope import HopeParameters
from nl_models.continual.report import LearningReport
from nl_models.continual.rules import StepRule, rules_of_levels
from nl_models.continual.stream import StreamState, advance, begin_context, token_losses
from nl_models.hope import HopeForCausalLM
from nl_models.surgery import FastWeights
from nl_models.surgery.modules import ContinuumCausalLM

Text = str | torch.Tensor
"""A text, for a learner with a tokenizer, or tokens ``[T]`` or ``[B, T]`` (int64)."""


class Tokenizer(Protocol):
    """What texts need: any tokenizer of transformers or of :mod:`nl_models.data`."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class LevelDistance(NamedTuple):
    """How far apart two memories are at one level: ‖ΔA − ΔB‖, and the same over ‖W‖; ``[B]`` each."""

    chunk_size: int
    distance: torch.Tensor
    relative: torch.Tensor


class ContinuumLearner:
    """Reads streams, predicts them, and learns by the model's own next-token loss (objective="next_token").

    At each level's own chunk boundary, every sequence's fast weights of that level take one step on the
    gradient of the summed loss of the chunk just read, at the weights that served it (Nested Learning, arXiv
    2512.24695, Eq. 71). What the attention or the memories hold of earlier pieces is a constant in that
    gradient; a piece is at most the fastest level's chunk. The model's own parameters never change.

    Args:
        model: what :func:`nl_models.surgery.convert_mlp_to_continuum` gave, with or without adapters of PEFT
            on it, or a :class:`nl_models.HopeForCausalLM` with levels of ``max_rate=0`` and a chunk size.
        rules: one :class:`StepRule` for all levels, or one for each.
        nested: whether a step of a level puts the faster ones back to the model's own weights (Eq. 72): what
            they learned serves their own context, and the slower level's step is what stays of it. ``None``:
            as the model says, a Hope of the nested variant yes and all others no.
        batch_size: streams that are read side by side, each with fast weights of its own.
        context_length: tokens after which the context starts anew, as between documents; fast weights stay.
            ``None``: the positions that the model knows, and no limit for Hope.
        tokenizer: for texts; without one only tokens are read.

    Raises:
        TypeError: a model of another kind, rules that are none, or ``nested`` that is no bool.
        ValueError: a model without levels to step, or sizes that are no positive integers.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: StepRule | Sequence[StepRule],
        *,
        nested: bool | None = None,
        batch_size: int = 1,
        context_length: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.parameters = find_fast_parameters(model, nested)
        for name, value in (("batch_size", batch_size), ("context_length", context_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        self.rules = rules_of_levels(rules, len(self.parameters.chunk_sizes), batch_size)
        if context_length is None:
            context_length = getattr(self.model.config, "max_position_embeddings", None)
        self.batch_size = batch_size
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.state = StreamState(changes=self.parameters.zeros(batch_size))
        self._before: StreamState | None = None

    @property
    def model(self) -> nn.Module:
        """The model that reads; it is never changed."""
        return self.parameters.model

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Tokens between two steps of each level, fast to slow."""
        return self.parameters.chunk_sizes

    @property
    def tokens_read(self) -> int:
        """Tokens taken in from streams: what ``skip`` takes after a load."""
        return self.state.read

    @property
    def tokens_per_level(self) -> tuple[int, ...]:
        """Tokens that each level has taken steps on."""
        return tuple(self.state.learned // size * size for size in self.chunk_sizes)

    def fast_weights(self) -> FastWeights:
        """What was learned, as a converted model takes it: ``model(ids, fast_weights=…)``."""
        if not isinstance(self.parameters, ConvertedParameters):
            raise TypeError("fast_weights: only converted models take them; use loss, predict or generate")
        return self.parameters.fast_weights(self.state.changes)

    def learn(
        self,
        stream: Text | Iterable[Text],
        *,
        skip: int = 0,
        save_to: str | os.PathLike | None = None,
        save_every: int | None = None,
        progress: bool = False,
    ) -> LearningReport:
        """Read a stream, predicting every token before learning from it.

        Args:
            stream: one text, which continues the current context, or documents, each of which begins a new
                one. With ``batch_size`` B > 1, tokens ``[B, T]``.
            skip: tokens at the start of the stream that were read already, as ``tokens_read`` says after a
                load; the document in which they end is continued.
            save_to: file that is kept up to date (see :meth:`save`), at the end and
            save_every: after this many tokens at least.
            progress: whether to show a progress bar on the terminal.

        Returns:
            Losses before learning, and how often and how far each level stepped.

        Raises:
            TypeError: a stream that is no text and no tokens.
            ValueError: tokens of another batch size, outside of the vocabulary, or fewer than ``skip``.
            FileNotFoundError: the folder of ``save_to`` does not exist.
        """
        if save_every is not None and (save_to is None or save_every < 1):
            raise ValueError(f"save_every: expected at least 1, together with save_to, got {save_every}")
        if save_to is not None:  # now, not after hours of reading
            memory_file.check_folder("save_to", save_to)
        if isinstance(stream, (str, torch.Tensor)):
            documents, fresh = [stream], False
        elif isinstance(stream, Iterable):
            documents, fresh = stream, True
        else:
            raise TypeError(f"stream: expected text, tokens or documents, got {type(stream).__name__}")
        report = LearningReport(self.chunk_sizes)
        saved = self.state.read
        self._before = self.state
        with evaluating(self.model), _bar(progress) as bar:
            for document in documents:
                tokens = self._encode("stream", document, rows=self.batch_size)
                if skip and skip >= tokens.shape[1]:
                    skip -= tokens.shape[1]
                    continue
                if fresh and not skip:
                    self.state = begin_context(self.parameters, self.rules, self.state)
                tokens, skip = tokens[:, skip:], 0
                task = bar.add_task("learning", total=tokens.shape[1], loss="")
                pieces = advance(
                    self.parameters, self.rules, self.state, tokens, context_length=self.context_length
                )
                for state, piece in pieces:
                    self.state = state
                    if piece is None:
                        continue
                    report.add(*piece)
                    if progress:
                        shown = f"{float(piece.loss.mean()) / piece.tokens:.3f}"
                        bar.update(task, advance=piece.tokens, loss=shown)
                    if save_every is not None and state.read - saved >= save_every:
                        self.save(save_to)
                        saved = state.read
        if skip:
            raise ValueError(f"skip: the stream ends {skip} tokens before")
        if save_to is not None:
            self.save(save_to)
        return report

    @torch.no_grad()
    def predict(self, text: Text) -> torch.Tensor:
        """Logits ``[N, T, V]`` of the token after each one of a new text; nothing is learned.

        ``text`` has N rows, a multiple of the batch size: those that follow one another share a sequence's
        fast weights. The context starts anew as it does in :meth:`learn`.
        """
        tokens = self._encode("text", text)
        with evaluating(self.model):
            windows = tokens.split(self.context_length or tokens.shape[1], dim=1)
            outputs = [self.parameters.run(self.state.changes, window, None) for window in windows]
        return torch.cat([output.logits for output in outputs], dim=1)

    @torch.no_grad()
    def loss(self, text: Text) -> torch.Tensor:
        """Nats per token ``[N]`` of a new text of N rows after its first token; nothing is learned."""
        tokens = self._encode("text", text)
        if tokens.shape[1] < 2:
            raise ValueError("text: expected at least two tokens, the first is not predicted")
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        window = self.context_length or inputs.shape[1]
        losses = []
        with evaluating(self.model):
            for x, y in zip(inputs.split(window, dim=1), targets.split(window, dim=1), strict=True):
                logits = self.parameters.run(self.state.changes, x, None).logits
                losses.append(token_losses(logits, y))
        return torch.cat(losses, dim=1).mean(1)

    def generate(self, text: Text, **options: Any) -> torch.Tensor | str:
        """``model.generate`` with what was learned; ``options`` are its options.

        Returns:
            Tokens ``[N, T']``, prompt included; for a text, the whole as text.
        """
        tokens = self._encode("text", text)
        with evaluating(self.model):
            generated = self.parameters.generate(self.state.changes, tokens, options)
        return self.tokenizer.decode(generated[0].tolist()) if isinstance(text, str) else generated

    def state_dict(self) -> dict[str, Any]:
        """All that was learned, and where in the stream and in every chunk it stands.

        ``{"header": JSON, "tensors": by name}``, on the CPU; a copy.
        """
        fingerprint = memory_file.model_fingerprint(self.model)
        return memory_file.pack(self.state, self.parameters, self._options(), fingerprint)

    def load_state_dict(self, packed: dict[str, Any], *, source: str = "state_dict") -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            MemoryFileError: of another model, other levels or rules; nothing has changed.
        """
        fingerprint = memory_file.model_fingerprint(self.model)
        self.state = memory_file.unpack(
            packed, self.state, self.parameters, self._options(), fingerprint, source
        )
        self._before = None

    def save(self, path: str | os.PathLike) -> None:
        """Write the memory to a safetensors file: a few MB, not the model.

        The file appears whole, in place of the one before, or not at all, whatever kills the process. Its
        header has the format version, a digest of the model, and the tokens that each level learned from.
        """
        memory_file.write(path, self.state_dict())

    def load(self, path: str | os.PathLike) -> ContinuumLearner:
        """Take over what :meth:`save` wrote; reading on gives bit for bit what it would have given then.

        Raises:
            FileNotFoundError: there is no such file.
            MemoryFileError: truncated, damaged, foreign, or of another model; nothing has changed.
        """
        self.load_state_dict(memory_file.read(path), source=str(Path(path)))
        return self

    def rollback(self) -> None:
        """Undo the last :meth:`learn`.

        Raises:
            RuntimeError: nothing was learned since this learner was made, loaded or rolled back.
        """
        if self._before is None:
            raise RuntimeError("rollback: nothing was learned since the last rollback, load or start")
        self.state, self._before = self._before, None

    def fork(self) -> ContinuumLearner:
        """Another learner that stands where this one stands and shares the model; they learn on apart."""
        other = ContinuumLearner(
            self.model,
            self.rules,
            nested=self.parameters.nested,
            batch_size=self.batch_size,
            context_length=self.context_length,
            tokenizer=self.tokenizer,
        )
        # Nothing in a state is ever changed in place.
        other.state = replace(self.state)
        return other

    def compare(self, other: ContinuumLearner) -> list[LevelDistance]:
        """How far apart two memories of the same model are, level by level.

        Raises:
            ValueError: a learner with other levels or another batch size.
        """
        ours, theirs = self.state.changes, other.state.changes
        if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
            raise ValueError("other: expected a learner with the same levels and batch size")
        squares = [torch.zeros(self.batch_size, dtype=self.parameters.dtype) for _ in self.chunk_sizes]
        for parameter in self.parameters.parameters:
            difference = ours[parameter.name] - theirs[parameter.name].to(ours[parameter.name].device)
            squares[parameter.level] += difference.square().sum((1, 2)).cpu()
        norms = self.parameters.level_norms
        return [
            LevelDistance(size, square.sqrt(), square.sqrt() / norm)
            for size, square, norm in zip(self.chunk_sizes, squares, norms, strict=True)
        ]

    def _options(self) -> dict[str, Any]:
        """What a saved memory depends on beside the model."""
        return {
            "chunk_sizes": list(self.chunk_sizes),
            "rules": [rule.description() for rule in self.rules],
            "nested": self.parameters.nested,
            "batch_size": self.batch_size,
            "context_length": self.context_length,
        }

    def _encode(self, name: str, text: Text, *, rows: int | None = None) -> torch.Tensor:
        """Tokens ``[N, T]`` on the model's device, checked; ``rows`` is N where it must be."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise TypeError(f"{name}: a text needs a tokenizer; give the learner one, or pass tokens")
            text = torch.tensor(self.tokenizer.encode(text), dtype=torch.int64)
        if not isinstance(text, torch.Tensor) or text.is_floating_point() or text.dtype == torch.bool:
            got = f"a tensor of {text.dtype}" if isinstance(text, torch.Tensor) else type(text).__name__
            raise TypeError(f"{name}: expected text or a tensor of integer tokens, got {got}")
        tokens = text[None] if text.ndim == 1 else text
        wrong = len(tokens) != rows if rows is not None else not len(tokens) or len(tokens) % self.batch_size
        if tokens.ndim != 2 or tokens.shape[1] < 1 or wrong:
            raise ValueError(
                f"{name}: expected tokens [T] or [rows, T] for a batch size of {self.batch_size}, "
                f"got shape {tuple(text.shape)}"
            )
        vocabulary = self.model.config.vocab_size
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= vocabulary:
            wrong_token = lowest if lowest < 0 else highest
            raise ValueError(f"{name}: expected tokens from 0 to {vocabulary - 1}, got {wrong_token}")
        return tokens.to(self.parameters.device, torch.int64)


def find_fast_parameters(model: nn.Module, nested: bool | None = None) -> FastParameters:
    """The fast parameters of a model, whatever kind it is; ``nested`` as for :class:`ContinuumLearner`.

    Raises:
        TypeError: a model of a kind that has none, or ``nested`` of another type.
        ValueError: a model without levels to step.
    """
    if nested is not None and not isinstance(nested, bool):
        raise TypeError(f"nested: expected a bool or None, got {nested!r}")
    # A model with adapters (PEFT) is a wrapper round the model that has the levels.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, ContinuumCausalLM):
        parameters: FastParameters = ConvertedParameters(inner)
    elif isinstance(inner, HopeForCausalLM):
        parameters = HopeParameters(inner)
    else:
        raise TypeError(
            f"model: expected a converted model (convert_mlp_to_continuum) or a HopeForCausalLM, "
            f"got {type(model).__name__}"
        )
    if nested is not None:
        parameters.nested = nested
    return parameters


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        disable=not show,
    )
