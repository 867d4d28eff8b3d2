"""The fast weights of a converted model: what each sequence has added to the weights of the MLPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nl_models.layers.state import join_states, row_indices


class LayerFastWeights(NamedTuple):
    """What is added to the weights of the first n hidden units of one MLP, for each of B sequences.

    fp32, or fp64 for a model in fp64. Changes rather than weights: a bf16 weight would round most steps away,
    and what stands on the model's own path (adapters, quantised weights) keeps working.
    """

    up: torch.Tensor  # [B, n, D]
    down: torch.Tensor  # [B, D, n]
    gate: torch.Tensor | None  # [B, n, D]; None for an MLP without a gate


class FastWeights:
    """The fast weights of all layers, for B sequences. Never changed in place: a step makes new ones.

    A plain class on purpose: what wraps modules (FSDP2) casts tensors that it finds in containers.

    Args:
        layers: one for each decoder layer; ``None`` where the MLP has no levels.
        inputs: where a call keeps what the matrices multiplied, by layer and part ("up", "gate", "down");
            ``None``: nowhere.
    """

    def __init__(
        self,
        layers: Sequence[LayerFastWeights | None],
        inputs: dict[tuple[int, str], torch.Tensor] | None = None,
    ):
        self.layers = tuple(layers)
        self.inputs = inputs
        sizes = {tensor.shape[0] for layer in self.layers for tensor in layer or () if tensor is not None}
        if len(sizes) != 1:
            raise ValueError(f"layers: expected tensors of one batch size, got {sorted(sizes)}")
        self.batch_size = sizes.pop()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FastWeights:
        """``function`` of every tensor."""
        return FastWeights(
            None if layer is None else LayerFastWeights(*(None if t is None else function(t) for t in layer))
            for layer in self.layers
        )

    def select(self, rows: torch.Tensor) -> FastWeights:
        """The sequences ``rows`` (int64, any number of times)."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def remove(self, rows: torch.Tensor | Sequence[int]) -> FastWeights:
        """The sequences that are not among ``rows``: indices, or bool ``[B]``."""
        left = torch.ones(self.batch_size, dtype=torch.bool)
        left[row_indices(rows, self.batch_size)] = False
        return self.select(row_indices(left, self.batch_size))

    def reset(self, rows: torch.Tensor | Sequence[int]) -> FastWeights:
        """The same with the sequences ``rows`` at the model's own weights."""
        kept = torch.ones(self.batch_size, 1, 1)
        kept[row_indices(rows, self.batch_size)] = 0
        return self.map(lambda tensor: tensor * kept.to(tensor))

    @staticmethod
    def join(weights: Sequence[FastWeights]) -> FastWeights:
        """The sequences of several in one, in order, as when users join a batch.

        Raises:
            ValueError: of different models.
        """
        layers = [join_states(each) for each in zip(*(w.layers for w in weights), strict=True)]
        return FastWeights(layers)

    def check_batch(self, batch_size: int) -> None:
        """Raise ``ValueError`` unless ``batch_size`` rows can be served (see :func:`fast_product`)."""
        if batch_size % self.batch_size:
            raise ValueError(
                f"fast_weights: those of {self.batch_size} sequences cannot serve a batch of {batch_size}; "
                "expected one for each row, or for each of equally many rows that follow one another"
            )


def fast_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [N, T, in]`` times the weight ``[B, out, in]`` of its sequence, where and as ``x`` is.

    ``N = B r``: r rows that follow one another share a sequence's weights, as beams of one prompt do.
    """
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    return (rows @ weight.to(x).mT).view(*x.shape[:-1], weight.shape[1])


def add_to_first(y: torch.Tensor, addition: torch.Tensor) -> torch.Tensor:
    """``y [.., H]`` with ``addition [.., n]`` added to its first n units."""
    return y + F.pad(addition, (0, y.shape[-1] - addition.shape[-1]))
