"""A model that learns from a stream while it reads it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from torch import nn

from nl_models.console import Display
from nl_models.continual import memory_file
from nl_models.continual.converted import ConvertedParameters
from nl_models.continual.fast_parameters import FastParameters
from nl_models.continual.hope import HopeParameters
from nl_models.continual.report import LearningReport
from nl_models.continual.rules import StepRule, rules_of_levels
from nl_models.continual.stream import StreamState, advance, begin_context, token_losses
from nl_models.hope import HopeForCausalLM
from nl_models.layers.state import row_indices
from nl_models.module_views import device_of, dtype_of, in_evaluation, weights_digest
from nl_models.surgery import FastWeights
from nl_models.surgery.modules import ContinuumCausalLM

Text = str | torch.Tensor
"""A text, for a learner with a tokenizer, or tokens ``[T]`` or ``[B, T]`` (int64)."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
            on it, or a :class:`nl_models.HopeForCausalLM`. Of a Hope whose levels learn by themselves, as by
            default, the weights that they start from are what learns, as one level; of one with levels of
            ``max_rate=0`` and a chunk size, these levels.
        rules: one :class:`StepRule` for all levels, or one for each.
        nested: whether a step of a level puts the faster ones back to the model's own weights (Eq. 72): what
            they learned serves their own context, and the slower level's step is what stays of it. ``None``:
            as the model says, a Hope of the nested variant yes and all others no.
        chunk_size: tokens between two steps of a default Hope's one level; ``None``: 64. Other models say
            it themselves.
        batch_size: streams that are read side by side, each with fast weights of its own.
        context_length: tokens after which the context starts anew, as between documents; fast weights stay.
            ``None``: the positions that the model knows, and no limit for Hope.
        tokenizer: for texts; without one only tokens are read.

    Raises:
        TypeError: a model of another kind, rules that are none, or ``nested`` that is no bool.
        ValueError: a model without levels to step, offloaded, with layers that have no backward pass, or made
            inside of ``torch.inference_mode()``; or sizes that are no positive integers.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        rules: StepRule | Sequence[StepRule],
        *,
        nested: bool | None = None,
        chunk_size: int | None = None,
        batch_size: int = 1,
        context_length: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        sizes = {"chunk_size": chunk_size, "batch_size": batch_size, "context_length": context_length}
        for name, value in sizes.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        self.parameters = find_fast_parameters(model, nested, chunk_size)
        self.rules = rules_of_levels(rules, len(self.parameters.chunk_sizes), batch_size)
        if context_length is None:
            context_length = getattr(self.model.config, "max_position_embeddings", None)
        if tokenizer is not None and not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
            raise TypeError(
                f"tokenizer: expected an object with encode and decode, got {type(tokenizer).__name__}"
            )
        self._chunk_size = chunk_size
        self.batch_size = batch_size
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.state = StreamState(changes=self.parameters.zeros(batch_size))
        self._before: StreamState | None = None
        self._digest: tuple[list, str] | None = None

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

    @torch.inference_mode(False)
    def learn(
        self,
        stream: Text | Iterable[Text],
        *,
        skip: int = 0,
        save_to: str | os.PathLike | None = None,
        save_every: int | None = None,
        progress: bool = False,
    ) -> LearningReport:
        """Read a stream, predicting every token before learning from it; in evaluation mode.

        Args:
            stream: one text, which continues the current context, or documents, each of which begins a new
                one. With ``batch_size`` B > 1, tokens ``[B, T]``. Documents without a token are passed over.
                All of a list or tuple are checked before the first is read, those of an iterator in turn.
            skip: tokens at the start of the stream that were read already, as ``tokens_read`` says after a
                load; the document in which they end is continued.
            save_to: file that is kept up to date (see :meth:`save`), at the end and
            save_every: after this many tokens at least.
            progress: whether to show how much of the whole stream is read: a bar on a terminal, else lines.

        Returns:
            Losses before learning, and how often and how far each level stepped.

        Raises:
            TypeError: a stream that is no text and no tokens, such as a mapping, a file, bytes or an array.
            ValueError: tokens of another batch size, outside of the vocabulary, or fewer than ``skip``.
            FileNotFoundError: the folder of ``save_to`` does not exist.
        """
        if save_every is not None and (save_to is None or save_every < 1):
            raise ValueError(f"save_every: expected at least 1, together with save_to, got {save_every}")
        if save_to is not None:  # now, not after hours of reading
            memory_file.check_folder("save_to", save_to)
        if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
            raise ValueError(f"skip: expected a number of tokens, at least 0, got {skip!r}")
        fresh = not isinstance(stream, (str, torch.Tensor))
        documents = self._documents(stream) if fresh else [self._encode("stream", stream, self.batch_size)]
        report = LearningReport(self.chunk_sizes)
        parameters = self._evaluating()
        saved = self.state.read
        self._before = self.state
        total = sum(tokens.shape[1] for tokens in documents) - skip if isinstance(documents, list) else 0
        with Display(Console() if progress else None, total=total, label="learning") as display:
            for tokens in documents:
                if not tokens.shape[1]:
                    report.empty_documents += 1
                    continue
                if skip and skip >= tokens.shape[1]:
                    skip -= tokens.shape[1]
                    continue
                if fresh and not skip:
                    self.state = begin_context(parameters, self.rules, self.state)
                tokens, skip = tokens[:, skip:].to(self.parameters.device), 0
                if not isinstance(documents, list):
                    display.expect(tokens.shape[1])
                pieces = advance(
                    parameters, self.rules, self.state, tokens, context_length=self.context_length
                )
                for state, piece in pieces:
                    self.state = state
                    if piece is None:
                        continue
                    report.add(*piece)
                    if progress:
                        loss = float(piece.loss.mean()) / piece.tokens
                        display.advance(piece.tokens, status=f"loss {loss:.3f}")
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
        tokens, parameters = self._prompt(text), self._evaluating()
        windows = tokens.split(self.context_length or tokens.shape[1], dim=1)
        outputs = [parameters.run(self.state.changes, window, None) for window in windows]
        return torch.cat([output.logits for output in outputs], dim=1)

    @torch.no_grad()
    def loss(self, text: Text) -> torch.Tensor:
        """Nats per token ``[N]`` of a new text of N rows after its first token; nothing is learned."""
        tokens, parameters = self._prompt(text), self._evaluating()
        if tokens.shape[1] < 2:
            raise ValueError("text: expected at least two tokens, the first is not predicted")
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        window = self.context_length or inputs.shape[1]
        losses = []
        for x, y in zip(inputs.split(window, dim=1), targets.split(window, dim=1), strict=True):
            logits = parameters.run(self.state.changes, x, None).logits
            losses.append(token_losses(logits, y))
        return torch.cat(losses, dim=1).mean(1)

    def generate(self, text: Text, **options: Any) -> torch.Tensor | str:
        """``model.generate`` with what was learned; ``options`` are its options.

        Returns:
            Tokens ``[N, T']``, prompt included; for a text, the whole as text.
        """
        generated = self._evaluating().generate(self.state.changes, self._prompt(text), options)
        return self.tokenizer.decode(generated[0].tolist()) if isinstance(text, str) else generated

    @torch.inference_mode(False)
    def state_dict(self, **options: Any) -> dict[str, Any]:
        """All that was learned, and where in the stream and in every chunk it stands.

        ``{"header": JSON, "tensors": by name}``, on the CPU; a copy. ``options`` are those of :meth:`save`.
        """
        keep = memory_file.FileOptions(**options)
        keep.check()
        return memory_file.pack(self.state, self.parameters, self._options(), self._model_digest(), keep)

    @torch.inference_mode(False)
    def load_state_dict(
        self, packed: dict[str, Any], *, source: str = "state_dict", allow_other_model: bool = False
    ) -> None:
        """Take over what :meth:`state_dict` gave; ``allow_other_model`` as for :meth:`load`.

        Raises:
            MemoryFileError: of another model, other levels or rules; nothing has changed.
        """
        self.state = memory_file.unpack(
            packed,
            self.state,
            self.parameters,
            self._options(),
            self._model_digest,
            source,
            allow_other_model,
        )
        self._before = None

    def save(self, path: str | os.PathLike, **options: Any) -> None:
        """Write the memory to a safetensors file: a few MB, not the model.

        The file appears whole, in place of the one before, or not at all, whatever kills the process. Its
        header has the format version, a digest of the model, and the tokens that each level learned from.
        By default reading on after :meth:`load` is exact; each option makes the file smaller.

        Args:
            path: the file.
            dtype: of what was learned: ``torch.bfloat16``, ``float16`` or ``float32``; ``None``: as it is.
            rank: keep the change of each matrix as its best approximation of this rank (truncated SVD), where
                that is smaller.
            momenta: whether to keep those of rules that have one; without, they begin at zero.
            chunks: whether to keep chunks that are not full, and the context. Without, their tokens take part
                in no step, and the next text begins a new context.

        Raises:
            TypeError, ValueError: another option, or a ``dtype`` or ``rank`` that cannot be.
        """
        memory_file.write(path, self.state_dict(**options))

    def num_bytes(self, **options: Any) -> int:
        """Bytes, at most, of what :meth:`save` keeps with these options, before anything was read or after.

        Every level has stepped then, and stands in the midst of a chunk. With ``chunks`` the context is
        added to them, whose size is the model's; names and header are some kilobytes.
        """
        keep = memory_file.FileOptions(**options)
        keep.check()
        return keep.num_bytes(self.parameters, self.rules, self.state.changes)

    def load(self, path: str | os.PathLike, *, allow_other_model: bool = False) -> ContinuumLearner:
        """Take over what :meth:`save` wrote; reading on gives bit for bit what it would have given then.

        Args:
            path: the file.
            allow_other_model: also if any value of the model's weights is not what it was when the memory was
                learned (fine-tuned, in another dtype, with another vocabulary). What the other model made of
                the text is left out then: the memory goes on with a new context.

        Raises:
            FileNotFoundError: there is no such file.
            MemoryFileError: truncated, damaged, foreign, or of another model; nothing has changed.
        """
        packed = memory_file.read(path)
        self.load_state_dict(packed, source=str(Path(path)), allow_other_model=allow_other_model)
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_into_model(self, row: int = 0) -> None:
        """Add what the sequence ``row`` learned to the model's own weights, for good, and begin anew.

        The one method that changes the model. Memories that were saved before are then of another model.

        Raises:
            TypeError: weights to which nothing can be added (quantised, or with adapters on them).
            ValueError: no such sequence.
        """
        row = int(row_indices([row], self.batch_size))
        weights = [self.parameters.own_weight(parameter) for parameter in self.parameters.parameters]
        for parameter, weight in zip(self.parameters.parameters, weights):
            change = self.state.changes[parameter.name][row]
            weight.copy_(weight.to(change) + change)
        vars(self.parameters).pop("level_norms", None)  # measured once
        self.reset()
        self._before = None

    def rollback(self) -> None:
        """Undo the last :meth:`learn`.

        Raises:
            RuntimeError: nothing was learned since this learner was made, loaded or rolled back.
        """
        if self._before is None:
            raise RuntimeError("rollback: nothing was learned since the last rollback, load or start")
        self.state, self._before = self._before, None

    def reset(self, rows: torch.Tensor | Sequence[int] | None = None) -> None:
        """Forget what was learned: all, and the text too; or of the sequences ``rows``, which read on.

        Args:
            rows: indices, or bool ``[B]``. They go on in the text where they are.

        Raises:
            ValueError: no such rows.
        """
        if rows is None:
            self._before, self.state = self.state, StreamState(changes=self.parameters.zeros(self.batch_size))
            return
        kept = torch.ones(self.batch_size, 1, 1)
        kept[row_indices(rows, self.batch_size)] = 0
        self._before, self.state = self.state, self.state.map(lambda tensor: tensor * kept.to(tensor))

    def fork(self, rows: torch.Tensor | Sequence[int] | None = None) -> ContinuumLearner:
        """Another learner that stands where this one stands and shares the model; they learn on apart.

        Args:
            rows: of which sequences, in that order: indices, or bool ``[B]``; ``None``: of all.

        Raises:
            ValueError: no such rows.
        """
        # Nothing in a state is ever changed in place.
        if rows is None:
            return self._like(self.batch_size, self.rules, replace(self.state))
        rows = row_indices(rows, self.batch_size)
        rules = [
            replace(rule, rate=rule.rate[rows.to(rule.rate.device)]) if rule.has_rates else rule
            for rule in self.rules
        ]
        return self._like(len(rows), rules, self.state.select(rows))

    @staticmethod
    def join(learners: Sequence[ContinuumLearner]) -> ContinuumLearner:
        """The sequences of several learners on one model in one, in order; they read on side by side.

        Raises:
            ValueError: other models, rules or options, or places in their chunks.
        """
        first = learners[0]
        slowest = first.chunk_sizes[-1]
        for other in learners:
            differ = [
                n for n, v in first._options().items() if n != "batch_size" and other._options()[n] != v
            ]
            if other.model is not first.model or differ:
                raise ValueError(f"learners: of different {differ[0] if differ else 'models'}")
            rates = [[None if r.has_rates else float(r.rate) for r in x.rules] for x in (first, other)]
            if rates[0] != rates[1] or None in rates[0]:
                raise ValueError("learners: with different rates, or rates for each sequence")
            places = [
                (x.learned % slowest, x.context_tokens, None if x.waiting is None else x.waiting.shape[1])
                for x in (first.state, other.state)
            ]
            if places[0] != places[1]:
                raise ValueError(
                    "learners: at different places (tokens of a chunk, of the context, and that wait: "
                    f"{places[0]} and {places[1]}); let them read equally many tokens, or serve their "
                    "fast_weights() side by side"
                )
        states = [learner.state for learner in learners]
        return first._like(sum(x.batch_size for x in learners), first.rules, StreamState.join(states))

    def _like(self, batch_size: int, rules: Sequence[StepRule], state: StreamState) -> ContinuumLearner:
        other = ContinuumLearner(
            self.model,
            rules,
            nested=self.parameters.nested,
            chunk_size=self._chunk_size,
            batch_size=batch_size,
            context_length=self.context_length,
            tokenizer=self.tokenizer,
        )
        other.state = state
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

    def _model_digest(self) -> str:
        """The digest of the model, taken again only when a weight is another or was written to."""
        now = [(name, id(weight), weight._version) for name, weight in self.model.named_parameters()]
        if self._digest is None or self._digest[0] != now:
            self._digest = (now, weights_digest(self.model))
        return self._digest[1]

    def _options(self) -> dict[str, Any]:
        """What a saved memory depends on beside the model."""
        return {
            "chunk_sizes": list(self.chunk_sizes),
            "rules": [rule.description() for rule in self.rules],
            "nested": self.parameters.nested,
            "batch_size": self.batch_size,
            "context_length": self.context_length,
        }

    def _evaluating(self) -> FastParameters:
        """The fast parameters of a view of the model in evaluation mode; the model's own mode stays."""
        view = in_evaluation(self.model)
        return self.parameters if view is self.model else self.parameters.on(view)

    def _documents(self, stream: Iterable[Text]) -> Iterable[torch.Tensor]:
        """The tokens of every document; those of a sequence, which can be read twice, checked beforehand."""
        if not isinstance(stream, Iterable) or hasattr(stream, "__array__") or _is_no_stream(stream):
            raise _no_text("stream", stream)
        tokens = (self._encode(f"stream[{i}]", text, self.batch_size) for i, text in enumerate(stream))
        return list(tokens) if isinstance(stream, Sequence) else tokens

    def _prompt(self, text: Text) -> torch.Tensor:
        """Tokens ``[N, T]`` of a text on the model's device, N a multiple of the batch size."""
        return self._encode("text", text).to(self.parameters.device)

    def _encode(self, name: str, text: Text, rows: int | None = None) -> torch.Tensor:
        """Tokens ``[N, T]``, checked; ``rows`` is N where it must be, and then T may be 0 in a document."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise TypeError(f"{name}: a text needs a tokenizer; give the learner one, or pass tokens")
            ids = self.tokenizer.encode(text)
            if not isinstance(ids, Sequence) or not all(isinstance(i, int) for i in ids):
                raise TypeError(
                    f"tokenizer: expected encode(text) to give a list of integers, got {type(ids).__name__}"
                )
            text = torch.tensor(ids, dtype=torch.int64)
        if not isinstance(text, torch.Tensor) or text.dtype not in _INTEGERS:
            raise _no_text(name, text)
        if text.is_nested or text.layout is not torch.strided or text.is_meta:
            raise ValueError(
                f"{name}: expected a dense tensor of tokens with values, got {text.layout} on {text.device}"
            )
        tokens = text if text.ndim == 2 else text.reshape(1, -1)
        wrong = len(tokens) != rows if rows is not None else not len(tokens) or len(tokens) % self.batch_size
        shortest = 0 if name.startswith("stream[") else 1
        if text.ndim not in (1, 2) or tokens.shape[1] < shortest or wrong:
            raise ValueError(
                f"{name}: expected tokens [T] or [rows, T] for a batch size of {self.batch_size}, "
                f"got shape {tuple(text.shape)}"
            )
        vocabulary = self.model.config.vocab_size
        lowest, highest = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
        if lowest < 0 or highest >= vocabulary:
            wrong_token = lowest if lowest < 0 else highest
            raise ValueError(f"{name}: expected tokens from 0 to {vocabulary - 1}, got {wrong_token}")
        tokens = tokens.long()
        return tokens.clone() if tokens.is_inference() else tokens  # autograd keeps them


def find_fast_parameters(
    model: nn.Module, nested: bool | None = None, chunk_size: int | None = None
) -> FastParameters:
    """The fast parameters of a model, whatever kind it is; options as for :class:`ContinuumLearner`.

    Raises:
        TypeError: a model of a kind that has none, or ``nested`` of another type.
        ValueError: a model without levels to step, offloaded, with layers that have no backward pass, or made
            inside of ``torch.inference_mode()``.
    """
    if nested is not None and not isinstance(nested, bool):
        raise TypeError(f"nested: expected a bool or None, got {nested!r}")
    # A model with adapters (PEFT) is a wrapper round the model that has the levels.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, ContinuumCausalLM):
        if chunk_size is not None:
            raise ValueError("chunk_size: the levels of a converted model have chunk sizes of their own")
        parameters: FastParameters = ConvertedParameters(inner)
    elif isinstance(inner, HopeForCausalLM):
        parameters = HopeParameters(inner, chunk_size)
    else:
        raise TypeError(
            f"model: expected a converted model (convert_mlp_to_continuum) or a HopeForCausalLM, "
            f"got {type(model).__name__}"
        )
    for name, parameter in inner.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device (offloaded, or not loaded); what learns has to be in "
                "memory: accelerate.hooks.remove_hook_from_submodules(model) brings it back"
            )
        if parameter.is_inference():
            raise ValueError(
                f"model: {name} was made inside of torch.inference_mode() and can have no gradient; make or "
                "load the model outside of it"
            )
    _check_backward(inner)
    if nested is not None:
        parameters.nested = nested
    return parameters


def _check_backward(model: nn.Module) -> None:
    """Raise ``ValueError`` for a quantised layer through which no gradient comes back."""
    for name, part in model.named_modules():
        plain = type(part) is nn.Linear and type(part.weight) is nn.Parameter
        if plain or not hasattr(part, "in_features"):
            continue
        dtype, device = dtype_of(part) or dtype_of(model), device_of(part) or device_of(model)
        x = torch.zeros(1, part.in_features, dtype=dtype, device=device)
        layer, gradient = in_evaluation(part), None
        with torch.no_grad():
            layer(x)  # after which some keep their weights in a form for reading only
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an op without a backward: said below
            y = layer(x.requires_grad_())
            if y.requires_grad:
                (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"model: its {name} ({type(part).__module__}.{type(part).__name__}) lets no gradient "
                "through; learning needs quantisation of the weights alone (bitsandbytes on a GPU, torchao's "
                "weight-only kinds), or none"
            )


def _is_no_stream(value: object) -> bool:
    """Whether iterating over ``value`` gives something else than documents in order."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    return named or isinstance(value, (Mapping, Set, bytes, bytearray, memoryview)) or hasattr(value, "read")


def _no_text(name: str, value: object) -> TypeError:
    """The error for ``value``, with the way to what is meant."""
    got, remedy = type(value).__name__, "pass text, or tokens as torch.tensor([...])"
    if isinstance(value, torch.Tensor):
        got = f"a tensor of {value.dtype}"
    elif isinstance(value, Mapping):
        got = f"a {got} with the keys {sorted(map(str, value))}"
        remedy = 'of a tokenizer\'s output pass "input_ids", as a tensor without padding'
    elif isinstance(value, (bytes, bytearray, memoryview)):
        remedy = 'decode it first: bytes.decode("utf-8")'
    elif hasattr(value, "read") or isinstance(value, os.PathLike):
        remedy = "read it first, and pass its text"
    elif hasattr(value, "_fields"):
        remedy = f"pass the one of its fields that is meant: {', '.join(value._fields)}"
    elif isinstance(value, Set):
        remedy = "documents are read in order: pass a list"
    elif hasattr(value, "__array__"):
        remedy = "pass torch.from_numpy(...)"
    return TypeError(
        f"{name}: expected text, a tensor of integer tokens, or documents of these, got {got}; {remedy}"
    )
