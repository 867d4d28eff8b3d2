"""Deep momentum: the step is a small MLP of the gradient, which learns while the model does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nl_models.optim.mixed_optimizer import (
    Group,
    MixedOptimizer,
    check_betas,
    gradients_of,
    same_shapes,
    state_dtype,
    unit_scale,
)

OBJECTIVES = ("dot", "regression")


class DeepMomentum(MixedOptimizer):
    """Deep momentum gradient descent, DMGD (Nested Learning, arXiv 2512.24695, Eq. 50).

    Each matrix has an MLP m of one hidden layer, which all its n coordinates share (in groups with
    ``rule="matrix"``). It learns from the gradient and is then applied to it::

        u = G / rms(G)                                             one number a coordinate
        m(u) = 1/h Σ_k b_k tanh(a_k u)                             odd: the step turns round with the gradient
        (a, b) ← α (a, b) − memory_lr · h · ∇L(a, b)
        W ← (1 − lr·weight_decay) W + lr · m(u)

    The paper leaves the network and its inner objective open. Here L is, by ``objective``:

        ``"dot"``           1/n Σ u m(u): what the step would change the loss by, to first order
        ``"regression"``    1/n Σ ½ (m(u) + u)²: to give back the gradient, with the delta rule's error

    ``literal=True`` is as printed: u = G, L = ⟨m(u), 1⟩ summed over coordinates, without the h, and
    W ← W + m(u). As ones know nothing of the gradient's sign, this is no descent; it is for study.
    ``"dot"`` moves all hidden units alike: they differ only by where they start. At the default rates,
    ``memory_lr = 2 (1 − momentum)``, the step settles at −1.08 tanh(0.77 u) for normal gradients.

    Args:
        params: groups of :func:`split_parameters`, or any parameters or groups as PyTorch takes them; a
            group's ``"rule"`` is ``"matrix"`` if absent.
        lr: learning rate of both rules.
        hidden: h.
        momentum: α in [0, 1), what the memory keeps of itself.
        memory_lr: the memory's rate, at least 0.
        objective: ``"dot"`` or ``"regression"``. Not used by ``literal``.
        literal: see above.
        weight_decay: decoupled, of both rules.
        adamw_betas, adamw_eps: of AdamW's rule.

    State: a and b, 2h numbers a matrix in fp32 (fp64 for fp64): nothing of the matrix's size.

    Raises:
        ValueError: an option out of range, or a vector under the matrix rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        hidden: int = 4,
        momentum: float = 0.9,
        memory_lr: float = 0.2,
        objective: str = "dot",
        literal: bool = False,
        weight_decay: float = 0.1,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "hidden": hidden,
            "momentum": momentum,
            "memory_lr": memory_lr,
            "objective": objective,
            "literal": literal,
            "weight_decay": weight_decay,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
        }
        super().__init__(params, defaults)

    def _matrix_step(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> None:
        for group, params in matrices:
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"memory": initial_memory(group["hidden"], state_dtype(p), p.device)}
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for members in same_shapes(params):
                gradient = torch.stack(gradients_of(members)).flatten(1)
                memories = [self.state[p]["memory"] for p in members]
                u = gradient if group["literal"] else unit_scale(gradient, mean=True)
                memory = torch.stack(memories)
                memory = group["momentum"] * memory - group["memory_lr"] * _slope(group, memory, u)
                torch._foreach_copy_(memories, list(memory.unbind()))
                rate = 1.0 if group["literal"] else group["lr"]
                for p, step in zip(members, _applied(memory, u).unbind()):
                    p.add_(step.reshape(p.shape), alpha=rate)

    def _check_group(self, group: Group) -> None:
        check_betas("momentum", (group["momentum"],), 1)
        hidden = group["hidden"]
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden: expected an int of at least 1, got {hidden!r}")
        if not 0 <= group["memory_lr"] < float("inf"):
            raise ValueError(f"memory_lr: expected a number of at least 0, got {group['memory_lr']!r}")
        if group["objective"] not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {OBJECTIVES}, got {group['objective']!r}")
        super()._check_group(group)


def initial_memory(hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[2, h]: a spread over [0.5, 1.5], b = −1: a step against the gradient from the first on."""
    memory = torch.full((2, hidden), -1.0, dtype=dtype, device=device)
    # 0.5 + (k + ½) / h, made on the device: nothing is copied to it.
    memory[0] = 0.5 + (torch.arange(hidden, dtype=dtype, device=device) + 0.5) / hidden
    return memory


def _applied(memory: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """m(u) of memories [k, 2, h] at u [k, n]; a unit at a time, so that no [k, h, n] is made."""
    a, b = memory.unbind(1)
    result = torch.zeros_like(u)
    for unit in range(a.shape[1]):
        result += b[:, unit, None] * torch.tanh(a[:, unit, None] * u)
    return result / a.shape[1]


def _slope(group: Group, memory: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The gradient of the inner objective [k, 2, h], times h unless ``literal``."""
    a, b = memory.unbind(1)
    if group["literal"]:
        error = torch.full_like(u, 1 / a.shape[1])
    elif group["objective"] == "dot":
        error = u / u.shape[1]
    else:
        error = (u + _applied(memory, u)) / u.shape[1]
    slopes = []
    for unit in range(a.shape[1]):
        tanh = torch.tanh(a[:, unit, None] * u)
        slope_b = (error * tanh).sum(1)
        slope_a = b[:, unit] * (error * u * (1 - tanh * tanh)).sum(1)
        slopes.append(torch.stack([slope_a, slope_b], dim=1))
    return torch.stack(slopes, dim=2)
