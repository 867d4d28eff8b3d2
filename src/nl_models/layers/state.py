"""Fast state of layers: nested NamedTuples whose tensors all have the batch as first dimension."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from nl_kernels import (
    ContinuumClock,
    ContinuumLevelState,
    DeepMemoryState,
    DeepMemoryWeights,
    MemoryStack,
    SelfModifyingState,
)
from nl_models.files import write_bytes

State = Any
"""A tensor, ``None``, or a (named) tuple of states."""

STATE_FORMAT = "nl_models.LayerState.1"


class AttentionState(NamedTuple):
    """Keys and values so far.

    Attributes:
        keys: ``[B, H, S, D]``, rotated.
        values: ``[B, H, S, D]``.
        mask: ``[B, S]`` bool, True at real tokens; ``None`` where there is no padding.
        position: ``[B]`` int64, the rotary position of each sequence's next token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    position: torch.Tensor


LAYER_STATES = {
    cls.__name__: cls
    for cls in (
        AttentionState,
        DeepMemoryState,
        DeepMemoryWeights,
        SelfModifyingState,
        MemoryStack,
        ContinuumLevelState,
        ContinuumClock,
    )
}
"""The named tuples that the state of a layer may hold, by name."""

# torch.load(weights_only=True) takes classes that are said to be data.
torch.serialization.add_safe_globals([*LAYER_STATES.values()])


def map_state(function: Callable[..., torch.Tensor], state: State, *others: State) -> State:
    """Apply ``function`` to every tensor of ``state``, and to those of ``others`` at its place.

    The structure, and every ``None`` in it, stays.
    """
    if state is None:
        return None
    if isinstance(state, torch.Tensor):
        return function(state, *others)
    mapped = [map_state(function, *parts) for parts in zip(state, *others)]
    return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)


def combine_states(function: Callable[..., torch.Tensor], state: State, initial: State) -> State:
    """``function`` of every number that a state and the initial one both have.

    Counters, and what waits for a step, stay those of ``state``.
    """

    def each(x: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
        return function(x, begun) if x.is_floating_point() and x.shape == begun.shape else x

    return map_state(each, state, initial)


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


def detach_state(state: State) -> State:
    """The same without its graph, as truncated backpropagation has it between two pieces of a stream."""
    return map_state(torch.Tensor.detach, state)


def row_indices(rows: torch.Tensor | Sequence[int], batch_size: int) -> torch.Tensor:
    """``rows`` as indices ``[N]``, from 0: given as such, or as bool ``[batch_size]``.

    Raises:
        ValueError: no such rows, or none.
    """
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):  # no numbers, which is said below
        found = torch.empty(0)
    if found.dtype == torch.bool and found.shape == (batch_size,):
        found = found.nonzero()[:, 0]
    integers = not (found.is_floating_point() or found.dtype == torch.bool) and found.ndim == 1
    if not integers or not found.numel() or int(found.min()) < 0 or int(found.max()) >= batch_size:
        raise ValueError(
            f"rows: expected at least one index from 0 to {batch_size - 1}, or bool [{batch_size}], "
            f"got {rows}"
        )
    return found.long()


def select_state(state: State, sequences: torch.Tensor) -> State:
    """The states of some sequences, in their order: indices ``[N]``, with repeats, or bool ``[B]``.

    Columns of keys and values that none of them has read are left out.
    """
    if isinstance(state, tuple) and not isinstance(state, AttentionState):
        parts = [select_state(part, sequences) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    chosen = map_state(lambda x: x[sequences.to(x.device)], state)
    return _without_empty_columns(chosen) if isinstance(chosen, AttentionState) else chosen


def _without_empty_columns(state: AttentionState) -> AttentionState:
    if state.mask is None:
        return state
    start = first_column(state.mask)
    keys, values, mask = state.keys[:, :, start:], state.values[:, :, start:], state.mask[:, start:]
    return AttentionState(keys, values, None if bool(mask.all()) else mask, state.position)


def first_column(mask: torch.Tensor) -> int:
    """The first column of ``mask [B, S]`` that is real in some row, S if there is none."""
    return int((mask.bool().any(0).long().cumsum(0) == 0).sum())


def join_states(states: Sequence[State]) -> State:
    """The states of several batches as those of one, as when sequences join a batch.

    They may have read unequally much: keys and values of fewer tokens get columns before them that are masked
    out, and fewer tokens that wait in a continuum level's chunk are filled up.

    Raises:
        ValueError: states of different layers.
    """
    first = states[0]
    if any(type(state) is not type(first) for state in states):
        raise ValueError(f"states: expected those of one layer, got {[type(s).__name__ for s in states]}")
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        if len({x.shape[1:] for x in states}) > 1:
            raise ValueError(f"states: of different sizes, {[tuple(x.shape) for x in states]}")
        return torch.cat([x.to(first.device) for x in states])
    if len({len(state) for state in states}) > 1:
        raise ValueError("states: expected those of one layer, got tuples of different lengths")
    if isinstance(first, AttentionState):
        states = _equally_long(states)
    elif isinstance(first, ContinuumLevelState):
        longest = max(state.pending_rates.shape[1] for state in states)
        states = [with_pending(state, longest) for state in states]
    parts = [join_states(each) for each in zip(*states)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def _equally_long(states: Sequence[AttentionState]) -> list[AttentionState]:
    lengths = [state.keys.shape[2] for state in states]
    if len(set(lengths)) == 1 and all(state.mask is None for state in states):
        return list(states)
    filled = []
    for (keys, values, mask, position), length in zip(states, lengths):
        gap = max(lengths) - length
        mask = torch.ones_like(keys[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
        keys, values = F.pad(keys, (0, 0, gap, 0)), F.pad(values, (0, 0, gap, 0))
        filled.append(AttentionState(keys, values, F.pad(mask, (gap, 0)), position))
    return filled


def with_pending(state: ContinuumLevelState, tokens: int) -> ContinuumLevelState:
    """The same with room for so many tokens that wait, at least as many as there are."""
    room = tokens - state.pending_rates.shape[1]
    return state._replace(
        pending_inputs=F.pad(state.pending_inputs, (0, 0, 0, room)),
        pending_rates=F.pad(state.pending_rates, (0, room)),
    )


def save_state(path: str | os.PathLike, state: State) -> None:
    """Write the state of a layer to a safetensors file, whole or not at all.

    Raises:
        ValueError: there is no state.
    """
    if state is None:
        raise ValueError("state: expected that of a layer, got None; call the layer with output_state=True")
    tensors: dict[str, torch.Tensor] = {}
    description = describe_state(state, "state", tensors)
    metadata = {"format": STATE_FORMAT, "structure": json.dumps(description)}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def load_state(path: str | os.PathLike, device: torch.device | str = "cpu") -> State:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or no saved state of a layer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != STATE_FORMAT:
                raise ValueError(f"path: {path} is no saved state of a layer")
            return rebuild_state(json.loads(metadata["structure"]), file.get_tensor, LAYER_STATES)
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} is truncated, or no saved state of a layer: {error}") from error
