"""States of the chunked memories as nested named tuples of tensors, whatever the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nl_kernels.checks import check_position, check_tensor

State = TypeVar("State", bound=tuple)


def map_tensors(function: Callable, state: State, *others: State) -> State:
    """``function`` of the tensors in the same place of each named tuple; what is absent stays absent."""
    if isinstance(state, tuple):
        return type(state)(*(map_tensors(function, *parts) for parts in zip(state, *others, strict=True)))
    return None if state is None else function(state, *others)


def named_tensors(name: str, state: tuple | torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a state by their names in messages."""
    if state is None or isinstance(state, torch.Tensor):
        return {} if state is None else {name: state}
    found = {}
    for field, part in zip(state._fields, state):
        found |= named_tensors(f"{name}.{field}", part)
    return found


def tensors_in(state: tuple | torch.Tensor | None) -> list[torch.Tensor]:
    """All tensors of nested tuples."""
    if isinstance(state, tuple):  # a step's time shows it: an instance of a tensor takes longer to tell
        return [x for part in state if part is not None for x in tensors_in(part)]
    return [] if state is None else [state]


def weights_in(state: tuple | None) -> list[torch.Tensor]:
    """All tensors of a state but its position."""
    return [] if state is None else tensors_in((state.snapshot, state.running, state.momentum))


def cast(state: State, dtype: torch.dtype) -> State:
    """The same with weights of ``dtype``."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, state)


def own_memory(state: State) -> State:
    """A copy whose tensors are contiguous and share no memory, as steps in place need it."""
    return map_tensors(lambda x: x.clone(memory_format=torch.contiguous_format), state)


def beginning(kind: type[State], initial: tuple, anchored: bool, batch: int, momentum: bool) -> State:
    """The state before the first token, from the initial weights [B, H, ..] that are its anchor or itself."""
    zeros = map_tensors(torch.zeros_like, initial)
    start = zeros if anchored else initial
    device = next(x for x in initial if x is not None).device
    position = torch.zeros(batch, dtype=torch.int64, device=device)
    return kind(start, start, position, zeros if momentum else None)


def check_state(
    name: str, state: object, kind: type, shapes: tuple, momentum: bool, period: int, like: torch.Tensor
) -> None:
    """Check that a state fits the weights and the options of a call.

    Args:
        shapes: of its weights, in the named tuple that holds them; ``None`` for layers that there are not.
        momentum: whether the call has it.
        period: tokens between the boundaries that the position is counted from.
    """
    if not isinstance(state, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(state).__name__}")
    if (state.momentum is not None) != momentum:
        made, given = ("with", "without") if state.momentum is not None else ("without", "with")
        raise ValueError(f"{name}: made {made} momentum, but this call is {given} momentum")
    for part_name in ("snapshot", "running", "momentum"):
        part = getattr(state, part_name)
        if part is None and part_name == "momentum":
            continue
        if not isinstance(part, type(shapes)):
            raise TypeError(
                f"{name}.{part_name}: expected {type(shapes).__name__}, got {type(part).__name__}"
            )
        for field, shape, held in zip(shapes._fields, shapes, part):
            field = f"{name}.{part_name}.{field}"
            if (shape is None) != (held is None):
                raise ValueError(f"{field}: made by {'linear' if held is None else 'two-layer'} memories")
            if shape is not None:
                check_tensor(field, held, shape, like=like)
    lead = next(shape for shape in shapes if shape is not None)
    check_position(f"{name}.position", state.position, lead[0], period, like)
