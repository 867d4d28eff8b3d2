"""M3: multi-scale momentum Muon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nl_models.optim.matrix_optimizer import (
    MatrixOptimizer,
    hashable_coefficients,
    orthogonalise_groups,
    rms_scale,
)
from nl_models.optim.mixed_optimizer import (
    Group,
    check_betas,
    check_positive,
    gradients_of,
    state_dtype,
)
from nl_models.optim.orthogonalise import compute_dtype_of


class M3(MatrixOptimizer):
    """A fast and a slow momentum, both orthogonalised (arXiv 2512.24695, Algorithm 1 and Eq. 75).

    A matrix W [m, n] with gradient G at its t-th step (in groups with ``rule="matrix"``)::

        every f steps   M2 ← β3 M2 + (1 − β3) · mean of the last f gradients,    O2 = NS(M2)
        every step      M1 ← β1 M1 + (1 − β1) G,    O1 = NS(M1)
                        W ← (1 − lr·weight_decay) W − lr · rms·√max(m, n) · (O1 + αO2)

    and with ``second_moment``, elementwise, in place of its last line::

        V ← β2 V + (1 − β2) G²,    D = (O1 + αO2) / √(V + ε · mean V)
        W ← (1 − lr·weight_decay) W − lr · rms · √(mn) · D / ‖D‖_F

    ``literal=True`` is Algorithm 1 as printed, with plain sums: ``M1 += β1 G``, ``V += β2 G²``, every f steps
    ``M2 += β3 Σ G`` and ``W −= lr (O1 + αO2) / √(V + ε)`` (weight decay as above; no ``rms``). A window is f
    gradients, where the printed bounds count the one between two windows twice. O2 is zero in the first f
    steps. Axes before the last two are a stack of matrices. Groups with ``rule="adamw"`` follow AdamW.

    Args:
        params: groups of :func:`split_parameters`, or any parameters or groups as PyTorch takes them; a
            group's ``"rule"`` is ``"matrix"`` if absent.
        lr: learning rate of both rules.
        betas: β1 (fast), β2 (second moment), β3 (slow), each in [0, 1).
        alpha: weight of the slow direction, at least 0.
        frequency: f, steps between updates of the slow momentum.
        second_moment: keep V; always kept by ``literal``.
        literal: see above.
        eps: ε. Without it an element whose gradients are far below the others' would take far longer steps,
            as O1 is not small there.
        weight_decay: decoupled, of both rules.
        rms: root mean square of the elements of an O1 step, learning rate apart.
        adamw_betas, adamw_eps: of AdamW's rule.
        ns_steps, ns_coefficients, ns_eps, ns_dtype, process_group: as in :class:`Muon`.

    State: M1 and M2, V if kept, in fp32 (fp64 for fp64), and O2 in the dtype of its products. M2 takes each
    gradient when it comes, as it is read only every f steps: no window is kept.

    Raises:
        ValueError: an option out of range, or a vector under the matrix rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        alpha: float = 0.2,
        frequency: int = 8,
        second_moment: bool = False,
        literal: bool = False,
        eps: float = 1e-2,
        weight_decay: float = 0.1,
        rms: float = 0.2,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence[Sequence[float]] = "muon",
        ns_eps: float = 1e-7,
        ns_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group = process_group
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "alpha": alpha,
                "frequency": frequency,
                "second_moment": second_moment,
                "literal": literal,
                "eps": eps,
                "weight_decay": weight_decay,
                "rms": rms,
                "adamw_betas": tuple(adamw_betas),
                "adamw_eps": adamw_eps,
                "ns_steps": ns_steps,
                "ns_coefficients": hashable_coefficients(ns_coefficients),
                "ns_eps": ns_eps,
                "ns_dtype": ns_dtype,
            },
        )

    def directions(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
        """What Algorithm 1 subtracts, ``lr`` apart, of every matrix."""
        groups = [group for group, _ in matrices]
        for group, params in matrices:
            for p in params:
                self._start(group, p)
        steps = [[self._count(p) for p in params] for _, params in matrices]
        self._refresh_slow(matrices, steps)
        for (group, params), counts in zip(matrices, steps):
            self._accumulate(group, params, counts)
        fast = orthogonalise_groups(
            groups,
            [[self.state[p]["fast_momentum"] for p in params] for _, params in matrices],
            self.process_group,
        )
        return [
            [self._direction(group, p, o1) for p, o1 in zip(params, o1s)]
            for (group, params), o1s in zip(matrices, fast)
        ]

    def _start(self, group: Group, p: torch.Tensor) -> None:
        if self.state[p]:
            return
        dtype = state_dtype(p)
        products = compute_dtype_of(group["ns_dtype"], p.device, dtype)
        self.state[p] = {
            # On the host, where the decision falls whether a window ends.
            "step": torch.zeros((), dtype=torch.int64),
            "fast_momentum": torch.zeros_like(p, dtype=dtype),
            "slow_momentum": torch.zeros_like(p, dtype=dtype),
            "slow_direction": torch.zeros_like(p, dtype=products),
        }
        if group["second_moment"] or group["literal"]:
            self.state[p]["second_moment"] = torch.zeros_like(p, dtype=dtype)

    # Traced, torch.compile credits every parameter's step to the first (torch 2.13).
    @torch.compiler.disable
    def _count(self, p: torch.Tensor) -> int:
        """Steps that ``p`` has taken before this one; adds this one."""
        state = self.state[p]
        if state["step"].device.type != "cpu":  # only after loading: a state comes back on p's device
            state["step"] = state["step"].cpu()
        count = int(state["step"])
        state["step"] += 1
        return count

    def _refresh_slow(self, matrices: list[tuple[Group, list[torch.Tensor]]], steps: list[list[int]]) -> None:
        """O2 of the matrices whose window has ended with the step before."""
        due = [
            [p for p, count in zip(params, counts) if count and count % group["frequency"] == 0]
            for (group, params), counts in zip(matrices, steps)
        ]
        if not any(due):
            return
        momenta = [[self.state[p]["slow_momentum"] for p in params] for params in due]
        results = orthogonalise_groups([group for group, _ in matrices], momenta, self.process_group)
        for params, directions in zip(due, results):
            for p, direction in zip(params, directions):
                self.state[p]["slow_direction"].copy_(direction)

    def _accumulate(self, group: Group, params: list[torch.Tensor], counts: list[int]) -> None:
        """M1, M2 and V with this step's gradients."""
        beta1, beta2, beta3 = group["betas"]
        gradients = gradients_of(params)
        states = [self.state[p] for p in params]
        fast = [state["fast_momentum"] for state in states]
        slow = [state["slow_momentum"] for state in states]
        second = [state["second_moment"] for state in states if "second_moment" in state]
        if group["literal"]:
            torch._foreach_add_(fast, gradients, alpha=beta1)
            torch._foreach_add_(slow, gradients, alpha=beta3)
            torch._foreach_addcmul_(second, gradients, gradients, value=beta2)
            return
        torch._foreach_lerp_(fast, gradients, 1 - beta1)
        opened = [m for m, count in zip(slow, counts) if count % group["frequency"] == 0]
        if opened:
            torch._foreach_mul_(opened, beta3)
        torch._foreach_add_(slow, gradients, alpha=(1 - beta3) / group["frequency"])
        if second:
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)

    def _direction(self, group: Group, p: torch.Tensor, fast: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        direction = fast + group["alpha"] * state["slow_direction"].to(fast.dtype)
        if group["literal"]:
            return direction / (state["second_moment"] + group["eps"]).sqrt()
        if not group["second_moment"]:
            return direction * rms_scale(p, group["rms"])
        second = state["second_moment"]
        # A matrix that never had a gradient other than zero has no direction: it stays.
        tiny = torch.finfo(second.dtype).tiny
        second = second + group["eps"] * second.mean(dim=(-2, -1), keepdim=True)
        direction = direction / second.clamp_min(tiny).sqrt()
        norm = torch.linalg.vector_norm(direction, dim=(-2, -1), keepdim=True).clamp_min(tiny)
        return direction / norm * (group["rms"] * math.sqrt(p.shape[-2] * p.shape[-1]))

    def _check_group(self, group: Group) -> None:
        check_betas("betas", group["betas"], 3)
        check_positive("eps", group["eps"])
        if not 0 <= group["alpha"] < math.inf:
            raise ValueError(f"alpha: expected a number of at least 0, got {group['alpha']!r}")
        frequency = group["frequency"]
        if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
            raise ValueError(f"frequency: expected an int of at least 1, got {frequency!r}")
        super()._check_group(group)
