"""Delta momentum: a momentum that erases what it holds in the direction of the gradient before it writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nl_models.optim.mixed_optimizer import (
    Group,
    MixedOptimizer,
    check_betas,
    check_positive,
    gradients_of,
    same_shapes,
    state_dtype,
    unit_scale,
)

PRECONDITIONERS = ("none", "rms")


class DeltaMomentum(MixedOptimizer):
    """Momentum learned by the delta rule (Nested Learning, arXiv 2512.24695, Eqs. 48–49).

    A matrix W [m, n] with gradient G (in groups with ``rule="matrix"``)::

        Ĝ = G / ‖G‖_F
        M ← M (αI − erase · ĜᵀĜ) − lr · P(G)
        W ← (1 − lr·weight_decay) W + M

    ``P(G)`` is G, or with ``preconditioner="rms"`` the quotient ``G / (√V̂ + eps)`` of AdamW's second moment.
    ``literal=True`` is the printed form, ``M ← M (αI − GᵀG) − lr · P(G)``: nothing bounds its erasing, and it
    diverges where ‖G‖₂² > 1 + α. A stack [s, m, n] is s matrices whose gradients share one norm. Groups
    with ``rule="adamw"`` follow AdamW.

    Args:
        params: groups of :func:`split_parameters`, or any parameters or groups as PyTorch takes them; a
            group's ``"rule"`` is ``"matrix"`` if absent.
        lr: learning rate of the matrices: as SGD's with momentum.
        momentum: α in [0, 1).
        erase: in [0, 1 + α), where every eigenvalue of the erasing factor is within the unit circle; 0 is SGD
            with momentum. Not used by ``literal``.
        preconditioner: ``"none"`` or ``"rms"``.
        beta2, eps: of ``"rms"``.
        literal: see above.
        weight_decay: decoupled, of both rules.
        adamw_lr, adamw_betas, adamw_eps: of AdamW's rule.

    State: M, fp32 (fp64 for fp64): 4 bytes a weight; ``"rms"`` adds V, 4 more, and a step count.

    Raises:
        ValueError: an option out of range, or a vector under the matrix rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        erase: float = 0.5,
        preconditioner: str = "none",
        beta2: float = 0.95,
        eps: float = 1e-8,
        literal: bool = False,
        weight_decay: float = 0.0,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "erase": erase,
            "preconditioner": preconditioner,
            "beta2": beta2,
            "eps": eps,
            "literal": literal,
            "weight_decay": weight_decay,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
        }
        super().__init__(params, defaults)

    def _matrix_step(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> None:
        for group, params in matrices:
            for p in params:
                self._start(group, p)
            for members in same_shapes(params):
                gradient = torch.stack(gradients_of(members))
                states = [self.state[p] for p in members]
                momenta = [state["momentum"] for state in states]
                target = self._preconditioned(group, gradient, states)
                key = gradient if group["literal"] else unit_scale(gradient, mean=False)
                old = torch.stack(momenta)
                new = group["momentum"] * old - group["lr"] * target
                erased = _projected(old, key)
                new = new - (erased if group["literal"] else group["erase"] * erased)
                torch._foreach_copy_(momenta, list(new.unbind()))
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p in params:
                p.add_(self.state[p]["momentum"])

    def _start(self, group: Group, p: torch.Tensor) -> None:
        if self.state[p]:
            return
        self.state[p] = {"momentum": torch.zeros_like(p, dtype=state_dtype(p))}
        if group["preconditioner"] == "rms":
            # On the device, where the correction of the bias is computed.
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            self.state[p]["second_moment"] = torch.zeros_like(p, dtype=state_dtype(p))

    @staticmethod
    def _preconditioned(group: Group, gradient: torch.Tensor, states: list[dict]) -> torch.Tensor:
        if group["preconditioner"] == "none":
            return gradient
        beta2 = group["beta2"]
        steps, moments = ([state[name] for state in states] for name in ("step", "second_moment"))
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(moments, beta2)
        torch._foreach_add_(moments, list((gradient * gradient).unbind()), alpha=1 - beta2)
        shape = (-1, *[1] * (gradient.ndim - 1))
        correction = (1 - beta2 ** torch.stack(steps).to(gradient.dtype)).reshape(shape)
        return gradient / ((torch.stack(moments) / correction).sqrt() + group["eps"])

    def _check_group(self, group: Group) -> None:
        check_betas("momentum", (group["momentum"],), 1)
        check_betas("beta2", (group["beta2"],), 1)
        check_positive("eps", group["eps"])
        if not 0 <= group["erase"] < 1 + group["momentum"]:
            raise ValueError(
                f"erase: expected a number in [0, 1 + momentum = {1 + group['momentum']:g}), got "
                f"{group['erase']!r}"
            )
        if group["preconditioner"] not in PRECONDITIONERS:
            raise ValueError(
                f"preconditioner: expected one of {PRECONDITIONERS}, got {group['preconditioner']!r}"
            )
        super()._check_group(group)


def _projected(momentum: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``M KᵀK`` of stacks [.., m, n], by the smaller of the two products in between."""
    if key.shape[-2] <= key.shape[-1]:
        return (momentum @ key.mT) @ key
    return momentum @ (key.mT @ key)
