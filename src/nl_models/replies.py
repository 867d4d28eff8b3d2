"""A reply: what a model reads of a message, how it is sampled, and where it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from nl_kernels.checks import check_positive_int
from nl_models.data.tokenizer import AnyTokenizer, ReadyTokenizer


class Sampling(NamedTuple):
    """How a reply is written: ``temperature`` 0 is greedy; ``stop`` ends it where it has been written."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    stop: str | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot be."""
        check_positive_int("max_new_tokens", self.max_new_tokens)
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")


_REPLY = "<the reply>"


def has_chat_template(tokenizer: AnyTokenizer) -> bool:
    """Whether messages have a form of their own, in which a reply says itself where it ends."""
    return _chatting(tokenizer) is not None


def message_ids(tokenizer: AnyTokenizer, message: str, *, begun: bool) -> list[int]:
    """What a model reads of a message before it replies: by the tokenizer's chat template, else as a line.

    Args:
        begun: whether it follows a reply of the model's, with whose end it then begins.
    """
    chat = _chatting(tokenizer)
    if chat is None:
        return text_ids(tokenizer, f"{message}\n", begun=begun)
    said = [{"role": "user", "content": message}]
    if begun:  # a template knows only whole conversations
        said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _REPLY}, *said]
    text = str(chat.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    return chat.encode(text.partition(_REPLY)[2] if begun else text, add_special_tokens=False)


def text_ids(tokenizer: AnyTokenizer, text: str, *, begun: bool) -> list[int]:
    """A text as it is; what a tokenizer of transformers puts before one comes at the beginning alone."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer.encode(text, add_special_tokens=not begun)
    return tokenizer.encode(text)


def _chatting(tokenizer: AnyTokenizer) -> PreTrainedTokenizerBase | None:
    """The tokenizer of transformers, if it has a chat template."""
    inner = tokenizer.for_transformers() if isinstance(tokenizer, ReadyTokenizer) else tokenizer
    return inner if isinstance(inner, PreTrainedTokenizerBase) and inner.chat_template else None


def _text(tokenizer: AnyTokenizer, ids: list[int]) -> str:
    """Without special tokens, such as that which ends a reply."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    return tokenizer.decode(ids)  # ours leave them out by themselves


_EMPTY_STOPS = 2  # so many ends of nothing may come before a reply


class _Written(StoppingCriteria):
    """Hands on what is written, and stops behind ``stop``."""

    def __init__(self, tokenizer: AnyTokenizer, stop: str | None, write: Callable[[str], None]):
        self.tokenizer, self.stop, self.write = tokenizer, stop, write
        self.prompt: int | None = None
        self.shown = ""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.prompt is None:  # the first call comes behind the first token written
            self.prompt = input_ids.shape[1] - 1
        whole = _text(self.tokenizer, input_ids[0, self.prompt :].tolist())
        text = until(whole, self.stop)
        done = text != whole
        if not text.endswith("\ufffd"):  # a character of which only some bytes are there
            self.write(text[len(self.shown) :])
            self.shown = text
        return torch.full((len(input_ids),), done, device=input_ids.device)


def written_after(
    model: Any,
    ids: list[int],
    tokenizer: AnyTokenizer,
    sampling: Sampling,
    write: Callable[[str], None],
    **options: Any,
) -> str:
    """What ``model`` writes after ``ids``; ``write`` gets each piece as it comes."""
    sampling.check()
    if not ids:
        raise ValueError("text: expected at least one character")
    prompt = torch.tensor([ids])
    if hasattr(model, "device"):
        prompt = prompt.to(model.device)
    written = _Written(tokenizer, sampling.stop, write)
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    found = model.generate(
        prompt,
        max_new_tokens=sampling.max_new_tokens,
        stopping_criteria=StoppingCriteriaList([written]),
        **chosen,
        **options,
    )
    text = until(_text(tokenizer, found[0, len(ids) :].tolist()), sampling.stop)
    write(text[len(written.shown) :])  # bytes that nothing completes any more
    return text


def until(text: str, stop: str | None) -> str:
    """What comes before ``stop``; a reply may begin with white space, but not be nothing else for long."""
    if stop is None:
        return text
    start = len(text) - len(text.lstrip())
    if start == len(text):
        return "" if text.count(stop) > _EMPTY_STOPS else text
    place = text.find(stop, start)
    return text if place < 0 else text[:place]
