"""The public function: checks, choice of implementation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from nl_kernels.checks import check_choice, check_positive_int, check_range, check_tensor
from nl_kernels.dispatch import choose_implementation, needs_gradient
from nl_kernels.ops.continuum.launch import MAX_WIDTH
from nl_kernels.ops.continuum.loop import Options, run_flush, run_memory
from nl_kernels.ops.continuum.reference import continuum_flush_reference, continuum_memory_reference
from nl_kernels.ops.continuum.registration import products
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
from nl_kernels.ops.continuum.update import check_retention
from nl_kernels.zero_gradients import with_zero_gradients

SERVED_RULES = ("sgd", "momentum", "muon")
"""Those whose step is made of the sums Σ_t η_t δ_t x_tᵀ; dgd's takes a solve of each chunk."""

AVAILABLE = ("triton", "eager", "reference")


def continuum_memory(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str = "sequential",
    level_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    initial_state: ContinuumState | None = None,
    output_final_state: bool = False,
    detach_updates: bool = False,
    norm_eps: float = 1e-6,
    checkpoint_every: int | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """MLP blocks whose weights learn within the context, each level at a period of its own, fast to slow.

    Every level is a pre-norm MLP ``f_θ(n(x))`` (Nested Learning, arXiv 2512.24695, Eqs. 70-74)::

        sequential    x ← x + f_ℓ(n_ℓ(x)), level after level (Eq. 70)
        nested        the same; whenever a level steps, the next faster one goes back to its initial weights,
                      also where the rate of that step is 0 (Eq. 72)
        independent   x + Σ_ℓ w_ℓ f_ℓ(n_ℓ(x)) (Eq. 74)

    After every ``chunk_size`` tokens of a sequence a level takes one step on those tokens, all gradients at
    the weights that served them (Eq. 71), on the regression loss ``½‖f_θ(k_t) − v_t‖²`` with
    ``k_t = n(key n(x_t))`` and ``v_t = value n(x_t)``, by its rule: see :func:`nl_kernels.continuum_update`.

    Between steps it is an ordinary MLP. Fast weights belong to one sequence. Gradients flow through the
    steps into everything that a level holds, and into the state.

    Args:
        x: [B, T, D], fp16, bf16, fp32 or fp64.
        levels: at least one; every chunk size a multiple of the one before, levels that never step last.
        variant: ``"sequential"``, ``"nested"`` or ``"independent"``.
        level_weights: of ``"independent"``: w [levels]; None: all 1.
        mask: [B, T] bool, True for tokens, anywhere in the row; None: all are tokens. Padding is neither
            learned from nor counted, and its outputs are zero.
        initial_state: the state returned by an earlier call on the preceding tokens of the same sequences;
            None: the levels' own weights. Weights in a state replace the levels' ``up``, ``gate``, ``down``.
        output_final_state: also return the state after the last token.
        detach_updates: take every step as a constant in the backward pass (first-order), so that what only
            steps depend on (``key``, ``value``, ``rate``, momenta) gets no gradient.
        norm_eps: added to the mean square inside the norms.
        checkpoint_every: keep for the backward only the fast weights of every so many steps of a level, and
            recompute the rest; None: keep everything.
        impl: ``"triton"`` (every rule but ``dgd``, first-order or without gradients, not fp64),
            ``"eager"``, ``"reference"`` (token by token, slow: the definition); None: Triton on CUDA for what
            it serves, else eager.

    Returns:
        y [B, T, D] and the final state: a tuple with one :class:`ContinuumLevelState` for each level, None in
        the place of a level that never steps; None unless ``output_final_state``. Of a level with the number
        0 as its rate that resets a faster one, it holds a :class:`ContinuumClock`.

    A level that never learns (``chunk_size=None``, or the number 0 as its ``rate``) gives bit for bit what
    ``F.linear``, ``F.gelu``/``F.silu`` and ``F.linear`` give on ``F.rms_norm``'s output.

    Raises:
        TypeError: an argument of another type or dtype than said.
        ValueError: another shape, device or value than said, or a state of other levels; nothing has run.
        NotImplementedError: ``impl="triton"`` for what it does not serve.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    _check_x(x)
    _check_levels(levels, x)
    _check_variant(variant, level_weights, levels, x)
    if mask is not None:
        _check_mask(mask, x)
    if initial_state is not None:
        _check_state("initial_state", initial_state, levels, x.shape[0], x, variant)
    if checkpoint_every is not None:
        check_positive_int("checkpoint_every", checkpoint_every)
    _check_bool("detach_updates", detach_updates)
    _check_non_negative("norm_eps", norm_eps)
    tensors = {"level_weights": level_weights, "mask": mask, "initial_state": initial_state}
    flows = not detach_updates and needs_gradient(x, level_weights, *_tensors(levels, initial_state))
    chosen = _choose("continuum_memory", impl, x, levels, flows)
    for level in levels:
        if level.steps:
            start = () if initial_state is None else (level.up, level.down, level.gate)
            numbers = [n for n in (level.rate, level.retention) if isinstance(n, torch.Tensor)]
            made = () if detach_updates else (level.key, level.value, *numbers)
            x = with_zero_gradients(x, (*start, *made))
    if chosen == "reference":
        return continuum_memory_reference(
            x,
            levels,
            variant=variant,
            output_final_state=output_final_state,
            detach_updates=detach_updates,
            norm_eps=norm_eps,
            **tensors,
        )
    options = Options(variant, norm_eps, flows, products(chosen), checkpoint_every, output_final_state)
    return run_memory(x, levels, options, **tensors)


def continuum_flush(
    state: ContinuumState,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str = "sequential",
    detach_updates: bool = False,
    norm_eps: float = 1e-6,
    impl: str | None = None,
) -> ContinuumState:
    """Every level takes a step on the tokens that wait for one: the flush of a last, partial chunk.

    The step is that of a whole chunk with fewer tokens. A level and sequence without pending tokens takes
    none. Afterwards every sequence stands at the start of a chunk. :func:`continuum_memory` never does this
    by itself: a cut sequence goes on as if it were whole.

    Args:
        state: from :func:`continuum_memory`; it stays as it is.
        levels, variant, detach_updates, norm_eps: as in the call that made the state. Of ``"nested"``, a
            level goes back to its start where the next slower one steps.
        impl: as in :func:`continuum_memory`.

    Raises:
        TypeError, ValueError: as :func:`continuum_memory`.
    """
    if not isinstance(state, tuple) or not any(isinstance(level, ContinuumLevelState) for level in state):
        raise TypeError(f"state: expected a ContinuumState with a level that steps, got {state!r:.200}")
    like = next(level for level in state if isinstance(level, ContinuumLevelState)).pending_inputs
    if like.ndim != 3:
        raise ValueError(f"state: expected pending_inputs of shape [B, P, D], got {tuple(like.shape)}")
    _check_levels(levels, like, rates_of_tokens=True)
    _check_variant(variant, None, levels, like)
    _check_state("state", state, levels, like.shape[0], like, variant)
    _check_bool("detach_updates", detach_updates)
    _check_non_negative("norm_eps", norm_eps)
    flows = not detach_updates and needs_gradient(*_tensors(levels, state))
    chosen = _choose("continuum_flush", impl, like, levels, flows)
    if chosen == "reference":
        return continuum_flush_reference(
            state, levels, variant=variant, detach_updates=detach_updates, norm_eps=norm_eps
        )
    return run_flush(state, levels, Options(variant, norm_eps, flows, products(chosen)))


def _choose(op: str, impl: str | None, x: torch.Tensor, levels: Sequence[ContinuumLevel], flows: bool) -> str:
    """The implementation; ``flows``: gradients go through the steps."""
    refused = _unserved(x, levels, flows)
    available = AVAILABLE if impl is not None or refused is None else AVAILABLE[1:]
    chosen = choose_implementation(op, impl, x.device, available)
    if chosen == "triton" and refused is not None:
        raise NotImplementedError(f"{op}: {refused}; use impl='eager'")
    return chosen


def _unserved(x: torch.Tensor, levels: Sequence[ContinuumLevel], flows: bool) -> str | None:
    """Why the kernels cannot serve a call; None: they can."""
    if x.dtype == torch.float64:
        return "the Triton kernels serve bfloat16, float16 and float32, got float64"
    for index, level in enumerate(levels):
        if level.steps and level.rule not in SERVED_RULES:
            return f"levels[{index}].rule: the Triton kernels serve {SERVED_RULES}, got {level.rule!r}"
        if level.steps and max(level.up.shape) > MAX_WIDTH:
            return (
                f"levels[{index}].up: the Triton kernels have widths of at most {MAX_WIDTH}, got "
                f"{tuple(level.up.shape)}"
            )
    if flows:
        return (
            "detach_updates: the Triton kernels take steps as constants, so that no gradient flows through "
            "them; expected True where something requires a gradient, got False"
        )
    return None


def _tensors(levels: Sequence[ContinuumLevel], state: ContinuumState | None) -> Iterator[torch.Tensor]:
    """All tensors that a gradient may flow into."""
    for level in levels:
        parts = (
            level.norm,
            level.up,
            level.down,
            level.gate,
            level.rate,
            level.key,
            level.value,
            level.retention,
        )
        yield from (part for part in parts if isinstance(part, torch.Tensor))
    for before in state or ():
        yield from (part for part in before or () if part is not None)


def _check_x(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.ndim != 3 or min(x.shape) < 1:
        raise ValueError(f"x: expected shape [B, T, D] with B, T, D >= 1, got {tuple(x.shape)}")
    check_tensor("x", x, x.shape)


def _check_variant(
    variant: str, level_weights: torch.Tensor | None, levels: Sequence[ContinuumLevel], x: torch.Tensor
) -> None:
    check_choice("variant", variant, VARIANTS)
    if level_weights is None:
        return
    if variant != "independent":
        raise ValueError(f"level_weights: of variant 'independent' only, got them with {variant!r}")
    check_tensor("level_weights", level_weights, (len(levels),), like=x)


def _check_levels(
    levels: Sequence[ContinuumLevel], x: torch.Tensor, *, rates_of_tokens: bool = False
) -> None:
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
        _check_non_negative(f"{name}.rate", level.rate)
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
        _check_non_negative(f"{name}.error_bound", level.error_bound)
        if level.error_bound == 0:
            raise ValueError(f"{name}.error_bound: expected more than 0 or None, got 0")
    if isinstance(level.rate, torch.Tensor):
        shape = () if level.rate.ndim == 0 else x.shape[:2]
        if rates_of_tokens:  # those of an earlier call, which are in its state
            shape = level.rate.shape
        check_tensor(f"{name}.rate", level.rate, shape, like=x)
        if x.device.type == "cpu":  # reading it on an accelerator would wait for the device
            check_range(f"{name}.rate", level.rate, 0.0, math.inf, closed_high=False)
    check_retention(f"{name}.retention", level.retention, x)
    _check_bool(f"{name}.restore_norms", level.restore_norms)
    _check_non_negative(f"{name}.momentum_decay", level.momentum_decay)
    if level.momentum_decay >= 1:
        raise ValueError(f"{name}.momentum_decay: expected less than 1, got {level.momentum_decay}")
    for part in ("key", "value"):
        matrix = getattr(level, part)
        if matrix is not None:
            check_tensor(f"{name}.{part}", matrix, (width, width), like=x)
        elif level.steps and part == "value":
            raise ValueError(
                f"{name}.{part}: expected a tensor of shape {(width, width)} for a level that steps, got None"
            )


def _check_mask(mask: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a tensor of torch.bool, got {_describe(mask)}")
    if mask.shape != x.shape[:2] or mask.device != x.device:
        raise ValueError(f"mask: expected shape {tuple(x.shape[:2])} on {x.device}, got {_describe(mask)}")


def _check_state(
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
        _check_position(f"{name}[{index}].position", before.position, batch)
        last = level.chunk_size - 1
        if isinstance(before, ContinuumLevelState):
            _check_level_state(f"{name}[{index}]", before, f"levels[{index}]", level, batch, x)
            last = before.pending_rates.shape[1]
        if x.device.type == "cpu":
            check_range(f"{name}[{index}].position", before.position, 0, last)
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
        initial, fast, momentum = (
            getattr(level, part),
            getattr(state, part),
            getattr(state, f"{part}_momentum"),
        )
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


def _check_position(name: str, position: object, batch: int) -> None:
    if not isinstance(position, torch.Tensor) or position.dtype != torch.int64:
        raise TypeError(f"{name}: expected a tensor of int64, got {_describe(position)}")
    if position.shape != (batch,):
        raise ValueError(f"{name}: expected shape {(batch,)}, got {_describe(position)}")


def _check_fp32(name: str, value: object, shape: tuple[int, ...], x: torch.Tensor) -> None:
    check_tensor(name, value, shape, like=x)
    if value.dtype != state_dtype(x.dtype):
        raise TypeError(f"{name}: expected {state_dtype(x.dtype)} for x of {x.dtype}, got {value.dtype}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _check_non_negative(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number, at least 0, got {value}")


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
