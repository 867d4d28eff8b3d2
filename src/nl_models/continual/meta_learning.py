"""Training the initial states: the loss of a stream as a function of the weights that reading starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nl_models.continual.learner import find_fast_parameters
from nl_models.continual.rules import StepRule, rules_of_levels
from nl_models.continual.stream import StreamState, advance
from nl_models.layers.gated_delta_net import GatedDeltaNet
from nl_models.layers.memory_layer import MemoryLayer


def next_token_loss_through_steps(
    model: nn.Module,
    input_ids: torch.Tensor,
    rules: StepRule | Sequence[StepRule],
    *,
    nested: bool | None = None,
    context_length: int | None = None,
) -> torch.Tensor:
    """The mean loss of reading ``input_ids`` as :class:`ContinuumLearner` does, with the graph of every step.

    ``backward()`` reaches the model's parameters through the steps that start from them, and rates that are
    tensors: the initial states are meta-learned (Nested Learning, arXiv 2512.24695, Eq. 73). The value is
    that of :class:`ContinuumLearner`: the steps themselves are first-order.

    Args:
        model: as for :class:`ContinuumLearner`. Memories have a second derivative in the implementation
            ``"reference"`` only.
        input_ids: ``[B, T]``, T at least 2; every row starts from the model's own weights.
        rules: as for :class:`ContinuumLearner`; muon's step is differentiable once, which is what is needed.
        nested: as for :class:`ContinuumLearner`.
        context_length: as for :class:`ContinuumLearner`; ``None``: no limit.

    Returns:
        A scalar: nats per token. Its graph holds the activations of the whole stream.

    Raises:
        TypeError: ``input_ids`` that are no tensor.
        ValueError: inside of ``torch.inference_mode()``, fewer than two tokens, a model whose layers are
            checkpointed, which keeps no context, or a memory of another implementation.
    """
    parameters = find_fast_parameters(model, nested)
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids: expected a tensor of tokens [B, T], got {type(input_ids).__name__}")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode(): the loss has no gradient there; call it outside of it")
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected shape [B, T] with T >= 2, got {tuple(input_ids.shape)}")
    rules = rules_of_levels(rules, len(parameters.chunk_sizes), len(input_ids))
    _check_differentiable(parameters.model)
    state = StreamState(changes=parameters.zeros(len(input_ids)))
    total = torch.zeros((), dtype=parameters.dtype, device=parameters.device)
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for _, piece in advance(
            parameters, rules, state, input_ids, context_length=context_length, create_graph=True
        ):
            if piece is not None:
                total = total + piece.loss.sum()
    return total / (input_ids.shape[0] * (input_ids.shape[1] - 1))


def _check_differentiable(model: nn.Module) -> None:
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError("model: gradient checkpointing keeps no context; switch it off")
    for module in model.modules():
        if isinstance(module, (MemoryLayer, GatedDeltaNet)) and module.impl != "reference":
            raise ValueError(
                f"model: the op of {type(module).__name__} has a second derivative in the implementation "
                f"'reference' only, got {module.impl!r}; a HopeConfig takes memory_impl, "
                "a memory in the place of attention has the attribute impl"
            )
