"""``generate`` for models with a state: it goes on with new tokens alone, and ended rows write nothing."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteriaList

from nl_models.hf_names import CACHE_NAME, either_cache_name, name_cache
from nl_models.layers.state_cache import StateCacheLayer, token_digest


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have stopped.

    transformers fills such rows up with padding while others go on, and means it to be masked out when it is
    read again. A state would have read it by then.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        # Without an end of text, a stopped row is not filled up: it goes on.
        self.padded = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.rows: torch.Tensor | None = None
        self.before: torch.Tensor | None = None  # those that had stopped before the last token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        self.before = self.rows
        self.rows = stopped if self.rows is None else self.rows | stopped
        return stopped


class StatefulGeneration:
    """Takes the cache by either of its names, and masks the padding that follows an early end of text.

    It stands before ``GenerationMixin`` among the bases of a class, where transformers looks for that. Beam
    search needs no such mask: its running beams have not ended.

    Attributes:
        keeps_states: whether there are any.
        counts_tokens: the states know how many real tokens they have read, and need no mask of the past.
    """

    keeps_states: bool = False
    counts_tokens: ClassVar[bool] = False

    def generate(
        self, inputs: torch.Tensor | None = None, *args, new_tokens_only: bool | None = None, **kwargs
    ):
        """As ``GenerationMixin.generate``; with a cache that has read S columns it goes on with T new tokens.

        Args:
            inputs: [B, T] ids: new ones, or all from the beginning as transformers has it. Results begin with
                them. Of new ones leave out what the model wrote itself: its last token is read before them.
            new_tokens_only: which of the two; ``None``: new ones if T ≤ S, otherwise all from the beginning.
            kwargs: those of ``GenerationMixin.generate``; ``attention_mask`` is [B, T], 0 at padding.

        Raises:
            ValueError: more than S tokens, which do not begin with those that the cache knows it has read.
        """
        kwargs = name_cache(kwargs, CACHE_NAME)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        layer, mask = state_layer(kwargs.get(CACHE_NAME)), kwargs.get("attention_mask")
        given = (
            layer is not None and layer.seen > 0 and ids is not None and kwargs.get("inputs_embeds") is None
        )
        # With a mask of all columns transformers itself takes shorter ids for new ones.
        if given and (mask is None or mask.shape[1] == ids.shape[1]):
            if new_tokens_only is None:
                new_tokens_only = _only_new(ids, layer, kwargs[CACHE_NAME].get_seq_length())
            if new_tokens_only:
                kwargs.pop("input_ids", None)
                return self._generate_on(ids, layer, *args, **kwargs)
        return _generate(self, inputs, *args, **kwargs)

    def _generate_on(self, ids: torch.Tensor, layer: StateCacheLayer, *args, **kwargs):
        """:meth:`generate` with new tokens."""
        mask, cache = kwargs.get("attention_mask"), kwargs[CACHE_NAME]
        with torch.no_grad():
            cache.read_pending(self.base_model)
        past = getattr(cache, "mask", None)
        mask, unread = torch.ones_like(ids) if mask is None else mask, 0
        if layer.unread is not None:
            last, real = (x.to(ids.device, ids.dtype) for x in layer.unread)
            ids, mask, unread = (
                torch.cat([last, ids], 1),
                torch.cat([real.to(mask.dtype), mask], 1),
                last.shape[1],
            )
        length = cache.get_seq_length()
        past = mask.new_ones(len(ids), length) if past is None else past[:, :length].to(mask)
        kwargs["attention_mask"] = torch.cat([past, mask], 1)
        cache.goes_on_after = length
        try:
            found = _generate(self, ids, *args, **kwargs)
        finally:
            del cache.goes_on_after
        if isinstance(found, torch.Tensor):
            return found[:, unread:]
        found.sequences = found.sequences[:, unread:]
        return found

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, ended_rows: EndedRows | None = None, **kwargs):
        cache = name_cache(kwargs, "cache").get("cache")
        drafting, goes_on = hasattr(cache, "is_drafting"), hasattr(cache, "goes_on_after")
        if drafting and kwargs.get("next_sequence_length") is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - _columns_read(cache)
        given = super().prepare_inputs_for_generation(input_ids, *args, **name_cache(kwargs, CACHE_NAME))
        if self.counts_tokens and goes_on:
            given.pop("position_ids", None)
        if drafting or (self.counts_tokens and goes_on):
            mask, ids = given.get("attention_mask"), given["input_ids"]
            if mask is not None and ids is not None:
                given["attention_mask"] = mask[:, -ids.shape[1] :]
        return given

    def _sample(self, input_ids: torch.Tensor, *, stopping_criteria: StoppingCriteriaList, **kwargs):
        ended, cache = EndedRows(stopping_criteria), kwargs.get(CACHE_NAME)
        ends = self.keeps_states and ended.padded and len(input_ids) > 1
        if ends:
            kwargs["ended_rows"] = ended
        if (ends or _has_read_padding(cache)) and kwargs.get("attention_mask") is None:
            length = kwargs["generation_config"]._mask_length  # transformers leaves out a mask of ones
            kwargs["attention_mask"] = input_ids.new_ones(len(input_ids), length)
        if state_layer(cache) is not None and kwargs["generation_config"].is_assistant:
            self._read_ahead(input_ids, kwargs)
        found = super()._sample(input_ids, stopping_criteria=ended, **kwargs)
        if state_layer(cache) is not None:
            _note_unread(found, cache, ended.before if ended.padded else None)
        return found

    def _assisted_decoding(self, input_ids: torch.Tensor, *args, **kwargs):
        cache = kwargs.get(CACHE_NAME)
        if state_layer(cache) is None:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        # transformers takes the mask for one of ``input_ids``. Without any, an assistant takes tokens that it
        # drafted itself for padding in its next turn, where they are those.
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask[:, mask.shape[1] - input_ids.shape[1] :]
        kwargs["attention_mask"] = mask
        self._read_ahead(input_ids, kwargs)
        cache.is_drafting = True
        try:
            found = super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            del cache.is_drafting
        cache.read_pending(self.base_model)
        cache.end_recording()
        _note_unread(found, cache, None)
        return found

    def _read_ahead(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Read a long prompt but for its last token, and record from there.

        Otherwise all of it would be read again whenever a draft is taken back.
        """
        cache = kwargs[CACHE_NAME]
        new = input_ids.shape[1] - _columns_read(cache)
        if new > _SHORT and kwargs.get("inputs_embeds") is None:
            given = {"input_ids": input_ids[:, -new:-1]}
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    given[name] = kwargs[name][:, -new:-1]
            self.base_model(**given, cache=cache, use_cache=True)
        cache.read_pending(self.base_model)
        cache.activate_past_recording()

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        ended, mask = model_kwargs.get("ended_rows"), model_kwargs.get("attention_mask")
        if ended is not None and ended.rows is not None and mask is not None:
            mask[:, -1].masked_fill_(ended.rows.to(mask.device), 0)  # the column that was just added
        return model_kwargs


