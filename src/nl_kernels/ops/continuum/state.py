"""What goes into and out of a continuum memory: the definition of a level, and its state between calls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from nl_kernels.checks import check_exact, has_readable_data
from nl_kernels.memory.state import map_tensors
from nl_kernels.renamed import renamed_arguments

RULES = ("sgd", "dgd", "momentum", "muon")
RULES_WITH_MOMENTUM = ("momentum", "muon")
VARIANTS = ("sequential", "nested", "independent")


@dataclass(frozen=True, eq=False, kw_only=True)
class ContinuumLevel:
    """One level: a pre-norm residual MLP block ``x + down σ(up n(x))`` and how its weights learn in context.

    Matrices have the layout of ``nn.Linear.weight``. ``up``, ``gate`` and ``down`` are the *initial* fast
    weights; ``norm``, ``key`` and ``value`` do not change in context. All may need gradients.

    Attributes:
        norm: [D], the weight of the RMS norm ``n`` before the block.
        up: [H, D]. A level that never steps may have weights of each sequence instead: [B, H, D], and so for
            ``down`` and ``gate``.
        down: [D, H].
        gate: [H, D] for a gated block ``down (SiLU(gate n(x)) ∘ up n(x))`` as in Llama; None: GELU.
        chunk_size: the level's weights step after every ``chunk_size`` tokens; None: never.
            Part of the model: weights trained at one chunk size run at that one.
        rate: η, the rate of every token: a number, or a tensor [] or [B, T]; finite and not negative.
            The number 0 makes the level exactly the plain block, whose steps change nothing of its own; they
            still take the next faster level of the nested variant back to its start. May need a gradient.
        key: [D, D], makes the keys ``n(key n(x))`` (this ``n`` without a weight: unit root mean square).
            None: the keys are what the block reads, ``n(x)``, so that what it read serves its step too.
        retention: α in [0, 1], a number or a tensor []: each step also takes ``(1 − α) (W − W_0)`` off the
            weights, W_0 the level's own. Below 1 they stay near what they were trained for, however long a
            sequence is. 1: nothing pulls them back. May need a gradient.
        value: [D, D], makes the targets ``value n(x)``. Needed unless the level never steps.
        predict_next: a token's target is made of the *next* token of its chunk, at that token's rate; the
            last one of a chunk has none. What a level reads at the next occurrence of a token is then what
            came after it. False: of the token itself.
        rule: ``"sgd"``, ``"dgd"`` (delta gradient descent, in its exact mini-batch form), ``"momentum"`` or
            ``"muon"``; see :func:`nl_kernels.continuum_update`.
        momentum_decay: of ``"momentum"`` and ``"muon"``, in [0, 1).
        restore_norms: after each step, every row of the matrices gets back the norm that it has in ``up``,
            ``gate``, ``down`` (LaCT, arXiv 2505.23884).
        error_bound: the largest root mean square that each linear layer's error signal may have; longer ones
            are scaled down, which for the last layer is a Huber loss. None: no bound, the plain square.
    """

    norm: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None = None
    chunk_size: int | None = None
    rate: torch.Tensor | float = 0.0
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    rule: str = "sgd"
    momentum_decay: float = 0.9
    retention: torch.Tensor | float = 1.0
    restore_norms: bool = False
    error_bound: float | None = 1.0
    predict_next: bool = False

    @property
    def retains_all(self) -> bool:
        """Whether nothing pulls the weights back to the level's own."""
        return not isinstance(self.retention, torch.Tensor) and self.retention == 1

    @property
    def steps(self) -> bool:
        """Whether the weights ever change."""
        return self.chunk_size is not None and (isinstance(self.rate, torch.Tensor) or self.rate > 0)


class Weights(NamedTuple):
    """Shared by all sequences ([H, D], …) until the first step, of each one ([B, H, D], …) from then on.

    Also momenta (None: zero), row norms and what a step subtracts, in the same places.
    """

    up: torch.Tensor | None
    down: torch.Tensor | None
    gate: torch.Tensor | None


NO_MOMENTA = Weights(None, None, None)


def initial_weights(level: ContinuumLevel) -> Weights:
    """The level's own weights, where every sequence starts."""
    return Weights(level.up, level.down, level.gate)


class ContinuumLevelState(NamedTuple):
    """A level's fast weights and the tokens that it has seen since its last step, for each of B sequences.

    Floating tensors are fp32 (fp64 when the op runs in fp64). P is the largest ``position`` in the batch.
    """

    up: torch.Tensor  # [B, H, D]
    down: torch.Tensor  # [B, D, H]
    gate: torch.Tensor | None  # [B, H, D]; None for a level without a gate
    pending_inputs: torch.Tensor  # [B, P, D]: n(x) of the tokens not yet learned from, then padding
    pending_rates: torch.Tensor  # [B, P]: their rates
    position: torch.Tensor  # [B], int64: tokens since the last step, < chunk_size
    up_momentum: torch.Tensor | None = None  # of rules with momentum, in the shapes of the weights
    down_momentum: torch.Tensor | None = None
    gate_momentum: torch.Tensor | None = None


