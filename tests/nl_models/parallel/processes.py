"""Ranks as processes of this machine (gloo), and what each of them returned."""

import datetime

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nl_models.processes import fork_server


def on_ranks(size, folder, function, *arguments):
    """``function(mesh, *arguments)`` on every rank of a mesh of ``size``: their results, in order."""
    fork_server("nl_models.parallel", "torch.distributed.device_mesh")
    name = f"{function.__name__}-{len(list(folder.iterdir()))}"
    arguments = (size, folder / name, function, arguments)
    torch.multiprocessing.start_processes(_work, arguments, nprocs=size, start_method="forkserver")
    return [torch.load(f"{folder / name}.{rank}", weights_only=False) for rank in range(size)]


def pieces(x, lengths):
    """``x [B, T, …]`` as the ranks have it."""
    return x.split(list(lengths), dim=1)


def _work(rank, size, file, function, arguments):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    address = {"init_method": f"file://{file}", "rank": rank, "world_size": size}
    dist.init_process_group("gloo", **address, timeout=timeout)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("sequence",))
    try:
        torch.save(function(mesh, *arguments), f"{file}.{rank}")
    finally:
        dist.destroy_process_group()
