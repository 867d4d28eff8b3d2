"""A step period for each parameter group of any optimiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from nl_models.optim.mixed_optimizer import Group, state_dtype

REDUCTIONS = ("mean", "sum")

# What this object adds to a saved state: of each parameter of a slow group, and in each group.
_SUM = "multi_frequency_sum"
_ADDED = "multi_frequency_added"
_CALLS = "multi_frequency_calls"
_REDUCTION = "multi_frequency_reduction"


class MultiFrequency(Optimizer):
    """Steps each parameter group of another optimiser once every ``period`` calls of :meth:`step`.

    The outer form of a continuum memory system (Nested Learning, arXiv 2512.24695, Eq. 71): a slow level
    takes one step on the gradients of all calls of its period, and stands still between. Gradients are added
    up as they are when ``step`` is called, clipped and unscaled, so ``zero_grad`` is called after every call
    as usual. A call that a ``GradScaler`` skips does not count. Decay, momenta and step counts of a group are
    those of its own steps. Learning rates are read when a group steps; schedulers take this object.

    Args:
        optimizer: what steps. Its groups and their options are shared with this object, which keeps the
            period in each group as ``"period"``. Of optimisers with their own ``step`` conventions, ``LBFGS``
            and :class:`DeltaGradientDescent` (which needs each gradient's inputs) are refused.
        periods: of each group, at least 1.
        reduction: ``"mean"`` over the calls of the period (a missing gradient counts as zero), or ``"sum"``
            as in Eq. 71.

    State: beside the optimiser's, a sum of W's shape for each parameter of period above 1, fp32 (fp64 for
    fp64), from its first gradient on.

    Raises:
        TypeError: ``optimizer`` is no optimiser, or one that is refused.
        ValueError: not one period for each group, a period below 1, or an unknown reduction.
    """

    # A fused inner optimiser unscales by itself, in the step; sums must be unscaled before.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer, periods: Sequence[int], *, reduction: str = "mean") -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, (LBFGS, MultiFrequency)) or getattr(optimizer, "needs_inputs", False):
            raise TypeError(f"optimizer: {type(optimizer).__name__} cannot step on sums of gradients")
        periods = list(periods)
        if len(periods) != len(optimizer.param_groups):
            raise ValueError(
                f"periods: expected {len(optimizer.param_groups)}, one for each group, got {len(periods)}"
            )
        for period in periods:
            _check_period(period)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        # Optimizer.__init__ would make groups and states of its own.
        self.optimizer = optimizer
        self.reduction = reduction
        self._calls = 0
        self._begun = False
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        for group, period in zip(optimizer.param_groups, periods):
            group["period"] = period
        self._note_in_groups()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not yet there: while copying
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def param_groups(self) -> list[Group]:
        """The optimiser's own, with ``"period"`` and what a saved state is known by."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        """What :meth:`state_dict` saves of each parameter; to look at, since it is made when asked for."""
        merged: defaultdict[torch.Tensor, Any] = defaultdict(dict, self.optimizer.state)
        for p in self._slow_parameters() if self._begun else ():
            merged[p] = {**merged[p], **self._own_state(p)}
        return MappingProxyType(merged)

    @property
    def defaults(self) -> Group:
        """The optimiser's own."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: Group) -> None:
        """Add a group with its ``"period"``, 1 if absent."""
        param_group = {"period": 1, **param_group}
        _check_period(param_group["period"])
        self.optimizer.add_param_group(param_group)
        self._note_in_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimiser's own; sums of the running period stay."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Add up gradients, and step the groups whose period ends with this call.

        Gradients are the same after it. Nothing is read from the device.

        Raises:
            RuntimeError: a sparse gradient in a group of period above 1; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_asked_for_its_state():
            self.optimizer.step()
            self._begun = True
            return loss
        slow = [group for group in self.param_groups if group["period"] > 1]
        gradients = {p: p.grad for group in slow for p in group["params"]}
        for p, gradient in gradients.items():
            if gradient is not None and gradient.layout != torch.strided:
                raise RuntimeError(
                    f"MultiFrequency: a gradient of shape {tuple(p.shape)} is sparse, which is not supported "
                    "with a period above 1; make it with sparse=False"
                )
        self._begun = True
        self._calls += 1
        self._note_in_groups()
        try:
            for group in slow:
                self._add(group)
                ends = self._calls % group["period"] == 0
                share = 1 / group["period"] if self.reduction == "mean" else 1.0
                for p in group["params"]:
                    total = self._sums.pop(p, None) if ends else None
                    p.grad = None if total is None else total.mul_(share).to(p.dtype)
            self.optimizer.step()
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
        return loss

    def _add(self, group: Group) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if p not in self._sums:
                self._sums[p] = torch.zeros_like(p, dtype=state_dtype(p))
        if params:
            grads = [p.grad.to(state_dtype(p)) for p in params]
            torch._foreach_add_([self._sums[p] for p in params], grads)

    def _is_asked_for_its_state(self) -> bool:
        """Whether this is a first call, with all rates and gradients zero: so PyTorch has states made.

        ``torch.distributed.checkpoint`` does, where it is about to load one. It is no call of the period, and
        every group takes it, or the states of slow groups would be missing.
        """
        if self._begun or any(group.get("lr") != 0 for group in self.param_groups):
            return False
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        return bool(whole) and not any(g.layout != torch.strided or g.any() for g in whole)

    def _note_in_groups(self) -> None:
        """PyTorch's tools carry what is in groups and states, and nothing else."""
        for group in self.param_groups:
            group[_CALLS], group[_REDUCTION] = self._calls, self.reduction

    def _slow_parameters(self) -> Iterator[torch.Tensor]:
        return (p for group in self.param_groups if group["period"] > 1 for p in group["params"])

    def _own_state(self, p: torch.Tensor) -> dict[str, Any]:
        """Always with a sum, so that a checkpoint has the same names at any call."""
        total = self._sums.get(p)
        zero = torch.zeros_like(p, dtype=state_dtype(p)) if total is None else total
        return {_SUM: zero, _ADDED: int(total is not None)}

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's, with the sum of the running period in the state of each parameter of a slow group.

        Calls counted so far, and the reduction, are in every group.
        """
        saved = self.optimizer.state_dict()
        state = dict(saved["state"])
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for p in self._slow_parameters() if self._begun else ():
            state[numbers[p]] = {**state.get(numbers[p], {}), **self._own_state(p)}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, also within a period.

        Raises:
            ValueError: a state that was not saved by ``MultiFrequency``, or with another reduction.
        """
        rest, calls, reduction, sums = _taken_apart(state_dict)
        if reduction != self.reduction:
            raise ValueError(
                f"state_dict: saved with reduction={reduction!r}, this object has {self.reduction!r}"
            )
        self.optimizer.load_state_dict(rest)
        numbers = [number for group in rest["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        self._calls, self._begun = calls, self._begun or calls > 0
        self._sums = {
            p: sums[number].to(device=p.device, copy=True)
            for number, p in zip(numbers, params)
            if number in sums
        }
        self._note_in_groups()

    def describe(self) -> str:
        """The optimiser's own description, where it has one, after a line with each group's period."""
        lines = [
            f"group {number}: {len(group['params'])} parameters, a step every {group['period']} calls on the "
            f"{self.reduction} of their gradients"
            for number, group in enumerate(self.param_groups)
        ]
        own = getattr(self.optimizer, "describe", lambda: type(self.optimizer).__name__)
        return "\n".join([*lines, own()])

    def __repr__(self) -> str:
        return f"MultiFrequency({self.optimizer!r})"


def _taken_apart(
    state_dict: dict[str, Any],
) -> tuple[dict[str, Any], int, str, dict[Any, torch.Tensor]]:
    """The inner optimiser's part, the calls, the reduction, and the sums by what names their parameters."""
    older = state_dict.get("multi_frequency")  # where all this was before
    if older is not None:
        rest = {key: value for key, value in state_dict.items() if key != "multi_frequency"}
        return rest, older["calls"], older["reduction"], older["sums"]
    groups = state_dict["param_groups"]
    if any(_CALLS not in group for group in groups):
        raise ValueError("state_dict: saved by an optimiser without MultiFrequency; load it into that")
    own = (_SUM, _ADDED, _CALLS, _REDUCTION)
    slow = any(group["period"] > 1 for group in groups)
    if slow and groups[0][_CALLS] and not any(_SUM in s for s in state_dict["state"].values()):
        raise ValueError("state_dict: saved by the optimiser inside MultiFrequency, so sums are missing")
    sums = {name: s[_SUM] for name, s in state_dict["state"].items() if s.get(_ADDED)}
    # From a flat checkpoint, PyTorch fills in {} for what a state had not yet when it was saved.
    without = {
        name: {k: v for k, v in s.items() if k not in own and not (isinstance(v, dict) and not v)}
        for name, s in state_dict["state"].items()
    }
    rest = {
        **state_dict,
        "state": {name: s for name, s in without.items() if s},
        "param_groups": [{k: v for k, v in group.items() if k not in own} for group in groups],
    }
    return rest, groups[0][_CALLS], groups[0][_REDUCTION], sums


def _check_period(period: Any) -> None:
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"periods: expected ints of at least 1, got {period!r}")
