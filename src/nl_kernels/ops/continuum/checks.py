"""Checks of the continuum's arguments: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from nl_kernels.checks import (
    check_bool,
    check_choice,
    check_position,
    check_positive_int,
    check_range,
    check_tensor,
)
from nl_kernels.ops.continuum.state import (
    RULES,
    RULES_WITH_MOMENTUM,
    VARIANTS,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    check_chunk_sizes,
    entry_type,
    state_dtype,
)


def check_variant(
    variant: str, level_weights: torch.Tensor | None, levels: Sequence[ContinuumLevel], x: torch.Tensor
) -> None:
    check_choice("variant", variant, VARIANTS)
    if level_weights is None:
        return
    if variant != "independent":
        raise ValueError(f"level_weights: of variant 'independent' only, got them with {variant!r}")
    check_tensor("level_weights", level_weights, (len(levels),), like=x)


def check_levels(levels: Sequence[ContinuumLevel], x: torch.Tensor, *, rates_of_tokens: bool = False) -> None:
    if not isinstance(levels, Sequence) or not all(isinstance(level, ContinuumLevel) for level in levels):
        raise TypeError(f"levels: expected a sequence of ContinuumLevel, got {_kinds(levels)}")
    if not levels:
        raise ValueError("levels: expected at least one, got none")
    for index, level in enumerate(levels):
        _check_level(f"levels[{index}]", level, x, rates_of_tokens)
    check_chunk_sizes([level.chunk_size for level in levels])


def _check_level(name: str, level: ContinuumLevel, x: torch.Tensor, rates_of_tokens: bool) -> None:
    batch, _, width = x.shape
    if not isinstance(level.rate, torch.Tensor):  # first: whether the level steps depends on it
        check_number(f"{name}.rate", level.rate)
    if not isinstance(level.up, torch.Tensor) or level.up.ndim not in ((2,) if level.steps else (2, 3)):
        alternative = "" if level.steps else f" or [{batch}, H, {width}]"
        raise ValueError(
            f"{name}.up: expected a tensor of shape [H, {width}]{alternative}, got {_describe(level.up)}"
        )
    sequences, hidden = (batch,) * (level.up.ndim == 3), level.up.shape[-2]
    check_tensor(f"{name}.norm", level.norm, (width,), like=x)
    check_tensor(f"{name}.up", level.up, (*sequences, hidden, width), like=x)
    check_tensor(f"{name}.down", level.down, (*sequences, width, hidden), like=x)
    if level.gate is not None:
        check_tensor(f"{name}.gate", level.gate, (*sequences, hidden, width), like=x)
    if level.chunk_size is not None:
        check_positive_int(f"{name}.chunk_size", level.chunk_size)
    check_choice(f"{name}.rule", level.rule, RULES)
    if level.error_bound is not None:
        check_number(f"{name}.error_bound", level.error_bound)
        if level.error_bound == 0:
            raise ValueError(f"{name}.error_bound: expected more than 0 or None, got 0")
    if isinstance(level.rate, torch.Tensor):
        shape = () if level.rate.ndim == 0 else x.shape[:2]
        if rates_of_tokens:  # those of an earlier call, which are in its state
            shape = level.rate.shape
        check_tensor(f"{name}.rate", level.rate, shape, like=x)
        check_range(f"{name}.rate", level.rate, 0.0, math.inf, closed_high=False)
    check_retention(f"{name}.retention", level.retention, x)
    check_bool(f"{name}.restore_norms", level.restore_norms)
    check_bool(f"{name}.predict_next", level.predict_next)
    if level.predict_next and level.chunk_size == 1:
        raise ValueError(
            f"{name}.chunk_size: expected at least 2 with predict_next, got 1: no token has a next one"
        )
    check_decay(f"{name}.momentum_decay", level.momentum_decay)
    for part in ("key", "value"):
        matrix = getattr(level, part)
        if matrix is not None:
            check_tensor(f"{name}.{part}", matrix, (width, width), like=x)
        elif level.steps and part == "value":
            raise ValueError(
                f"{name}.{part}: expected a tensor of shape {(width, width)} for a level that steps, got None"
            )


def check_state(
    name: str,
    state: ContinuumState,
    levels: Sequence[ContinuumLevel],
    batch: int,
    x: torch.Tensor,
    variant: str,
) -> None:
    if not isinstance(state, tuple) or len(state) != len(levels):
        raise ValueError(f"{name}: expected a tuple of {len(levels)} level states, got {_kinds(state)}")
    for index, (before, level) in enumerate(zip(state, levels)):
        expected = entry_type(levels, index, variant)
        if not isinstance(before, expected):
            raise TypeError(f"{name}[{index}]: expected {expected.__name__}, got {type(before).__name__}")
        if before is None:
            continue
        period = level.chunk_size
        if isinstance(before, ContinuumLevelState):
            _check_level_state(f"{name}[{index}]", before, f"levels[{index}]", level, batch, x)
            period = before.pending_rates.shape[1] + 1
        check_position(f"{name}[{index}].position", before.position, batch, period, x)
    if variant != "nested" or x.device.type != "cpu":
        return
    for index, (fast, slow) in enumerate(itertools.pairwise(state)):
        if fast is None or slow is None:
            continue
        ahead = slow.position - fast.position
        if bool(((ahead < 0) | (ahead % levels[index].chunk_size != 0)).any()):
            raise ValueError(
                f"{name}[{index}].position: expected the place of {name}[{index + 1}].position in a chunk of "
                f"{levels[index].chunk_size}, got {fast.position.tolist()} beside {slow.position.tolist()}"
            )


def _check_level_state(
    name: str,
    state: ContinuumLevelState,
    level_name: str,
    level: ContinuumLevel,
    batch: int,
    x: torch.Tensor,
) -> None:
    for part in ("up", "down", "gate"):
        initial, fast = getattr(level, part), getattr(state, part)
        momentum = getattr(state, f"{part}_momentum")
        if (initial is None) != (fast is None):
            raise ValueError(f"{name}.{part}: expected None exactly where {level_name}.{part} is")
        if (momentum is not None) != (fast is not None and level.rule in RULES_WITH_MOMENTUM):
            raise ValueError(
                f"{name}.{part}_momentum: expected a tensor exactly where {level_name} has {part} and a rule "
                f"of {RULES_WITH_MOMENTUM}, got {_describe(momentum)}"
            )
        if initial is not None:
            _check_fp32(f"{name}.{part}", fast, (batch, *initial.shape), x)
        if momentum is not None:
            _check_fp32(f"{name}.{part}_momentum", momentum, (batch, *initial.shape), x)
    longest = state.pending_rates.shape[-1]
    _check_fp32(f"{name}.pending_inputs", state.pending_inputs, (batch, longest, x.shape[2]), x)
    _check_fp32(f"{name}.pending_rates", state.pending_rates, (batch, longest), x)
    if longest >= level.chunk_size:
        raise ValueError(
            f"{name}.pending_rates: expected fewer than a chunk's {level.chunk_size}, got {longest}"
        )


def _check_fp32(name: str, value: object, shape: tuple[int, ...], x: torch.Tensor) -> None:
    check_tensor(name, value, shape, like=x)
    if value.dtype != state_dtype(x.dtype):
        raise TypeError(f"{name}: expected {state_dtype(x.dtype)} for x of {x.dtype}, got {value.dtype}")


def check_number(name: str, value: object) -> None:
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number, at least 0, got {value}")


def check_decay(name: str, value: object) -> None:
    """A number in [0, 1)."""
    check_number(name, value)
    if value >= 1:
        raise ValueError(f"{name}: expected less than 1, got {value}")


def check_retention(name: str, value: object, like: torch.Tensor) -> None:
    """A number in [0, 1], or a tensor of one."""
    if isinstance(value, torch.Tensor):
        check_tensor(name, value, value.shape if value.numel() == 1 else (), like=like)
        check_range(name, value, 0.0, 1.0)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a tensor of one, got {type(value).__name__}")
    elif not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def _kinds(value: object) -> str:
    """What came in the place of a sequence, without its tensors' numbers."""
    if isinstance(value, torch.Tensor):
        return _describe(value)
    if type(value) not in (list, tuple):
        return type(value).__name__
    return f"a {type(value).__name__} of {[type(element).__name__ for element in value]}"


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} of {value.dtype} on {value.device}"
    return type(value).__name__
