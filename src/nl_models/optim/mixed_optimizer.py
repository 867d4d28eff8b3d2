"""Two rules in one optimiser: a subclass's for matrices, AdamW for the rest; checks; state and its saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from nl_kernels.dispatch import without_autocast

RULES = ("matrix", "adamw")

Group = dict[str, Any]


class MixedOptimizer(Optimizer):
    """Matrices by the subclass's rule, everything else by AdamW; a group's ``"rule"`` says which.

    A subclass implements :meth:`_matrix_step` and names its options of groups in ``defaults``, among them
    ``lr``, ``weight_decay``, ``adamw_betas`` and ``adamw_eps``; ``adamw_lr`` where AdamW's groups that name
    no rate are to have another.
    """

    takes_sharded = False

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, {"rule": "matrix", **defaults})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; nothing has changed if it is refused.

        Raises:
            ValueError: an option out of range, or a parameter that is no matrix under the matrix rule.
        """
        if isinstance(param_group, dict) and param_group.get("rule") == "adamw" and "lr" not in param_group:
            param_group = {**param_group, "lr": self.defaults.get("adamw_lr", self.defaults["lr"])}
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on every parameter that has a gradient; nothing is read from the device.

        Raises:
            RuntimeError: a sparse gradient; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        self._check_gradients(work)
        for group, params in work:
            if params and group["rule"] == "adamw":
                self._adamw_step(group, params)
        matrices = [(group, params) for group, params in work if params and group["rule"] == "matrix"]
        if matrices:
            # A step within autocast would round its products.
            with without_autocast(matrices[0][1][0].device.type):
                self._matrix_step(matrices)
        return loss

    def describe(self) -> str:
        """A line for each parameter: its rule, learning rate, weight decay, shape and name."""
        rows = [("rule", "lr", "weight decay", "shape", "parameter")]
        for group in self.param_groups:
            rule = type(self).__name__ if group["rule"] == "matrix" else "AdamW"
            rows += [
                (
                    rule,
                    f"{group['lr']:g}",
                    f"{group['weight_decay']:g}",
                    str(tuple(p.shape)),
                    self._name_of(group, p),
                )
                for p in group["params"]
            ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join((*map(str.ljust, row[:4], widths), row[4])) for row in rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but the state keeps its dtypes: momenta of 16-bit matrices are fp32."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, own):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[p][name] = value.to(device=p.device, copy=True)

    def _check_gradients(self, work: list[tuple[Group, list[torch.Tensor]]]) -> None:
        """Refuse gradients before anything has changed."""
        for group, params in work:
            for p in params:
                if p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__}: the gradient of {self._name_of(group, p)} is sparse, which "
                        "is not supported; make it with sparse=False"
                    )

    def _matrix_step(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> None:
        """Step all parameters of groups of the subclass's rule; every one of them has a gradient."""
        raise NotImplementedError

    def _adamw_step(self, group: Group, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["adamw_betas"][0],
            beta2=group["adamw_betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["adamw_eps"],
            maximize=False,
        )

    def _check_group(self, group: Group) -> None:
        if group["rule"] not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {group['rule']!r}")
        for name in ("lr", "weight_decay"):
            if isinstance(group[name], torch.Tensor) or not 0 <= group[name] < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {group[name]!r}")
        check_positive("adamw_eps", group["adamw_eps"])
        check_betas("adamw_betas", group["adamw_betas"], 2)
        for p in group["params"]:
            if isinstance(p, DTensor) and group["rule"] == "matrix" and not self.takes_sharded:
                raise ValueError(
                    f"params: {self._name_of(group, p)} is a DTensor, which {type(self).__name__} does not "
                    "take"
                )
            if group["rule"] == "matrix" and p.ndim < 2:
                raise ValueError(
                    f"params: {self._name_of(group, p)} of shape {tuple(p.shape)} is no matrix; put it in a "
                    f"group with rule='adamw': {type(self).__name__}(split_parameters(model))"
                )

    @staticmethod
    def _name_of(group: Group, parameter: torch.Tensor) -> str:
        """Its name where the groups were made from named parameters, else its number in the group."""
        number = next(i for i, p in enumerate(group["params"]) if p is parameter)
        return group["param_names"][number] if "param_names" in group else f"parameter {number}"


def state_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Of momenta: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(parameter.dtype, torch.float32)


def gradients_of(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """In the dtype of the state."""
    return [p.grad.to(state_dtype(p)) for p in params]


def same_shapes(params: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The parameters in lists of one shape, dtype and device each, so that one call can serve a list."""
    lists: dict[tuple, list[torch.Tensor]] = {}
    for p in params:
        lists.setdefault((p.shape, p.dtype, p.device), []).append(p)
    return list(lists.values())


def unit_scale(stack: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Each tensor ``stack[i]`` over its norm, or over its root mean square: at any scale; zero stays zero."""
    axes = tuple(range(1, stack.ndim))
    tiny = torch.finfo(stack.dtype).tiny
    # Squares of the tensor itself could under- or overflow.
    scaled = stack / stack.abs().amax(axes, keepdim=True).clamp_min(tiny)
    size = torch.linalg.vector_norm(scaled, dim=axes, keepdim=True).clamp_min(tiny)
    return scaled / size * (math.sqrt(stack[0].numel()) if mean else 1.0)


def check_positive(name: str, value: float) -> None:
    """Check a positive finite number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_betas(name: str, values: tuple[float, ...], count: int) -> None:
    """Check ``count`` numbers in [0, 1)."""
    if len(values) != count or not all(0 <= beta < 1 for beta in values):
        raise ValueError(f"{name}: expected {count} numbers in [0, 1), got {values!r}")
