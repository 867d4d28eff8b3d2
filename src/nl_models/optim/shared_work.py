"""Orthogonalisation shared out over processes: each matrix goes whole to one of them, and back to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def run_shared(
    tensors: Sequence[torch.Tensor], run: Run, process_group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """``run`` on matrices that several processes hold; all of them must call this with matrices alike.

    Plain tensors are copies of one another over ``process_group``; None: every process runs all of its own.
    A DTensor that is sharded within its matrices goes to one process of its mesh and comes back in shards;
    sharded by an axis before the last two, each process has whole matrices, and nothing is sent.

    Args:
        run: takes tensors [.., m, n], gives as many of the same shapes and dtypes.

    Raises:
        NotImplementedError: a DTensor with partial sums, or sharded over more than one axis of its mesh.
    """
    results = list(tensors)
    jobs: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kind, group = _placing(tensor)
        group = process_group if not isinstance(tensor, DTensor) else group
        jobs.setdefault((kind, group, tensor.device, tensor.dtype), []).append(i)
    for (kind, group, _, _), members in jobs.items():
        chosen = [tensors[i] for i in members]
        local = [x.to_local() if isinstance(x, DTensor) else x for x in chosen]
        if kind == "whole" or group is None or group.size() == 1:
            done = run(local)
        elif kind == "copies":
            done = _share_copies(local, run, group)
        else:
            done = _share_shards(chosen, local, run, group)
        for i, before, after in zip(members, chosen, done):
            results[i] = _placed_as(after, before)
    return results


def owners(costs: Sequence[int], processes: int) -> list[int]:
    """Which process runs each: the dearest first, each to the one with the least so far."""
    load, found = [0] * processes, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = min(range(processes), key=load.__getitem__)
        load[found[i]] += costs[i]
    return found


def _placing(tensor: torch.Tensor) -> tuple[str, dist.ProcessGroup | None]:
    """``"copies"``, ``"shards"`` or ``"whole"`` (nothing to send), and among which processes."""
    if not isinstance(tensor, DTensor):
        return "copies", None
    split = [axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    if not split:
        return "copies", tensor.device_mesh.get_group(0)
    placement = tensor.placements[split[0]]
    if len(split) > 1 or type(placement) is not Shard:
        raise NotImplementedError(
            f"placements: expected Replicate, and Shard over at most one axis of the mesh, got "
            f"{tensor.placements} for a matrix of shape {tuple(tensor.shape)}"
        )
    kind = "shards" if placement.dim >= tensor.ndim - 2 else "whole"
    return kind, tensor.device_mesh.get_group(split[0])


def _placed_as(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _costs(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Multiplications, up to a factor."""
    return [x.numel() * min(x.shape[-2:]) for x in tensors]


def _flat(tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in tensors]) if tensors else like.new_empty(0)


def _share_copies(tensors: list[torch.Tensor], run: Run, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every process runs its share, and all gather the results."""
    whose = owners(_costs(tensors), group.size())
    mine = [x for x, owner in zip(tensors, whose) if owner == group.rank()]
    sizes = [
        sum(x.numel() for x, o in zip(tensors, whose) if o == process) for process in range(group.size())
    ]
    # Equal lengths are what every backend can gather.
    sent = tensors[0].new_zeros(max(sizes))
    sent[: sizes[group.rank()]] = _flat(run(mine) if mine else [], tensors[0])
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent, group=group)
    offsets, results = [0] * len(sizes), []
    for x, owner in zip(tensors, whose):
        start = offsets[owner]
        offsets[owner] += x.numel()
        results.append(received[owner][start : offsets[owner]].reshape(x.shape))
    return results


def _share_shards(
    tensors: list[DTensor], local: list[torch.Tensor], run: Run, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Every matrix's shards go to its owner, who runs it and sends each process the shard it had."""
    processes, rank = range(group.size()), group.rank()
    whose = owners(_costs(tensors), group.size())
    axes = [next(p.dim for p in x.placements if isinstance(p, Shard)) for x in tensors]
    mine = [i for i, owner in enumerate(whose) if owner == rank]
    order = sorted(range(len(tensors)), key=lambda i: whose[i])
    given = [sum(local[i].numel() for i in order if whose[i] == process) for process in processes]
    shapes = {i: [_shard_shape(tensors[i].shape, axes[i], s, group.size()) for s in processes] for i in mine}
    taken = [sum(shapes[i][process].numel() for i in mine) for process in processes]

    arrived = local[0].new_empty(sum(taken))
    dist.all_to_all_single(arrived, _flat([local[i] for i in order], local[0]), taken, given, group=group)
    pieces: dict[int, list[torch.Tensor]] = {i: [] for i in mine}
    for part in arrived.split(taken):
        for i, piece in zip(mine, part.split([shapes[i][len(pieces[i])].numel() for i in mine])):
            pieces[i].append(piece.reshape(shapes[i][len(pieces[i])]))
    whole = [torch.cat(pieces[i], dim=axes[i]) for i in mine]
    done = run(whole) if mine else []

    back = [
        part
        for process in processes
        for i, x in zip(mine, done)
        for part in [x.split([shape[axes[i]] for shape in shapes[i]], dim=axes[i])[process]]
    ]
    returned = local[0].new_empty(sum(given))
    dist.all_to_all_single(returned, _flat(back, local[0]), given, taken, group=group)
    results = list(local)
    for i, part in zip(order, returned.split([local[i].numel() for i in order])):
        results[i] = part.reshape(local[i].shape)
    return results


def _shard_shape(shape: torch.Size, axis: int, process: int, processes: int) -> torch.Size:
    """As DTensor cuts: equal pieces of the rounded-up length, the last ones shorter or empty."""
    length = -(-shape[axis] // processes)
    first = min(process * length, shape[axis])
    return torch.Size([*shape[:axis], min(length, shape[axis] - first), *shape[axis + 1 :]])
