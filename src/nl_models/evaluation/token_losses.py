"""Next-token losses of every position, in memory that does not grow with the text."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.module_views import input_device

_LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless ``model`` is a Hope, or a baseline of its family."""
    if not isinstance(model, HopeForCausalLM):
        raise TypeError(
            f"model: expected a HopeForCausalLM (Hope, Titans, Gated DeltaNet or attention by its config), "
            f"got {type(model).__name__}"
        )


def check_tokens(name: str, tokens: object, vocab_size: int) -> torch.Tensor:
    """``tokens [L]`` as int64 on the CPU.

    Raises:
        TypeError: no tensor or array of integers.
        ValueError: more than one dimension, empty, or ids outside of the vocabulary.
    """
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu":
        tokens = torch.from_numpy(tokens.astype(np.int64))
    if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"{name}: expected token ids as a tensor or array of integers, got {kind}")
    if tokens.ndim != 1 or not tokens.numel():
        raise ValueError(f"{name}: expected one row of token ids, got shape {tuple(tokens.shape)}")
    tokens = tokens.detach().cpu().long()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: expected ids from 0 to {vocab_size - 1} (the model's vocabulary), got {low} to {high}; "
            "encode the text with the model's own tokenizer"
        )
    return tokens


def token_losses(model: HopeForCausalLM, rows: torch.Tensor, cache: HopeCache | None = None) -> torch.Tensor:
    """Nats ``[B, T]``, fp32 on the CPU, of predicting ``rows[:, 1:]`` from the tokens before.

    Args:
        model: in evaluation mode, without gradients.
        rows: ``[B, T + 1]`` ids; the last column is only a target.
        cache: the state before, which is replaced by that after ``rows[:, :-1]``; ``None``: a fresh one.
    """
    rows = rows.to(input_device(model))
    hidden = model.model(input_ids=rows[:, :-1], cache=cache, use_cache=cache is not None).last_hidden_state
    hidden, targets = hidden.flatten(0, 1), rows[:, 1:].flatten()
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    losses = [
        F.cross_entropy(model.lm_head(some).float(), wanted, reduction="none")
        for some, wanted in zip(hidden.split(at_once), targets.split(at_once))
    ]
    return torch.cat(losses).view(rows.shape[0], -1).cpu()
