"""Fast state of layers: nested NamedTuples whose tensors all have the batch as first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def describe_state(state: State, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The structure of ``state`` as JSON: a tensor is its name, to which ``tensors`` is extended."""
    if state is None:
        return None
    if isinstance(state, torch.Tensor):
        # A copy: safetensors writes no views, and no two names for the same memory.
        tensors[name] = state.detach().clone(memory_format=torch.contiguous_format)
        return name
    parts = [describe_state(part, f"{name}.{i}", tensors) for i, part in enumerate(state)]
    return {"type": type(state).__name__, "parts": parts} if hasattr(state, "_fields") else parts


def rebuild_state(
    description: Any, get_tensor: Callable[[str], torch.Tensor], types: Mapping[str, type]
) -> State:
    """The inverse of :func:`describe_state`; ``types`` are the named tuples there may be, by name."""
    if description is None:
        return None
    if isinstance(description, str):
        return get_tensor(description)
    if isinstance(description, list):
        return tuple(rebuild_state(part, get_tensor, types) for part in description)
    parts = [rebuild_state(part, get_tensor, types) for part in description["parts"]]
    return types[description["type"]](*parts)
