"""Muon: momentum of matrices, orthogonalised by Newton–Schulz."""

from __future__ import annotations

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
    gradients_of,
    state_dtype,
)


class Muon(MatrixOptimizer):
    """Momentum whose singular values are made equal (Nested Learning, arXiv 2512.24695, Eqs. 42–44).

    A matrix W [m, n] with gradient G (in groups with ``rule="matrix"``)::

        M ← μM + (1 − μ)G
        U = NS(μM + (1 − μ)G) with Nesterov's look-ahead, else NS(M)
        W ← (1 − lr·weight_decay) W − lr · rms·√max(m, n) · U

    The step has the root mean square ``rms`` that AdamW's typically has, so a learning rate and its schedule
    serve both. Axes before the last two are a stack of matrices. Groups with ``rule="adamw"`` follow AdamW.

    Args:
        params: groups of :func:`split_parameters`, or any parameters or groups as PyTorch takes them; a
            group's ``"rule"`` is ``"matrix"`` if absent.
        lr: learning rate of both rules.
        momentum: μ in [0, 1).
        nesterov: look ahead by the newest gradient.
        weight_decay: decoupled, of both rules.
        rms: root mean square of the elements of a step, learning rate apart.
        adamw_betas, adamw_eps: of AdamW's rule.
        ns_steps, ns_coefficients, ns_eps: ``steps``, ``coefficients``, ``eps`` of
            :func:`nl_kernels.newton_schulz`.
        ns_dtype: of its products; None: bf16 on accelerators, the momentum's dtype on the CPU.
        process_group: processes that hold copies of the same parameters and gradients, as under
            ``DistributedDataParallel``: each orthogonalises its share of the matrices and sends the others
            the result. None: every process does all. Sharded parameters (DTensor, as FSDP2 makes them) are
            shared out over their mesh without it; each goes whole to one process and comes back in shards.

    State: one momentum of W's shape, fp32 (fp64 for fp64); AdamW's two moments for the rest.

    Raises:
        ValueError: an option out of range, or a vector under the matrix rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
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
                "momentum": momentum,
                "nesterov": nesterov,
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
        """``rms·√max(m, n)·U`` of every matrix."""
        momenta = []
        for group, params in matrices:
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p, dtype=state_dtype(p))}
            gradients, buffers = gradients_of(params), [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            if group["nesterov"]:
                buffers = torch._foreach_lerp(gradients, buffers, group["momentum"])
            momenta.append(buffers)
        results = orthogonalise_groups([group for group, _ in matrices], momenta, self.process_group)
        return [
            [u * rms_scale(p, group["rms"]) for p, u in zip(params, us)]
            for (group, params), us in zip(matrices, results)
        ]

    def _check_group(self, group: Group) -> None:
        check_betas("momentum", (group["momentum"],), 1)
        super()._check_group(group)
