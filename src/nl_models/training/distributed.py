"""The processes that train together: those that torchrun or ``accelerate launch`` started, or one alone."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer


def choose_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is a device, else the CPU; each of several processes has its own GPU.

    Raises:
        ValueError: not a device, or CUDA asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} asked for, but PyTorch finds no CUDA device here; use 'cpu'")
    if device.type == "cuda" and launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


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


def world_size() -> int:
    """How many processes the group has."""
    return dist.get_world_size() if grouped() else 1


def on_first(function: Callable[[], object]) -> None:
    """Call ``function`` in process 0 alone, while the others wait; all raise what it raises."""
    raised: list[BaseException | None] = [None]
    if rank() == 0:
        try:
            function()
        except Exception as error:
            if not grouped():
                raise
            raised = [error]
    if grouped():
        dist.broadcast_object_list(raised)
    if raised[0] is not None:
        raise raised[0]


def summed(*values: float) -> list[float]:
    """Each value's sum over the processes."""
    if not grouped():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def parallel_model(model: nn.Module, device: torch.device, *, fsdp: bool) -> nn.Module:
    """What to call in training: the model itself, DDP around it, or the model sharded in place (FSDP2).

    Raises:
        ValueError: ``fsdp`` where no launcher has started the processes.
    """
    if fsdp:
        if not grouped():
            raise ValueError(
                "fsdp: needs processes to shard over; start them with "
                "torchrun --nproc-per-node N -m nl_models.train"
            )
        return shard_blocks(model, init_device_mesh(device.type, (world_size(),)))
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the model in place (FSDP2) and return it.

    A block is gathered at a time: what ``gradient_checkpointing_enable`` takes for one.
    """
    from torch.distributed.fsdp import fully_shard

    # Nothing here works in place on what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    return model
