"""``generate`` for models with a state: rows that have ended write nothing to it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteriaList

from nl_models.hf_names import CACHE_NAME, either_cache_name, name_cache


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

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        self.rows = stopped if self.rows is None else self.rows | stopped
        return stopped


class StatefulGeneration:
    """Takes the cache by either of its names, and masks the padding that follows an early end of text.

    It stands before ``GenerationMixin`` among the bases of a class, where transformers looks for that. Beam
    search needs no such mask: its running beams have not ended.
    """

    generate = either_cache_name(GenerationMixin.generate, CACHE_NAME)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, ended_rows: EndedRows | None = None, **kwargs):
        return super().prepare_inputs_for_generation(*args, **name_cache(kwargs, CACHE_NAME))

    def _sample(self, input_ids: torch.Tensor, *, stopping_criteria: StoppingCriteriaList, **kwargs):
        ended = EndedRows(stopping_criteria)
        ends = self._is_stateful and ended.padded and len(input_ids) > 1
        if ends:
            kwargs["ended_rows"] = ended
        if (ends or _has_read_padding(kwargs.get(CACHE_NAME))) and kwargs.get("attention_mask") is None:
            length = kwargs["generation_config"]._mask_length  # transformers leaves out a mask of ones
            kwargs["attention_mask"] = input_ids.new_ones(len(input_ids), length)
        return super()._sample(input_ids, stopping_criteria=ended, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        ended, mask = model_kwargs.get("ended_rows"), model_kwargs.get("attention_mask")
        if ended is not None and ended.rows is not None and mask is not None:
            mask[:, -1].masked_fill_(ended.rows.to(mask.device), 0)  # the column that was just added
        return model_kwargs


def _has_read_padding(cache: Cache | None) -> bool:
    """Whether a mask of ones contradicts what a state in ``cache`` has read."""
    return any(getattr(layer, "padding", None) is not None for layer in getattr(cache, "layers", ()))
