"""What Muon and M3 share: steps along orthogonalised directions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nl_kernels import newton_schulz
from nl_models.optim.mixed_optimizer import Group, MixedOptimizer, check_positive
from nl_models.optim.orthogonalise import orthogonalise
from nl_models.optim.shared_work import run_shared


class MatrixOptimizer(MixedOptimizer):
    """A subclass implements :meth:`directions`; its options of groups include those of Newton–Schulz.

    Its ``process_group`` shares the orthogonalisation of parameters that are copies of one another.
    """

    process_group: dist.ProcessGroup | None = None
    takes_sharded = True

    def directions(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
        """Update the states of all parameters; for each group what is to be subtracted, ``lr`` apart."""
        raise NotImplementedError

    def _matrix_step(self, matrices: list[tuple[Group, list[torch.Tensor]]]) -> None:
        for (group, params), directions in zip(matrices, self.directions(matrices)):
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, direction in zip(params, directions):
                if isinstance(p, DTensor):
                    # In place, DTensor refuses axes of length 1; and a norm has brought other placements.
                    p, direction = (
                        x.redistribute(placements=p.placements).to_local() for x in (p, direction)
                    )
                p.add_(direction, alpha=-group["lr"])

    def _check_group(self, group: Group) -> None:
        for name in ("ns_eps", "rms"):
            check_positive(name, group[name])
        super()._check_group(group)
        if group["rule"] == "matrix":
            # Refuses a bad schedule now rather than in the first step.
            newton_schulz(
                torch.zeros(1, 1),
                steps=group["ns_steps"],
                coefficients=group["ns_coefficients"],
                eps=group["ns_eps"],
                compute_dtype=group["ns_dtype"],
                impl="reference",
            )


def orthogonalise_groups(
    groups: list[Group], tensors: list[list[torch.Tensor]], process_group: dist.ProcessGroup | None = None
) -> list[list[torch.Tensor]]:
    """:func:`orthogonalise` over all groups, together where options agree, shared out over processes."""
    keys = [(g["ns_steps"], g["ns_coefficients"], g["ns_eps"], g["ns_dtype"]) for g in groups]
    results: list[list[torch.Tensor]] = [[] for _ in groups]
    for key in dict.fromkeys(keys):
        members = [i for i, other in enumerate(keys) if other == key]
        steps, coefficients, eps, dtype = key
        run = partial(orthogonalise, steps=steps, coefficients=coefficients, eps=eps, compute_dtype=dtype)
        done = iter(run_shared([x for i in members for x in tensors[i]], run, process_group))
        for i in members:
            results[i] = [next(done) for _ in tensors[i]]
    return results


def rms_scale(parameter: torch.Tensor, rms: float) -> float:
    """``rms · √max(m, n)``: an orthogonal matrix [m, n] times this has elements of that root mean square."""
    return rms * math.sqrt(max(parameter.shape[-2:]))


def hashable_coefficients(coefficients: Any) -> Any:
    """A name as it is; triples as tuples, which can be compared and saved."""
    return (
        coefficients if isinstance(coefficients, str) else tuple(tuple(map(float, t)) for t in coefficients)
    )
