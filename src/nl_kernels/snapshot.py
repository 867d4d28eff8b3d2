"""The snapshot of a chunked memory, at which a chunk takes its gradients, and its adjoint.

``met`` says where a boundary is met after a chunk: everywhere, nowhere, or a bool tensor that broadcasts. A
snapshot that equals the running weights is ``None``.
"""

from __future__ import annotations

import torch

Met = bool | torch.Tensor


def take_snapshot(
    met: Met, after: torch.Tensor, before: torch.Tensor, snapshot: torch.Tensor | None
) -> torch.Tensor | None:
    """The snapshot after a chunk, from the weights after and before it and the snapshot that it had."""
    if met is True:
        return None
    old = before if snapshot is None else snapshot
    return old if met is False else torch.where(met, after, old)


def snapshot_adjoint(
    met: Met, grad_after: torch.Tensor | None, grad_snapshot: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the weights after a chunk and of the snapshot it had, from those of both after it.

    ``None`` is zero.
    """
    if grad_snapshot is None or isinstance(met, bool):
        return grad_after, grad_snapshot  # where met everywhere there is no snapshot, nor its gradient
    taken = grad_snapshot.where(met, 0)
    return taken if grad_after is None else grad_after + taken, grad_snapshot.masked_fill(met, 0)
