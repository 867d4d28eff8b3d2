"""A step period for each parameter group of any optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from nl_models.optim.mixed_optimizer import Group, state_dtype

REDUCTIONS = ("mean", "sum")


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
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        for group, period in zip(optimizer.param_groups, periods):
            group["period"] = period

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
        """The optimiser's own, with ``"period"``."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """The optimiser's own."""
        return self.optimizer.state

    @property
    def defaults(self) -> Group:
        """The optimiser's own."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: Group) -> None:
        """Add a group with its ``"period"``, 1 if absent."""
        param_group = {"period": 1, **param_group}
        _check_period(param_group["period"])
        self.optimizer.add_param_group(param_group)

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
        slow = [group for group in self.param_groups if group["period"] > 1]
        gradients = {p: p.grad for group in slow for p in group["params"]}
        for p, gradient in gradients.items():
            if gradient is not None and gradient.layout != torch.strided:
                raise RuntimeError(
                    f"MultiFrequency: a gradient of shape {tuple(p.shape)} is sparse, which is not supported "
                    "with a period above 1; make it with sparse=False"
                )
        self._calls += 1
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

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's, with the calls counted so far and the sums of running periods beside it."""
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        sums = {numbers[p]: total for p, total in self._sums.items()}
        own = {"calls": self._calls, "reduction": self.reduction, "sums": sums}
        return {**self.optimizer.state_dict(), "multi_frequency": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, also within a period.

        Raises:
            ValueError: a state that was not saved by ``MultiFrequency``, or with another reduction.
        """
        own = state_dict.get("multi_frequency")
        if own is None:
            raise ValueError("state_dict: saved by an optimiser without MultiFrequency; load it into that")
        if own["reduction"] != self.reduction:
            raise ValueError(
                f"state_dict: saved with reduction={own['reduction']!r}, this object has {self.reduction!r}"
            )
        rest = {key: value for key, value in state_dict.items() if key != "multi_frequency"}
        self.optimizer.load_state_dict(rest)
        params = [p for group in self.param_groups for p in group["params"]]
        self._calls = own["calls"]
        self._sums = {
            params[number]: total.to(device=params[number].device, copy=True)
            for number, total in own["sums"].items()
        }

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


def _check_period(period: Any) -> None:
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"periods: expected ints of at least 1, got {period!r}")
