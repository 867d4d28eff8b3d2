"""The processes that train together: those that torchrun or ``accelerate launch`` started, or one alone."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nl_models.parallel.mesh import Mesh
from nl_models.training.config import TrainConfig

_Result = TypeVar("_Result")


def choose_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is a device, else the CPU; each of several processes has its own GPU.

    Raises:
        ValueError: not a device, or CUDA asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} asked for, but PyTorch finds no CUDA device here; use 'cpu'")
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name != "cpu" and launched() else name)


def computes_in_bf16(precision: str, device: str) -> bool:
    """Whether a run computes under bf16 autocast on a type of device; ``"auto"`` does on CUDA alone."""
    return precision == "bf16" or (precision == "auto" and device == "cuda")


def launched() -> bool:
    """Whether a launcher started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def restartable() -> bool:
    """Whether torchrun starts all processes anew, with the same arguments, when one ends before its time.

    Which start this is it does not tell all nodes alike.
    """
    return launched() and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[None]:
    """Within the block this process is in a group with those that a launcher started beside it, if any."""
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def grouped() -> bool:
    """Whether this process is in a group; it may be the only one in it."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process in the group, from 0."""
    return dist.get_rank() if grouped() else 0


def on_first(function: Callable[[], _Result]) -> _Result:
    """Call ``function`` in process 0 alone, while the others wait; all return or raise what it does."""
    ended: list[Any] = [None, None]
    if rank() == 0:
        try:
            ended[0] = function()
        except Exception as error:
            ended[1] = error
    if grouped():
        dist.broadcast_object_list(ended)
    if ended[1] is not None:
        raise ended[1]
    return ended[0]


def summed(*values: float) -> list[float]:
    """Each value's sum over the processes."""
    if not grouped():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def run_mesh(config: TrainConfig) -> Mesh:
    """How the processes that train share this run's work: as ``config.mesh`` says, else its windows.

    Raises:
        ValueError: another number of processes, or shares that this run cannot have.
    """
    processes = dist.get_world_size() if grouped() else 1
    mesh = Mesh(data=processes) if config.mesh is None else Mesh.parse(config.mesh)
    if mesh.ranks != processes:
        raise ValueError(
            f"mesh: {mesh} has {mesh.ranks} ranks, but the number of processes is {processes}; start as "
            f"many (torchrun --nproc-per-node {mesh.ranks} -m nl_models.train …), or give another mesh"
        )
    if config.fsdp and not grouped():
        raise ValueError(
            "fsdp: needs processes to shard over; start them with "
            "torchrun --nproc-per-node N -m nl_models.train, or say --no-fsdp"
        )
    check_shares(config, mesh)
    return mesh


def check_shares(config: TrainConfig, mesh: Mesh) -> None:
    """Raise ``ValueError`` where the ranks of a mesh cannot share out a run's work."""
    for name, of, ranks in (
        ("batch_size", "data", mesh.data),
        ("sequence_length", "sequence", mesh.sequence),
        ("heads", "heads", mesh.heads),
    ):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"{name}: expected a multiple of the ranks that share it ({of}={ranks}), "
                f"got {getattr(config, name)}"
            )
    if mesh.sequence > 1 and mesh.heads > 1:
        raise ValueError(f"mesh: sequence and heads do not go together; leave one of them out of {mesh}")
    for name in ("fsdp", "carry_state", "compile"):
        if mesh.sequence * mesh.heads > 1 and getattr(config, name):
            raise ValueError(
                f"{name}: goes with data ranks alone; leave it out, or sequence and heads: {mesh}"
            )
