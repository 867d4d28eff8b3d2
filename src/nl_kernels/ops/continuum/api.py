"""The public function: checks, choice of implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nl_kernels.checks import check_choice, check_positive_int, check_range, check_tensor
from nl_kernels.dispatch import choose_implementation
from nl_kernels.ops.continuum.eager import continuum_memory_eager
from nl_kernels.ops.continuum.reference import continuum_memory_reference
from nl_kernels.ops.continuum.state import (
    RULES,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    check_chunk_sizes,
    state_dtype,
)

AVAILABLE = ("eager", "reference")


def continuum_memory(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    mask: torch.Tensor | None = None,
    initial_state: ContinuumState | None = None,
    output_final_state: bool = False,
    norm_eps: float = 1e-6,
    checkpoint_every: int | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """A chain of MLP blocks whose weights learn within the context, from the fastest level to the slowest.

    Every level is a pre-norm residual MLP block, ``x + f_θ(n(x))``, and feeds the next (Nested Learning,
    arXiv 2512.24695, Eqs. 70-73). After every ``chunk_size`` tokens of a sequence a level takes one step
    on those tokens, all gradients at the weights that served them (Eq. 71), on the regression loss
    ``½‖f_θ(k_t) − v_t‖²`` with ``k_t = n(key n(x_t))`` and ``v_t = value n(x_t)``. Each linear layer W with
    its own inputs x_t and output gradients δ_t then becomes::

        sgd   W − Σ_t η_t δ_t x_tᵀ
        dgd   (W − Σ_t η_t δ_t x_tᵀ) (I + Σ_t η_t x_t x_tᵀ)^{-1}

    Between steps it is an ordinary MLP. Fast weights belong to one sequence. Gradients flow through the
    steps into everything that a level holds, and into the state.

    Args:
        x: [B, T, D], fp16, bf16, fp32 or fp64.
        levels: at least one; every chunk size a multiple of the one before, levels that never step last.
        mask: [B, T] bool, True for tokens, anywhere in the row; None: all are tokens. Padding is neither
            learned from nor counted, and its outputs are zero.
        initial_state: the state returned by an earlier call on the preceding tokens of the same sequences;
            None: the levels' own weights. Weights in a state replace the levels' ``up``, ``gate``, ``down``.
        output_final_state: also return the state after the last token.
        norm_eps: added to the mean square inside the norms.
        checkpoint_every: keep for the backward only the fast weights of every so many steps of a level, and
            recompute the rest; None: keep everything.
        impl: ``"eager"`` or ``"reference"`` (token by token, slow: the definition); None: eager.

    Returns:
        y [B, T, D] and the final state: a tuple with one :class:`ContinuumLevelState` for each level, None in
        the place of a level that never steps; None unless ``output_final_state``.

    A level that never steps (``chunk_size=None``, or the number 0 as its ``rate``) gives bit for bit what
    ``F.linear``, ``F.gelu``/``F.silu`` and ``F.linear`` give on ``F.rms_norm``'s output.

    Raises:
        TypeError: an argument of another type or dtype than said.
        ValueError: another shape, device or value than said, or a state of other levels; nothing has run.
    """
    _check_x(x)
    _check_levels(levels, x)
    if mask is not None:
        _check_mask(mask, x)
    if initial_state is not None:
        _check_state(initial_state, levels, x)
    if checkpoint_every is not None:
        check_positive_int("checkpoint_every", checkpoint_every)
    _check_non_negative("norm_eps", norm_eps)
    options = {
        "mask": mask,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "norm_eps": norm_eps,
    }
    if choose_implementation("continuum_memory", impl, x.device, AVAILABLE) == "reference":
        return continuum_memory_reference(x, levels, **options)
    return continuum_memory_eager(x, levels, checkpoint_every=checkpoint_every, **options)


def _check_x(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.ndim != 3 or min(x.shape) < 1:
        raise ValueError(f"x: expected shape [B, T, D] with B, T, D >= 1, got {tuple(x.shape)}")
    check_tensor("x", x, x.shape)


def _check_levels(levels: Sequence[ContinuumLevel], x: torch.Tensor) -> None:
    if not isinstance(levels, Sequence) or not all(isinstance(level, ContinuumLevel) for level in levels):
        raise TypeError(f"levels: expected a sequence of ContinuumLevel, got {levels!r:.200}")
    if not levels:
        raise ValueError("levels: expected at least one, got none")
    for index, level in enumerate(levels):
        _check_level(f"levels[{index}]", level, x)
    check_chunk_sizes([level.chunk_size for level in levels])


def _check_level(name: str, level: ContinuumLevel, x: torch.Tensor) -> None:
    width = x.shape[2]
    if not isinstance(level.up, torch.Tensor) or level.up.ndim != 2:
        raise ValueError(f"{name}.up: expected a tensor of shape [H, {width}], got {_describe(level.up)}")
    hidden = level.up.shape[0]
    check_tensor(f"{name}.norm", level.norm, (width,), like=x)
    check_tensor(f"{name}.up", level.up, (hidden, width), like=x)
    check_tensor(f"{name}.down", level.down, (width, hidden), like=x)
    if level.gate is not None:
        check_tensor(f"{name}.gate", level.gate, (hidden, width), like=x)
    if level.chunk_size is not None:
        check_positive_int(f"{name}.chunk_size", level.chunk_size)
    check_choice(f"{name}.rule", level.rule, RULES)
    if level.error_bound is not None:
        _check_non_negative(f"{name}.error_bound", level.error_bound)
        if level.error_bound == 0:
            raise ValueError(f"{name}.error_bound: expected more than 0 or None, got 0")
    if isinstance(level.rate, torch.Tensor):
        shape = () if level.rate.ndim == 0 else x.shape[:2]
        check_tensor(f"{name}.rate", level.rate, shape, like=x)
        if x.device.type == "cpu":  # reading it on an accelerator would wait for the device
            check_range(f"{name}.rate", level.rate, 0.0, math.inf, closed_high=False)
    else:
        _check_non_negative(f"{name}.rate", level.rate)
    for part in ("key", "value"):
        matrix = getattr(level, part)
        if matrix is not None:
            check_tensor(f"{name}.{part}", matrix, (width, width), like=x)
        elif level.steps:
            raise ValueError(
                f"{name}.{part}: expected a tensor of shape {(width, width)} for a level that steps, got None"
            )


def _check_mask(mask: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a tensor of torch.bool, got {_describe(mask)}")
    if mask.shape != x.shape[:2] or mask.device != x.device:
        raise ValueError(f"mask: expected shape {tuple(x.shape[:2])} on {x.device}, got {_describe(mask)}")


def _check_state(state: ContinuumState, levels: Sequence[ContinuumLevel], x: torch.Tensor) -> None:
    if not isinstance(state, tuple) or len(state) != len(levels):
        raise ValueError(f"initial_state: expected a tuple of {len(levels)} level states, got {state!r:.200}")
    batch, _, width = x.shape
    for index, (before, level) in enumerate(zip(state, levels)):
        name = f"initial_state[{index}]"
        expected = ContinuumLevelState if level.steps else type(None)
        if not isinstance(before, expected):
            raise TypeError(f"{name}: expected {expected.__name__}, got {type(before).__name__}")
        if before is None:
            continue
        for part in ("up", "down", "gate"):
            initial, fast = getattr(level, part), getattr(before, part)
            if (initial is None) != (fast is None):
                raise ValueError(f"{name}.{part}: expected None exactly where levels[{index}].{part} is")
            if initial is not None:
                _check_fp32(f"{name}.{part}", fast, (batch, *initial.shape), x)
        if not isinstance(before.position, torch.Tensor) or before.position.dtype != torch.int64:
            raise TypeError(f"{name}.position: expected a tensor of int64, got {_describe(before.position)}")
        if before.position.shape != (batch,):
            raise ValueError(f"{name}.position: expected shape {(batch,)}, got {_describe(before.position)}")
        longest = before.pending_rates.shape[-1]
        _check_fp32(f"{name}.pending_inputs", before.pending_inputs, (batch, longest, width), x)
        _check_fp32(f"{name}.pending_rates", before.pending_rates, (batch, longest), x)
        if longest >= level.chunk_size:
            raise ValueError(
                f"{name}.pending_rates: expected fewer than a chunk's {level.chunk_size}, got {longest}"
            )
        if x.device.type == "cpu":
            check_range(f"{name}.position", before.position, 0, longest)


def _check_fp32(name: str, value: object, shape: tuple[int, ...], x: torch.Tensor) -> None:
    check_tensor(name, value, shape, like=x)
    if value.dtype != state_dtype(x.dtype):
        raise TypeError(f"{name}: expected {state_dtype(x.dtype)} for x of {x.dtype}, got {value.dtype}")


def _check_non_negative(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number, at least 0, got {value}")


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} of {value.dtype} on {value.device}"
    return type(value).__name__