class ContinuumClock(NamedTuple):
    """Of a level of the nested variant that steps by nothing (rate 0), and so resets the next faster one."""

    position: torch.Tensor  # [B], int64: tokens since the last step, < chunk_size


#: One entry for each level; None for a level that never steps.
ContinuumState: TypeAlias = tuple[ContinuumLevelState | ContinuumClock | None, ...]


def entry_type(levels: Sequence[ContinuumLevel], index: int, variant: str) -> type:
    """What a state holds for a level: its fast weights, only its place in its chunk, or None."""
    level = levels[index]
    if level.steps:
        return ContinuumLevelState
    resets = variant == "nested" and index > 0 and levels[index - 1].steps
    return ContinuumClock if resets and level.chunk_size is not None else type(None)


def equal_positions(batch: int, value: int, device: torch.device) -> torch.Tensor:
    """Positions [B] that are all ``value``, which this very tensor says: none that is made of it does."""
    position = torch.full((batch,), value, device=device)
    if not torch.compiler.is_compiling():
        position.nl_kernels_equal_to = value
    return position


def all_equal_to(position: torch.Tensor) -> int | None:
    """What positions on a device are that the host need not read; None: it must."""
    if torch.compiler.is_compiling() or (position.device.type == "cpu" and has_readable_data(position)):
        return None
    return getattr(position, "nl_kernels_equal_to", None)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of fast weights and of everything that changes them: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def fast_part(state: ContinuumLevelState, detached: bool) -> tuple[Weights, Weights]:
    """Weights and momenta of a state; ``detached``: momenta are constants."""
    momenta = Weights(state.up_momentum, state.down_momentum, state.gate_momentum)
    if detached:
        momenta = map_tensors(torch.Tensor.detach, momenta)
    return Weights(state.up, state.down, state.gate), momenta


def level_state(
    level: ContinuumLevel,
    weights: Weights,
    momenta: Weights,
    inputs: torch.Tensor,
    rates: torch.Tensor,
    position: torch.Tensor,
) -> ContinuumLevelState:
    """The state of these weights, of all sequences or of each, with the tokens that wait for a step."""
    fast = [
        w if w is None or w.ndim == 3 else w.to(inputs.dtype).expand(len(position), -1, -1).clone()
        for w in weights
    ]
    if level.rule in RULES_WITH_MOMENTUM:
        momenta = [
            None if w is None else torch.zeros_like(w) if m is None else m for w, m in zip(fast, momenta)
        ]
    return ContinuumLevelState(*fast, inputs, rates, position, *momenta)


def continuum_detach(state: ContinuumState) -> ContinuumState:
    """The state cut from the graph that made it, as truncated backpropagation does between segments."""
    return tuple(map_tensors(torch.Tensor.detach, level) for level in state)


def continuum_clone(state: ContinuumState) -> ContinuumState:
    """A copy that shares no memory with the state; gradients flow through it."""
    return tuple(map_tensors(torch.clone, level) for level in state)


@renamed_arguments(rows="sequences")
def continuum_reset(
    state: ContinuumState, levels: Sequence[ContinuumLevel], *, sequences: torch.Tensor | None = None
) -> ContinuumState:
    """The state with some sequences at their start again: initial weights, nothing pending, no momentum.

    Args:
        state: of B sequences, from :func:`nl_kernels.continuum_memory` with the same levels.
        levels: whose weights are the start; gradients flow into them.
        sequences: [B] bool, the sequences to reset; None: all.

    Raises:
        TypeError, ValueError: ``sequences`` is no such tensor, or the state is one of other levels.
    """
    if len(state) != len(levels):
        raise ValueError(f"state: expected that of {len(levels)} levels, got {len(state)}")
    return tuple(None if s is None else _reset_level(s, lv, sequences) for s, lv in zip(state, levels))


def _reset_level(
    state: ContinuumLevelState | ContinuumClock, level: ContinuumLevel, sequences: torch.Tensor | None
) -> ContinuumLevelState | ContinuumClock:
    position = state.position
    if sequences is None:
        sequences = torch.ones_like(position, dtype=torch.bool)
    check_exact("sequences", sequences, "a bool tensor or None", torch.bool, position.shape, position)
    start = initial_weights(level)._asdict()  # all else begins with zeros

    def reset(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        again = sequences.view(-1, *(1,) * (x.ndim - 1))
        return torch.where(again, start[name].to(x.dtype), x) if name in start else x.masked_fill(again, 0)

    return state._make(map(reset, state._fields, state))


def check_chunk_sizes(sizes: Sequence[int | None], name: str = "levels") -> None:
    """Check that levels run from fast to slow: each chunk size a multiple of the one before, None last.

    Raises:
        ValueError: the first level that does not.
    """
    for index, (fast, slow) in enumerate(itertools.pairwise(sizes)):
        if slow is None:
            continue
        if fast is None:
            raise ValueError(
                f"{name}[{index}].chunk_size: levels that never step (None) come last, but "
                f"{name}[{index + 1}].chunk_size is {slow}; reorder the levels"
            )
        if slow % fast:
            raise ValueError(f"{name}[{index + 1}].chunk_size: expected a multiple of {fast}, got {slow}")
