"""How a level steps: the rule, its rate, and what bounds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nl_kernels.checks import check_choice

STEP_RULES = ("sgd", "dgd", "momentum", "muon")


@dataclass(frozen=True, eq=False, kw_only=True)
class StepRule:
    """One level's step on the summed gradient of its chunk (Eq. 71).

    Attributes:
        rule: ``"sgd"``, ``"dgd"`` (delta gradient descent, exact for the chunk), ``"momentum"`` or ``"muon"``
            (orthogonalised momentum). See :func:`nl_kernels.continuum_update`.
        rate: η of every token, at least 0; a tensor may be trained
            (:func:`nl_models.continual.next_token_loss_through_steps`): one number, or ``[B]``, one for each
            sequence, so that several rates are tried side by side.
        momentum_decay: of ``"momentum"`` and ``"muon"``, in [0, 1).
        retention: α in [0, 1]: each step also takes ``1 − α`` of what was learned so far away, so that the
            level remembers about 1 / (1 − α) of its chunks. 1: nothing is forgotten.
        anchored: of ``"dgd"``: the step erases what was learned along what is read, not the model's own
            weight; otherwise it erases of both.
        restore_norms: whether every row of a weight gets its initial norm back after the step, which bounds
            how far a stream can carry it.
    """

    rule: str = "sgd"
    rate: float | torch.Tensor = 0.0
    momentum_decay: float = 0.9
    retention: float = 1.0
    anchored: bool = False
    restore_norms: bool = False

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, STEP_RULES)
        if isinstance(self.rate, torch.Tensor):
            if self.rate.numel() != 1 and self.rate.ndim != 1:
                raise ValueError(
                    f"rate: expected one number or one for each sequence, got shape {tuple(self.rate.shape)}"
                )
        elif isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)):
            raise TypeError(f"rate: expected a number or a tensor, got {self.rate!r}")
        elif not 0 <= self.rate < math.inf:
            raise ValueError(f"rate: expected a finite number, at least 0, got {self.rate}")
        if not 0 <= self.momentum_decay < 1:
            raise ValueError(f"momentum_decay: expected a number in [0, 1), got {self.momentum_decay}")
        if isinstance(self.retention, bool) or not isinstance(self.retention, (int, float)):
            raise TypeError(f"retention: expected a number, got {self.retention!r}")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"retention: expected a number in [0, 1], got {self.retention}")
        if self.anchored and (self.rule != "dgd" or self.restore_norms):
            raise ValueError("anchored: of rule 'dgd' only, without restore_norms")

    @property
    def steps(self) -> bool:
        """Whether the level ever changes."""
        return isinstance(self.rate, torch.Tensor) or self.rate > 0

    @property
    def has_rates(self) -> bool:
        """Whether every sequence has a rate of its own."""
        return isinstance(self.rate, torch.Tensor) and self.rate.numel() > 1

    def rates(self) -> float | torch.Tensor:
        """η as a factor of ``[B, out, in]``."""
        return self.rate.view(-1, 1, 1) if isinstance(self.rate, torch.Tensor) else self.rate

    @property
    def reads_weight(self) -> bool:
        """Whether the step depends on the weight itself."""
        return (self.rule == "dgd" and not self.anchored) or self.restore_norms

    @property
    def has_momentum(self) -> bool:
        """Whether a momentum is carried from step to step."""
        return self.rule in ("momentum", "muon")

    def description(self) -> dict[str, object]:
        """What a state of this rule depends on: all but rate and retention, which may change at any time."""
        return {
            "rule": self.rule,
            "momentum_decay": self.momentum_decay if self.has_momentum else None,
            "anchored": self.anchored,
            "restore_norms": self.restore_norms,
        }


def rules_of_levels(
    rules: StepRule | Sequence[StepRule], count: int, batch_size: int
) -> tuple[StepRule, ...]:
    """One rule for each of ``count`` levels; a single one serves all.

    Raises:
        TypeError: something else.
        ValueError: another number of rules, or rates of another number of sequences.
    """
    if isinstance(rules, StepRule):
        rules = (rules,) * count
    if not isinstance(rules, Sequence) or not all(isinstance(rule, StepRule) for rule in rules):
        raise TypeError(f"rules: expected a StepRule or a sequence of them, got {rules!r:.200}")
    if len(rules) != count:
        raise ValueError(f"rules: expected one, or one for each of {count} levels, got {len(rules)}")
    for rule in rules:
        if isinstance(rule.rate, torch.Tensor) and rule.rate.numel() not in (1, batch_size):
            raise ValueError(f"rate: expected one, or {batch_size}, got {rule.rate.numel()}")
    return tuple(rules)
