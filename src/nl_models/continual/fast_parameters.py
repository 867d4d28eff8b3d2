"""What of a model learns, and how the model is run with it: one description for every kind of model."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nl_models.module_views import dtype_of, input_device

Context = Any
"""What a model carries from token to token: a cache, or one for each sequence. Opaque to the learner."""


class FastParameter(NamedTuple):
    """One matrix ``[out, in]`` of one level of one layer, in the layout of ``nn.Linear.weight``."""

    name: str
    level: int
    input_name: str  # of the vectors that it multiplies, shared by the matrices with the same input


class ModelOutput(NamedTuple):
    """What a run over a piece of every sequence gives.

    Attributes:
        logits: ``[B, T, V]``.
        context: after the piece.
        inputs: by ``FastParameter.input_name``, ``[B, T, in]``, where they were asked for.
    """

    logits: torch.Tensor
    context: Context
    inputs: dict[str, torch.Tensor]


class FastParameters(ABC):
    """The fast parameters of a model. Implementations: converted models, Hope.

    Attributes:
        model: whose parameters are read and never changed.
        chunk_sizes: of the levels, fast to slow, each a multiple of the one before.
        parameters: every fast matrix.
        nested: whether a step of a level puts the faster ones back to the model's own weights (Eq. 72).
    """

    model: nn.Module
    chunk_sizes: tuple[int, ...]
    parameters: tuple[FastParameter, ...]
    nested: bool = False

    @abstractmethod
    def weight(self, parameter: FastParameter) -> torch.Tensor:
        """The model's own weight ``[out, in]`` in the dtype of fast weights, differentiable."""

    @abstractmethod
    def own_weight(self, parameter: FastParameter) -> torch.Tensor:
        """The model's own weight ``[out, in]`` as a view of the parameter, to be written to.

        Raises:
            TypeError: there is no parameter that is the weight.
        """

    @abstractmethod
    def run(
        self,
        changes: Mapping[str, torch.Tensor],
        ids: torch.Tensor,
        context: Context,
        *,
        keep_inputs: bool = False,
    ) -> ModelOutput:
        """Run ``ids [N, T]`` with ``changes[name] [B, out, in]`` added to the weights, N a multiple of B.

        ``context`` is that after the tokens before, ``None`` at the start, and is not modified.
        """

    @abstractmethod
    def generate(
        self, changes: Mapping[str, torch.Tensor], ids: torch.Tensor, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """``model.generate(ids, **options)`` with the changes."""

    @abstractmethod
    def detach(self, context: Context) -> Context:
        """The context without the graph behind it, in the layout that it has after a load."""

    @abstractmethod
    def describe_context(self, context: Context) -> tuple[Any, dict[str, torch.Tensor]]:
        """The context as JSON and named tensors."""

    @abstractmethod
    def rebuild_context(self, description: Any, tensors: Mapping[str, torch.Tensor]) -> Context:
        """The inverse of :meth:`describe_context`."""

    def on(self, model: nn.Module) -> FastParameters:
        """The same, of a view of the model (:mod:`nl_models.module_views`)."""
        other = type(self)(model)
        for name in ("nested", "level_norms", "chunk_sizes"):
            setattr(other, name, getattr(self, name))
        return other

    @property
    def dtype(self) -> torch.dtype:
        """Of the fast weights: fp32, or fp64 for a model in fp64."""
        return torch.promote_types(dtype_of(self.model) or torch.float32, torch.float32)

    @property
    def device(self) -> torch.device:
        """Of the model's input."""
        return input_device(self.model)

    @functools.cached_property
    def level_norms(self) -> tuple[float, ...]:
        """Frobenius norm of all weights of each level, as the model has them."""
        squares = [0.0] * len(self.chunk_sizes)
        for parameter in self.parameters:
            squares[parameter.level] += float(self.weight(parameter).detach().square().sum())
        return tuple(math.sqrt(square) for square in squares)

    def zeros(self, batch_size: int) -> dict[str, torch.Tensor]:
        """The changes before any step."""
        return {
            parameter.name: torch.zeros_like(self.weight(parameter)).detach().repeat(batch_size, 1, 1)
            for parameter in self.parameters
        }
