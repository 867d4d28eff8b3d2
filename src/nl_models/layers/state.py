"""Fast state of layers: nested NamedTuples whose tensors all have the batch as first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

State = Any
"""A tensor, ``None``, or a (named) tuple of states."""


def map_state(function: Callable[[torch.Tensor], torch.Tensor], state: State) -> State:
    """Apply ``function`` to every tensor of ``state``; the structure, and every ``None`` in it, stays."""
    if state is None:
        return None
    if isinstance(state, torch.Tensor):
        return function(state)
    mapped = [map_state(function, part) for part in state]
    return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)


def state_tensors(state: State) -> Iterator[torch.Tensor]:
    """The tensors of ``state`` in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from state_tensors(part)