_SHORT = 32
"""Tokens that may as well be read again."""

_generate = either_cache_name(GenerationMixin.generate, CACHE_NAME)


def state_layer(cache: Cache | None) -> StateCacheLayer | None:
    """The first layer of a cache that holds a state; it knows the columns that all layers have read."""
    layers = getattr(cache, "layers", ())
    return next((layer for layer in layers if isinstance(layer, StateCacheLayer)), None)


def _columns_read(cache: Cache) -> int:
    """How many columns of its input ids a call of ``generate`` has read."""
    return cache.get_seq_length() - getattr(cache, "goes_on_after", 0)


def _note_unread(found: Any, cache: Cache, ended_before: torch.Tensor | None) -> None:
    """Keep the tokens in the cache that were written and not read; rows that had ended wrote padding."""
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    last = sequences[:, _columns_read(cache) :]
    real = torch.ones_like(last)
    if ended_before is not None:
        real = (~ended_before).long()[:, None].expand_as(last)
    state_layer(cache).unread = (last.clone(), real.clone())


def _only_new(ids: torch.Tensor, layer: StateCacheLayer, length: int) -> bool:
    """Whether ``ids`` are new tokens, and not all since the beginning; ``length`` columns were read."""
    if ids.shape[1] <= length:
        return True
    if layer.tokens is not None:
        read = token_digest(ids[:, : layer.seen])
        if not torch.equal(read, layer.tokens.to(read.device)):
            raise ValueError(
                f"inputs: {ids.shape[1]} tokens that do not begin with the {layer.seen} that the cache has "
                "read; pass new_tokens_only=True to read them after those, or begin with a new cache"
            )
    return False


def _has_read_padding(cache: Cache | None) -> bool:
    """Whether a mask of ones contradicts what a state in ``cache`` has read."""
    return any(getattr(layer, "padding", None) is not None for layer in getattr(cache, "layers", ()))
