"""The cache of a converted model: keys and values, states of memories, and the fast weights that served."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig

from nl_models.layers.state import state_tensors
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.surgery.fast_weights import FastWeights


class ContinuumCache(DynamicCache):
    """A :class:`transformers.DynamicCache` that carries fast weights along, and the states of memories.

    ``model.generate(ids, cache=ContinuumCache(model.config, fast_weights))`` reads with them;
    they follow their sequences when beams are reordered.

    Args:
        config: of the converted model.
        fast_weights: of B sequences, for batches of a multiple of B; ``None``: the model's own weights.
    """

    def __init__(self, config: PreTrainedConfig, fast_weights: FastWeights | None = None):
        super().__init__(config=config)
        for index in config.memory_layers or {}:
            self.layers[int(index)] = StateCacheLayer()
        self.fast_weights = fast_weights

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes the row ``beam_idx[i]`` of before."""
        self._follow(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._follow(indices)
        super().batch_select_indices(indices)

    def _follow(self, rows: torch.Tensor) -> None:
        """Fast weights of the rows ``rows``; those of one sequence serve any row."""
        fast = self.fast_weights
        if fast is None or fast.batch_size == 1:
            return
        first = self.layers[0]
        held = state_tensors(first.state) if isinstance(first, StateCacheLayer) else iter([first.keys])
        before = next(held).shape[0]
        shared = before // fast.batch_size
        if shared == 1:
            self.fast_weights = fast.select(rows)
            return
        own = torch.arange(before, device=rows.device) // shared
        if len(rows) != before or bool((rows // shared != own).any()):
            raise ValueError(
                f"rows: {shared} share the fast weights of each of {fast.batch_size} sequences; they may "
                f"change places among themselves only, got {rows.tolist()}"
            )
